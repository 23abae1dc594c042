"""What `convert` takes: the parser, without anything heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from convert.layouts import FLOATS, LAYOUTS
from sam3jax.files import at_home

DESCRIPTION = "Weights in, weights out, and what is in a file."


def parse(command: str, arguments: Sequence[str] | None, prog: str = "") -> argparse.Namespace:
    """The options; ends the program with status 2 where they are wrong, 0 after --help.

    command: always `convert`; the subcommand is in the options. arguments: None stands for those of the
    process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    return _parser(prog or f"python -m {command}").parse_args([at_home(word) for word in words])


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    command = commands.add_parser(
        "torch-to-jax",
        help="a torch checkpoint, published or transformers layout, to a model folder",
    )
    command.add_argument(
        "--src",
        required=True,
        type=Path,
        help=".pt, .safetensors, index of shards, folder, or facebook/sam3 on the hub",
    )
    command.add_argument("--out", required=True, type=Path, help="model folder to write")
    command.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="LoRA adapters of peft, to be merged into it"
    )
    command.add_argument("--dtype", choices=FLOATS, help="of every float; default: as stored")
    command.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer.json, or CLIP's bpe_simple_vocab_16e6.txt.gz; default: the one beside, or one that is found",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of ModelConfig, where shapes do not tell",
    )

    command = commands.add_parser(
        "jax-to-torch", help="a model folder or run folder to a torch checkpoint, adapters merged"
    )
    command.add_argument("--src", required=True, type=Path, help="model folder or run folder")
    command.add_argument(
        "--out",
        required=True,
        type=Path,
        help=".pt or .safetensors; folder with --adapter; either with huggingface",
    )
    command.add_argument("--layout", choices=LAYOUTS, help="default: the one the weights came in")
    command.add_argument(
        "--dtype",
        choices=FLOATS,
        help="of every float; default: as stored, float32 where a run trained",
    )
    command.add_argument("--prefix", help="before the detector's names; default: as in the source")
    command.add_argument(
        "--detector-only", action="store_true", help="leave the tracker and its neck out"
    )
    command.add_argument("--adapter", action="store_true", help="what was trained alone, for peft")
    command.add_argument(
        "--base", help="the model that was trained, as others find it, for example facebook/sam3"
    )

    command.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        default=[],
        metavar="PICTURE",
        help="measure on these how answers differ where the export is opened; default: where they will, on two of "
        "the run's own",
    )
    command.add_argument("--no-compare", action="store_true", help="measure nothing")

    command.add_argument(
        "--phrase",
        action="append",
        default=[],
        help="asked by --compare; default: the run's own; may be given several times",
    )

    command = commands.add_parser(
        "inspect", help="what a checkpoint, model folder or run folder holds"
    )
    command.add_argument("path", type=Path)
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of ModelConfig, where shapes do not tell",
    )
    command.add_argument(
        "--layers", action="store_true", help="list the linear layers, as LoRA targets name them"
    )
    return parser
