"""report.html of a run folder: one file that opens anywhere, without network.

Reads what lies in the folder and leaves out what does not: metrics.jsonl (curves), evaluation.json,
predictions.json and base_predictions.json, clicks.json and predictions/ (tables and pictures), summary.json,
config.yaml.
`python -m sam3jax.report RUN` writes it anew.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from PIL import Image

from sam3jax.checksums import record_files
from sam3jax.config import ConfigError, load_config
from sam3jax.data.coco import Dataset
from sam3jax.data.datasets import open_datasets
from sam3jax.data.describe import describe
from sam3jax.data.pictures import DataError
from sam3jax.data.video_sets import open_frames, read_pictures
from sam3jax.errors import UserError
from sam3jax.files import write_text
from sam3jax.viewing import click_results, diagnosis, draw, tables
from sam3jax.viewing.charts import curves
from sam3jax.viewing.meanings import by_importance, less_is_better, meaning
from sam3jax.viewing.page import page
from sam3jax.viewing.run_files import by_picture, damage, not_as_written, read_json
from sam3jax.viewing.shown import Shown

_PICTURES = 4  # best, worst and most different, each
_POINTS = 400  # of a curve: more cannot be seen
_TOGETHER = {"cgF1": "concept", "pmF1": "concept", "IL_MCC": "concept",
             "false_alarms": "false alarms", "false_alarms_empty": "false alarms",
             "precision": "at the threshold", "recall": "at the threshold"}  # fmt: skip
_FIRST = ("segm", "bbox", "concept", "at the threshold", "false alarms", "segm by size",
          "bbox by size", "loss", "loss/final", "loss/auxiliary", "loss/o2m", "rate", "grad_norm",
          "images_per_second")  # fmt: skip
_TILES = ("segm/AP", "segm/AP50", "bbox/AP", "cgF1", "recall", "false_alarms")
_COLUMNS = {"instances": "n", "AP": "AP", "AP50": "AP50", "AP75": "AP75", "precision": "precision",
            "recall": "recall", "F1": "F1", "false_alarms": "false alarms",
            "best_threshold": "best threshold"}  # fmt: skip

_OPEN = {
    "clips": open_frames,
    "clicks": read_pictures,
}  # of tasks that read more than pictures and phrases
REPORT = "report.html"
_OF_A_RUN = ("config.yaml", "metrics.jsonl", "evaluation.json", "summary.json", "demo.json")

Series = dict[str, list[tuple[float, float]]]


def write_report(run: str | Path, datasets: Mapping[str, Dataset] | None = None) -> Path:
    """Write report.html into a run folder; returns its path. Raises DataError where it is none.

    datasets: name -> data set for the summary, the evaluated one under "valid"; default: those of
    the run's config, or a remark where they are no longer there.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise DataError(f"no run folder {folder}: give the folder that training wrote")
    if not any((folder / name).is_file() for name in _OF_A_RUN):
        raise DataError(
            f"{folder} is no run folder: it holds none of {', '.join(_OF_A_RUN)}; give the folder that training wrote"
        )
    damaged = damage(folder)
    try:
        html = _page_of(folder, datasets, damaged)
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        if isinstance(error, UserError) or not damaged:
            raise
        raise DataError(f"{not_as_written(folder, damaged)} ({type(error).__name__})") from error
    write_text(folder / REPORT, html)
    record_files(folder, REPORT)
    return folder / REPORT


def _page_of(folder: Path, datasets: Mapping[str, Dataset] | None, damaged: Sequence[str]) -> str:
    evaluation = read_json(folder / "evaluation.json", {})
    remark = ""
    if datasets is None:
        datasets, remark = _datasets(folder)
    sections = [
        ("Damage", tables.note(not_as_written(folder, damaged)) if damaged else ""),
        ("Results", _tiles(evaluation) + _base_against_tuned(evaluation)),
        ("Clicks", click_results.clicks(folder, evaluation, tables.table, _jpeg)),
        ("Demo", _demo(folder)),
        ("Categories", _categories(evaluation)),
        ("Phrases", diagnosis.phrases(evaluation.get("diagnosis", {}), tables.table)),
        (
            "Labels",
            diagnosis.labels(evaluation.get("diagnosis", {}), datasets.get("valid"), _inline),
        ),
        ("Curves", _curves(read_curves(folder / "metrics.jsonl"))),
        ("Pictures", _pictures(folder, evaluation, datasets.get("valid")) or tables.note(remark)),
        ("Data", _data(datasets) or tables.note(remark)),
        ("Run", _summary(read_json(folder / "summary.json", {}))),
        ("Configuration", _config(folder / "config.yaml")),
    ]
    body = "\n".join(
        f'<section id="{name.lower()}"><h2>{name}</h2>\n{html}</section>'
        for name, html in sections
        if html
    )
    links = " ".join(f'<a href="#{name.lower()}">{name}</a>' for name, html in sections if html)
    step = f", step {evaluation['step']}" if "step" in evaluation else ""
    return page(
        title=folder.resolve().name,
        step=step,
        data=tables.without_places(str(evaluation.get("data", ""))),
        links=Markup(links),  # made here, of fixed words
        body=Markup(body),  # made by the functions below, which escape what they are given
    )


def read_curves(file: Path) -> dict[str, Series]:
    """Chart -> line -> points (step, value), from one JSON object per logged step.

    A resumed run may log a step twice: the later line counts. A last line cut off is left out.
    """
    values: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        split = entry.pop("split", "train")
        step = entry.pop("step", None)
        for name, value in entry.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if step is not None and number and math.isfinite(value):
                values[split, name][step] = value
    charts: dict[str, Series] = defaultdict(dict)
    for (split, name), points in values.items():
        chart, line = _place(name)
        if split != "train" and line in charts[chart]:
            line = f"{line} ({split})"
        charts[chart][line] = _thinned(sorted(points.items()))
    return dict(sorted(charts.items(), key=lambda item: (_rank(item[0]), item[0])))


def _place(name: str) -> tuple[str, str]:
    """(chart, line) of a logged name: loss_ce_aux_0_o2m is line "aux 0 o2m" of chart loss_ce."""
    prefix, _, last = name.rpartition("/")
    if prefix in ("segm", "bbox") and "_" in last:
        return f"{prefix} by size", last
    if prefix or name in _TOGETHER:
        return prefix or _TOGETHER[name], last
    layer = re.search(r"(_aux_\d+)?(_o2m)?$", name)
    where = layer.group() if layer else ""
    return name.removesuffix(where), where.replace("_", " ").strip() or name


def _rank(chart: str) -> int:
    """Place of a chart among those that everybody wants to see; beyond them for the others."""
    return _FIRST.index(chart) if chart in _FIRST else len(_FIRST)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about _POINTS of them, first and last kept."""
    if len(points) <= _POINTS:
        return points
    return points[: -1 : -(-len(points) // _POINTS)] + points[-1:]


def _curves(charts: Mapping[str, Series]) -> str:
    drawn: dict[bool, list[str]] = {True: [], False: []}
    for chart, series in charts.items():
        values = [v for points in series.values() for _, v in points]
        wide = chart.startswith("loss") and min(values) > 0 and max(values) > 20 * min(values)
        for part, lines in enumerate(_split(series)):
            title = chart if not part else f"{chart} ({part + 1})"
            if len(lines) == 1 and next(iter(lines)) != title:
                title = f"{title}: {next(iter(lines))}"
            svg = curves(lines, title=title, logarithmic=wide)
            drawn[chart in _FIRST].append(f'<figure class="chart">{svg}</figure>')
    if not charts:
        return ""
    main, others = (f'<div class="charts">{"".join(drawn[k])}</div>' for k in (True, False))
    if not drawn[False]:
        return main
    return f"{main}<details><summary>everything else that was logged</summary>{others}</details>"


def _split(series: Series, most: int = 8) -> Iterator[Series]:
    names = list(series)
    for start in range(0, len(names), most):
        yield {name: series[name] for name in names[start : start + most]}


def _tiles(evaluation: Mapping[str, Any]) -> str:
    metrics, base = evaluation.get("metrics", {}), evaluation.get("base", {}).get("metrics", {})
    tiles = []
    for name in _TILES:
        if name in metrics:
            before = f"<small>base {base[name]:.3f}</small>" if name in base else ""
            tiles.append(f"<div><span>{name}</span><b>{metrics[name]:.3f}</b>{before}</div>")
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _base_against_tuned(evaluation: Mapping[str, Any]) -> str:
    metrics, base = evaluation.get("metrics", {}), evaluation.get("base", {}).get("metrics", {})
    if not metrics:
        return ""
    sure, moved = (
        evaluation.get("uncertainty", {}),
        evaluation.get("compare", {}).get("uncertainty", {}),
    )
    rows = []
    for name in by_importance([name for name in metrics if not name.endswith("/objects")]):
        row = [name, tables.number(metrics[name], name) + tables.between(sure.get(name))]
        if base:
            row[1:1] = [tables.number(base.get(name), name)]
            worse = less_is_better(name)
            change = tables.change(
                base.get(name), metrics[name], moved.get(name), worse_is_more=worse
            )
            row.append(change + tables.between(moved.get(name), signed=True))
        words = Markup('<span class="words">{}</span>').format(meaning(name))
        rows.append([*row, words])
    head = ["metric", "base", "tuned", "change"] if base else ["metric", evaluation.get("weights", "")]  # fmt: skip
    n = len(evaluation.get("pictures", ())) or evaluation.get("measured", {}).get("pictures", 0)
    drawn = (
        f"Small figures: the middle 95 % over {n:,} pictures drawn again with replacement. A change whose range "
        "holds 0 has no colour: it may be chance. "
    )
    note = (drawn if sure else "") + diagnosis.certainty(evaluation)
    return tables.table([*head, ""], rows) + tables.note(note)


def _categories(evaluation: Mapping[str, Any]) -> str:
    rows = evaluation.get("per_category", ())
    if not rows:
        return ""
    kind = "segm" if any("segm/AP" in row for row in rows) else "bbox"
    base = {row["category"]: row for row in evaluation.get("base", {}).get("per_category", ())}
    head = ["category", *_COLUMNS.values(), *(["base AP", "change"] if base else [])]
    table = []
    for row in sorted(rows, key=lambda r: -r.get(f"{kind}/AP", -1.0)):
        cells = [row["category"]]
        cells += [tables.number(row.get(f"{kind}/{key}", row.get(key))) for key in _COLUMNS]
        if base:
            before = base.get(row["category"], {}).get(f"{kind}/AP")
            cells += [tables.number(before), tables.change(before, row.get(f"{kind}/AP"))]
        table.append(cells)
    what = "masks" if kind == "segm" else "boxes"
    return tables.table(head, table) + tables.note(
        f"AP of {what}; precision, recall, F1 at IoU .5 and score {rows[0].get('threshold', 0.5):.2f}. Pictures below "
        "show what `predict` shows: finds above the best threshold of their phrase, each thing once."
    )


def _demo(folder: Path) -> str:
    """What a demo measured on pictures or videos that it made itself, and what it drew of them."""
    rows = read_json(folder / "demo.json", {}).get("results", {})
    if not rows:
        return ""
    names = list(next(iter(rows.values())))
    table = tables.table(
        ["held out", *names], [[n, *map(tables.number, r.values())] for n, r in rows.items()]
    )
    shown = []
    for film in sorted(folder.glob("demo*.mp4")):
        source = "data:video/mp4;base64," + base64.b64encode(film.read_bytes()).decode("ascii")
        shown.append(f'<video controls loop muted playsinline src="{source}"></video>')
    for picture in sorted(folder.glob("demo*.png")):
        with Image.open(picture) as image:
            shown.append(
                f'<figure><img loading="lazy" alt="{escape(picture.stem)}" src="{_jpeg(image)}"></figure>'
            )
    return f'{table}<div class="wide">{"".join(shown)}</div>'


def _pictures(folder: Path, evaluation: Mapping[str, Any], dataset: Dataset | None) -> str:
    scored = evaluation.get("pictures", ())
    if dataset is None or not scored:
        return ""
    tuned = by_picture(read_json(folder / "predictions.json", []))
    base = by_picture(read_json(folder / "base_predictions.json", []))
    shown = Shown.told(evaluation)
    worst = scored[:_PICTURES]
    best = [p for p in reversed(scored) if p not in worst][:_PICTURES]
    changed = evaluation.get("compare", {}).get("pictures", ())
    blocks = []
    for title, chosen in (
        ("Best", best),
        ("Worst", worst),
        ("Where base and tuned differ most", changed[:_PICTURES]),
    ):
        drawn = [_picture(p, dataset, tuned, base, shown) for p in chosen]
        if any(drawn):
            blocks.append(f"<h3>{title}</h3>{''.join(drawn)}")
    return "".join(blocks)


def _picture(
    scored: Mapping[str, Any],
    dataset: Dataset,
    tuned: Mapping[Any, Sequence],
    base: Mapping[Any, Sequence],
    shown: Shown,
) -> str:
    """truth, base where there is one, tuned: images of their own, so that a narrow window stacks them."""
    record = next((i for i in dataset.images if i.id == scored["id"]), None)
    if record is None:
        return ""
    try:
        image = record.open()
    except DataError as error:
        return tables.note(str(error))
    names = dataset.categories
    parts = [("truth", draw.true_instances(record, names))]
    if base:
        found = draw.found_instances(base.get(record.id, ()), names, replace(shown, thresholds={}))
        parts.append(("base", found))
    parts.append(("tuned", draw.found_instances(tuned.get(record.id, ()), names, shown)))
    figures = "".join(
        f'<figure><img loading="lazy" alt="{name}" '
        f'src="{_inline(draw.colour_like(parts[0][1], instances), image)}">'
        f"<figcaption>{name}: {len(instances)}</figcaption></figure>"
        for name, instances in parts
    )
    change = f" (base {scored['base']:.2f})" if "base" in scored else ""
    title = f"{escape(record.file.name)} · F1 {scored['F1']:.2f}{change}"
    return f'<div class="picture"><h4>{title}</h4><div class="parts">{figures}</div></div>'


def _inline(instances: Sequence[draw.Instance], image: Image.Image) -> str:
    return _jpeg(draw.overlay(image, instances, smallest=480, largest=480))


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=82, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _data(datasets: Mapping[str, Dataset]) -> str:
    blocks = []
    for name, dataset in datasets.items():
        lines = escape(tables.without_places("\n".join(describe(dataset))))
        place = escape(tables.without_places(dataset.name))
        blocks.append(f"<h3>{escape(name)}: {place}</h3><pre>{lines}</pre>")
    return "".join(blocks)


def _summary(summary: Mapping[str, Any]) -> str:
    rows = [[name, tables.number(value)] for name, value in _flat(summary)]
    return (
        f"<details open><summary>summary.json</summary>{tables.table(['', ''], rows)}</details>"
        if rows
        else ""
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} · ")
        elif not isinstance(value, list):
            yield f"{prefix}{name}", value


def _config(file: Path) -> str:
    if not file.is_file():
        return ""
    text = escape(tables.without_places(file.read_text(errors="replace")))
    return f"<details><summary>config.yaml</summary><pre>{text}</pre></details>"


def _datasets(folder: Path) -> tuple[dict[str, Dataset], str]:
    file = folder / "config.yaml"
    if not file.is_file():
        return {}, ""
    try:
        config = load_config(file)
        train, valid = _OPEN.get(config.task, open_datasets)(config)
    except (DataError, ConfigError) as error:
        return {}, f"The data cannot be read any more: {error}"
    return {"train": train, **({"valid": valid} if valid is not None else {})}, ""
