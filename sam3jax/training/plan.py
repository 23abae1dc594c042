"""What a training step needs on devices that may not be here: compiled for them, never run.

Shapes come from the run's own data, sizes from its weights; no weight is read.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sam3jax.config import Config
from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer
from sam3jax.model.init import parameter_shapes
from sam3jax.tasks import TASKS
from sam3jax.training.mesh import backend_of, micro_batches
from sam3jax.training.optim import build_optimizer
from sam3jax.training.rates import count, multipliers
from sam3jax.training.sharding import parts_of, specs
from sam3jax.training.state import init_state
from sam3jax.training.step import make_train_step
from sam3jax.training.targets import compiler_options
from sam3jax.types import AXIS
from sam3jax.weights.base import open_base
from sam3jax.weights.frozen import compact
from sam3jax.weights.scope import scope_of
from sam3jax.weights.trainable import start

# Of a card's memory: the rest goes to the driver, the allocator and what lies between two buffers.
USABLE = 0.92
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


@dataclass(frozen=True)
class Needs:
    """Of one device, in bytes: arguments (weights, state, batch) and temporaries. flops: matrix products and
    convolutions of one update on one device. collectives: kind -> (number, bytes). host: operations that would
    leave the device for the host in the middle of the step. seconds: of compiling.
    """

    arguments: int
    temporaries: int
    flops: float
    collectives: dict[str, tuple[int, int]]
    host: tuple[str, ...]
    seconds: float
    trained: int
    pictures: int

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries


def needs(config: Config, devices: Sequence[Any]) -> Needs:
    """Compile one update of a run for these devices. Raises ConfigError and DataError as a training does."""
    config, tokenizer = _sizes(config)
    mesh = Mesh(np.array(devices), (AXIS,))
    backend = backend_of(mesh)
    task = TASKS[config.task](config, backend)
    micro = micro_batches(config, mesh)
    data = task.open(tokenizer)
    loader = task.loader(data)
    batch = next(loader)
    loader.close()

    trainable, frozen = start(parameter_shapes(config.model, scope_of(config).parts), config)
    rates = multipliers(trainable, frozen, config)
    parts = parts_of(mesh, config.shard)
    optimizer = build_optimizer(config, trainable, rates, parts)
    state = jax.eval_shape(lambda t: init_state(t, optimizer, config.optim.ema > 0), trainable)
    frozen = jax.eval_shape(lambda f: compact(f, config, backend), frozen)
    prepared, frozen = jax.eval_shape(lambda t, f: task.prepare(t, f, data), trainable, frozen)
    step = make_train_step(
        task, optimizer, mesh, seed=config.seed, ema=config.optim.ema, parts=parts
    )
    traced = step.trace(
        _placed(state, mesh, parts), _placed(frozen, mesh, parts), _placed(prepared, mesh, 1),
        _batch_shapes(batch, task.batch_spec, mesh, micro),
    )  # fmt: skip
    begun = time.monotonic()
    compiled = traced.lower().compile(compiler_options(devices[0]))
    memory = compiled.memory_analysis()
    assert memory is not None
    text = compiled.as_text() or ""
    return Needs(
        arguments=memory.argument_size_in_bytes, temporaries=memory.temp_size_in_bytes,
        flops=flops(traced.jaxpr.jaxpr), collectives=collectives(text), host=host_traffic(text),
        seconds=time.monotonic() - begun, trained=count(trainable, rates), pictures=config.batch_size,
    )  # fmt: skip


def _sizes(config: Config) -> tuple[Config, Tokenizer]:
    """The config with the sizes of its weights; without weights with its own, and any vocabulary."""
    if config.init is not None:
        base = open_base(config)
        return base.config, base.tokenizer
    return config, Tokenizer(build_byte_tokenizer(600), config.model.text_length)


def _placed(tree: Any, mesh: Mesh, parts: int) -> Any:
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s))
    return jax.tree.map(place, tree, specs(tree, parts))


def _batch_shapes(batch: Any, spec: Any, mesh: Mesh, micro: int) -> Any:
    """What `put_batch` makes of a batch, as shapes."""

    def place(spec: P, part: Any) -> Any:
        sharding = NamedSharding(mesh, P(None, *spec) if spec else spec)

        def one(x: Any) -> jax.ShapeDtypeStruct:
            x = np.asarray(x)
            shape = (micro, len(x) // micro, *x.shape[1:]) if spec else x.shape
            dtype = jax.dtypes.canonicalize_dtype(x.dtype)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return jax.tree.map(one, part)

    return jax.tree.map(place, spec, batch, is_leaf=lambda x: isinstance(x, P))


def flops(jaxpr: Any) -> float:
    """Operations of the matrix products and convolutions in a jaxpr, on one device.

    Loops of unknown length, such as the matcher's, count for nothing: they hold no product.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, shape = (
            equation.primitive.name,
            equation.outvars[0].aval.shape if equation.outvars else (),
        )
        if name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[d] for d in left)
            total += 2.0 * math.prod(shape) * inner
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            total += 2.0 * math.prod(shape) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        else:
            inside = [flops(inner) for inner in _inside(equation.params)]
            times = equation.params["length"] if name == "scan" else 1
            # One branch of a condition runs.
            total += times * (max(inside, default=0.0) if name == "cond" else sum(inside))
    return total


def _inside(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """kind -> (number, bytes of their results) in a compiled program."""
    found = {}
    text = re.sub(r"/\*.*?\*/", "", text)  # long tuples number their parts in comments
    for kind in _KINDS:
        calls = re.findall(rf"= (\(?[^=]*?) {kind}(?:-start)?\(", text)
        if calls:
            found[kind] = (len(calls), sum(map(_bytes, calls)))
    return found


def host_traffic(text: str) -> tuple[str, ...]:
    """Names of the operations in a compiled program that talk to the host: callbacks, feeds, copies to its memory."""
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    found = {name for name in calls if re.search(r"callback|Host", name)}
    found |= set(re.findall(r" (infeed|outfeed)\(", text))
    found |= {"host transfer"} if "is_host_transfer=true" in text else set()
    found |= {"host memory"} if "S(5)" in text else set()
    return tuple(sorted(found))


def _bytes(shapes: str) -> int:
    """Of every array in a type such as `(f32[3,4]{1,0}, bf16[])`."""
    parts = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(_BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in parts)  # fmt: skip


def with_micro_batch(config: Config, micro_batch: int, devices: int) -> Config:
    """The same run with that many pictures a device at once, and as few micro-batches an update as may be."""
    held = micro_batch * devices
    update = math.lcm(held, TASKS[config.task](config, None).together)
    return config.model_copy(update={"micro_batch": micro_batch, "batch_size": update})
