"""The interactive path equals torch: prompts of every kind, odd batches, from features and from pictures."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from sam3jax.model import Interactive
from sam3jax.model.interactive import with_padding_token
from sam3jax.model.mask_decoder import choose
from sam3jax.model.prompt_encoder import ABSENT
from sam3jax.types import ClickFeatures

torch = pytest.importorskip("torch")
pytest.importorskip("sam3")
from convert import to_flax
from tests import bridge, click_reference
from tests import torch_reference as base
from tests import tracker_reference as reference

PARTS = ("detector", "second_neck", "interactive")
TOLERANCE = 1e-4  # of the output's standard deviation
SIZES = {"small": reference.SMALL, "wide": reference.WIDE}


def relative(got, want) -> float:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, (got.shape, want.shape)
    scale = want.std() if want.size > 1 and want.std() > 0 else 1.0
    return float(np.abs(got - want).max() / scale)


def unequal(got, want) -> float:
    """The largest difference, of the largest value."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def outputs(answer) -> list:
    """Everything an answer says; the score as a probability: near 0 its logit is a difference of large numbers."""
    return [answer.masks, answer.ious, answer.tokens, jax.nn.sigmoid(answer.score)]


def last(x) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


def model_config(size: reference.TrackerSize):
    return bridge.model_config(
        reference.DETECTORS[size], mask_decoder_heads=size.decoder_heads,
        mask_decoder_ffn=size.decoder_ffn, mask_decoder_iou_hidden=size.iou_hidden,
        mask_prompt_channels=size.mask_channels,
    )  # fmt: skip


class Models:
    """A torch detector with its second neck and tracker; the same weights in Flax."""

    def __init__(self, size: reference.TrackerSize):
        self.size, self.config = size, model_config(size)
        detector_size = dataclasses.replace(reference.DETECTORS[size], vocabulary=1024)
        self.config = self.config.model_copy(update={"vocab_size": 1024})
        self.detector = reference.detector_with_neck(detector_size, 11).eval()
        self.tracker = reference.tracker(size, 11)
        tensors = reference.checkpoint(self.detector, self.tracker)
        self.tensors = {n.removeprefix("detector."): t for n, t in tensors.items()}
        self.params = to_flax(self.tensors, self.config, parts=PARTS)

    def decode(self, features, picture, prompts, *, train=False, token=True):
        points, labels = (np.asarray(prompts[k]) for k in ("points", "labels"))
        if token:
            points, labels = map(np.asarray, with_padding_token(points, labels))
        masks = np.asarray(prompts["masks"])[:, 0] if "masks" in prompts else None
        return run(self.config, train)(self.params, features, picture, points, labels, masks)


@functools.cache
def run(config, train=False):
    def call(params, features, picture, points, labels, masks=None, has_mask=None):
        return Interactive(config, train).apply(
            {"params": params}, features, picture, points, labels, masks, has_mask, method="decode"
        )

    return jax.jit(call)


models_of = functools.cache(lambda size: Models(SIZES[size]))


@pytest.fixture(scope="module")
def models():
    return models_of("small")


def features(levels) -> ClickFeatures:
    return ClickFeatures(*(last(x) for x in (levels.fine, levels.middle, levels.coarse)))


CASES = {
    "a point": (1, dict(points=1)),
    "points": (7, dict(points=4)),
    "a box": (3, dict(points=0, box=True)),
    "a box and points": (3, dict(points=2, box=True)),
    "points and a mask": (5, dict(points=3, mask=True)),
    "a mask": (5, dict(points=0, mask=True)),
    "everything": (7, dict(points=2, box=True, mask=True)),
    "padded rows": (5, dict(points=3, padded=True)),
}


@pytest.mark.parametrize(
    ("size", "case"),
    [*(("small", case) for case in CASES), ("wide", "everything"), ("wide", "padded rows")],
)
def test_decode_equals_torch(size, case):
    objects, options = CASES[case]
    models = models_of(size)
    levels = click_reference.random_levels(models.tracker, 3, 5)
    prompts = click_reference.random_prompts(models.size, objects, seed=objects, **options)
    picture = torch.arange(objects) % 3
    answer = models.decode(features(levels), picture.numpy(), prompts)
    for multimask in (True, False):
        with torch.no_grad():
            want = click_reference.decode(models.tracker, levels, prompts, multimask, picture)
        masks, ious = choose(answer, multimask, train=False)
        assert relative(masks, want["masks"]) < TOLERANCE
        assert relative(ious, want["ious"]) < TOLERANCE
        # With one mask, the token that tracking keeps is token 0, whichever mask was chosen.
        kept = answer.tokens[:, 1:] if multimask else answer.tokens[:, :1]
        assert relative(kept, want["mask_tokens"]) < TOLERANCE
    assert relative(answer.score[:, None], want["object_score_logits"]) < TOLERANCE
    assert relative(answer.masks, want["all_masks"]) < TOLERANCE
    assert relative(answer.ious, want["all_ious"]) < TOLERANCE


def test_training_takes_mask_0_where_evaluation_falls_back(models):
    levels = click_reference.random_levels(models.tracker, 3, 5)
    prompts = click_reference.random_prompts(models.size, 7, 4, 7)
    answer = models.decode(features(levels), np.zeros(7, int), prompts)
    with torch.no_grad():
        evaluated = click_reference.decode(models.tracker, levels, prompts, False)
        models.tracker.train()
        trained = click_reference.decode(models.tracker, levels, prompts, False)
        models.tracker.eval()
    assert (evaluated["stability"] < 0.98).any()
    assert relative(evaluated["masks"], trained["masks"]) > 1e-2
    assert relative(choose(answer, False, train=True)[0], trained["masks"]) < TOLERANCE
    assert relative(choose(answer, False, train=False)[0], evaluated["masks"]) < TOLERANCE


def test_pictures_to_masks(models):
    example = base.example(reference.DETECTORS[models.size], 5, images=3, prompts=1)
    images = torch.from_numpy(example["images"])
    prompts = click_reference.random_prompts(models.size, 5, 2, 7, box=True)
    picture = torch.tensor([2, 0, 1, 1, 2])
    with torch.no_grad():
        want = click_reference.interactive(
            models.detector, models.tracker, images, prompts, True, picture
        )
    encode = jax.jit(
        lambda params, x: Interactive(models.config).apply(
            {"params": params}, x, method="encode_image"
        )
    )
    found = encode(models.params, last(images))
    no_memory = models.tracker.no_mem_embed.detach().numpy().reshape(-1)
    assert relative(found.fine, last(want["fine"])) < TOLERANCE
    assert relative(found.middle, last(want["middle"])) < TOLERANCE
    assert relative(found.coarse, last(want["coarse"]) + no_memory) < TOLERANCE
    answer = models.decode(found, picture.numpy(), prompts)
    masks, ious = choose(answer, True, train=False)
    assert relative(masks, want["masks"]) < TOLERANCE
    assert relative(ious, want["ious"]) < TOLERANCE
    with torch.no_grad():
        one = {n: x[2:4] for n, x in prompts.items()}
        _, ious_1, low = click_reference.image_predictor(
            models.detector, models.tracker, images[1], one, True
        )
    assert relative(np.clip(masks[2:4], -32, 32), low) < TOLERANCE
    assert relative(ious[2:4], ious_1) < TOLERANCE


def test_absent_points_equal_no_points(models):
    """A row does not change with its neighbours, their number of points, or places left absent."""
    levels = features(click_reference.random_levels(models.tracker, 2, 5))
    prompts = click_reference.random_prompts(models.size, 5, 3, 3, mask=True)
    points, labels = (np.asarray(prompts[k]) for k in ("points", "labels"))
    masks = np.asarray(prompts["masks"])[:, 0]
    has_mask = np.array([True, False, True, False, False])
    count = np.array([3, 1, 2, 3, 0])
    labels = np.where(
        np.arange(3) < count[:, None], labels, -1
    )  # one row has the padding token only
    labels[4, 0] = -1
    count[4] = 1
    labels = np.where(np.arange(3) < count[:, None], labels, ABSENT)
    picture = np.array([0, 1, 0, 0, 1])
    # Absent places in front, between and behind, anywhere in the picture.
    rng = np.random.default_rng(0)
    wide_points = rng.uniform(-50, 500, (5, 9, 2)).astype(np.float32)
    wide_labels = np.full((5, 9), ABSENT, np.int32)
    for row in range(5):
        places = np.sort(rng.permutation(9)[: count[row]])
        wide_points[row, places] = points[row, : count[row]]
        wide_labels[row, places] = labels[row, : count[row]]
    together = run(models.config)(
        models.params, levels, picture, wide_points, wide_labels, masks, has_mask
    )
    for row in range(5):
        k = count[row]
        alone = run(models.config)(
            models.params, levels, picture[row : row + 1], points[row : row + 1, :k],
            labels[row : row + 1, :k], masks[row : row + 1] if has_mask[row] else None,
        )  # fmt: skip
        for ours, theirs in zip(outputs(together), outputs(alone), strict=True):
            assert np.abs(ours[row] - theirs[0]).max() < 1e-6 * np.abs(ours).max()


def test_no_points_at_all(models):
    """The picture predictor's mask alone: no token of a prompt at all, not even padding."""
    levels = click_reference.random_levels(models.tracker, 1, 5)
    prompts = click_reference.random_prompts(models.size, 3, 0, 4, mask=True)
    got = models.decode(features(levels), np.zeros(3, int), prompts, token=False)
    encoder, decoder = models.tracker.sam_prompt_encoder, models.tracker.sam_mask_decoder
    with torch.no_grad():
        sparse, dense = encoder(points=None, boxes=None, masks=prompts["masks"])
        own = levels.of(torch.zeros(3, dtype=torch.long))
        masks, *_ = decoder(
            own.coarse, encoder.get_dense_pe(), sparse, dense, True, False, [own.fine, own.middle]
        )
    assert relative(choose(got, True, train=False)[0], masks) < TOLERANCE


def test_padding_is_a_token_and_absence_is_not(models):
    levels = features(click_reference.random_levels(models.tracker, 1, 5))
    points, labels = np.full((1, 2, 2), 20.0, np.float32), np.array([[1, -1]])
    decode = run(models.config)
    padded, absent, alone = (
        decode(models.params, levels, np.zeros(1, int), p, n).masks
        for p, n in ((points, labels), (points, np.array([[1, ABSENT]])), (points[:, :1], labels[:, :1]))
    )  # fmt: skip
    assert unequal(absent, alone) < 1e-6
    assert relative(padded, alone) > 1e-2


def test_transformers_holds_the_heads_under_our_names():
    """Every exported tensor of the heads is one of Sam3TrackerVideoModel's, equal in value."""
    pytest.importorskip("transformers")
    from convert import tracker as renames
    from convert.weights import part_tensors
    from sam3jax.weights.parts import live_parts
    from sam3jax.weights.tensor_file import Tensor

    size = dataclasses.replace(reference.SMALL, dim=128, memory_dim=64)
    tracker = reference.tracker(size, 3)
    port = reference.huggingface(tracker, size).state_dict()
    config = model_config(reference.SMALL).model_copy(update={"dim": 128})
    tensors = {n: Tensor.of(x) for n, x in reference.checkpoint(None, tracker).items()}
    leaves = live_parts({}, tensors, config, ("interactive",), "the tracker")
    back = part_tensors(leaves, config, ("interactive",))
    found, rest = renames.to_huggingface(back)
    assert not rest
    names = {n.removeprefix("tracker_model."): x.read() for n, x in found.items()}
    # Four point embeddings are one, the frequencies stand twice.
    assert len(names) == 17 + 131 + 1 - 3 + 1
    for name, x in names.items():
        np.testing.assert_array_equal(x, port[name].numpy())
