"""Say whether a training fits a device, here or elsewhere: `python -m sam3jax.plan --config X --device h100`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("plan"))

from sam3jax.config import Config, ConfigError, load_config, parse_config, read_settings
from sam3jax.errors import exit_status
from sam3jax.options import parse
from sam3jax.training import plan, targets
from sam3jax.training.micro_batch import choose, most_that_fits
from sam3jax.weights.start import is_hub_id

GB = 1e9
# What may be tried where a step does not fit, and what it costs besides; of which tasks, where not of all.
_PHRASES = ("detect", "clips")
REMEDIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("micro_batch=1", "more updates of one picture at a time, the same result", ()),
    ("model.remat=true", "a third more computation", ()),
    ("model.compute_dtype=bfloat16", "products in half precision", ()),
    ("loss.mask_chunk=1", "masks one after the other", _PHRASES),
    ("loss.mask_resolution=prediction", "masks are compared at a quarter of the picture's edge", _PHRASES),
    ("data.max_prompts=1", "one phrase a picture in each update", _PHRASES),
    ("clips.frames_at_once=1", "frames one after the other, computed again for the gradient", ("clips",)),
    ("clicks.objects_at_once=1", "masks one after the other", ("clicks",)),
    ("clicks.mask_resolution=prediction", "masks are compared at a quarter of the picture's edge", ("clicks",)),
    ("clicks.objects=1", "one object a picture in each update", ("clicks",)),
    ("shard=true", "every layer waits for its weights from the other devices", ()),
    ("base_dtype=int8", "weights that are not trained are rounded to eight bits", ()),
    ("lora.targets=[transformer.decoder.layers.*]", "the trunk and the fusion stay as they are", _PHRASES),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan of a run; returns the exit status, 1 where it does not fit."""
    options = parse("plan", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    if config.data.train is None:
        few = {"train": "shapes", "shapes_train": config.batch_size, "shapes_valid": 1}
        config = config.model_copy(update={"data": config.data.model_copy(update=few)})
        print(
            "data.train is not set: generated pictures (or videos) stand in, with the settings' numbers of phrases"
        )
    if config.init is not None and is_hub_id(config.init):
        print(f"{config.init} is not downloaded: the published sizes stand in")
        config = config.model_copy(update={"init": None})
    card, devices = targets.target(options.device) if options.device else targets.here()
    for line in _warnings(config, card):
        print(line)
    print(f"compiling for {len(devices)} x {card.name} ...", flush=True)
    room = plan.USABLE * card.memory
    if config.micro_batch == "auto":
        config, found, said = choose(config, devices, room)
        print(said)
    else:
        found = plan.needs(config, devices)
    for line in describe(found, config, card, len(devices)):
        print(line)
    if found.peak <= room:
        if options.search:
            most, needs = most_that_fits(config, devices, room)
            print(f"largest micro_batch that fits: {most}, {needs.peak / GB:.2f} GB")
        return 0
    print(
        f"it does not fit: {(found.peak - room) / GB:.2f} GB too much. What each of these alone would need:"
    )
    for setting, needs, cost in remedies(config, devices):
        fits = "fits" if needs.peak <= room else "still too much"
        print(f"  {setting:<44} {needs.peak / GB:7.2f} GB  {fits:<14} {cost}", flush=True)
    return 1


def _warnings(config: Config, card: targets.Card) -> list[str]:
    said, old = [], card.gpu is not None and card.gpu[0] < (8, 0)
    if old and config.model.compute_dtype == "bfloat16":
        said.append(
            f"{card.name} has no units for bfloat16: numbers are kept in it and computed in float32"
        )
    if card.gpu and config.model.fused_attention:
        said.append(
            f"{card.name} is too old for cuDNN's fused attention: set model.fused_attention=false"
            if old
            else "model.fused_attention: cuDNN plans on the card, so its own workspace is not counted here"
        )
    return said


def describe(found: plan.Needs, config: Config, card: targets.Card, devices: int) -> list[str]:
    """Lines for people: memory against the card's, work against its rates, what the devices send."""
    held = config.micro_batch or config.batch_size // devices
    lines = [
        f"parameters trained      {found.trained:,}",
        f"pictures of one update  {found.pictures}, {held} at once on a device",
        f"arguments               {found.arguments / GB:.2f} GB (weights, optimizer, batch)",
        f"temporaries             {found.temporaries / GB:.2f} GB",
        f"peak                    {found.peak / GB:.2f} GB of {card.memory / GB:.1f} GB, of which {plan.USABLE:.0%} are "
        "counted on",
        f"products                {found.flops / 1e12:.2f} TFLOP a device and update",
    ]
    if card.rates:
        work = found.flops / card.rates[config.model.compute_dtype]
        read = found.arguments / card.bandwidth
        lines.append(
            f"no update is faster than {max(work, read):.3f} s ({work:.3f} s of products at the card's rate, "
            f"{read:.3f} s to read the arguments once)"
        )
    if devices > 1:
        for kind, (number, size) in found.collectives.items():
            lines.append(f"{kind:<23} {number}, {size / 1e6:.1f} MB in all")
    if found.host:
        lines.append(
            f"talks to the host       {', '.join(found.host)}: that is a fault, please report it"
        )
    return [*lines, f"compiled in {found.seconds:.0f} s; nothing was run"]


def remedies(config: Config, devices: Sequence[Any]) -> list[tuple[str, plan.Needs, str]]:
    """(setting, needs, what it costs) of the three settings that save most, each compiled by itself."""
    tried = []
    for setting, cost, tasks in REMEDIES:
        if (setting == "shard=true" and len(devices) == 1) or (tasks and config.task not in tasks):
            continue
        try:
            changed = _with(config, setting)
            if changed == config:
                continue
            tried.append((setting, plan.needs(changed, devices), cost))
        except ConfigError:  # this setting does not go with the others
            continue
        print(f"  tried {setting}", flush=True)
    return sorted(tried, key=lambda x: x[1].peak)[:3]


def _with(config: Config, setting: str) -> Config:
    """The configuration with one setting more; a model's own sizes stay as they are."""
    said = config.model_dump(exclude_unset=True, mode="json")
    return parse_config(read_settings([setting], Config, said))
