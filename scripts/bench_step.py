"""The full-size LoRA step: compiled temporaries, compile time, step time, peak memory, time by part.

    python -m scripts.bench_step                    compile only: memory analysis, nothing executed
    python -m scripts.bench_step --run 3            random weights, real steps
    python -m scripts.bench_step --parts            forward time of each part
    python -m scripts.bench_step --dtype bfloat16   compute dtype
    python -m scripts.bench_step --run 2 --torch    and the torch trainer's step, with ratios
    python -m scripts.bench_step --run 3 --behind   adapters behind the trunk alone
    python -m scripts.bench_step --run 3 --cached   the same, the trunk's features in the place of the picture
    python -m scripts.bench_step --run 3 model.remat=products   any settings of a run

LoRA r16 on ViT qkv/proj/MLP, fusion encoder and decoder; 1 picture, 1 phrase, 3 masks, 1008 px.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sam3jax.config import Config, parse_config, read_settings
from sam3jax.losses import compute_losses
from sam3jax.model import Sam3
from sam3jax.model.init import init_params, parameter_shapes
from sam3jax.tasks.detection import Detection
from sam3jax.training.mesh import backend_of, make_mesh
from sam3jax.training.optim import build_optimizer
from sam3jax.training.rates import count, multipliers
from sam3jax.training.state import init_state
from sam3jax.training.step import make_train_step
from sam3jax.types import Batch, Prompts, Targets, TextFeatures
from sam3jax.weights.frozen import compact
from sam3jax.weights.lora import init_lora
from sam3jax.weights.trainable import split, without_text_tower

INSTANCES = 3


def run_config(dtype: str, behind: bool = False, settings: Sequence[str] = ()) -> Config:
    raw: dict = {"model": {"compute_dtype": dtype}, "loss": {"mask_chunk": 4}}
    if behind:
        raw["model"]["drop_path"] = 0.0
        raw["lora"] = {"targets": ["transformer.encoder.layers.*", "transformer.decoder.layers.*"]}
    return parse_config(read_settings(settings, Config, raw))


def batch_of(config: Config) -> Batch:
    """One picture of noise, one phrase, three rectangles."""
    size = config.model.image_size
    rng = np.random.default_rng(0)
    masks = np.zeros((1, INSTANCES, size, size), bool)
    boxes = np.array([[[0.3, 0.3, 0.2, 0.3], [0.6, 0.5, 0.3, 0.2], [0.5, 0.8, 0.1, 0.1]]], "f")
    for k, (x, y, w, h) in enumerate(boxes[0] * size):
        masks[0, k, int(y - h / 2) : int(y + h / 2), int(x - w / 2) : int(x + w / 2)] = True
    return Batch(
        images=rng.integers(0, 256, (1, size, size, 3), np.uint8),
        tokens=np.ones((1, config.model.text_length), np.int32),
        prompts=Prompts(
            text_id=np.zeros((1, 1), np.int32), valid=np.ones((1, 1), bool),
            boxes=np.zeros((1, 1, 0, 4), "f"), box_labels=np.zeros((1, 1, 0), np.int32),
            box_valid=np.zeros((1, 1, 0), bool),
        ),
        targets=Targets(
            boxes=boxes, masks=np.packbits(masks, -1), mask_valid=np.ones((1, INSTANCES), bool),
            index=np.arange(INSTANCES, dtype=np.int32).reshape(1, 1, -1),
            num_targets=np.full((1, 1), INSTANCES, np.int32), is_exhaustive=np.ones((1, 1), bool),
        ),
        image_valid=np.ones(1, bool), image_id=np.zeros(1, np.int32),
    )  # fmt: skip


def text_of(config: Config) -> TextFeatures:
    c = config.model
    features = np.random.default_rng(1).normal(size=(1, c.text_length, c.dim)).astype("f")
    return TextFeatures(jnp.asarray(features, c.compute_dtype), np.arange(c.text_length)[None] < 5)


def prepare(config: Config, real: bool, cached: bool = False):
    """(step, state, frozen, text, batch); shapes only unless `real`. cached: features for the picture."""
    params = init_params(config.model, 0) if real else parameter_shapes(config.model)
    lora, scale = init_lora(jax.random.key(0), params, config.model, config.lora)
    trainable, frozen = split(params, lora, scale, config)
    rates = multipliers(trainable, frozen, config)
    frozen = without_text_tower(frozen)
    optimizer = build_optimizer(config, trainable, rates)
    mesh = make_mesh(jax.devices()[:1])
    backend = backend_of(mesh)
    step = make_train_step(Detection(config, backend), optimizer, mesh, seed=0)
    state = init_state(trainable, optimizer, False)
    if real:
        frozen = jax.tree.map(jnp.asarray, compact(frozen, config, backend))
    else:
        frozen = jax.eval_shape(lambda tree: compact(tree, config, backend), frozen)
    print(f"parameters trained: {count(trainable, rates):,}", flush=True)
    batch = batch_of(config)
    if cached:
        shape = (1, config.model.grid, config.model.grid, config.model.vit_dim)
        features = np.random.default_rng(2).normal(size=shape)
        batch = batch.replace(images=features.astype(jnp.dtype(config.model.compute_dtype)))
    one = jax.tree.map(lambda x: x[None], batch)  # one micro-batch
    return step, state, frozen, text_of(config), one.replace(tokens=batch.tokens)


def peak_gb() -> float:
    stats = jax.local_devices()[0].memory_stats() or {}
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return stats.get("peak_bytes_in_use", rss) / 1e9


def parts(config: Config, repeats: int) -> dict[str, float]:
    """Median forward seconds of each part, on the outputs of the part before."""
    model = Sam3(config.model, train=True)
    params = jax.tree.map(jnp.asarray, init_params(config.model, 0))
    variables = {"params": params}
    batch, text = batch_of(config), text_of(config)
    rngs = {"dropout": jax.random.key(0)}
    image = jnp.asarray((batch.images / 127.5 - 1).astype("f"))
    times: dict[str, float] = {}

    def measure(name, function, *args):
        run = jax.jit(function)
        out = jax.block_until_ready(run(*args))
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            taken.append(time.perf_counter() - start)
        times[name] = statistics.median(taken)
        print(f"{name:<10} {times[name]:8.3f} s", flush=True)
        return out

    def call(method):
        return lambda v, *args: model.apply(v, *args, method=method, rngs=rngs)

    from sam3jax.model.positions import sine_grid

    grid, dim = config.model.grid, config.model.dim
    position = sine_grid(grid, grid, dim).reshape(grid * grid, dim)
    trunk = measure("trunk", call(lambda m, x: m.vit(x)), variables, image)
    levels = measure("neck", call(lambda m, x: m.neck(x)), variables, trunk)
    prompt = text.features
    flat = levels[-1].reshape(1, grid * grid, dim)
    fuse = call(lambda m, *a: m.fusion_encoder(*a))
    memory = measure("fusion", fuse, variables, flat, position, prompt, text.valid)
    memory = memory.reshape(levels[-1].shape)
    decode = call(lambda m, *a: m.decoder(*a))
    decoded = measure("decoder", decode, variables, memory, position, prompt, text.valid)
    masks = call(lambda m, *a: m.segmentation_head(*a))
    measure("masks", masks, variables, memory, levels, decoded.queries[-1], prompt, text.valid)
    outputs = jax.jit(call("detect"))(
        variables, jax.jit(call("encode_image"))(variables, batch.images), text, batch.prompts
    )
    losses = lambda out: compute_losses(out, batch.targets, batch.prompts.valid, config.loss)[0]
    measure("loss", losses, outputs)
    from sam3jax.losses.matches import match
    from sam3jax.losses.truth import gather_truth

    measure(
        "matching",
        lambda out: match(out, gather_truth(batch.targets, batch.prompts.valid), config.loss),
        outputs,
    )
    return times


def torch_step(dtype: str, steps: int) -> dict:
    """Seconds, peak memory and trained parameters of `bench_step_torch`, in a process of its own."""
    command = [sys.executable, "-m", "scripts.bench_step_torch", "--dtype", dtype, "--run", str(steps)]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--run", type=int, default=0, metavar="STEPS")
    parser.add_argument("--parts", type=int, nargs="?", const=3, default=0, metavar="REPEATS")
    parser.add_argument("--torch", action="store_true", help="compare, with --run")
    parser.add_argument("--behind", action="store_true", help="adapters behind the trunk")
    parser.add_argument("--cached", action="store_true", help="--behind, with cache_trunk")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    config = run_config(options.dtype, options.behind or options.cached, options.settings)
    print(f"{jax.devices()[0].platform}, jax {jax.__version__}, {options.dtype}")
    if options.parts:
        print(json.dumps(parts(config, options.parts)))
        return
    step, *args = prepare(config, real=options.run > 0, cached=options.cached)
    start = time.perf_counter()
    compiled = step.lower(*args).compile()
    print(f"compile: {time.perf_counter() - start:.1f} s", flush=True)
    m = compiled.memory_analysis()
    for name in ("argument", "output", "alias", "temp"):
        print(f"{name:<10} {getattr(m, f'{name}_size_in_bytes') / 1e9:8.3f} GB")
    state, *rest = args
    times = []
    for _ in range(options.run):
        start = time.perf_counter()
        state, metrics = compiled(state, *rest)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
        print(f"step {times[-1]:.2f} s, loss {float(metrics['loss']):.3f}", flush=True)
    if not times:
        return
    median, peak = statistics.median(times), peak_gb()
    print(f"median step {median:.2f} s, peak memory {peak:.2f} GB", flush=True)
    if options.torch:
        del state, rest, args, metrics  # torch needs the memory
        other = torch_step(options.dtype, options.run)
        theirs, memory = statistics.median(other["seconds"]), other["peak_gb"]
        print(
            f"torch: {other['trained']:,} trained, median step {theirs:.2f} s, peak {memory:.2f} GB"
        )
        print(f"ours / torch: time {median / theirs:.2f}, peak memory {peak / memory:.2f}")


if __name__ == "__main__":
    main()
