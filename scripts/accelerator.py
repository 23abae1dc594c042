"""Everything to be known of an accelerator on the day there is one: right numbers, speed, memory. One script.

    python -m scripts.accelerator --out runs/accelerator             on a card or TPU; about ten minutes
    python -m scripts.accelerator --out runs/accelerator --small     the same checks at small sizes, on any device

    parity      a step in float32 at highest precision against this machine's CPU: every term, every gradient
    matcher     the assignment at the sizes of training, against scipy in value and time
    tiny        a step of the tiny preset: compiled once, seconds
    step        the published sizes, LoRA r16, bfloat16: compiled, run, its peak beside what `sam3jax plan` says
    fused       the same with cuDNN's attention in the trunk
    precision   what a float32 product is at jax's default precision, and at the highest
    attention   each branch of each large problem: value, gradient, seconds

Results go to OUT/accelerator.json as soon as each check ends; the last lines say of every check whether it passed,
failed, or was left out and why. Exit status 1 where one failed.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam3jax.config import Config, parse_config
from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer
from sam3jax.files import write_json
from sam3jax.matching import hungarian
from sam3jax.model import attention as attend
from sam3jax.model.blockwise import blockwise
from sam3jax.model.init import init_params
from sam3jax.tasks.detection import Detection
from sam3jax.training.mesh import backend_of, make_mesh, put_batch, put_replicated
from sam3jax.training.optim import build_optimizer
from sam3jax.training.plan import host_traffic
from sam3jax.training.rates import multipliers
from sam3jax.training.state import TrainState, init_state
from sam3jax.training.step import make_train_step
from sam3jax.weights.frozen import compact
from sam3jax.weights.trainable import start
from scripts import plan_table

SMALL = dict(
    preset="tiny", image_size=84, pretrain_image_size=42, window_size=3, vit_dim=32, vit_stages=1, vit_stage_blocks=2,
    vit_heads=2, text_dim=16, text_layers=1, text_heads=2, dim=32, ffn=48, heads=4, fusion_layers=1, decoder_layers=1,
    geometry_layers=1, queries=9, remat=False,
)  # fmt: skip
SMALL_LORA = {"targets": ["transformer.decoder.*"]}  # fewer adapters compile faster
# Of a gradient, relative to the norm of all gradients: two float32 programs that add in another order.
TOLERANCE = 1e-4
GB = 1e9


class LeftOut(Exception):
    """The check says nothing on this device. The message is the reason."""


class Program(NamedTuple):
    """A training step with everything that it takes, on one device."""

    step: Any
    state: TrainState
    rest: tuple[Any, Any, Any]  # frozen, prepared, batch


def program(config: Config, device: Any, optimizer: Any = None) -> Program:
    """As a training makes it, of random weights. optimizer: in the place of the config's."""
    mesh = make_mesh([device])
    task = Detection(config, backend_of(mesh))
    model = config.model
    data = task.open(Tokenizer(build_byte_tokenizer(600), model.text_length))
    loader = task.loader(data)
    batch = next(loader)
    loader.close()
    trainable, frozen = start(init_params(model, config.seed), config)
    # Adapters that are not zero: else half the gradients are.
    rng = np.random.default_rng(0)
    moved = lambda x: x + 0.02 * rng.normal(size=x.shape).astype(x.dtype)
    trainable = jax.tree.map(lambda x: moved(np.asarray(x)), trainable)
    rates = multipliers(trainable, frozen, config)
    optimizer = optimizer or build_optimizer(config, trainable, rates)
    step = make_train_step(task, optimizer, mesh, seed=config.seed)
    with jax.default_device(device):
        state = put_replicated(init_state(trainable, optimizer, False), mesh)
        frozen = put_replicated(compact(frozen, config, backend_of(mesh)), mesh)
        prepared, frozen = task.prepare(state.trainable, frozen, data)
    prepared = put_replicated(prepared, mesh)
    return Program(step, state, (frozen, prepared, put_batch(batch, task.batch_spec, mesh)))


def config_of(model: dict[str, Any], pictures: int = 1, **more: Any) -> Config:
    data = dict(train="shapes", shapes_train=pictures, shapes_valid=1, max_prompts=1)
    return parse_config({"model": model, "data": data, "batch_size": pictures, **more})


def parity(device: Any, reference: Any, small: bool) -> dict[str, Any]:
    """Terms and gradients of one step on the device and on the CPU."""
    model = {**(SMALL if small else {"preset": "tiny"}), "dropout": 0.0, "drop_path": 0.0}
    config = config_of(model, 2, **({"lora": SMALL_LORA} if small else {}))
    descent = optax.sgd(1.0)  # what was taken off is the gradient
    found = []
    with jax.default_matmul_precision("highest"):
        for where in (device, reference):
            made = program(config, where, descent)
            before = jax.device_get(made.state.trainable)
            state, metrics = made.step(made.state, *made.rest)
            taken = jax.tree.map(np.subtract, before, jax.device_get(state.trainable))
            found.append((jax.device_get(metrics), taken))
    (terms, gradient), (want_terms, want) = found
    norm = float(optax.tree.norm(want))
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True)
    worst = float(np.max([np.linalg.norm(a - b) for a, b in pairs])) / norm
    apart = {k: abs(float(terms[k]) - float(v)) / max(abs(float(v)), 1.0) for k, v in want_terms.items()}  # fmt: skip
    # Not `max(...)`, which may pass over a NaN.
    good = norm > 0 and worst <= TOLERANCE and all(x <= TOLERANCE for x in apart.values())
    term = next((k for k, x in apart.items() if np.isnan(x)), max(apart, key=lambda k: apart[k]))
    note = " (the device is a CPU: it was compared with itself)" if device == reference else ""
    return {
        "passed": good, "gradient_error": worst, "term_error": apart[term], "worst_term": term,
        "said": f"gradients {worst:.1e} of the norm, terms {apart[term]:.1e} ({term}), allowed {TOLERANCE:.0e}{note}",
    }  # fmt: skip


def matcher(device: Any, small: bool) -> dict[str, Any]:
    """The largest problems of a training, all targets real."""
    try:
        from scripts.bench_matching import problems, scipy_loop
    except ImportError as error:
        raise LeftOut(f"{error.name} is not installed") from None
    cases, same = {}, True
    for n, t in ((3, 5),) if small else ((11, 32), (88, 100), (352, 200)):
        cost, count = jax.device_put(problems(n, t, few=False), device)
        found, seconds = timed(jax.jit(hungarian), cost, count)
        matrix = np.asarray(cost)
        began = time.perf_counter()
        want = scipy_loop(matrix, np.asarray(count))
        cases[f"{n}x{t}"] = {"seconds": seconds, "scipy_seconds": time.perf_counter() - began}
        total = lambda rows, c=matrix: np.take_along_axis(c, rows[:, None], 1)[:, 0].sum(-1)
        same &= bool(np.allclose(total(np.asarray(found)), total(want), rtol=1e-5, atol=1e-4))
    said = ", ".join(f"{k}: {1e3 * v['seconds']:.1f} ms (scipy {1e3 * v['scipy_seconds']:.1f})" for k, v in cases.items())  # fmt: skip
    return {"passed": same, "cases": cases, "said": f"{said}; costs {'equal' if same else 'DIFFER'}"}  # fmt: skip


def tiny(device: Any, small: bool) -> dict[str, Any]:
    """Several steps of a small model: one program, finite, no word with the host."""
    config = config_of(SMALL, 2, lora=SMALL_LORA) if small else config_of({"preset": "tiny"}, 2)
    made = program(config, device)
    state, seconds, losses = made.state, [], []
    for _ in range(3 if small else 20):
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(made.step(state, *made.rest))
        seconds.append(time.perf_counter() - began)
        losses.append(float(metrics["loss"]))
    programs = made.step._cache_size()
    good = programs == 1 and bool(np.isfinite(losses).all()) and losses[-1] < losses[0]
    median = statistics.median(seconds[1:])
    return {
        "passed": good, "programs": programs, "losses": losses, "first_seconds": seconds[0], "seconds": median,
        "said": f"{programs} program, first call {seconds[0]:.0f} s, a step {1e3 * median:.0f} ms, "
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f}",
    }  # fmt: skip


def step(device: Any, small: bool, *, fused: bool = False) -> dict[str, Any]:
    """A step at full size: what it needs by the compiler, by the plan made elsewhere, and measured."""
    if fused and device.platform != "gpu":
        raise LeftOut("cuDNN is NVIDIA's")
    row = plan_table.Row("h100", plan_table.EVERYWHERE, 1, True)
    config = plan_table.config_of(row)
    if small:
        config = config_of({**SMALL, "compute_dtype": "bfloat16"}, lora=SMALL_LORA)
    model = config.model.model_copy(update={"fused_attention": fused})
    before = _peak_gb(device)
    made = program(config.model_copy(update={"model": model}), device)
    began = time.perf_counter()
    compiled = made.step.lower(made.state, *made.rest).compile()
    compiling = time.perf_counter() - began
    memory = compiled.memory_analysis()
    needs = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GB
    state, seconds, losses = made.state, [], []
    for _ in range(2 if small else 6):
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, *made.rest))
        seconds.append(time.perf_counter() - began)
        losses.append(float(metrics["loss"]))
    peak = _peak_gb(device)
    if peak is not None and peak == before:  # it is that of an earlier check
        peak = None
    host = host_traffic(compiled.as_text() or "")
    planned = None if small else _planned(row, device)
    good = bool(np.isfinite(losses).all()) and not host and (peak is None or peak < 1.15 * needs + 0.5)  # fmt: skip
    median = statistics.median(seconds[1:])
    said = [f"compiled in {compiling:.0f} s", f"a step {median:.3f} s", f"compiler {needs:.2f} GB"]
    said.append("no plan is stored for this card" if planned is None else f"plan {planned:.2f} GB")
    said.append(
        "no peak of its own was measured" if peak is None else f"measured peak {peak:.2f} GB"
    )
    return {
        "passed": good, "compile_seconds": compiling, "seconds": median, "all_seconds": seconds, "losses": losses,
        "compiled_gb": needs, "planned_gb": planned, "peak_gb": peak, "host": host, "said": ", ".join(said),
    }  # fmt: skip


def _peak_gb(device: Any) -> float | None:
    """The most that the device held so far, where it tells."""
    found = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return None if found is None else found / GB


def _planned(row: plan_table.Row, device: Any) -> float | None:
    """Gigabytes of the stored plan that stands for this device."""
    kind = device.device_kind.lower()
    names = {"h100": ("h100", "h200", "a100", "l4", "rtx"), "t4": ("t4",), "v5e": ("v5 lite", "v5e", "v6")}  # fmt: skip
    target = next((t for t, parts in names.items() if any(p in kind for p in parts)), None)
    done = plan_table.stored()
    found = done.get(row._replace(target=target)) if target else None
    return (found["arguments"] + found["temporaries"]) / GB if found else None


def precision(device: Any, small: bool) -> dict[str, Any]:
    """float32 products: their error at the default precision tells TF32 or bfloat16; the highest must be exact."""
    n = 256 if small else 4096
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, n)).astype(np.float32) for _ in range(2))
    want = a.astype(np.float64) @ b
    errors, seconds = {}, {}
    x, y = jax.device_put((a, b), device)
    for name in ("default", "highest"):
        product = jax.jit(partial(jnp.matmul, precision=name))
        got, seconds[name] = timed(product, x, y)
        errors[name] = float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())
    kind = "float32" if errors["default"] < 1e-5 else "TF32" if errors["default"] < 2e-3 else "bfloat16"  # fmt: skip
    said = ", ".join(f"{k}: error {errors[k]:.1e} in {1e3 * seconds[k]:.2f} ms" for k in errors)
    return {"passed": errors["highest"] < 1e-5, "errors": errors, "seconds": seconds, "said": f"{said}; the default is {kind}"}  # fmt: skip


def attention(device: Any, small: bool) -> dict[str, Any]:
    """Every branch against the plain form in float32, each problem that training has."""
    full = {"global": ((1, 5184, 16, 64), False), "window": ((9, 576, 16, 64), False), "decoder": ((1, 402, 8, 32), True)}  # fmt: skip
    few = {"global": ((1, 96, 2, 16), False), "decoder": ((1, 14, 2, 16), True)}
    out, good = {}, True
    for name, (shape, bias) in (few if small else full).items():
        b, n, h, k = shape
        keys = {"decoder": 96 if small else 5184}.get(name, n)
        rng = np.random.default_rng(0)
        draw = lambda *s, rng=rng: jnp.asarray(rng.normal(size=s), jnp.bfloat16)
        given = [draw(*shape), draw(b, keys, h, k), draw(b, keys, h, k)]
        given += [draw(b, h, n, keys)] if bias else []
        weight = draw(*shape)
        exact = [x.astype(jnp.float32) for x in given]
        with jax.default_matmul_precision("highest"):
            want, _ = timed(_with_gradient(_plain, weight), *jax.device_put(exact, device))
        for branch, function in _branches(device, bias).items():
            got, seconds = timed(_with_gradient(function, weight), *jax.device_put(given, device))
            error = float(np.max([_relative(a, b) for a, b in zip(got, want, strict=True)]))
            out[f"{name} {branch}"] = {"seconds": seconds, "error": error}
            good &= error < 2e-2  # bfloat16 holds 8 bits
    said = ", ".join(f"{k}: {1e3 * v['seconds']:.2f} ms ({v['error']:.0e})" for k, v in out.items())
    return {"passed": good, "branches": out, "said": said}


def _branches(device: Any, bias: bool) -> dict[str, Callable[..., Any]]:
    found = {"plain": _plain, "blockwise": partial(_blocks, device.platform)}
    if device.platform == "gpu" and not bias:
        found["fused"] = partial(jax.nn.dot_product_attention, implementation="cudnn")
    return found


def _plain(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
    return attend._attend(q, k, v, bias, None, 0.0, None)


def _blocks(platform: str, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
    return blockwise(q, k, v, bias, None, 0.0, None, platform)


def _with_gradient(function: Callable[..., Any], weight: Any) -> Callable[..., Any]:
    """(value, gradient of each argument)."""

    def loss(given: tuple[Any, ...]) -> Any:
        y = function(*given)
        return (y.astype(jnp.float32) * weight).sum(), y

    def both(*given: Any) -> tuple[Any, ...]:
        gradients, y = jax.grad(loss, has_aux=True)(given)
        return (y, *gradients)

    return jax.jit(both)


def _relative(a: Any, b: Any) -> float:
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def timed(function: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    """(result, median seconds of five calls behind the first)."""
    out = jax.block_until_ready(function(*given))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(function(*given))
        seconds.append(time.perf_counter() - began)
    return out, statistics.median(seconds)


# In this order: the peak of a device is that of all it did so far, so the large step comes before the
# attention that forms all scores.
CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    "parity": parity, "matcher": matcher, "tiny": tiny, "step": step, "fused": partial(step, fused=True),
    "precision": precision, "attention": attention,
}  # fmt: skip


def run(out: Path, *, small: bool, only: Sequence[str] = tuple(CHECKS)) -> dict[str, Any]:
    """All checks, each written down as soon as it ends. What one raises is its failure, not the others'."""
    out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    found: dict[str, Any] = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__, "small": small, "checks": {}}  # fmt: skip
    for name in only:
        print(f"{name} ...", flush=True)
        began = time.perf_counter()
        try:
            more = {"reference": jax.devices("cpu")[0]} if name == "parity" else {}
            result = CHECKS[name](device, small=small, **more)
            status = "passed" if result["passed"] else "failed"
        except LeftOut as reason:
            status, result = "left out", {"said": str(reason)}
        except Exception as error:  # a card's own faults are what is looked for
            traceback.print_exc()
            lines = str(error).splitlines() or [""]
            status, result = "failed", {"said": f"{type(error).__name__}: {lines[0][:300]}"}
        result |= {"status": status, "took_seconds": time.perf_counter() - began}
        found["checks"][name] = result
        write_json(out / "accelerator.json", found)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--small", action="store_true", help="small sizes, for any device")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=tuple(CHECKS), help="some of the checks")  # fmt: skip
    options = parser.parse_args(arguments)
    found = run(options.out, small=options.small, only=options.only)
    print(f"\n{found['device']}, jax {found['jax']}{', small sizes' if found['small'] else ''}")
    for name, result in found["checks"].items():
        print(f"{result['status']:<9} {name:<10} {result['took_seconds']:4.0f} s  {result['said']}")
    return int(any(result["status"] == "failed" for result in found["checks"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
