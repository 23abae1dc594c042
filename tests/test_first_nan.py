"""The first NaN is found where it was put: in a weight, a batch, a layer or a gradient."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from packaging.version import Version

from sam3jax.training.first_nan import first_nan
from sam3jax.training.mesh import make_mesh, put_batch, put_replicated
from sam3jax.types import AXIS


class Layer(nn.Module):
    """x / scale: NaN where both are zero."""

    @nn.compact
    def __call__(self, x, _):
        scale = self.param("scale", nn.initializers.ones, ())
        return x / scale, None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(nn.remat(Layer), {"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="stack")(x, None)
        return nn.Dense(1, name="head")(x)


class Task:
    """The mean of a small net's outputs, or the square root of its distance to itself."""

    batch_spec = P(AXIS)

    def __init__(self, root: bool = False) -> None:
        self.model, self.root = Net(), root

    def count(self, batch):
        return jnp.float32(batch.shape[0])

    def loss(self, variables, prepared, batch, totals, key):
        found = self.model.apply(variables, batch)
        if self.root:  # its derivative at 0 is infinite
            found = jnp.sqrt((found - jax.lax.stop_gradient(found)) ** 2)
        return found.sum() / totals, {}


def asked(change, *, root=False, value=1.0):
    mesh, task = make_mesh(jax.devices()[:2]), Task(root)
    batch = jnp.full((6, 4), value)
    params = jax.tree.map(jnp.array, task.model.init(jax.random.key(0), batch)["params"])
    change(params)
    params = put_replicated({"params": params}, mesh)
    return first_nan(task, mesh, params, {"params": {}}, None, put_batch(batch, P(AXIS), mesh, 3))


def zero_scale(params):
    params["stack"]["scale"] = params["stack"]["scale"].at[1].set(0.0)


def nan_weight(params):
    params["head"]["kernel"] = params["head"]["kernel"].at[2].set(jnp.nan)


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (nan_weight, {}, "is in the weights: params.head.kernel"),
        (lambda _: None, {"value": jnp.inf}, "is in the batch"),
        pytest.param(
            zero_scale,
            {"value": 0.0},
            "output of Layer.stack.__call__",
            marks=pytest.mark.xfail(
                Version(flax.__version__) >= Version("0.12.12"),
                reason="this flax allows no callback inside nn.scan; the gradient is named instead",
            ),
        ),
        (lambda _: None, {"root": True}, "the gradient of params.head.bias holds a NaN"),
        (lambda _: None, {}, "the newest batch gives no NaN again"),
    ],
)
def test_the_first_nan_is_named(change, options, said):
    assert said in asked(change, **options)
