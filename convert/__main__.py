"""Weights in, weights out, what is in a file: `python -m convert torch-to-jax | jax-to-torch | inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("convert"))

from convert.jax_to_torch import export
from convert.options import parse
from convert.peft_folder import export_adapter
from convert.sources import is_run_folder, open_source
from convert.torch_to_jax import describe, describe_source, torch_to_jax
from convert.weights import ConversionError
from sam3jax.config import ModelConfig, read_settings
from sam3jax.errors import exit_status
from sam3jax.files import FileError
from sam3jax.weights.lora import linear_layers
from sam3jax.weights.model_folder import is_model_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert or inspect as the command line says; returns the exit status."""
    options = parse("convert", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    commands = {"torch-to-jax": _torch_to_jax, "jax-to-torch": _jax_to_torch, "inspect": _inspect}
    for line in commands[options.command](options):
        print(line)


def _keep_apart(src: Path, out: Path) -> None:
    """Raises FileError where writing `out` would change `src`."""
    source, target = src.resolve(), out.resolve()
    if source == target or target in source.parents or source in target.parents:
        raise FileError(
            f"--out {out} and --src {src} lie in each other, so that the source would change: give an --out elsewhere"
        )


def _torch_to_jax(o: argparse.Namespace) -> list[str]:
    return torch_to_jax(
        o.src, o.out, dtype=o.dtype, tokenizer=o.tokenizer, adapter=o.adapter, overrides=_settings(o.set)
    )  # fmt: skip


def _jax_to_torch(o: argparse.Namespace) -> list[str]:
    _keep_apart(o.src, o.out)
    source = open_source(o.src)
    compare = None if o.no_compare else o.compare
    if o.adapter:
        return export_adapter(source, o.out, o.base, compare=compare, phrases=o.phrase)
    return export(
        source, o.out, layout=o.layout, dtype=o.dtype, prefix=o.prefix, detector_only=o.detector_only, base=o.base,
        compare=compare, phrases=o.phrase,
    )  # fmt: skip


def _inspect(o: argparse.Namespace) -> list[str]:
    if is_model_folder(o.path) or is_run_folder(o.path):
        source = open_source(o.path)
        config, lines = source.folder.config, describe_source(source.folder, source.adapters)
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
