"""A run, or a model folder, as StableHLO: `python -m sam3jax.export --run RUN --out DIR --phrase "glass bottle"`.

What is written runs with jax alone, on CPU, GPU and TPU; README.md in the folder shows how. For torch and
transformers see `sam3jax convert`.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("export"))

import numpy as np

from sam3jax.errors import exit_status
from sam3jax.files import FileError, make_folder
from sam3jax.inference.exported import write_programs
from sam3jax.model import Sam3
from sam3jax.options import parse
from sam3jax.viewing.asking import check_phrase, phrase_list
from sam3jax.weights.model_folder import load_model_folder
from sam3jax.weights.run_folder import read_run

_README = """# A SAM 3 detector as StableHLO

Made by `sam3jax export`. It needs jax, flatbuffers, numpy, pillow and safetensors, nothing else.

```python
import json
import jax
import numpy as np
from jax import export
from PIL import Image
from safetensors.flax import load_file

about = json.load(open("model.json"))
weights = load_file("weights.safetensors")
image, text, detect = (
    jax.jit(export.deserialize(bytearray(open(f"{name}.stablehlo", "rb").read())).call)
    for name in ("image", "text", "detect")
)
picture = Image.open("photograph.jpg").convert("RGB")
size, boxes = about["image_size"], about["boxes"]
pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))[None]
phrase = next(iter(about["tokens"]))
features, valid = text(weights, np.array([about["tokens"][phrase]], np.int32))
none = np.zeros((1, boxes, 4), np.float32), np.zeros((1, boxes), np.int32), np.zeros((1, boxes), bool)
scores, found, masks = detect(weights, image(weights, pixels), features, valid, *none)
for score, box in zip(scores, found * np.tile(picture.size, 2)):  # centre x, centre y, width, height
    if score > 0.5:
        print(phrase, float(score), box)
```

SAM 3's weights, and what is tuned from them, stand under the SAM License.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the programs as the command line says; returns the exit status."""
    options = parse("export", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    out = Path(options.out)
    if importlib.util.find_spec("flatbuffers") is None:
        raise FileError("programs are written with flatbuffers: pip install sam3jax[export]")
    if out.exists():
        raise FileError(f"{out} exists already: give --out a new folder")
    nms = None
    if options.model:
        config, params, tokenizer = load_model_folder(options.model, dtype=np.float32)
        model, variables = Sam3(config), {"params": params}
    else:
        run = read_run(options.run)
        model, tokenizer, nms = run.model, run.tokenizer, run.config.evaluation.nms
        variables = run.base_variables if options.base else run.variables
    for phrase in options.phrase and phrase_list(options.phrase):
        check_phrase(phrase, tokenizer)
    make_folder(out)
    try:
        write_programs(out, model, variables, tokenizer, options.phrase, limit=options.detections, nms=nms)  # fmt: skip
        (out / "README.md").write_text(_README, encoding="utf-8")
    except BaseException:  # nothing half-written stays
        shutil.rmtree(out, ignore_errors=True)
        raise
    size = sum(f.stat().st_size for f in out.iterdir())
    print(f"{out}: {size / 1e6:,.1f} MB; README.md there shows how to run it")
