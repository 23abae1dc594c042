"""Damage every file of a run folder in every way, then open it: `python -m scripts.damage_test FOLDER`.

Opened for predict, evaluate, export, report and to be trained on. Each must answer as for the whole folder, or
say what is wrong; a traceback, or other numbers in silence, is a failure. Ends with a count.

Nothing is computed whose inputs are those of the whole folder: predict, evaluate and export run only where the run
that is read differs in anything, training on is answered by what its first step would be given, and the report,
which reads no checkpoint, is left out for those.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shutil
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from convert import __main__ as convert
from sam3jax import evaluate, predict, report, train
from sam3jax.checksums import of_arrays
from sam3jax.config import dump_config
from sam3jax.errors import exit_status
from sam3jax.viewing import report as page
from sam3jax.weights.run_folder import read_run
from scripts.kill_test import SETTINGS, lines, saved

STEPS = 4
WORDS = [w for w in SETTINGS.split() if not w.startswith(("steps=", "eval_every="))]
WORDS += [
    "eval_every=2",
    "optim.schedule=constant",
    "optim.warmup_steps=1",
    "evaluation.threshold=0.02",
]
CLOCKS = ("tensorboard", ".lock")  # nothing reads them


class Damage(NamedTuple):
    """act(copy): damages a copy of the run. file: the path in the run that it touches."""

    name: str
    file: str
    act: Callable[[Path], None]


def damages(run: Path, other: Path | None = None, every: bool = True) -> Iterator[Damage]:
    """Every kind for every file of a run. other: a run of equal settings and another seed.

    every: False for one file, the largest, of those whose names alone differ (arrays and pictures of a folder), and
    without the state of older checkpoints, which nothing reads.
    """
    older = [f"checkpoints/{step}/state" for step in saved(run)[:-1]]
    for path in sorted(f for f in run.rglob("*") if f.is_file()):
        alike = [f for f in path.parent.iterdir() if f.suffix == path.suffix]
        nameless = path.parent.name == "d" or path.suffix == ".png"
        if not every and nameless and path != max(alike, key=lambda f: (f.stat().st_size, f)):
            continue
        if not every and any(place in str(path) for place in older):
            continue
        file = path.relative_to(run)
        for name, change in CHANGES.items():
            yield Damage(
                f"{name} {file}", str(file), lambda r, f=file, c=change: _rewrite(r / f, c)
            )
        yield Damage(f"deleted {file}", str(file), lambda r, f=file: (r / f).unlink())
        if other is not None and (twin := _twin(path.stat().st_size, other, file)) is not None:
            yield _exchange("another run's", file, other / twin)
        if (step := _of_step(run, file)) is not None:
            yield _exchange("another step's", file, run / step)
        for name, text in TEXTS.get(path.name, {}).items():
            yield Damage(f"{name} {file}", str(file), lambda r, f=file, t=text: _retext(r / f, t))
    for step in saved(run):
        place = f"checkpoints/{step}"
        yield Damage(f"deleted {place}", place, lambda r, p=place: shutil.rmtree(r / p))
        for item in ("weights", "state", "about"):
            inner = f"{place}/{item}"
            yield Damage(f"deleted {inner}", inner, lambda r, p=inner: shutil.rmtree(r / p))
            if other is not None:
                yield _exchange("another run's", Path(inner), other / inner)
            if before := [s for s in saved(run) if s != step]:
                source = run / "checkpoints" / str(before[0]) / item
                yield _exchange("another step's", Path(inner), source)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "first byte flipped": lambda b: _flip(b, 0),
    "byte in the middle flipped": lambda b: _flip(b, len(b) // 2),
    "last byte flipped": lambda b: _flip(b, len(b) - 1),
    "digit changed": lambda b: _digit(b),
    "cut": lambda b: b[: len(b) // 2],
    "emptied": lambda _: b"",
    "zeros": lambda b: bytes(len(b)),
}


def _thresholds(value: Any) -> Callable[[dict], Any]:
    return lambda found: {**found, "thresholds": dict.fromkeys(found["thresholds"], value)}


_JSON: dict[str, Callable[[Any], Any]] = {
    "list in": lambda _: [], "object in": lambda _: {}, "text in": lambda _: "text", "null in": lambda _: None,
}  # fmt: skip
# Whole files of the right syntax that say something else: other types, other versions.
TEXTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "validation.json": {
        **_JSON,
        **{f"thresholds of {v!r} in": _thresholds(v) for v in (9.0, -1, float("nan"), "0.5", True, None)},
        "no checksum, score as text in": lambda f: {"metrics": f["metrics"], "thresholds": {}, "score": "1"},
    },
    "metadata": {**_JSON, "no checksum in": lambda f: {k: v for k, v in f.items() if k not in ("crc32", "checksums")}},
    "evaluation.json": {**_JSON, "metrics as text in": lambda f: {**f, "metrics": "none"}},
    "predictions.json": {**_JSON, "form of predict in": lambda f: {"annotations": f}},
    "summary.json": _JSON,
    ".checksums.json": _JSON,
    "config.yaml": {
        "setting of a later version in": lambda t: t + "later: 1\n",
        "other lora.alpha in": lambda t: re.sub(r"alpha: [\d.]+", "alpha: 33.0", t),
        "no checksum in": lambda t: t.partition("\n")[2],
        "other id in": lambda t: re.sub(r"\nid: \w+", "\nid: 0123456789abcdef", t),
        "no id in": lambda t: re.sub(r"\nid: \w+", "\nid: null", t),
    },
}  # fmt: skip


def _flip(content: bytes, place: int) -> bytes:
    if not content:
        return b"\x01"
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


def _digit(content: bytes) -> bytes:
    """The last digit behind a point, as a wrong number of the right form."""
    found = list(re.finditer(rb"\d\.\d*(\d)", content))
    if not found:
        return _flip(content, len(content) * 2 // 3)
    place = found[len(found) // 2].start(1)
    return content[:place] + str((int(content[place : place + 1]) + 5) % 10).encode() + content[place + 1 :]  # fmt: skip


def _rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def _retext(file: Path, change: Callable[[Any], Any]) -> None:
    text = file.read_text()
    file.write_text(
        change(text) if file.suffix == ".yaml" else json.dumps(change(json.loads(text)))
    )


def _exchange(whose: str, file: Path, source: Path) -> Damage:
    def act(run: Path) -> None:
        if source.is_dir():
            shutil.rmtree(run / file)
            shutil.copytree(source, run / file)
        else:
            shutil.copyfile(source, run / file)

    return Damage(f"{whose} {file}", str(file), act)


def _twin(size: int, other: Path, file: Path) -> Path | None:
    """The file of the same place in another run; data files, whose names are random, by their size in bytes."""
    if (other / file).is_file():
        return file
    theirs = [f for f in (other / file.parent).glob("*") if f.is_file()]
    found = min(theirs, key=lambda f: abs(f.stat().st_size - size), default=None)
    return None if found is None else found.relative_to(other)


def _of_step(run: Path, file: Path) -> Path | None:
    if file.parts[0] != "checkpoints" or not file.parts[1].isdigit():
        return None
    steps = [s for s in saved(run) if s != int(file.parts[1])]
    inner = Path(*file.parts[2:])
    size = (run / file).stat().st_size
    return _twin(size, run, Path("checkpoints", str(steps[0]), inner)) if steps else None


class Answer(NamedTuple):
    """value: what must stay equal. said: lines on stdout and stderr."""

    status: int
    value: Any
    said: str


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same answer to the same question, without computing it again."""
    answers: dict[str, Any] = {}

    def call(*given: Any, **named: Any) -> Any:
        key = repr((given, named))
        if key not in answers:
            answers[key] = function(*given, **named)
        return answers[key]

    return call


class FirstStepError(Exception):
    """Training reached its first step; what that was given, as checksums."""


def _first_step(state: Any, frozen: Any, prepared: Any, batch: Any) -> Any:
    raise FirstStepError(of_arrays((state, frozen, prepared, batch)))


def _read(run: Path) -> Any:
    """All that predict and evaluate take from a run."""
    found = read_run(run)
    config = dump_config(found.config)
    return (
        of_arrays((found.variables, found.base_variables)),
        found.thresholds,
        found.step,
        found.metrics,
        config,
    )


def opened(name: str, run: Path, place: Path, words: list[str], picture: Path) -> Answer:
    """Open a run folder by one command, in this process."""
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    commands: dict[str, Callable[[], int]] = {
        "predict": lambda: predict.main([str(picture), "--run", str(run), "--phrase", "red circle", "--no-overlay", "--output", str(out)]),
        "export": lambda: convert.main(["jax-to-torch", "--src", str(run), "--out", str(out / "x.safetensors")]),
        "report": lambda: report.main([str(run)]),
        "evaluate": lambda: evaluate.main(["--run", str(run), "--output", str(out)]),
        "resume": lambda: train.main([*words, f"output={run}", f"steps={STEPS + 1}"]),
        "finished": lambda: train.main([*words, f"output={run}", f"steps={STEPS}"]),
        "read": lambda: exit_status(lambda: found.append(_read(run))),
    }  # fmt: skip
    stream, found, real = io.StringIO(), [], train.make_train_step
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        train.make_train_step = lambda *_, **__: _first_step
        try:
            status, value = commands[name](), None
            value = (found[0] if found else VALUES[name](run, out)) if status == 0 else None
        except FirstStepError as step:
            status, value = 0, (*step.args, repr(sorted(lines(run).items())))
        except Exception:
            status, value = -1, None
            traceback.print_exc()
        finally:
            train.make_train_step = real
    return Answer(status, value, stream.getvalue())


def _predicted(run: Path, out: Path) -> Any:
    return json.loads((out / "predictions.json").read_text())["annotations"]


def _exported(run: Path, out: Path) -> Any:
    return zlib.crc32((out / "x.safetensors").read_bytes())


def _reported(run: Path, out: Path) -> Any:
    return re.sub(r"(id=|#|url\(#)[\w-]+", "", (run / "report.html").read_text())


def _evaluated(run: Path, out: Path) -> Any:
    found = json.loads((out / "evaluation.json").read_text())
    return found["metrics"], found["thresholds"], json.loads((out / "predictions.json").read_text())


def _finished(run: Path, out: Path) -> Any:
    found = json.loads((run / "summary.json").read_text())
    return repr(sorted(lines(run).items())), found["final"], found["best"]


VALUES: dict[str, Callable[[Path, Path], Any]] = {
    "predict": _predicted, "export": _exported, "report": _reported, "evaluate": _evaluated,
    "resume": _finished, "finished": _finished,
}  # fmt: skip


def judged(found: Answer, whole: Answer, file: str) -> str:
    """`same`, `refused` or `said` are well; `traceback`, `silent` and `unclear` are not."""
    if found.status == -1 or "Traceback (most recent call last)" in found.said:
        return "traceback"
    if found.status:
        errors = [line for line in found.said.splitlines() if line.startswith("error: ")]
        return "refused" if found.status == 2 and len(errors) == 1 else "unclear"
    if found.value == whole.value:
        return "same"
    names = {Path(file).name, file, "/".join(Path(file).parts[:2])}
    told = [line for line in found.said.splitlines() if line not in whole.said]
    page = str(found.value) if isinstance(found.value, str) else ""
    if "not as sam3jax wrote it" in page:
        return "said"
    words = ("note: ", "not as ")
    said = any(w in line for line in (*told, page) for w in words) and any(n in line for line in (*told, page) for n in names)  # fmt: skip
    return "said" if said else "silent"


def main() -> int:
    """Returns 1 where a damage gave a traceback or other numbers in silence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="new folder for the runs")
    parser.add_argument("--only", default="", help="kinds whose name holds this regular expression")
    parser.add_argument("--every", action="store_true", help="every file of arrays and pictures")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    page.curves = _remembered(page.curves)  # most of a report's time
    picture = options.folder / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    # Each copy lies at the same place: what a run says of its folder is then equal.
    place = options.folder / "place"
    run, whole, other = place / "run", options.folder / "whole", options.folder / "other"
    for source, seed in ((whole, 0), (other, 1)):
        if not source.is_dir():
            if train.main([*WORDS, f"output={run}", f"steps={STEPS}", f"seed={seed}"]):
                return 1
            run.rename(source)

    def ask(act: Callable[[Path], None], file: str = "") -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        for name in ("read", "predict", "evaluate", "export", "report", "finished", "resume"):
            if name in ("predict", "evaluate", "export") and expected and answers["read"].value == expected["read"].value:  # fmt: skip
                answers[name] = Answer(0, expected[name].value, answers["read"].said)
                continue
            if name in ("report", "finished") and file.startswith("checkpoints"):
                continue
            if name in ("read", "finished", "resume"):  # the one before wrote into the run
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(whole, run)
                act(run)
            answers[name] = opened(name, run, place, WORDS, picture)
        return answers

    expected: dict[str, Answer] = {}
    expected = ask(lambda _: None)
    again = ask(lambda _: None)
    for name, answer in expected.items():
        if answer.status or not answer.value or judged(again[name], answer, "") != "same":
            print(
                f"{name} of the whole run: status {answer.status}, not the same twice\n{answer.said}"
            )
            return 1
    counts: Counter[str] = Counter()
    kinds = bad = 0
    every = damages(whole, other, options.every)
    # The newest checkpoint, then the files beside the checkpoints, then older checkpoints.
    for damage in sorted(every, key=lambda d: (f"checkpoints/{STEPS}" not in d.file, d.file)):
        if not re.search(options.only, damage.name):
            continue
        found = ask(damage.act, damage.file)
        verdicts = {n: judged(a, expected[n], damage.file) for n, a in found.items()}
        counts.update(verdicts.values())
        kinds += 1
        wrong = {n for n, v in verdicts.items() if v in ("traceback", "silent", "unclear")}
        bad += bool(wrong)
        print(f"{kinds} {damage.name}: {', '.join(f'{n} {v}' for n, v in verdicts.items())}", flush=True)  # fmt: skip
        for name in wrong:
            print(f"  {name}: " + "\n  ".join(found[name].said.splitlines()[-12:]), flush=True)
    print(f"{kinds} kinds of damage, {kinds - bad} well; openings: {dict(counts)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
