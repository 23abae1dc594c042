"""Run folders and their checkpoints. The one file that touches orbax.

A checkpoint holds what changes: trained weights, optimizer state, step, and where the data stand.
The frozen base is not in it: it is read again from `init`, or drawn again from the seed. base.json
tells whether what `init` names is still what the run started from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from sam3jax.config import Config, ConfigError, ModelConfig, dump_config, load_config, parse_config
from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer
from sam3jax.files import make_folder, write_json, write_text
from sam3jax.model import Sam3
from sam3jax.model.init import init_params
from sam3jax.training.optim import build_optimizer
from sam3jax.training.step import TrainState, init_state
from sam3jax.weights.lora import Tree, init_lora, merge_lora
from sam3jax.weights.model_folder import is_model_folder, load_model_folder, open_model_folder
from sam3jax.weights.trainable import merge, multipliers, split

CONFIG, BASE, CHECKPOINTS = "config.yaml", "base.json", "checkpoints"
# What a run may change when it continues; anything else would make it another run.
MAY_CHANGE = {"steps", "eval_every", "save_every", "log_every", "keep", "evaluation", "output", "resume"}  # fmt: skip
# What a user sets of a model that is read from a folder; its sizes come with it.
AT_RUN_TIME = {"image_size", "dropout", "drop_path", "compute_dtype"}


class Checkpoints:
    """The checkpoints of a run folder: the newest `keep` and the best one stay."""

    def __init__(self, run: Path, config: Config | None = None) -> None:
        # Opening to read makes orbax warn that it will not write.
        logging.getLogger("absl").setLevel(logging.ERROR)
        keep_newest = config.keep if config else None
        metric = config.best_metric if config else None
        policy = None
        if config:
            best = keep.BestN(
                get_metric_fn=lambda m: m[metric], n=1, keep_checkpoints_without_metrics=False
            )
            policy = keep.AnyPreservationPolicy([keep.LatestN(keep_newest), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, read_only=config is None, create=config is not None,
            best_fn=(lambda m: m[metric]) if metric else None,
        )  # fmt: skip
        self._manager = ocp.CheckpointManager((run / CHECKPOINTS).absolute(), options=options)

    def save(
        self, state: TrainState, data: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Save in the background; metrics where the model was just validated."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        self._manager.save(step, args=items, metrics=metrics)

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def restore(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(state, data) of a step, in the shapes and on the devices of `state`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(step, args=items)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"the checkpoint at step {step} does not fit the run's configuration "
                f"({str(error).splitlines()[0]}): was config.yaml changed?"
            ) from error
        return found.state, found.data

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder in memory. variables: tuned; base_variables: where it began; step: of `variables`.

    trained: what the checkpoint holds of `variables`; base_fingerprint: of the weights below.
    """

    config: Config
    model: Sam3
    variables: Tree
    base_variables: Tree
    tokenizer: Tokenizer
    step: int
    trained: Tree
    base_fingerprint: str


@dataclasses.dataclass(frozen=True)
class Base:
    """What a run starts from. params: float32 arrays; fingerprint: equal where the weights are."""

    config: Config
    params: Tree
    tokenizer: Tokenizer
    fingerprint: str


def load_base(config: Config) -> Base:
    """Weights, vocabulary and sizes that a run starts from: a model folder, a run folder, or noise.

    Raises ConfigError (FileError for a damaged folder) that says what was found and expected.
    """
    if config.init is None:
        if config.model.vocab_size > 4096:
            raise ConfigError(
                "init is not set: SAM 3 starts from its published weights (python -m convert torch-to-jax "
                "--src sam3.pt --out models/sam3, then init=models/sam3); to learn from nothing set "
                "model.preset=tiny"
            )
        tokenizer = Tokenizer(
            build_byte_tokenizer(config.model.vocab_size), config.model.text_length
        )
        return Base(config, init_params(config.model, config.seed), tokenizer, "noise")
    path = Path(config.init)
    if (path / CONFIG).is_file() and not is_model_folder(path):
        run = load_run(path)
        variables = jax.device_get(run.variables)
        params = variables["params"]
        if "lora" in variables:
            params = jax.device_get(merge_lora(params, variables["lora"], variables["lora_scale"]))
        # Not of the merged weights: their last bits depend on the machine that merges.
        known = fingerprint(jax.device_get(run.trained), run.base_fingerprint)
        return Base(_with_sizes(config, run.config.model, path), params, run.tokenizer, known)
    config = _with_sizes(config, open_model_folder(path).config, path)
    _, params, tokenizer = load_model_folder(path, dtype=np.float32)
    return Base(config, params, tokenizer, fingerprint(params))


def fingerprint(tree: Tree, behind: str = "") -> str:
    """Hexadecimal digits that are equal where all arrays of a tree are, on every machine.

    behind: what else they stand for, such as the fingerprint of the weights below adapters.
    """
    told = hashlib.sha256(behind.encode())
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data)  # twice the pace of a sha256
        told.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} {checksum}".encode())
    return told.hexdigest()[:32]


def check_base(run: Path, base: Base) -> None:
    """Raises ConfigError where `init` no longer holds the weights that the run started from."""
    file = run / BASE
    began = json.loads(file.read_text())["fingerprint"] if file.is_file() else base.fingerprint
    if began != base.fingerprint:
        raise ConfigError(
            f"{run} was trained from other weights than {base.config.init} holds now (fingerprint {began} in its "
            f"{BASE}, found {base.fingerprint}): put those back, or train again into another output"
        )


def _with_sizes(config: Config, found: ModelConfig, path: Path) -> Config:
    """The run's config with the model's own sizes; contradictions are errors."""
    asked = {k: getattr(config.model, k) for k in config.model.model_fields_set}
    wrong = [
        f"{k} {getattr(found, k)} (the config says {v})"
        for k, v in asked.items()
        if k not in AT_RUN_TIME | {"preset"} and getattr(found, k) != v
    ]
    if wrong:
        raise ConfigError(
            f"{path} is a model of another size: it has {', '.join(wrong)}; leave the sizes out of the "
            "config, they come with the weights"
        )
    chosen = {k: v for k, v in asked.items() if k in AT_RUN_TIME}
    model = parse_config({**found.model_dump(), **chosen}, ModelConfig)
    return config.model_copy(update={"model": model})


def start(base: Base) -> tuple[Tree, Tree]:
    """(trainable, frozen) before the first step."""
    config = base.config
    lora, scale = {}, {}
    if config.train == "lora" and config.lora.enabled:
        key = jax.random.fold_in(jax.random.key(config.seed), 2)
        lora, scale = init_lora(key, base.params, config.model, config.lora)
    trainable, frozen = split(base.params, lora, scale, config)
    if not jax.tree.leaves(trainable):
        raise ConfigError("nothing is trained: lora.enabled is false and `trainable` is empty")
    return trainable, frozen


def load_run(path: str | Path, *, step: int | None = None) -> Run:
    """A run folder with the weights of its best checkpoint (the newest where none was validated).

    Raises ConfigError where the folder is no run, has no checkpoint, or its base is gone.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise ConfigError(
            f"{path} is no run folder: expected {CONFIG}, written by python -m sam3jax.train"
        )
    base = load_base(load_config(path / CONFIG))
    check_base(path, base)
    config = base.config
    trainable, frozen = start(base)
    optimizer = build_optimizer(config, trainable, multipliers(trainable, frozen, config))
    abstract = jax.eval_shape(lambda: init_state(trainable, optimizer, config.optim.ema > 0))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
    )
    best = best_step(path)
    if not (path / CHECKPOINTS).is_dir():
        raise ConfigError(f"{path} has no checkpoint yet: train it, or give another run")
    checkpoints = Checkpoints(path)
    step = step if step is not None else best if best is not None else checkpoints.latest()
    if step is None:
        raise ConfigError(f"{path} has no checkpoint yet: train it, or give another run")
    state, _ = checkpoints.restore(step, abstract)
    checkpoints.close()
    tuned = state.trainable if state.ema is None else state.ema
    return Run(
        config=config, model=Sam3(config.model), variables=merge(tuned, frozen),
        base_variables=_base_variables(base, trainable, frozen), tokenizer=base.tokenizer, step=step,
        trained=tuned, base_fingerprint=base.fingerprint,
    )  # fmt: skip


def _base_variables(base: Base, trainable: Tree, frozen: Tree) -> Tree:
    without = {k: v for k, v in trainable.items() if k != "lora"}
    return {"params": merge(without, frozen)["params"]}


def best_step(path: Path) -> int | None:
    """The step that validated best, as the trainer noted it; None before the first validation."""
    file = path / "best.json"
    return json.loads(file.read_text())["step"] if file.is_file() else None


def open_run_folder(base: Base) -> Path:
    """Make the run folder, or check that the one there may be continued.

    The first process does; the others wait for its word. Raises ConfigError where the folder holds a
    run that `base` and its configuration do not continue, FileError where it cannot be written to.
    """
    path, wrong = Path(base.config.output), None
    if jax.process_index() == 0:
        try:
            _open_run_folder(path, base)
        except ValueError as error:
            wrong = error
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.array(wrong is not None))
        if failed and wrong is None:
            wrong = ConfigError(f"{path} cannot be used; the first process says why")
    if wrong is not None:
        raise wrong
    return path


def _open_run_folder(path: Path, base: Base) -> None:
    file = path / CONFIG
    if file.is_file():
        if not base.config.resume:
            raise ConfigError(
                f"{path} holds a run already and resume is false: give another output, or remove the folder"
            )
        old, new = (_flat(c.model_dump(mode="json")) for c in (load_config(file), base.config))
        changed = [
            f"{k} {old.get(k)} -> {v}"
            for k, v in new.items()
            if old.get(k) != v and k.split(".")[0] not in MAY_CHANGE
        ]
        if changed:
            raise ConfigError(
                f"{path} holds a run with other settings ({'; '.join(changed)}): give another output, or "
                "take the settings back to continue it"
            )
        check_base(path, base)
    elif path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{path} is not empty and no run folder: give another output")
    make_folder(path)
    write_text(file, dump_config(base.config))
    write_json(path / BASE, {"init": base.config.init, "fingerprint": base.fingerprint})


def _flat(tree: dict[str, Any], start: str = "") -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        out |= (
            _flat(value, f"{start}{key}.") if isinstance(value, dict) else {f"{start}{key}": value}
        )
    return out
