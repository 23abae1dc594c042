"""SAM 3.1 at full size: a seeded file goes in, trains one LoRA step, and goes out bit for bit where nothing was trained.

    python -m scripts.multiplex_full --work FOLDER     # six minutes on two cores, 14 GB of disk, 9 GB of memory

Prints the time and the peak memory of every command. Names, shapes and counts are those of
sam3.1_multiplex.pt; the inside of its memory, which is carried, is made up. Needs torch and CLIP's
vocabulary (open_clip).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sam3jax.config import ModelConfig
from sam3jax.weights.names import INTERACTIVE_PART, SECOND_NECK_PART, carried_shapes
from sam3jax.weights.parts import torch_shapes
from sam3jax.weights.tracker_names import INTERACTIVE_NECK, NECK, PROPAGATION_NECK, SECOND_NECK

TRACKER_KEYS = 457
TARGETS = "transformer.decoder.layers.*"
SIDE = 504  # pixels of the training picture


def shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the file but the RoPE tables."""
    config = ModelConfig()
    dead = {n: s for n, s in carried_shapes(config).items() if f"{NECK}.3." not in n}
    dead["backbone.language_backbone.encoder.text_projection"] = (1024, 1024)
    inside = torch_shapes(config) | dead
    for name, shape in torch_shapes(config, (SECOND_NECK_PART,)).items():
        for neck in (INTERACTIVE_NECK, PROPAGATION_NECK):
            inside[name.replace(SECOND_NECK, neck)] = shape
    found = {f"detector.{name}": shape for name, shape in inside.items()}
    heads = torch_shapes(config, (INTERACTIVE_PART,))
    for name, shape in heads.items():
        own = name.replace("tracker.", "tracker.model.interactive_", 1)
        own = own.replace("interactive_no_mem_embed", "interactivity_no_mem_embed")
        found[own] = shape
    for i in range(TRACKER_KEYS - len(heads)):
        layer, leaf = divmod(i, 2)
        shape = ((256,), (256, 256))[leaf]
        found[f"tracker.model.memory.layers.{layer}.{('bias', 'weight')[leaf]}"] = shape
    return found


def make(file: Path) -> None:
    """Write the seeded file."""
    import torch

    from convert.sizes import rope_tables

    rng = np.random.default_rng(31)
    state = {}
    for name, shape in shapes().items():
        array = rng.standard_normal(shape, np.float32)
        array *= 0.02
        if name.endswith((".weight", ".gamma")) and len(shape) == 1:  # norms
            array += 1
        state[name] = torch.from_numpy(array)
    for name, table in rope_tables(ModelConfig()).items():
        whole = torch.from_numpy(table.read())
        state[f"detector.{name}_real"] = whole.real.contiguous()
        state[f"detector.{name}_imag"] = whole.imag.contiguous()
    torch.save(state, file)


def make_data(folder: Path) -> None:
    """One picture of noise with three rectangles."""
    from PIL import Image

    (folder / "train").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(noise).save(folder / "train" / "a.png")
    boxes = [(50, 50, 100, 150), (200, 60, 90, 120), (300, 300, 150, 80)]
    objects = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [x, y, w, h], "iscrowd": 0, "area": w * h,
         "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
        for i, (x, y, w, h) in enumerate(boxes, 1)
    ]  # fmt: skip
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": SIDE, "height": SIDE}],
        "categories": [{"id": 1, "name": "red box"}],
        "annotations": objects,
    }
    (folder / "train" / "_annotations.coco.json").write_text(json.dumps(content))


def compare(before: Path, after: Path) -> None:
    """Print how many tensors differ in any bit, and refuse others than those of adapted layers."""
    import torch

    first, second = (
        torch.load(f, weights_only=True, mmap=True, map_location="cpu") for f in (before, after)
    )
    if first.keys() != second.keys():
        raise SystemExit(f"other names: {sorted(first.keys() ^ second.keys())[:5]}")
    same = lambda a, b: a.dtype == b.dtype and torch.equal(a, b)
    differ = [name for name in first if not same(first[name], second[name])]
    print(f"{len(differ)} of {len(first)} tensors differ", flush=True)
    trained = [n for n in differ if n.startswith("detector.transformer.decoder.layers.")]
    if len(trained) < len(differ) or bool(differ) != ("tuned" in after.name):
        raise SystemExit(f"not as it should be: {differ[:5]}")


def run(title: str, *command: object) -> None:
    """Run a command, and print its time and peak memory as a row of a table."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{title}: status {process.returncode}")
    seconds, peak = time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9
    print(f"| {title} | {seconds:.0f} | {peak:.2f} |", flush=True)


def main() -> int:
    """Make, convert, train, export, compare; ends with status 1 where other tensors changed than it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for 14 GB of files; default: temporary")
    parser.add_argument("--make", type=Path, help="used by the script itself")
    parser.add_argument("--compare", type=Path, nargs=2, help="used by the script itself")
    options = parser.parse_args()
    if options.make:
        make(options.make)
    elif options.compare:
        compare(*options.compare)
    else:
        work = Path(tempfile.mkdtemp(prefix="multiplex-", dir=options.work))
        try:
            chain(work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return 0


def chain(work: Path) -> None:
    """All commands one after the other, each in a process of its own."""
    file, model, tuned = work / "sam3.1_multiplex.pt", work / "model", work / "run"
    itself, convert = ("-m", "scripts.multiplex_full"), ("-m", "convert")
    make_data(work / "data")
    run("make", *itself, "--make", file)
    print(
        f"\n{file.stat().st_size:,} bytes\n\n| command | seconds | peak memory, GB |\n|---|---|---|"
    )
    run("inspect", *convert, "inspect", file)
    run("torch-to-jax", *convert, "torch-to-jax", "--src", file, "--out", model)
    run("jax-to-torch", *convert, "jax-to-torch", "--src", model, "--out", work / "back.pt")
    run("compare", *itself, "--compare", file, work / "back.pt")
    (work / "back.pt").unlink()
    run(
        "train, one LoRA step", "-m", "sam3jax.train", f"init={model}", f"data.train={work / 'data'}",
        f"output={tuned}", "steps=1", "optim.warmup_steps=0", f"lora.targets=[{TARGETS}]", "data.workers=0",
        "loss.mask_chunk=4", "batch_size=1",
    )  # fmt: skip
    run(
        "jax-to-torch of the run",
        *convert,
        "jax-to-torch",
        "--src",
        tuned,
        "--out",
        work / "tuned.pt",
    )
    run("compare", *itself, "--compare", file, work / "tuned.pt")


if __name__ == "__main__":
    sys.exit(main())
