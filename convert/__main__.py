"""python -m convert torch-to-jax | jax-to-torch | inspect: weights in, weights out, what is in a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.adapters import write_adapter
from convert.jax_to_torch import export
from convert.sources import is_run_folder, open_source
from convert.torch_to_jax import FLOATS, describe, describe_source, torch_to_jax
from convert.weights import LAYOUTS, ConversionError
from sam3jax.config import ConfigError, ModelConfig, read_settings
from sam3jax.files import FileError
from sam3jax.weights.lora import linear_layers
from sam3jax.weights.model_folder import is_model_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 after a sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        for line in options.run(options):
            print(line)
    except (FileError, ConversionError, ConfigError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"convert: cannot use {error.filename or 'a file'}: {error.strerror or error}; "
            "check the path and who may read and write there",
            file=sys.stderr,
        )
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "torch-to-jax",
        help="a torch checkpoint, published or transformers layout, to a model folder",
    )
    command.add_argument(
        "--src", required=True, type=Path, help=".pt, .safetensors, index of shards, or folder"
    )
    command.add_argument("--out", required=True, type=Path, help="model folder to write")
    command.add_argument("--dtype", choices=FLOATS, help="of every float; default: as stored")
    command.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json, or CLIP's bpe_simple_vocab_16e6.txt.gz"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of ModelConfig, where shapes do not tell",
    )
    command.set_defaults(run=_torch_to_jax)

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
    command.add_argument("--dtype", choices=FLOATS, help="of every float; default: as stored")
    command.add_argument("--prefix", help="before the detector's names; default: as in the source")
    command.add_argument(
        "--detector-only", action="store_true", help="leave the tracker and its neck out"
    )
    command.add_argument("--adapter", action="store_true", help="the adapters alone, for peft")
    command.add_argument(
        "--base", help="what the adapter says it belongs to, for example facebook/sam3"
    )
    command.set_defaults(run=_jax_to_torch)

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
    command.set_defaults(run=_inspect)
    return parser


def _keep_apart(src: Path, out: Path) -> None:
    """Raises FileError where writing `out` would change `src`."""
    source, target = src.resolve(), out.resolve()
    if source == target or target in source.parents or source in target.parents:
        raise FileError(
            f"--out {out} and --src {src} lie in each other, so that the source would change: give an --out elsewhere"
        )


def _torch_to_jax(o: argparse.Namespace) -> list[str]:
    return torch_to_jax(
        o.src, o.out, dtype=o.dtype, tokenizer=o.tokenizer, overrides=_settings(o.set)
    )


def _jax_to_torch(o: argparse.Namespace) -> list[str]:
    _keep_apart(o.src, o.out)
    folder, adapters = open_source(o.src)
    if o.adapter:
        return write_adapter(o.out, adapters, folder.config, o.base)
    return export(
        folder, o.out, adapters=adapters, layout=o.layout, dtype=o.dtype, prefix=o.prefix, detector_only=o.detector_only
    )  # fmt: skip


def _inspect(o: argparse.Namespace) -> list[str]:
    if is_model_folder(o.path) or is_run_folder(o.path):
        folder, adapters = open_source(o.path)
        config, lines = folder.config, describe_source(folder, adapters)
    else:
        config, lines = describe(o.path, _settings(o.set))
    layers = [entry.layer for entry in linear_layers(config)]
    if not o.layers:
        return [*lines, f"linear layers, to adapt: {len(layers)} (--layers lists them)"]
    return [*lines, *layers]


def _settings(words: Sequence[str]) -> dict[str, Any]:
    """{key: value} of `key=value` words; keys are ModelConfig's."""
    settings = read_settings(words, ModelConfig)
    if unknown := settings.keys() - ModelConfig.model_fields.keys():
        known = ", ".join(ModelConfig.model_fields)
        raise ConversionError(f"--set {', '.join(sorted(unknown))}: expected a key of {known}")
    return settings


if __name__ == "__main__":
    sys.exit(main())
