"""Pretrain a tiny SAM 3: its ViT, text tower and fusion encoder learn what the shapes' phrases mean.

    python -m scripts.pretrain_shapes --out runs/shapes_pretrained

SAM 3 does not start from noise but from a Perception Encoder, trained by contrast of pictures and
texts. A tiny one that starts its detection training from noise stays on a plateau: it finds objects
and does not tell phrases apart. This is its contrastive training. Every phrase is compared with
every patch by a sigmoid loss (SigLIP, https://arxiv.org/abs/2303.15343); the truth is the share of
the patch that the phrase's instances cover. Every patch of an object also says the object's box, by
a linear layer that is thrown away. In the last fifth of the steps two phrases a picture, one of them
there, go through the fusion encoder too, and another such layer reads from its tokens which patches
answer. (From the beginning it costs the contrast half its pace.)

Then configs/shapes_base.yaml trains the whole detector from the folder written here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sam3jax.config import DataConfig, ModelConfig
from sam3jax.data import transforms
from sam3jax.data.coco import Dataset, ImageRecord, decode_mask
from sam3jax.data.pictures import read_picture
from sam3jax.data.shapes import shapes_dataset
from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer
from sam3jax.model import Sam3
from sam3jax.model.init import init_params
from sam3jax.model.positions import sine_grid
from sam3jax.training.mesh import make_mesh, put_replicated
from sam3jax.types import AXIS
from sam3jax.weights.model_folder import save_model_folder

ASKED = 2  # phrases per picture that go through the fusion encoder
FUSED = 0.2  # share of the steps, the last ones, that train the fusion encoder
SIZE = 0.01  # weight of the penalty that keeps features of size 1
BOX = 0.1  # weight of the boxes' L1 distance
POSITIVE = 5.0  # weight of the patches that answer: one in a hundred does


def losses(
    trained: dict[str, Any],
    model: Sam3,
    tokens: jax.Array,
    batch: tuple[jax.Array, ...],
    fuse: bool,
) -> tuple[jax.Array, jax.Array]:
    """(sum, [contrast, box, fused]). batch: images [I, Y, X, 3] uint8; covered [I, V, y, x], of 255;
    boxes [I, y, x, 4] cxcywh in 0..1, 0 where there is no object; asked [I, P] rows of tokens.
    """
    images, covered, boxes, asked = batch
    head = trained["head"]

    def parts(model: Sam3) -> tuple[jax.Array, ...]:
        patches = model.encode_image(images).levels[-1]  # [I, y, x, D]
        text = model.encode_text(tokens)  # [V, N, D]
        valid = text.valid[..., None]
        means = (text.features * valid).sum(1) / valid.sum(1)
        cosine = jnp.einsum("iyxd,vd->ivyx", _unit(patches), _unit(means))
        contrast = _mean_loss(cosine * jnp.exp(head["scale"]) + head["bias"], covered)
        # The cosine leaves the size free, and it grows; the detector adds positions of size 1.
        contrast += SIZE * (jnp.mean(patches**2) - 1) ** 2
        here = boxes[..., 2:3] > 0
        said = jax.nn.sigmoid(patches @ head["box_kernel"] + head["box_bias"])
        box = jnp.where(here, abs(said - boxes), 0.0).sum() / (here.sum() + 1)
        if not fuse:
            return contrast, box, jnp.zeros(())
        i, rows, columns, d = patches.shape
        flat = jnp.repeat(patches.reshape(i, rows * columns, d), asked.shape[1], 0)
        position = sine_grid(rows, columns, d).reshape(rows * columns, d)
        which = asked.reshape(-1)
        fused = model.fusion_encoder(flat, position, text.features[which], text.valid[which])
        logits = (fused @ head["kernel"] + head["fused_bias"]).reshape(*asked.shape, rows, columns)
        of_asked = jnp.take_along_axis(covered, asked[:, :, None, None], 1)
        return contrast, box, _mean_loss(logits, of_asked)

    each = model.apply({"params": trained["params"]}, method=parts)
    contrast, box, fused = each
    return contrast + BOX * box + fused, jnp.stack(each)


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


def _mean_loss(logits: jax.Array, covered: jax.Array) -> jax.Array:
    share = covered.astype(jnp.float32) / 255
    each = optax.sigmoid_binary_cross_entropy(logits, share)
    return (each * jnp.where(covered > 0, POSITIVE, 1.0)).mean()


def read(data: Dataset, config: ModelConfig) -> tuple[np.ndarray, ...]:
    """All pictures, what each phrase covers of their patches, boxes of the objects: as `losses` takes."""
    grid, patch = config.grid, config.patch_size

    def one(record: ImageRecord) -> tuple[np.ndarray, ...]:
        square = transforms.square(record.width, record.height, config.image_size)
        covered = np.zeros((len(data.categories), grid, grid), np.uint8)
        boxes, most = np.zeros((grid, grid, 4), np.float32), np.full((grid, grid), 64, np.uint8)
        for a in record.annotations:
            mask = transforms.move_mask(square, decode_mask(a, record.height, record.width))
            share = np.rint(mask.reshape(grid, patch, grid, patch).mean((1, 3)) * 255)
            share = share.astype(np.uint8)
            row = covered[categories.index(a.category_id)]
            row += np.minimum(share, 255 - row)
            boxes[share > most] = transforms.move_boxes(square, np.array(a.bbox))
            most = np.maximum(share, most)
        picture = read_picture(record.file, record.width, record.height)
        return transforms.move_picture(square, picture), covered, boxes

    categories = list(data.categories)
    with ThreadPoolExecutor() as pool:
        return tuple(map(np.stack, zip(*pool.map(one, data.images))))


def batches(
    pictures: np.ndarray, covered: np.ndarray, boxes: np.ndarray, size: int, seed: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Random pictures, turned and mirrored together; of their phrases one that is there first."""
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(0, len(pictures), size)
        images, cells, places = pictures[rows], covered[rows], boxes[rows]
        for _ in range(rng.integers(4)):  # counter-clockwise: x becomes y, y becomes 1 - x
            images, cells = np.rot90(images, 1, (1, 2)), np.rot90(cells, 1, (2, 3))
            places = np.rot90(places, 1, (1, 2))[..., [1, 0, 3, 2]]
            places[..., 1] = 1 - places[..., 1]
        if rng.random() < 0.5:
            images, cells, places = images[:, :, ::-1], cells[:, :, :, ::-1], places[:, :, ::-1]
            places = places * [-1, 1, 1, 1] + [1, 0, 0, 0]
        asked = np.zeros((size, ASKED), np.int32)
        for i, there in enumerate(cells.any((2, 3))):
            yes, no = (rng.permutation(np.flatnonzero(x)) for x in (there, ~there))
            asked[i] = np.concatenate([yes[:1], no])[:ASKED]
        yield tuple(map(np.ascontiguousarray, (images, cells, np.float32(places), asked)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="model folder to write")
    parser.add_argument("--concepts", default="seen", help="group of the generated shapes")
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    # Positions without tiling: where a patch lies is said to it once, by an embedding that starts
    # as sines. From noise of 0.02 it would stay unheard beside the pixels.
    size = ModelConfig(preset="tiny").image_size
    config = ModelConfig(preset="tiny", pretrain_image_size=size)
    data_config = DataConfig(
        train="shapes", shapes_concepts=options.concepts, shapes_train=options.pictures
    )
    data = shapes_dataset("train", data_config)
    tokenizer = Tokenizer(build_byte_tokenizer(config.vocab_size), config.text_length)
    tokens = jnp.asarray(tokenizer(list(data.categories.values())))
    arrays = read(data, config)
    print(f"{len(data.images):,} pictures, {len(tokens)} phrases", flush=True)

    kernel = np.random.default_rng(options.seed).normal(0, 0.1, (config.dim, 5))
    head = {
        "scale": 3.0, "bias": -3.0, "kernel": kernel[:, 0], "fused_bias": -3.0,
        "box_kernel": kernel[:, 1:], "box_bias": 0.0,
    }  # fmt: skip
    params = init_params(config, options.seed)
    sines = sine_grid(config.grid, config.grid, config.vit_dim)
    params["vit"]["pos_embed"][0, 1:] = sines.reshape(-1, config.vit_dim)
    trained = {"params": params, "head": head}
    mesh = make_mesh()
    trained = put_replicated(jax.tree.map(np.float32, trained), mesh)
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        options.learning_rate,
        min(100, options.steps // 2),
        options.steps,
        options.learning_rate / 20,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(rate, weight_decay=0.01))
    state = put_replicated(optimizer.init(trained), mesh)
    split = NamedSharding(mesh, P(AXIS))
    model = Sam3(config)

    @partial(jax.jit, static_argnums=3, donate_argnums=(0, 1))
    def step(trained, state, batch, fuse):
        gradient = jax.value_and_grad(losses, has_aux=True)
        (_, parts), grads = gradient(trained, model, tokens, batch, fuse)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, parts

    source = {
        "made by": "python -m scripts.pretrain_shapes",
        **{k: v for k, v in vars(options).items() if k != "out"},
    }
    stream = batches(*arrays, options.batch_size, options.seed)
    start, recent = time.perf_counter(), []
    for number in range(1, options.steps + 1):
        batch = jax.device_put(next(stream), split)
        trained, state, parts = step(trained, state, batch, number > (1 - FUSED) * options.steps)
        recent.append(parts)
        if number % 100 == 0 or number == options.steps:
            contrast, box, fused = np.mean(jax.device_get(recent), 0)
            seconds = time.perf_counter() - start
            print(f"step {number} contrast {contrast:.4f} box {box:.3f} fused {fused:.4f} {seconds:.0f} s", flush=True)  # fmt: skip
            recent = []
        if number % 1000 == 0 or number == options.steps:
            params = jax.device_get(trained["params"])
            save_model_folder(
                options.out, config, params, tokenizer, source={**source, "steps": number}
            )


if __name__ == "__main__":
    main()
