"""Rounds of clicks equal torch, trunk included: the same clicks shown, the same losses and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3jax.config import ClicksConfig
from sam3jax.inference.click_rounds import evaluation_rounds
from sam3jax.model import Interactive
from sam3jax.tasks.click_training import training_rounds
from sam3jax.types import ClickBatch
from sam3jax.weights.tree import flatten

torch = pytest.importorskip("torch")
pytest.importorskip("sam3")
from convert import to_flax
from tests import click_reference
from tests import torch_reference as base
from tests import tracker_reference as reference
from tests.parity.test_interactive import PARTS, models_of

PICTURES, OBJECTS = 2, 3


@pytest.fixture(scope="module")
def models():
    return models_of("small")


def batch_of(models) -> ClickBatch:
    """Two pictures of three objects, the last of which is padding."""
    size = models.size
    images = base.example(reference.DETECTORS[size], 5, images=PICTURES, prompts=1)["images"]
    masks = click_reference.random_masks(size, 1, PICTURES * OBJECTS, 3)[0]
    masks = masks.reshape(PICTURES, OBJECTS, size.image, size.image)
    valid = np.ones((PICTURES, OBJECTS), bool)
    valid[-1, -1] = False
    return ClickBatch(
        images=images.transpose(0, 2, 3, 1), masks=np.packbits(masks, -1), valid=valid,
        points=np.zeros((PICTURES, OBJECTS, 0, 2), np.float32),
        labels=np.zeros((PICTURES, OBJECTS, 0), np.int32),
        image_valid=np.ones(PICTURES, bool), image_id=np.array([7, 3], np.int32),
        luck=np.array([7, 3], np.uint32),
    )  # fmt: skip


def torch_rounds(models, batch, asked, config, rounds):
    """The same prompts through torch, row by row, each with its own points; losses summed."""
    detector, tracker = models.detector, models.tracker
    tracker.train()
    images = torch.from_numpy(np.asarray(batch.images).transpose(0, 3, 1, 2).copy())
    levels = click_reference.levels_of(detector, tracker, images)
    levels.coarse = levels.coarse + tracker.no_mem_embed.reshape(1, -1, 1, 1)
    targets = np.unpackbits(batch.masks, axis=-1, count=models.size.image).astype(bool)
    total, terms = 0.0, {}
    weights = click_reference.LossWeights(config.loss_mask, config.loss_dice, config.loss_iou)
    for row in np.flatnonzero(batch.valid.reshape(-1)):
        steps, mask = [], None
        for r in range(rounds):
            shown = np.arange(asked.labels.shape[1])
            shown = shown[(asked.labels[row] >= 0) & (shown <= 2 + r)]
            prompts = {
                "points": torch.from_numpy(np.array(asked.points)[row : row + 1, shown]),
                "labels": torch.from_numpy(np.array(asked.labels)[row : row + 1, shown]),
            }
            if mask is not None:
                prompts["masks"] = mask
            picture = torch.tensor([row // OBJECTS])
            out = click_reference.decode(tracker, levels, prompts, len(shown) <= 1, picture)
            mask = out["masks"][:, out["ious"].argmax(1)]
            high = torch.nn.functional.interpolate(
                out["masks"], (models.size.image,) * 2, mode="bilinear"
            )
            score = out["object_score_logits"]
            steps.append(
                {"high_res_multimasks": high, "ious": out["ious"], "object_score_logits": score}
            )
        target = targets.reshape(-1, *targets.shape[2:])[row]
        found = click_reference.tracking_loss(
            [{"steps": steps}], torch.from_numpy(target.copy())[None, None], weights
        )
        total = total + found["core_loss"]
        for name, value in found.items():
            terms[name] = terms.get(name, 0.0) + float(value.detach())
    tracker.eval()
    return total, terms


def test_losses_and_gradients_of_all_rounds_equal_torch(models):
    config = ClicksConfig(first_point=0.5, first_box=0.5, first_mask=0.0, rounds=3, loss_dice=2.0)
    batch = batch_of(models)
    model = Interactive(models.config, train=True)

    @jax.jit
    def ours(params, key):
        def loss(params):
            losses, asked = training_rounds(model, {"params": params}, batch, key, config)
            return losses.total(config).sum(), (losses, asked)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, (losses, asked)), grads = ours(models.params, jax.random.key(1))
    assert losses.mask.shape == (5, 6)  # a first prompt, three corrections, one of the mask alone
    kinds = (np.asarray(asked.labels)[:5, :3] >= 0).sum(1)
    assert set(kinds) == {1, 2}  # points and boxes
    assert ((np.asarray(asked.labels)[:5, 3:7] >= 0).sum(1) == 3).all()
    total, terms = torch_rounds(models, batch, asked, config, rounds=5)
    np.testing.assert_allclose(value, total.detach(), rtol=1e-4)
    names = {
        "loss_mask": "mask",
        "loss_dice": "dice",
        "loss_iou": "iou_error",
        "loss_class": "score",
    }
    for name, ours_ in names.items():
        np.testing.assert_allclose(getattr(losses, ours_).sum(), terms[name], rtol=1e-4)

    want = {}
    for prefix, module in (("", models.detector), ("tracker.", models.tracker)):
        found = click_reference.gradients(module, total)
        want |= {prefix + name: g for name, g in found.items()}
    zeros = {n: np.zeros_like(x) for n, x in models.tensors.items()}
    want = flatten(to_flax({**zeros, **want}, models.config, parts=PARTS))
    got = {path: np.asarray(g) for path, g in flatten(grads).items()}
    frequencies = ("prompt_encoder", "frequencies")
    assert not got.pop(frequencies).any()
    moved = 0
    for path, g in got.items():
        # All scores of a query move alike with a key's bias: its gradient is zero but for rounding.
        of = (*path[:-1], "kernel") if path[-2:] == ("k_proj", "bias") else path
        largest = np.abs(want[of]).max()
        moved += largest > 0
        assert np.abs(g - want[path]).max() <= 1e-3 * largest + 1e-7, path
    assert moved > 150  # trunk, second neck and heads


def test_invalid_rows_and_neighbours_change_nothing(models):
    config = ClicksConfig(rounds=2)
    batch = batch_of(models)
    model = Interactive(models.config, train=True)
    rounds = jax.jit(
        lambda params, batch: training_rounds(
            model, {"params": params}, batch, jax.random.key(1), config
        )
    )
    run = lambda batch: rounds(models.params, batch)
    losses, asked = run(batch)
    masks = batch.masks.copy()
    masks[-1, -1] = 255  # the padding
    for batch_, rows in (
        (batch.replace(masks=masks), slice(0, 6)),
        (jax.tree.map(lambda x: x[1:], batch), slice(3, 6)),  # the second picture alone
    ):
        other, asked_other = run(batch_)
        np.testing.assert_array_equal(asked.labels[rows][:2], asked_other.labels[:2])
        for a, b in zip(jax.tree.leaves(losses), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a[:, rows], b, rtol=1e-4, atol=1e-6)
    assert not np.asarray(losses.mask[:, -1]).any()


def test_evaluation_clicks_as_the_published_rule(models):
    """Each click is where torch and scipy would click, given the mask before; IoUs are of those masks."""
    config = ClicksConfig(valid_clicks=4)
    batch = batch_of(models)
    model = Interactive(models.config)
    rounds = jax.jit(lambda params, b: evaluation_rounds(model, {"params": params}, b, config))
    out = rounds(models.params, batch)
    assert out.iou.shape == (4, 6)
    targets = np.unpackbits(batch.masks, axis=-1, count=models.size.image).astype(bool)
    targets = targets.reshape(-1, *targets.shape[2:])
    levels = click_reference.levels_of(
        models.detector, models.tracker, torch.from_numpy(batch.images.transpose(0, 3, 1, 2).copy())
    )
    levels.coarse = levels.coarse + models.tracker.no_mem_embed.reshape(1, -1, 1, 1)
    points, labels, mask, seen = [], [], None, None
    for r in range(4):
        at, is_in = click_reference.centre_click(targets, seen)
        points.append(at)
        labels.append(is_in)
        np.testing.assert_allclose(out.points[:, 2 + r], at[:, 0])
        np.testing.assert_array_equal(out.labels[:, 2 + r], is_in[:, 0])
        prompts = {
            "points": torch.from_numpy(np.concatenate(points, 1)),
            "labels": torch.from_numpy(np.concatenate(labels, 1)),
        }
        if mask is not None:
            prompts["masks"] = mask.clamp(-32, 32)
        with torch.no_grad():
            found = click_reference.decode(
                models.tracker, levels, prompts, r == 0, torch.arange(6) // OBJECTS
            )
        best = found["ious"].argmax(1)
        mask = found["masks"][torch.arange(6), best][:, None]
        seen = torch.nn.functional.interpolate(mask, (models.size.image,) * 2, mode="bilinear")
        seen = seen[:, 0].numpy() > 0
        iou = (seen & targets).sum((1, 2)) / np.maximum((seen | targets).sum((1, 2)), 1)
        np.testing.assert_allclose(out.predicted[r], found["ious"].max(1).values, rtol=1e-3)
        np.testing.assert_allclose(out.iou[r], iou, atol=2e-3)
        seen = np.array(out.masks[r])  # a pixel on the contour may round either way


def test_rounds_compile_once_for_any_mix(models):
    config = ClicksConfig(
        rounds=1, mask_only_round=False, first_point=0.3, first_box=0.3, first_mask=0.4
    )
    model = Interactive(models.config, train=True)
    run = jax.jit(
        lambda params, batch, key: training_rounds(model, {"params": params}, batch, key, config)
    )
    batch = batch_of(models)
    kinds = set()
    for seed in range(4):
        _, asked = run(models.params, batch, jax.random.key(seed))
        first = np.asarray(asked.labels)[:, :3]
        kinds |= {"box" if 2 in row else "point" if row[2] >= 0 else "mask" for row in first}
    assert kinds == {"box", "point", "mask"}
    assert run._cache_size() == 1
    assert jnp.isfinite(asked.mask).all()
