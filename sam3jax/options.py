"""What each command takes: the parsers, without anything heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence

from sam3jax.files import at_home

Parser = argparse.ArgumentParser


def parse(command: str, arguments: Sequence[str] | None, prog: str = "") -> argparse.Namespace:
    """The options of a command; ends the program with status 2 where they are wrong, 0 after --help.

    arguments: None stands for those of the process. Settings and options may be mixed, and `--steps 100`
    means `steps=100`.
    """
    parser = Parser(prog=prog or f"python -m sam3jax.{command}", allow_abbrev=False)
    PARSERS[command](parser)
    # `--box -5,10,40,30` is a box that reaches over the edge, and no option.
    parser._negative_number_matcher = re.compile(r"-[\d.][\d.,e-]*$")
    words = [at_home(w) for w in (sys.argv[1:] if arguments is None else arguments)]
    if command in TAKE_SETTINGS:
        words = _settings_as_words(words, parser)
    for flag in (word.partition("=")[0] for word in words):
        if re.match(r"--[a-z]", flag) and flag not in parser._option_string_actions:
            parser.error(f"there is no option {flag}{_meant(flag, parser)}")
    return parser.parse_intermixed_args(words)


def _meant(flag: str, parser: Parser) -> str:
    """The option that is spelt most like this one, for a sentence."""
    close = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _train(parser: Parser) -> None:
    parser.description = (
        "Train a SAM 3 detector. An interrupted run continues with the same command."
    )
    parser.epilog = (
        "For example: sam3jax train --config lora_coco init=sam3.pt data.train=my_folder output=runs/mine. Names of "
        "the package need no path; a name that does not exist lists them."
    )
    parser.add_argument("--config", help="YAML file, or a name such as lora_coco")
    _add_settings(parser)
    _add_hosts(parser, "the run folder on a disk that all of them see")


def _evaluate(parser: Parser) -> None:
    parser.description = "Measure a run on a COCO data set."
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--data", help="COCO folder; default: the run's validation data")
    parser.add_argument("--split", help="default: the run's validation split")
    parser.add_argument("--base", action="store_true", help="the model that the run started from")
    parser.add_argument("--compare", action="store_true", help="base against tuned")
    parser.add_argument("--probe", metavar="DATA", help="second data set that must not degrade")
    parser.add_argument("--probe-split", default="valid", metavar="SPLIT")
    parser.add_argument("--output", help="folder to write into; default: the run folder")
    _add_hosts(parser, "run folder and data on disks that all of them see")
    parser.add_argument(
        "--clicks", type=_clicks, metavar="N", help="clicks per object; default: the run's"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings of evaluation, data and clicks that are to differ from the run's",
    )


def _predict(parser: Parser) -> None:
    parser.description = "Find phrases, or what is clicked on, in pictures; phrases in videos."
    parser.add_argument("pictures", nargs="+", help="files, folders or globs; or films")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder")
    source.add_argument(
        "--model", help="not a run: a model folder, a checkpoint, or a hub id such as facebook/sam3"
    )
    parser.add_argument("--base", action="store_true", help="the model that the run started from")
    parser.add_argument(
        "--phrase",
        action="append",
        default=[],
        type=_phrase,
        help="what to look for; may be repeated",
    )
    parser.add_argument(
        "--box", action="append", default=[], type=_box, metavar="X,Y,W,H", help="like this"
    )
    parser.add_argument(
        "--negative-box", action="append", default=[], type=_box, metavar="X,Y,W,H", help="not this"
    )
    parser.add_argument(
        "--threshold", type=_score, metavar="SCORE", help="score; default: the run's, per phrase"
    )
    parser.add_argument(
        "--nms", type=_score, metavar="IOU",
        help="of two finds of a phrase whose masks overlap by more, the weaker is left out; 1 keeps all; default: "
        "the run's evaluation.shown_nms, 0.5, and 0.1 in videos",
    )  # fmt: skip
    parser.add_argument(
        "--tile",
        action="store_true",
        help="large pictures in overlapping parts of the model's size, instead of squashed to it",
    )
    parser.add_argument(
        "--frame", type=_frame, default=0, metavar="N",
        help="of files with several pages or slices, counted from 0; default 0",
    )  # fmt: skip
    parser.add_argument(
        "--max-megapixels", type=_megapixels, default=500, metavar="N",
        help="larger pictures are refused before they fill the memory; default 500",
    )  # fmt: skip
    parser.add_argument("--output", default="predictions", help="folder for overlays and JSON")
    parser.add_argument("--no-overlay", action="store_true", help="JSON only")
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        choices=EXPORTS,
        help="finds in this format too; may be repeated",
    )
    clicks = parser.add_argument_group("clicks")
    clicks.add_argument(
        "--points", action="append", nargs="+", default=[], type=_point, metavar="X,Y,LABEL",
        help="clicks on one object, label 1 inside or 0 outside; again for another object",
    )  # fmt: skip
    clicks.add_argument(
        "--everything", action="store_true", help="masks of a grid of clicks, best ones kept"
    )
    clicks.add_argument("--grid", type=_grid, metavar="N", help="with --everything: clicks along an edge, default 32")  # fmt: skip
    clicks.add_argument("--crops", type=int, choices=range(4), help="with --everything: further layers of crops, default 0")  # fmt: skip
    clicks.add_argument("--least-iou", type=_score, metavar="IOU", help="with --everything: least predicted IoU of a mask, default 0.88")  # fmt: skip
    clicks.add_argument("--least-stability", type=_score, metavar="IOU", help="with --everything: of a mask with itself at two thresholds, default 0.95")  # fmt: skip
    video = parser.add_argument_group("videos")
    video.add_argument("--video", action="store_true", help="each folder named is one video")
    video.add_argument("--reverse", action="store_true", help="from the last frame to the first")
    video.add_argument("--frames-per-device", type=_whole, metavar="N", help="at a time, default 1")


def _plan(parser: Parser) -> None:
    parser.description = (
        "Say whether a training fits a device, and what bounds its speed; nothing is run."
    )
    parser.epilog = (
        "The step is compiled for the device, which need not be here (pip install 'sam3jax[plan]'). Exit status 1: "
        "it does not fit."
    )
    parser.add_argument("--config", help="YAML file, or a name such as lora_coco")
    parser.add_argument(
        "--device", metavar="CARD[:N]", help="h100, a100-40, t4, v5e:8, ...; default: what is here"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="find the largest micro_batch that fits; several compilations",
    )
    _add_settings(parser)


def _doctor(parser: Parser) -> None:
    parser.description = "Say what was read from a data set, and what is odd about it."
    parser.epilog = (
        "Every split is looked at and every error is printed. The --output folder gets a contact sheet of each "
        "split, a table of categories, histograms, and doctor.json with every odd entry."
    )
    parser.add_argument("data", help="folder with pictures and COCO JSON, or the JSON itself")
    _add_settings(parser)
    parser.add_argument(
        "--decode", action="store_true", help="decode every picture, not only its header"
    )
    parser.add_argument("--output", default="doctor", metavar="DIR", help="default: doctor")
    parser.add_argument(
        "--import", dest="format", choices=IMPORTS, help="first convert data of this format"
    )
    parser.add_argument("--out", metavar="COCO_DIR", help="new folder that --import writes")


def _export(parser: Parser) -> None:
    parser.description = "Write a model as StableHLO programs that run with jax alone."
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder")
    source.add_argument("--model", help="model folder, as `sam3jax convert` writes it")
    parser.add_argument("--base", action="store_true", help="the model that the run started from")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--phrase", action="append", default=[], type=_phrase,
        help="whose tokens are written beside the programs; may be repeated",
    )  # fmt: skip
    parser.add_argument("--detections", type=_whole, default=100, metavar="N", help="strongest ones that come out, default 100")  # fmt: skip


def _app(parser: Parser) -> None:
    parser.description = "A page to click in: pictures, phrases, clicks; masks are saved as COCO."
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", help="run folder: tuned and base side by side")
    source.add_argument("--model", help="model folder; default: the tiny model of the package")
    parser.add_argument(
        "--data",
        metavar="COCO_DIR",
        help="where masks are saved; default: the run's training set, else app_masks",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")


def _report(parser: Parser) -> None:
    parser.description = "Write report.html into a run folder."
    parser.add_argument("run", metavar="RUN", help="run folder")


def _demo(parser: Parser) -> None:
    parser.description = "Teach the tiny SAM 3 of the package five concepts that it has never seen."
    parser.add_argument("--config", help=f"YAML file; default: {DEMO}, or {CLIPS_DEMO}")
    parser.add_argument(
        "--video", action="store_true", help="on videos: train on clips, then track"
    )
    _add_settings(parser)


def _list_settings(parser: Parser) -> None:
    parser.description = "Print every setting with its default, its bounds and its meaning."
    parser.add_argument(
        "group", nargs="?", metavar="GROUP", help="run, model, lora, loss, data, ...; default: all"
    )


DEMO = "configs/demo.yaml"
CLIPS_DEMO = "configs/clips.yaml"
EXPORTS = ("yolo", "labelstudio", "cvat")  # sam3jax.data.exporters
IMPORTS = ("yolo", "voc", "labelme", "cvat", "masks", "huggingface")  # sam3jax.data.importers
PARSERS: dict[str, Callable[[Parser], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "doctor": _doctor,
    "report": _report,
    "export": _export,
    "app": _app,
    "demo": _demo,
    "plan": _plan,
    "settings": _list_settings,
}
TAKE_SETTINGS = ("train", "evaluate", "demo", "doctor", "plan")


def _add_hosts(parser: Parser, disks: str) -> None:
    hosts = parser.add_argument_group("many hosts", f"the same command on each; {disks}")
    hosts.add_argument(
        "--distributed",
        action="store_true",
        help="take the rest from the cluster (Slurm, MPI, TPU, ...)",
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    hosts.add_argument("--num-processes", type=int)
    hosts.add_argument("--process-id", type=int, help="0, 1, ...")
    hosts.add_argument(
        "--wait", type=_seconds, default=240, metavar="SECONDS", help="for the others; default 240"
    )


def _add_settings(parser: Parser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="any setting; `sam3jax settings` lists them",
    )


def _settings_as_words(words: list[str], parser: Parser) -> list[str]:
    """`--steps 100`, `--steps=100` and `--data.flip` become `steps=100` and `data.flip=true`."""
    known = {flag for action in parser._actions for flag in action.option_strings}
    kept: list[str] = []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        is_setting = flag not in known and bool(re.match(r"--[a-z]", flag))
        kind = _kind_of(flag[2:]) if is_setting else None
        if kind is None and is_setting and not _meant(flag, parser) and (equals or words):
            # No setting has this name: reading the settings says so, and which one is meant.
            kept.append(f"{flag[2:]}={value if equals else words.pop(0)}")
        elif kind is None:
            kept.append(word)
            # The value of an option is no setting, whatever it looks like.
            if flag in known and not equals and words and parser._option_string_actions[flag].nargs != 0:  # fmt: skip
                kept.append(words.pop(0))
        elif equals:
            kept.append(f"{flag[2:]}={value}")
        elif kind is bool and (not words or words[0].lower() not in ("true", "false")):
            kept.append(f"{flag[2:]}=true")
        elif words:
            kept.append(f"{flag[2:]}={words.pop(0)}")
        else:
            parser.error(f"{flag}: expected a value, for example {flag[2:]}=...")
    return kept


def _kind_of(name: str) -> object:
    """The type of a setting, None where there is no such setting."""
    from sam3jax.config.loading import field_at

    field = field_at(name.split("."))
    return field.annotation if field is not None else None


def _point(text: str) -> list[float]:
    try:
        values = [float(v) for v in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 2:
        values.append(1.0)
    if len(values) != 3:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected x,y in pixels and 1 (inside) or 0 (outside), for example 120,80,1; pictures are "
            "named before --points"
        )
    return values


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


def _clicks(text: str) -> int:
    return _at_most(text, 32)


def _grid(text: str) -> int:
    return _at_most(text, 512)  # a quarter of a million clicks


def _at_most(text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to {most}")
    return int(text)


def _score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a score from 0 to 1")
    return value


def _frame(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0")
    return int(text)


def _seconds(text: str) -> float:
    return _positive(text, 86_400, "seconds")


def _megapixels(text: str) -> float:
    return _positive(text, 100_000, "megapixels")


def _positive(text: str, most: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= most:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected {what}, more than 0, at most {most:,}"
        )
    return value


def _phrase(text: str) -> str:
    if not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected one line without control characters; one --phrase for each phrase"
        )
    return text


def _box(text: str) -> list[float]:
    try:
        values = [float(v) for v in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 4:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected left,top,width,height in pixels, for example 40,30,100,80"
        )
    return values
