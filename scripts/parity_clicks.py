"""Clicks at full size: sam3's own interactive predictor against JAX on a CPU, with seeded weights.

    python -m scripts.parity_clicks                  # writes docs/parity_clicks.md; under 10 GB
    python -m scripts.parity_clicks --size small     # the same in a minute, writes nothing

Points, boxes, both, a mask shown again; three masks and one; several objects at once. Torch and JAX run one
after the other in processes of their own; the weights pass through `convert`, as a user's would. Needs the
test extra (the sam3 package).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from scripts import parity_full

ROOT = Path(__file__).resolve().parents[1]
SEED = 11
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # objects, prompts
    "a point": (1, dict(points=1)),
    "points": (7, dict(points=4)),
    "a box": (3, dict(points=0, box=True)),
    "a box and points": (3, dict(points=2, box=True)),
    "points and a mask": (5, dict(points=3, mask=True)),
}
HEADER = """# Clicks: parity with torch at full size

Written by `python -m scripts.parity_clicks`: trunk, second neck and interactive heads with {parameters:,}
parameters drawn from a seed (the whole checkpoint), one picture of {image} px, float32. Torch is
`SAM3InteractiveImagePredictor` of the sam3 package; weights go to JAX through `sam3jax convert`. Errors are the
largest absolute difference over the standard deviation of torch's values.

| prompt | objects | masks | logits | predicted IoU |
|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("published", "small"), default="published")
    parser.add_argument("--work", type=Path, help="folder for 8 GB of intermediate files")
    parser.add_argument("--stage", choices=STAGES, help="used by the script itself")
    options = parser.parse_args()
    if options.stage:
        return STAGES[options.stage](options.size, options.work)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        stages = {
            name: parity_full.run_stage(name, options.size, Path(folder), __file__)
            for name in STAGES
        }
        text = report(Path(folder), stages)
    print(text)
    if options.size == "published":
        (ROOT / "docs" / "parity_clicks.md").write_text(text, "utf-8")
    return 0


def torch_stage(size: str, work: Path) -> int:
    """Draw the weights, ask torch's predictor every case, keep everything in files."""
    import torch

    from tests import click_reference, tracker_reference
    from tests import torch_reference as base

    size_ = tracker_reference.PUBLISHED if size == "published" else tracker_reference.SMALL
    detector_size = tracker_reference.DETECTORS[size_]
    if size == "small":  # as many words as a tokenizer of bytes needs
        detector_size = dataclasses.replace(detector_size, vocabulary=1024)
    with parity_full.timed("build"):
        detector = tracker_reference.detector_with_neck(detector_size, SEED).eval()
        model = tracker_reference.tracker(size_, SEED)
        states = {"detector.": detector.state_dict(), "tracker.": model.state_dict()}
        tensors = {prefix + n: t for prefix, state in states.items() for n, t in state.items()}
        kept = {n: t for n, t in tensors.items() if t.is_floating_point() and "attn_mask" not in n and "freqs" not in n}  # fmt: skip
        torch.save(kept, work / "sam3.pt")
    image = torch.from_numpy(base.example(detector_size, 5, images=1, prompts=1)["images"])[0]
    out: dict[str, np.ndarray] = {"image": image.numpy()}
    with parity_full.timed("evaluation"), torch.no_grad():
        predictor = click_reference.image_predictor_of(detector, model, image)
        for number, (objects, asked) in enumerate(CASES.values()):
            prompts = click_reference.random_prompts(size_, objects, seed=7 + number, **asked)
            out |= {f"{number}.{name}": value.numpy() for name, value in prompts.items()}
            for many in (True, False):
                _, ious, low = click_reference.ask_predictor(predictor, prompts, many)
                out |= {f"{number}.{many}.ious": ious.numpy(), f"{number}.{many}.low": low.numpy()}
    parameters = sum(t.numel() for t in kept.values())
    np.savez(work / "torch.npz", parameters=parameters, size=size_.image, **out)
    return 0


def jax_stage(size: str, work: Path) -> int:
    """The same prompts through the converted model; the table's rows."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    from sam3jax.inference.clicking import CLAMP
    from sam3jax.model import Interactive
    from sam3jax.model.interactive import with_padding_token
    from sam3jax.model.mask_decoder import choose
    from sam3jax.weights.model_folder import load_model_folder
    from sam3jax.weights.scope import CLICKS

    with parity_full.timed("load"):
        config, params, _ = load_model_folder(work / "folder", parts=CLICKS.parts)
        params = {k: v for k, v in params.items() if k in (CLICKS.reads or params)}
        params = jax.device_put(params)
    found = dict(np.load(work / "torch.npz"))
    if size == "small":  # `convert` knows the published sizes; windows and heads are in no tensor
        config = small_config()
    model = Interactive(config)
    image = found["image"].transpose(1, 2, 0)[None]
    with parity_full.timed("picture"):
        encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode_image"))
        features = jax.block_until_ready(encode(params, image))
    decode = jax.jit(lambda p, f, *asked: model.apply({"params": p}, f, *asked, method="decode"))
    rows, off = [], lambda a, b: float(np.abs(a - b).max() / b.std())
    with parity_full.timed("prompts"):
        for number, (name, (objects, _)) in enumerate(CASES.items()):
            points, labels = with_padding_token(
                found[f"{number}.points"], found[f"{number}.labels"]
            )
            masks = found.get(f"{number}.masks")
            shown = None if masks is None else masks[:, 0]
            answer = decode(params, features, np.zeros(objects, np.int32), points, labels, shown)
            for many in (True, False):
                low, ious = (np.asarray(x) for x in choose(answer, many, train=False))
                errors = (
                    off(np.clip(low, -CLAMP, CLAMP), found[f"{number}.{many}.low"]),
                    off(ious, found[f"{number}.{many}.ious"]) if ious.size > 1
                    else float(np.abs(ious / found[f"{number}.{many}.ious"] - 1).max()),
                )  # fmt: skip
                rows.append([name, objects, 3 if many else 1, *(f"{e:.1e}" for e in errors)])
    (work / "rows.md").write_text("".join(f"| {' | '.join(map(str, row))} |\n" for row in rows))
    return 0


def small_config() -> Any:
    """The ModelConfig of the small torch models."""
    from tests import bridge, tracker_reference

    size = tracker_reference.SMALL
    return bridge.model_config(
        tracker_reference.DETECTORS[size], mask_decoder_heads=size.decoder_heads,
        mask_decoder_ffn=size.decoder_ffn, mask_decoder_iou_hidden=size.iou_hidden,
        mask_prompt_channels=size.mask_channels,
    )  # fmt: skip


def report(work: Path, stages: dict[str, dict[str, Any]]) -> str:
    found = np.load(work / "torch.npz")
    text = HEADER.format(parameters=int(found["parameters"]), image=int(found["size"]))
    text += (work / "rows.md").read_text()
    text += "\n| process | seconds | peak memory | of which |\n|---|---|---|---|\n"
    for name, stage in stages.items():
        parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in stage["parts"].items())
        text += f"| {name} | {stage['seconds']:.0f} | {stage['peak'] / 1e9:.1f} GB | {parts} |\n"
    return text


STAGES = {"torch": torch_stage, "convert": parity_full.convert_stage, "jax": jax_stage}


if __name__ == "__main__":
    sys.exit(main())
