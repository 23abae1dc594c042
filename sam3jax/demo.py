"""The demo: `python -m sam3jax.demo` teaches a tiny SAM 3 five concepts it has never seen.

It starts from the model inside the package, which knows coloured shapes (configs/shapes_base.yaml),
trains LoRA adapters on other shapes, colours and patterns, and on a few of the old ones so that the
rest is not forgotten, like any run. Then it asks the base and the tuned model about pictures that
neither has seen:

    new concepts        what was taught
    phrases permuted    every concept asked by another one's name: it must not be found
    old concepts        what the base knew: it must not be forgotten

Writes a run folder, in it demo.json and demo.png. `--video`: see `demo_video`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("demo"))

from sam3jax.config import Config, load_config
from sam3jax.data.coco import Dataset
from sam3jax.data.shapes import shapes_dataset
from sam3jax.demo_video import VIDEOS, demo_video, print_results
from sam3jax.errors import exit_status
from sam3jax.evaluation.ask import detections_to_keep, evaluate_run
from sam3jax.evaluation.metrics import Evaluation
from sam3jax.files import write_json
from sam3jax.inference.detector import Detector
from sam3jax.options import CLIPS_DEMO, DEMO, parse
from sam3jax.train import train
from sam3jax.training.mesh import local_mesh
from sam3jax.viewing import draw
from sam3jax.viewing.shown import Shown
from sam3jax.weights.run_folder import Run, read_run

NEW, OLD = "new", "seen"  # groups of concepts, sam3jax.data.shapes; OLD is what the base was taught
PICTURES = {NEW: 100, OLD: 40}
SEED = 7  # of these pictures: no setting of the demo was chosen by looking at them
DRAWN = 4  # pictures


def demo(config_file: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train, evaluate, draw; returns what demo.json holds. Raises what `train` raises."""
    start = time.perf_counter()
    config = load_config(config_file, overrides)
    train(config)
    run = read_run(config.output)
    new, old = (_held_out(run, group) for group in (NEW, OLD))
    keep = max(detections_to_keep(data, run.config.evaluation) for data in (new, old))
    detector = Detector(run.model, run.config.evaluation, local_mesh(), limit=keep)

    def ask(data: Dataset, base: bool) -> Evaluation:
        return evaluate_run(run, detector, data, base=base)

    found = {name: ask(new, name == "base") for name in ("base", "tuned")}
    results = {
        "new concepts, base": _figures(found["base"]),
        "new concepts, tuned": _figures(found["tuned"]),
        "phrases permuted, tuned": _figures(ask(permuted(new), False)),
        "old concepts, base": _figures(ask(old, True)),
        "old concepts, tuned": _figures(ask(old, False)),
    }
    results = {"seconds": time.perf_counter() - start, "results": results}
    write_json(run.path / "demo.json", results)
    _draw(run, new, found).save(run.path / "demo.png")
    return results


def _held_out(run: Run, group: str) -> Dataset:
    changes = {"shapes_concepts": group, "shapes_seed": SEED, "shapes_valid": PICTURES[group]}
    return shapes_dataset("test", run.config.data.model_copy(update=changes))


def permuted(dataset: Dataset) -> Dataset:
    """The same data, every category under the name of the next one."""
    ids, names = dataset.categories.keys(), list(dataset.categories.values())
    return dataclasses.replace(dataset, categories=dict(zip(ids, names[1:] + names[:1])))


def _figures(found: Evaluation) -> dict[str, float]:
    """Mask AP50; at the score threshold: recall where the concept is, silence where it is not."""
    m = found.metrics
    return {"AP50": m["segm/AP50"], "recall": m["recall"], "silence": 1 - m["false_alarms"]}


def _draw(run: Run, data: Dataset, found: dict[str, Evaluation]) -> Any:
    """truth | base | tuned, of the first pictures with something to find."""
    records = [r for r in data.images if r.annotations][:DRAWN]
    rows = []
    for record in records:
        parts = [("truth", draw.true_instances(record, data.categories))]
        for name, evaluation in found.items():
            here = [p for p in evaluation.predictions if p["image_id"] == record.id]
            chosen = run.thresholds if name == "tuned" else None
            shown = Shown.by(run.config.evaluation, chosen)
            parts.append((name, draw.found_instances(here, data.categories, shown)))
        rows.append(draw.panels(record.open(), parts, height=300))
    return draw.column(rows)


def _print(results: dict[str, Any], folder: Path) -> None:
    print(f"\n{'held-out pictures':<26}{'AP50':>8}{'recall':>9}{'silence':>9}")
    for name, row in results["results"].items():
        print(f"{name:<26}{row['AP50']:>8.3f}{row['recall']:>9.3f}{row['silence']:>9.3f}")
    print(f"{results['seconds']:.0f} seconds. Pictures: {folder / 'demo.png'}, {folder / 'report.html'}")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo as the command line says; returns the exit status."""
    options = parse("demo", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    run, show = (demo_video, print_results) if options.video else (demo, _print)
    file = options.config or (CLIPS_DEMO if options.video else DEMO)
    config = load_config(file, options.overrides)
    asked = f"{VIDEOS} videos" if options.video else f"{sum(PICTURES.values())} pictures"
    print("\n".join(plan(config, asked)), flush=True)
    show(run(file, options.overrides), Path(config.output))


def plan(config: Config, asked: str) -> list[str]:
    """What a demo is going to do, in lines for people. asked: what the models are asked about."""
    video = config.task == "clips"
    what = "frames of generated videos" if video else "generated pictures"
    return [
        f"The demo takes {'ten to fifteen' if video else 'four to six'} minutes on two CPU cores:",
        f"  1. {config.steps} steps of {config.batch_size} {what} teach the model new concepts; every "
        f"{config.save_every} steps are saved, and the same command continues",
        f"  2. the model is asked, as it was and as trained, about {asked} that it has never seen",
        f"  3. the table of both is printed; pictures and report.html lie in {config.output}",
    ]
