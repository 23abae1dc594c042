"""The loss of prompted masks equals sam2's, in values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3jax.config import ClicksConfig
from sam3jax.losses.interactive import at_centres, round_losses

torch = pytest.importorskip("torch")
pytest.importorskip("sam3")
from tests import click_reference

pytestmark = pytest.mark.slow

NAMES = {"loss_mask": "mask", "loss_dice": "dice", "loss_iou": "iou_error", "loss_class": "score"}
GRID, EDGE = 12, 42


def rounds(objects: int, seed: int, count: int = 3):
    """Targets, one of them empty, and the answers of some rounds: three masks, then one."""
    rng = np.random.default_rng(seed)
    blob = lambda *shape: np.cumsum(np.cumsum(rng.normal(size=shape), -1), -2).astype(np.float32)
    targets = blob(objects, EDGE, EDGE) > 0
    targets[objects // 2] = False
    out = []
    for i in range(count):
        m = 3 if i == 0 else 1
        out.append(
            dict(
                masks=2 * blob(objects, m, GRID, GRID),
                ious=rng.uniform(size=(objects, m)).astype(np.float32),
                score=rng.normal(size=objects).astype(np.float32),
            )
        )
    return targets, out


def ours(config, targets, answers):
    terms = [round_losses(**answer, targets=targets, config=config) for answer in answers]
    n = len(targets)
    sums = {k: sum(getattr(t, v).sum() for t in terms) / n for k, v in NAMES.items()}
    return sum(t.total(config).sum() for t in terms) / n, sums


def weights(config: ClicksConfig) -> click_reference.LossWeights:
    return click_reference.LossWeights(
        config.loss_mask, config.loss_dice, config.loss_iou, config.loss_score, config.focal_alpha,
        config.focal_gamma, config.iou_error, config.iou_of == "all",
    )  # fmt: skip


def theirs(config, targets, leaves):
    steps = []
    for leaf in leaves:
        masks = leaf["masks"]
        if config.mask_resolution == "target":
            masks = torch.nn.functional.interpolate(masks, (EDGE, EDGE), mode="bilinear")
        steps.append(
            {
                "high_res_multimasks": masks,
                "ious": leaf["ious"],
                "object_score_logits": leaf["score"][:, None],
            }
        )
    if config.mask_resolution == "prediction":
        targets = np.array(at_centres(jnp.asarray(targets), (GRID, GRID)))
    return click_reference.tracking_loss(
        [{"steps": steps}], torch.from_numpy(targets)[None], weights(config)
    )


@pytest.mark.parametrize(
    ("objects", "error", "of", "resolution"),
    [
        (n, *choice)
        for n, choice in zip(
            itertools.cycle((1, 3, 5, 7)),
            itertools.product(("l1", "mse"), ("all", "best"), ("target", "prediction")),
        )
    ],
)
def test_values_and_gradients_equal_torch(objects, error, of, resolution):
    # Chunks that do not divide the objects, and weights that are not the defaults.
    config = ClicksConfig(
        iou_error=error, iou_of=of, mask_resolution=resolution, objects_at_once=2, loss_dice=1.5,
        loss_iou=0.7,
    )  # fmt: skip
    targets, answers = rounds(objects, objects)
    leaves = [{k: torch.tensor(v, requires_grad=True) for k, v in a.items()} for a in answers]
    want = theirs(config, targets, leaves)
    want["core_loss"].backward()
    total = lambda answers: ours(config, targets, answers)
    (value, terms), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(answers)
    np.testing.assert_allclose(value, want["core_loss"].detach(), rtol=1e-5)
    for name in NAMES:
        np.testing.assert_allclose(terms[name], want[name].detach(), rtol=1e-5, atol=1e-7)
    for got, leaf in zip(grads, leaves, strict=True):
        for name, x in leaf.items():
            slope = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
            np.testing.assert_allclose(got[name], slope, atol=1e-3 * np.abs(slope).max() + 1e-12)


def test_bce_instead_of_focal_equals_torch():
    config = ClicksConfig(mask_loss="bce", loss_dice=0.0)
    targets, answers = rounds(5, 2, count=1)
    masks = torch.from_numpy(answers[0]["masks"])
    masks = torch.nn.functional.interpolate(masks, (EDGE, EDGE), mode="bilinear")
    wanted = torch.from_numpy(targets)[:, None].expand_as(masks).float()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(masks, wanted, reduction="none")
    best = bce.mean((2, 3)).min(1).values.numpy() * targets.any((1, 2))
    got = round_losses(**answers[0], targets=targets, config=config)
    np.testing.assert_allclose(got.mask, best, rtol=1e-5)


def test_masks_out_of_play_count_for_nothing():
    config = ClicksConfig(mask_resolution="prediction")
    targets, answers = rounds(5, 3, count=1)
    four = {k: np.concatenate([v, v[:, :1]], 1) for k, v in answers[0].items() if k != "score"}
    in_play = np.broadcast_to([True, True, True, False], (5, 4))
    # A mask that is better than all others, were it in play.
    four["masks"][:, 3] = np.where(at_centres(jnp.asarray(targets), (GRID, GRID)), 20.0, -20.0)
    score = answers[0]["score"]
    got = round_losses(**four, score=score, targets=targets, config=config, in_play=in_play)
    want = round_losses(**answers[0], targets=targets, config=config)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    free = round_losses(**four, score=score, targets=targets, config=config)
    assert (np.asarray(free.best)[[0, 1, 3, 4]] == 3).all()


def test_an_object_without_pixels_teaches_its_score_alone():
    config = ClicksConfig()
    targets, answers = rounds(3, 4, count=1)
    total = lambda answer: (
        round_losses(**answer, targets=targets, config=config).total(config).sum()
    )
    grads = jax.grad(total)(answers[0])
    assert not grads["masks"][1].any()
    assert not grads["ious"][1].any()
    assert grads["score"][1] > 0
    assert grads["masks"][0].any()
