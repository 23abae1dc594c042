"""The published detector, 840 M seeded weights at 1008 px: torch against JAX on a CPU, in value and gradient.

    python scripts/parity_full.py                  # writes docs/parity.md; 7 minutes, 15 GB
    python scripts/parity_full.py --size small     # the same in half a minute, writes nothing

Evaluation and training outputs, every loss term, the gradient of every tensor. Torch and JAX run one after
the other in processes of their own, so that each one's memory is its own; the weights pass through
`convert`, as a user's would. Needs the test extra (the sam3 package).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SEED = 1
BATCH = dict(seed=2, images=1, prompts=1, max_targets=3, box_prompts=1)
HEADER = """# Parity with torch at full size

Written by `python scripts/parity_full.py`: the published detector with {parameters:,} parameters drawn from a
seed, pictures of {image} px, one picture, one phrase with a box exemplar, {targets} targets, float32, every
dropout off. Weights go from torch to JAX through `python -m convert`. Errors are the largest absolute
difference over the standard deviation of torch's values (over the value, where there is one), which is
stricter than relative where seeded weights make the values alike (the last layer's logits spread by 0.02); of
gradients the norm of the difference over the norm of torch's.
The tests in `tests/parity` do the same at small sizes, module by module and over many seeds.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("published", "small"), default="published")
    parser.add_argument(
        "--work", type=Path, help="folder for 14 GB of intermediate files; default: a temporary one"
    )
    parser.add_argument("--stage", choices=STAGES, help="used by the script itself")
    options = parser.parse_args()
    if options.stage:
        return STAGES[options.stage](options.size, options.work)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        stages = {name: run_stage(name, options.size, Path(folder)) for name in STAGES}
        text = report(Path(folder), stages)
    print(text)
    if options.size == "published":
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "parity.md").write_text(text, "utf-8")
    return 0


def torch_stage(size: str, work: Path) -> int:
    """Draw the weights, run torch in evaluation and training, keep everything in files."""
    import torch

    from sam3jax.weights.tensor_file import Tensor, write_tensors
    from tests import torch_reference as reference

    size_ = reference.PUBLISHED if size == "published" else reference.SMALL
    with timed("build"):
        model = reference.detector(size_, seed=SEED)
        torch.save(model.state_dict(), work / "sam3.pt")
    example = reference.example(size_, **BATCH)
    example["num_targets"][:] = BATCH["max_targets"]
    real = np.random.default_rng(SEED).uniform(0.2, 0.5, example["boxes"].shape)
    example["boxes"] = real.astype(np.float32)
    example["prompt_valid"][:] = True
    arrays = {k: v for k, v in example.items() if isinstance(v, np.ndarray)}
    rows = reference.tokens(model, sorted(set(example["texts"])))
    np.savez(work / "example.npz", texts=np.array(example["texts"]), tokens=rows, **arrays)
    with timed("evaluation"), torch.no_grad():
        np.savez(
            work / "eval_torch.npz",
            **reference.stacked(reference.forward(model, example, train=False)[0]),
        )
    with timed("training step"):
        terms, gradients, out = reference.train_step(model, example)
    np.savez(work / "train_torch.npz", **reference.stacked(out))
    write_tensors(
        work / "gradients_torch.safetensors", {n: Tensor.of(g) for n, g in gradients.items()}
    )
    (work / "terms_torch.json").write_text(json.dumps(terms))
    parameters = sum(p.numel() for p in model.parameters())
    about = {"parameters": parameters, "image": size_.image, "targets": BATCH["max_targets"]}
    (work / "about.json").write_text(json.dumps(about))
    return 0


def convert_stage(size: str, work: Path) -> int:
    """The checkpoint to a model folder, by the command."""
    from convert.__main__ import main as convert

    with timed("torch-to-jax"):
        return convert(
            ["torch-to-jax", "--src", str(work / "sam3.pt"), "--out", str(work / "folder")]
        )


def jax_stage(size: str, work: Path) -> int:
    """The same batch through the converted model."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    from convert.weights import torch_tensors
    from sam3jax.config import LossConfig
    from sam3jax.losses import compute_losses
    from sam3jax.model import Sam3
    from sam3jax.types import Prompts
    from sam3jax.weights.model_folder import load_model_folder
    from sam3jax.weights.tensor_file import Tensor, write_tensors
    from sam3jax.weights.tree import flatten
    from tests.bridge import published, targets

    with timed("load"):
        config, params, _ = load_model_folder(work / "folder")
        config = config.model_copy(update={"dropout": 0.0, "drop_path": 0.0})
        params = jax.device_put(params)
    e = dict(np.load(work / "example.npz"))
    pair = lambda x: x.reshape(1, 1, *x.shape[1:])
    prompts = Prompts(
        text_id=np.zeros((1, 1), np.int32),
        valid=np.ones((1, 1), bool),
        boxes=pair(e["prompt_boxes"]),
        box_labels=pair(e["prompt_labels"]).astype(np.int32),
        box_valid=pair(e["prompt_valid"]),
    )
    batch = e["images"].transpose(0, 2, 3, 1), e["tokens"].astype(np.int32), prompts
    truth = targets(e)

    evaluate = jax.jit(lambda params, *batch: Sam3(config).apply({"params": params}, *batch))
    with timed("compile evaluation"):
        evaluate = evaluate.lower(params, *batch).compile()
    with timed("evaluation"):
        out = jax.block_until_ready(evaluate(params, *batch))
    np.savez(work / "eval_jax.npz", **published(out, train=False))
    del evaluate, out

    def loss(params, images, tokens, prompts, truth):
        out = Sam3(config, train=True).apply({"params": params}, images, tokens, prompts)
        total, terms = compute_losses(
            out, truth, prompts.valid, LossConfig(scale_by_find_batch_size=False)
        )
        return total, (terms, out)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    with timed("compile training step"):
        step = step.lower(params, *batch, truth).compile()
    with timed("training step"):
        (_, (terms, out)), gradients = jax.block_until_ready(step(params, *batch, truth))
    np.savez(work / "train_jax.npz", **published(out, train=True))
    (work / "terms_jax.json").write_text(json.dumps({k: float(v) for k, v in terms.items()}))
    leaves = {path: Tensor.of(np.asarray(g)) for path, g in flatten(gradients).items()}
    write_tensors(work / "gradients_jax.safetensors", torch_tensors(leaves, config))
    return 0


STAGES = {"torch": torch_stage, "convert": convert_stage, "jax": jax_stage}


def report(work: Path, stages: dict[str, dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    from sam3jax.weights.tensor_file import read_tensors

    lines = [HEADER.format(**json.loads((work / "about.json").read_text()))]
    lines += [
        "| output | mode | shape | largest difference | over standard deviation |",
        "|---|---|---|---|---|",
    ]
    for mode in ("eval", "train"):
        want, got = (dict(np.load(work / f"{mode}_{side}.npz")) for side in ("torch", "jax"))
        assert want.keys() == got.keys()
        for name, value in want.items():
            difference = np.abs(got[name] - value).max()
            scale = value.std() if value.size > 1 else np.abs(value).max()
            lines.append(
                f"| {name} | {mode} | {list(value.shape)} | {difference:.1e} | {difference / scale:.1e} |"
            )
    want, got = (json.loads((work / f"terms_{side}.json").read_text()) for side in ("torch", "jax"))
    shared = {k: abs(got[k] - v) / max(abs(v), 1e-3) for k, v in want.items() if k in got}
    worst = max(shared, key=shared.get)
    lines += [
        "",
        f"Loss: core_loss {want['core_loss']:.6f} in torch, {got['core_loss']:.6f} in JAX; of {len(shared)} terms the "
        f"largest relative difference is {shared[worst]:.1e} ({worst}).",
        "",
    ]
    want, got = (read_tensors(work / f"gradients_{side}.safetensors") for side in ("torch", "jax"))
    norms = {name: np.linalg.norm(t.read().astype(np.float64)) for name, t in want.items()}
    largest = max(norms.values())
    # Gradients that cancel (the biases of the two RPB heads' last layers) are rounding noise in both.
    real = [name for name, norm in norms.items() if norm > 1e-7 * largest]
    errors = {
        n: np.linalg.norm(got[n].read() - want[n].read().astype(np.float64)) / norms[n]
        for n in real
    }
    ordered = sorted(errors, key=errors.get)
    noise = [name for name in norms if name not in real]
    most = max((np.abs(got[n].read()).max() for n in noise), default=0.0)
    lines += [
        f"Gradients: {len(real)} tensors; relative error median {errors[ordered[len(ordered) // 2]]:.1e}, "
        f"95 % below {errors[ordered[int(0.95 * len(ordered))]]:.1e}, largest {errors[ordered[-1]]:.1e} ({ordered[-1]}). "
        f"{len(noise)} more are zero but for rounding (at most {most:.1e} in JAX, beside a largest norm of {largest:.1e}).",
        "",
        "| process | seconds | peak memory | of which |",
        "|---|---|---|---|",
    ]
    for name, stage in stages.items():
        parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in stage["parts"].items())
        lines.append(
            f"| {name} | {stage['seconds']:.0f} | {stage['peak'] / 1e9:.1f} GB | {parts} |"
        )
    total = sum(stage["seconds"] for stage in stages.values())
    load = os.getloadavg()[2]
    lines += [
        "",
        f"{total / 60:.1f} minutes in all on {os.cpu_count()} cores; load average {load:.1f} (other work on the machine above 2).",
    ]
    return "\n".join(lines) + "\n"


class timed:
    """Prints the seconds of a part as a line that the parent reads."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        print(f"part {self.name}: {time.perf_counter() - self.start:.1f}", flush=True)


def run_stage(stage: str, size: str, work: Path, script: str = __file__) -> dict[str, Any]:
    """A stage in a process of its own: seconds, peak memory in bytes, seconds of its parts."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, "--stage", stage, "--size", size, "--work", str(work)]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    parts: dict[str, float] = {}
    for line in process.stdout:
        print(f"{stage}: {line}", end="", flush=True)
        if line.startswith("part "):
            name, seconds = line.removeprefix("part ").rsplit(": ", 1)
            parts[name] = float(seconds)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the {stage} stage failed with status {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak": usage.ru_maxrss * 1024, "parts": parts}


if __name__ == "__main__":
    sys.exit(main())
