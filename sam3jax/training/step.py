"""One training step: pure, jitted, shard_mapped over the batch, state donated, no host callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sam3jax.config import Config
from sam3jax.losses import breakdown, compute_losses
from sam3jax.model import Sam3
from sam3jax.types import Batch, Outputs, TextFeatures
from sam3jax.weights.trainable import Tree, merge, touches

AXIS = "data"
# Pictures and what belongs to them are split over devices; the phrases are everywhere.
BATCH_SPEC = Batch(
    images=P(AXIS), tokens=P(), prompts=P(AXIS), targets=P(AXIS), image_valid=P(AXIS), image_id=P(AXIS)
)  # fmt: skip


@struct.dataclass
class TrainState:
    """Everything that changes from step to step.

    step: steps taken. skipped: steps whose loss or gradient was not finite; they change nothing.
    ema: averaged `trainable`, or None.
    """

    step: jax.Array
    trainable: Tree
    opt_state: Any
    ema: Tree | None
    skipped: jax.Array


def init_state(trainable: Tree, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    """The state before the first step."""
    # A copy: the state is donated, what it was made from is not.
    copy = lambda tree: jax.tree.map(jnp.array, tree)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=copy(trainable),
        opt_state=optimizer.init(trainable),
        ema=copy(trainable) if ema else None,
        skipped=jnp.zeros((), jnp.int32),
    )


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (of all hosts), one axis over which pictures are split."""
    return Mesh(np.array(devices or jax.devices()), (AXIS,))


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """step(state, frozen, text, batch) -> (state, metrics), compiled once.

    text: TextFeatures of the run's phrases, or None where the text tower is trained and the step
    encodes them. metrics: the loss terms under their published names, `loss` and its breakdown,
    `grad_norm`, `mask_pairs`, `skipped`: sums over devices, equal on all of them.

    Gradients arrive summed over devices: `state.trainable` is replicated, and under check_vma the
    transpose of its broadcast is that sum. A psum here would count every device twice.
    """
    model = Sam3(config.model, train=True)

    def loss_fn(trainable, frozen, text, batch: Batch, key):
        out = forward(model, merge(trainable, frozen), text, batch, key)
        valid = batch.prompts.valid & batch.image_valid[:, None]
        points = jax.random.fold_in(key, 1)
        return compute_losses(
            out, batch.targets, valid, config.loss, axis_names=(AXIS,), point_rng=points
        )

    def step(state: TrainState, frozen, text, batch: Batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, terms), grads = grad_fn(state.trainable, frozen, text, batch, key)
        terms = jax.lax.psum(terms, AXIS)
        loss, norm = terms["core_loss"], optax.tree.norm(grads)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        trainable = keep(trainable, state.trainable)
        ema = state.ema
        if ema is not None:
            decay = config.optim.ema
            ema = jax.tree.map(lambda e, t: decay * e + (1 - decay) * t, ema, trainable)
        state = TrainState(
            step=state.step + 1,
            trainable=trainable,
            opt_state=keep(opt_state, state.opt_state),
            ema=ema,
            skipped=state.skipped + jnp.where(good, 0, 1),
        )
        parts = {f"loss/{name}": value for name, value in breakdown(terms, config.loss).items()}
        metrics = {**terms, **parts, "loss": loss, "grad_norm": norm, "skipped": state.skipped}
        return state, metrics

    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P(), BATCH_SPEC), out_specs=P(), check_vma=True
    )
    return jax.jit(sharded, donate_argnums=0)


def forward(
    model: Sam3, variables: Tree, text: TextFeatures | None, batch: Batch, key: jax.Array
) -> Outputs:
    """The detector on a batch; phrases encoded here if `text` is None, each at most once."""
    rngs = {"dropout": key}
    prompts = batch.prompts
    if text is None:
        tokens = batch.tokens
        if prompts.text_id.size < len(tokens):
            # A large vocabulary: only the phrases that this batch asks.
            tokens = tokens[prompts.text_id.reshape(-1)]
            prompts = prompts.replace(
                text_id=jnp.arange(prompts.text_id.size).reshape(prompts.text_id.shape)
            )
        text = model.apply(variables, tokens, method="encode_text", rngs=rngs)
    image = model.apply(variables, batch.images, method="encode_image", rngs=rngs)
    return model.apply(variables, image, text, prompts, method="detect", rngs=rngs)


def encode_vocabulary(config: Config, variables: Tree, tokens: np.ndarray) -> TextFeatures:
    """The run's phrases [V, N] encoded once; for steps in which the text tower is not trained."""
    encode = jax.jit(lambda v, t: Sam3(config.model).apply(v, t, method="encode_text"))
    return encode(variables, tokens)


def text_is_trained(trainable: Tree) -> bool:
    """Whether the step must encode the phrases itself."""
    return touches(trainable, "text_encoder")


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Every leaf on every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's part of a batch, as the global arrays that the step takes."""

    def put(spec: P, part: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        make = jax.make_array_from_process_local_data
        return jax.tree.map(lambda x: make(sharding, np.asarray(x)), part)

    return jax.tree.map(put, BATCH_SPEC, batch, is_leaf=lambda x: isinstance(x, P))
