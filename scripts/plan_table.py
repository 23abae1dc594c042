"""The table of docs/memory.md: what a full-size step needs on cards that are not here, and on which it fits.

    python -m scripts.plan_table --minutes 35     compile what is missing, the most useful first; then the table
    python -m scripts.plan_table --minutes 0      the table alone

Every compiled row is a line of docs/plan_rows.jsonl; what is there is not compiled again, and a run that is cut
off loses the row under way. Remove a line to have it compiled anew. Minutes a row: two to five on one core for a
GPU, seven or more for a TPU. Nothing is run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sam3jax.config import Config, parse_config, read_settings
from sam3jax.training import plan, targets

DOCS = Path(__file__).parents[1] / "docs"
STORE, PAGE = DOCS / "plan_rows.jsonl", DOCS / "memory.md"
START, END = "<!-- plan table -->", "<!-- end of the plan table -->"
GB = 1e9
BEHIND = "[transformer.encoder.*,transformer.decoder.*]"
TRAINED = {
    "LoRA r16 everywhere": [],
    "LoRA r16 behind the trunk": [f"lora.targets={BEHIND}"],
    "all parameters": ["train=all"],
}
# What a program needs is a matter of the architecture, whether there is room one of the card.
STANDS_FOR = {
    "h100": ("rtx3060", "l4", "rtx4090", "a100-40", "a100", "h100"),
    "t4": ("t4",),
    "v5e": ("v5e", "v6e"),
}
COLUMNS = {"h100": "NVIDIA, Ampere on", "t4": "T4", "v5e": "TPU"}
SHORT = {"rtx3060": "RTX 3060 12", "l4": "L4 24", "rtx4090": "RTX 4090 24", "a100-40": "A100 40", "a100": "A100 80", "h100": "H100 80", "t4": "T4 16", "v5e": "v5e 16", "v6e": "v6e 32"}  # fmt: skip


class Row(NamedTuple):
    """One step: for a target, what is trained, pictures at once, with masks or boxes alone."""

    target: str
    trained: str
    pictures: int
    masks: bool


EVERYWHERE, BEHIND_TRUNK, ALL = TRAINED
FIRST = (
    Row("h100", EVERYWHERE, 1, True), Row("h100", BEHIND_TRUNK, 1, True), Row("h100", ALL, 1, True),
    Row("t4", EVERYWHERE, 1, True), Row("h100", EVERYWHERE, 4, True), Row("v5e", EVERYWHERE, 1, True),
    Row("l4", EVERYWHERE, 1, True), Row("t4", BEHIND_TRUNK, 1, True), Row("h100", BEHIND_TRUNK, 4, True),
    Row("h100", EVERYWHERE, 1, False), Row("h100", ALL, 4, True), Row("h100", EVERYWHERE, 4, False),
)  # fmt: skip


def rows() -> Iterator[Row]:
    """All of them, the most useful first."""
    yield from FIRST
    for masks in (True, False):
        for pictures in (1, 4):
            for target in STANDS_FOR:
                for trained in TRAINED:
                    if (row := Row(target, trained, pictures, masks)) not in FIRST:
                        yield row


def config_of(row: Row) -> Config:
    """A run at full size: bfloat16, generated pictures, one phrase each."""
    words = [
        "model.compute_dtype=bfloat16", "data.train=shapes", f"data.shapes_train={row.pictures}",
        "data.shapes_valid=1", "data.max_prompts=1", f"batch_size={row.pictures}", *TRAINED[row.trained],
    ]  # fmt: skip
    if not row.masks:
        words.append("loss.masks=false")
    return parse_config(read_settings(words, Config))


def stored(file: Path = STORE) -> dict[Row, dict[str, Any]]:
    """{row: what was compiled}."""
    lines = file.read_text().splitlines() if file.is_file() else []
    found = [json.loads(line) for line in lines]
    return {Row(*(line[name] for name in Row._fields)): line for line in found}


def compile_rows(wanted: Iterable[Row], minutes: float, file: Path = STORE) -> None:
    """Those that are missing, one after another, none begun after so many minutes."""
    begun = time.monotonic()
    for row in wanted:
        if time.monotonic() - begun >= 60 * minutes:
            return
        if row in stored(file):
            continue
        print(f"{row} ...", flush=True)
        needs = plan.needs(config_of(row), targets.target(row.target)[1])
        found = {
            **row._asdict(), "arguments": needs.arguments, "temporaries": needs.temporaries, "flops": needs.flops,
            "host": needs.host, "parameters": needs.trained, "seconds": round(needs.seconds), "jax": jax.__version__,
        }  # fmt: skip
        with file.open("a") as out:
            out.write(json.dumps(found) + "\n")
        print(f"  {_peak(found):.2f} GB in {needs.seconds:.0f} s", flush=True)
        jax.clear_caches()
        gc.collect()


def _peak(found: dict[str, Any]) -> float:
    return (found["arguments"] + found["temporaries"]) / GB


def fits(found: dict[str, Any], card: str) -> bool:
    """With the margin that `sam3jax plan` keeps."""
    return _peak(found) * GB <= plan.USABLE * targets.CARDS[card].memory


def table(done: dict[Row, dict[str, Any]]) -> list[str]:
    """The lines of the page between its marks."""
    lines = [_headline(done, 12, "rtx3060"), _headline(done, 16, "t4"), _headline(done, 16, "v5e"), _headline(done, 24, "l4"), ""]  # fmt: skip
    names = [f"{name} (GB)" for name in COLUMNS.values()]
    lines += [f"| trained | pictures at once | masks | {' | '.join(names)} | fits on |", "|---" * (4 + len(names)) + "|"]  # fmt: skip
    missing = 0
    for masks in (True, False):
        for trained in TRAINED:
            for pictures in (1, 4):
                cells, cards = [], []
                for target, stands_for in STANDS_FOR.items():
                    found = done.get(Row(target, trained, pictures, masks))
                    missing += found is None
                    cells.append("-" if found is None else _cell(found))
                    cards += [SHORT[c] for c in stands_for if found is not None and fits(found, c)]
                if any(cell != "-" for cell in cells):
                    said = ", ".join(cards) or "none of these"
                    lines.append(f"| {trained} | {pictures} | {'yes' if masks else 'no'} | {' | '.join(cells)} | {said} |")  # fmt: skip
    lines.append("")
    if missing:
        lines.append(f"`-` and rows that are left out were not compiled: {missing} of {2 * 2 * 3 * 3} steps.")  # fmt: skip
    return [*lines, *_same_on_ada(done)]


def _cell(found: dict[str, Any]) -> str:
    return f"{_peak(found):.1f} = {found['arguments'] / GB:.1f} + {found['temporaries'] / GB:.1f}"


def _headline(done: dict[Row, dict[str, Any]], gigabytes: int, card: str) -> str:
    """What fits on one card, in words."""
    (target,) = (t for t, cards in STANDS_FOR.items() if card in cards)
    own = {row: found for row, found in done.items() if row.target == target and row.masks}
    said = []
    for trained in TRAINED:
        most = max((r.pictures for r, f in own.items() if r.trained == trained and fits(f, card)), default=0)  # fmt: skip
        if most:
            said.append(f"{trained} ({most} picture{'s' if most > 1 else ''} at once)")
        elif any(r.trained == trained for r in own):
            said.append(f"not {trained}")
    return f"- **{gigabytes} GB ({targets.CARDS[card].name})**, of what was compiled with masks: {'; '.join(said) or 'nothing was compiled'}."


def _same_on_ada(done: dict[Row, dict[str, Any]]) -> list[str]:
    """How far the memory of one architecture stands for another's."""
    pair = [done.get(Row(target, EVERYWHERE, 1, True)) for target in ("h100", "l4")]
    if None in pair:
        return []
    h100, l4 = (_peak(found) for found in pair if found is not None)
    return [
        f"The NVIDIA column is compiled for an H100. Compiled for an L4 its first row needs {l4:.2f} GB in the place "
        f"of {h100:.2f}."
    ]


def write_page(lines: Sequence[str], page: Path = PAGE) -> None:
    """Between the page's marks."""
    before, _, rest = page.read_text().partition(START)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([f"{before}{START}", *lines, f"{END}{after}"]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=35, help="begin no row after so many")
    options = parser.parse_args(arguments)
    compile_rows(rows(), options.minutes)
    write_page(table(stored()))


if __name__ == "__main__":
    main()
