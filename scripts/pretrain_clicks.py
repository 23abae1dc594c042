"""Teach a tiny SAM 3 to answer clicks: its second neck and interactive heads, the trunk as it is.

    python -m scripts.pretrain_clicks --base shipped:tiny_shapes --out models/tiny_clicks

As in SAM 3, the second neck starts as a copy of the detector's and the trunk stays frozen, so the
detector's answers do not change by a bit. The heads start from noise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from sam3jax.config import ClicksConfig, Config, DataConfig
from sam3jax.data.click_loader import make_click_eval_loader, make_click_loader
from sam3jax.data.shapes import shapes_dataset
from sam3jax.inference.click_rounds import evaluation_rounds
from sam3jax.model import Interactive
from sam3jax.model.init import init_params
from sam3jax.tasks.click_training import training_rounds
from sam3jax.weights.model_folder import load_model_folder, open_model_folder, save_model_folder
from sam3jax.weights.names import DEFAULT_PARTS, PARTS, parts_of

# Clicks point at what is grey, dark and noisy as well: half of the pictures lose their colour.
PIXELS = dict(brightness=0.4, contrast=0.4, colour=0.4, grey=0.5, blur=1.0, noise=20.0)
# On generated X-rays .03 better than the released focal 20 and dice 1: docs/clicks.md.
LOSS = {"mask_loss": "bce", "loss_mask": 2.0, "loss_dice": 2.0}
ROOTS = ("tracker_neck", "prompt_encoder", "mask_decoder", "no_mem_embed")


def start(base: str, seed: int) -> tuple[Any, dict[str, Any], Any]:
    """(config, params of all parts, tokenizer): live heads are kept, else the neck is copied, heads drawn."""
    live = parts_of(path[0] for path in open_model_folder(base).leaves)
    parts = tuple(PARTS) if set(live) == set(PARTS) else DEFAULT_PARTS
    config, params, tokenizer = load_model_folder(base, dtype=np.float32, parts=parts)
    if parts == DEFAULT_PARTS:
        fresh = init_params(config, seed, tuple(p for p in PARTS if p not in DEFAULT_PARTS))
        params = params | fresh | {"tracker_neck": params["neck"]}
    return config, params, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="shipped:tiny_shapes", help="model folder to start from")
    parser.add_argument("--out", required=True, type=Path, help="model folder to write")
    parser.add_argument("--concepts", default="seen", help="group of the generated shapes")
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--objects", type=int, default=4, help="objects of a picture")
    parser.add_argument("--rounds", type=int, default=4, help="corrections of an object")
    parser.add_argument(
        "--mask-resolution", default="target", choices=("target", "prediction"),
        help="prediction is cheaper, and no mask can pass an IoU of about .87 (default: target)",
    )  # fmt: skip
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model_config, params, tokenizer = start(options.base, options.seed)
    clicks = ClicksConfig(
        objects=options.objects, rounds=options.rounds, mask_resolution=options.mask_resolution,
        **LOSS,
    )  # fmt: skip
    data = DataConfig(
        train="shapes", shapes_concepts=options.concepts, shapes_train=options.pictures,
        shapes_valid=60, flip=True, turn=True, **PIXELS,
    )  # fmt: skip
    config = Config(
        model=model_config,
        clicks=clicks,
        data=data,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    loader = make_click_loader(shapes_dataset("train", data), config)
    valid = make_click_eval_loader(shapes_dataset("valid", data), config, batch_size=10)
    model = Interactive(model_config, train=True)
    trained = {root: params[root] for root in ROOTS}
    frozen = {name: part for name, part in params.items() if name not in ROOTS}
    vit = jax.tree.map(jnp.asarray, frozen["vit"])
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        options.learning_rate,
        min(100, options.steps // 2),
        options.steps,
        options.learning_rate / 50,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))
    # Buffers have no gradient, and no weight decay either.
    frequencies = jnp.asarray(trained["prompt_encoder"]["frequencies"])
    state = optimizer.init(trained)

    @jax.jit
    def step(trained, state, vit, batch, key):
        def loss(trained):
            variables = {"params": {**trained, "vit": vit}}
            losses, _ = training_rounds(model, variables, batch, key, clicks)
            n = jnp.maximum(batch.valid.sum(), 1)
            ious = losses.iou.sum(1) / n
            return losses.total(clicks).sum() / n, (ious[0], ious[-1])

        (value, ious), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = optimizer.update(grads, state, trained)
        trained = optax.apply_updates(trained, updates)
        prompt = {**trained["prompt_encoder"], "frequencies": frequencies}
        return {**trained, "prompt_encoder": prompt}, state, jnp.stack([value, *ious])

    @jax.jit
    def evaluate(trained, vit, batch):
        found = evaluation_rounds(Interactive(model_config), {"params": {**trained, "vit": vit}}, batch, clicks)  # fmt: skip
        rows = (batch.valid & batch.image_valid[:, None]).reshape(-1)
        return jnp.where(rows, found.iou, 0.0).sum(1), rows.sum()

    def save(number: int) -> None:
        whole = {**frozen, **jax.device_get(trained)}
        narrow = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), whole)
        before = dict(open_model_folder(options.base).source)
        told = {k: v for k, v in vars(options).items() if k not in ("out", "base")}
        told |= {"made by": "python -m scripts.pretrain_clicks", "steps": number, **scores}
        told |= {"pixels": PIXELS, "loss": LOSS}
        history = [*before.get("trained", []), told]
        save_model_folder(
            options.out, model_config, narrow, tokenizer, source={**before, "trained": history}
        )

    begin, recent, scores = time.perf_counter(), [], {}
    key = jax.random.key(options.seed)
    for number in range(1, options.steps + 1):
        batch = jax.tree.map(jnp.asarray, next(loader))
        trained, state, told = step(trained, state, vit, batch, jax.random.fold_in(key, number))
        recent.append(told)
        if number % 50 == 0 or number == options.steps:
            loss, first, last = np.mean(jax.device_get(recent), 0)
            seconds = time.perf_counter() - begin
            print(f"step {number} loss {loss:.3f} IoU {first:.3f} -> {last:.3f} {seconds:.0f} s", flush=True)  # fmt: skip
            recent = []
        if number % 500 == 0 or number == options.steps:
            sums, count = map(sum, zip(*(evaluate(trained, vit, b) for b in valid)))
            scores = {f"mIoU@{k}": round(float(sums[k - 1] / count), 4) for k in (1, 2, 3, 5)}
            print(scores, flush=True)
            save(number)
    loader.close()


if __name__ == "__main__":
    main()
