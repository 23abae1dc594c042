"""Clips of videos: which frames, which questions, the same transform; batches frame by frame."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3jax.data import clips as cutting
from sam3jax.data.clip_loader import make_clip_loader
from sam3jax.data.clips import Sampling, draw_clip, evaluation_clips, frame_record, usable
from sam3jax.data.coco import Annotation, decode_mask
from sam3jax.data.examples import move_instance
from sam3jax.data.folders import read_dataset
from sam3jax.data.frames import FrameFiles
from sam3jax.data.pictures import DataError
from sam3jax.data.prompts import Question
from sam3jax.data.transforms import Transform, unpack_mask
from sam3jax.data.video_folders import read_videos
from sam3jax.data.video_sets import open_videos
from sam3jax.data.videos import NOT_ANNOTATED, VideoDataset
from tests import video_folders as made
from tests.batches import small_config
from tests.coco_folders import write_small_shapes

SAMPLING = Sampling(frames=3, max_stride=2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> VideoDataset:
    """Cat and dog; a bird is in the list of categories and in no video."""
    return read_videos(made.write_ytvis(tmp_path_factory.mktemp("videos")))


def config(**changes):
    return small_config(**{"batch_size": 6, "data": {"max_prompts": 3, "negatives": 1}, **changes})


def numbers(video, sampling, seeds=range(60)):
    draw = lambda seed: draw_clip(video, 84, config().data, sampling, np.random.default_rng(seed))
    return [draw(seed).frames for seed in seeds]


def test_clips_run_at_one_stride_both_ways(dataset):
    (video,) = dataset.videos
    drawn = numbers(video, SAMPLING)
    steps = {tuple(np.diff(frames)) for frames in drawn}
    assert steps == {(1, 1), (2, 2), (-1, -1), (-2, -2)}
    assert {f for frames in drawn for f in frames} == set(range(6))
    forwards = numbers(video, SAMPLING._replace(reverse=0.0))
    assert all(np.diff(frames).min() > 0 for frames in forwards)
    assert {frames[::-1] for frames in numbers(video, SAMPLING._replace(reverse=1.0))} == set(
        forwards
    )


def test_a_short_video_is_used_at_a_smaller_stride(dataset):
    (video,) = dataset.videos
    short = dataclasses.replace(video, labels=video.labels[:4])
    assert {tuple(np.abs(np.diff(f))) for f in numbers(short, Sampling(3, 5))} == {(1, 1)}
    shorter = dataclasses.replace(video, labels=video.labels[:2])
    assert set(numbers(shorter, Sampling(4, 5, reverse=0.0))) == {(0, 1, 0, 1)}
    many = dataclasses.replace(dataset, videos=(video, short, shorter))
    said = "\n".join(usable(many, Sampling(4, 5))[1])
    assert "1 videos have fewer than 4 annotated frames" in said
    assert "2 videos are too short for stride 5" in said


def test_a_drifting_crop_stays_inside_the_picture(dataset):
    (video,) = dataset.videos
    one = dataclasses.replace(video, labels=video.labels[:1])
    sampling = Sampling(frames=4, motion=0.9)
    for seed in range(500):
        clip = draw_clip(one, 84, config().data, sampling, np.random.default_rng(seed))
        for moved in clip.transforms:
            left, top, width, height = moved.crop
            assert left >= 0
            assert top >= 0
            assert left + width <= video.width + 1e-9
            assert top + height <= video.height + 1e-9


def test_the_stride_has_a_lower_bound_too(dataset):
    (video,) = dataset.videos
    steps = lambda **stride: {
        tuple(np.abs(np.diff(f))) for f in numbers(video, Sampling(2, **stride))
    }
    assert steps(min_stride=2, max_stride=4) == {(2,), (3,), (4,)}
    assert steps(min_stride=4, max_stride=4) == {(4,)}
    short = dataclasses.replace(video, labels=video.labels[:3])
    drawn = numbers(short, Sampling(3, min_stride=2, max_stride=4))
    assert {tuple(np.abs(np.diff(f))) for f in drawn} == {(1, 1)}  # there is no room for more


def test_fewer_frames_than_a_clip_are_run_to_and_fro(dataset):
    (video,) = dataset.videos
    two = dataclasses.replace(video, labels=video.labels[:2])
    assert set(numbers(two, Sampling(4, 5))) == {(0, 1, 0, 1), (1, 0, 1, 0)}
    batch = next(loader_of(dataclasses.replace(dataset, videos=(two,))))
    assert batch.images.shape[0] == 6
    used, lines = usable(dataclasses.replace(dataset, videos=(two,)), SAMPLING)
    assert len(used.videos) == 1
    assert any("run to and fro" in line for line in lines)


def test_a_coco_folder_of_pictures_is_taken_as_videos_of_one_frame(tmp_path):
    root = write_small_shapes(tmp_path / "shapes", train=3, valid=2)
    settings = {"data": {"train": str(root), "max_prompts": 3, "negatives": 1}, "task": "clips"}
    train, valid, lines = open_videos(config(**settings))
    assert (len(train.videos), len(valid.videos)) == (3, 2)
    assert any("3 videos of one annotated frame become clips by motion" in line for line in lines)
    pictures = read_dataset(root, "train")
    boxes = lambda annotations: [(a.category_id, a.bbox) for a in annotations]
    read = [boxes(r.annotations) for r in pictures.images]
    assert read == [boxes(v.labels[0].annotations) for v in train.videos]
    phrases = tuple(pictures.categories.values())
    tokens = np.ones((len(phrases), 16), np.int32)
    batch = next(make_clip_loader(train, phrases, tokens, config(**settings), SAMPLING))
    first, last = batch.images[0].astype(int), batch.images[2].astype(int)
    assert np.abs(first - last).mean() > 1  # the crop moved
    assert batch.targets.num_targets.sum() > 0


def test_only_annotated_frames_are_drawn(tmp_path):
    data = read_videos(made.write_palette(tmp_path, every=2))
    (video,) = data.videos
    assert {f for frames in numbers(video, Sampling(2, 2)) for f in frames} == {0, 2, 4}
    nobody = dataclasses.replace(video, labels=(NOT_ANNOTATED,) * 6)
    kept, said = usable(dataclasses.replace(data, videos=(video, nobody)), Sampling(2, 2))
    assert len(kept.videos) == 1
    assert said[0] == "1 videos without an annotated frame are left out"


def test_a_still_picture_becomes_a_clip_by_motion(dataset):
    (video,) = dataset.videos
    still = dataclasses.replace(
        video, labels=video.labels[2:3], frames=FrameFiles(video.frames.files[2:3])
    )
    for seed in range(30):
        clip = draw_clip(still, 84, config().data, Sampling(4), np.random.default_rng(seed))
        assert clip.frames == (0,) * 4
        crops = np.array([t.crop for t in clip.transforms])
        assert np.ptp(crops[:, :2], 0).max() > 0
        np.testing.assert_allclose(np.diff(crops, axis=0, n=2), 0, atol=1e-9)  # one speed
        assert (crops[:, :2] >= -1e-9).all()
        assert (crops[:, :2] + crops[:, 2:] <= np.array([video.width, video.height]) + 1e-9).all()
    moved = draw_clip(video, 84, config().data, Sampling(4), np.random.default_rng(0)).transforms
    assert len(set(moved)) == 1, "frames of a real video share one transform"


def loader_of(dataset, sampling=SAMPLING, **changes):
    c = config(**changes)
    phrases = ("cat", "dog", "bird", "ship")
    return make_clip_loader(dataset, phrases, np.ones((4, 16), np.int32), c, sampling)


def test_a_batch_holds_what_the_frames_show(dataset):
    """Every mask, box, count and id of two clips, against the annotations themselves."""
    truth = made.object_masks()
    for _, batch in zip(range(4), loader_of(dataset)):
        size = batch.images.shape[1]
        assert batch.images.shape == (6, 84, 84, 3)
        assert batch.clip.tolist() == [0, 0, 0, 1, 1, 1]
        assert batch.stage.tolist() == [0, 1, 2, 0, 1, 2]
        masks = unpack_mask(batch.targets.masks, size)
        for i in range(6):
            text, valid = batch.prompts.text_id[i], batch.prompts.valid[i]
            same = np.flatnonzero(batch.clip == batch.clip[i])
            assert all((batch.prompts.text_id[k] == text).all() for k in same), "same phrases"
            assert all((batch.object_id[k] == batch.object_id[i]).all() for k in same)
            for p in np.flatnonzero(valid):
                here = truth[batch.frame[i], text[p]].any() if text[p] < 2 else False
                assert batch.targets.num_targets[i, p] == here
                for slot in batch.targets.index[i, p, : batch.targets.num_targets[i, p]]:
                    assert batch.object_id[i, slot] == text[p] + 1
                    want = truth[batch.frame[i], text[p]]
                    picture = Image.fromarray(want.astype(np.uint8) * 255)
                    large = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
                    np.testing.assert_array_equal(masks[i, slot], large >= 128)
                    assert batch.targets.mask_valid[i, slot]
                    rows = np.flatnonzero(want.any(1))
                    middle = (rows[0] + rows[-1] + 1) / 2 / want.shape[0]
                    np.testing.assert_allclose(batch.targets.boxes[i, slot, 1], middle, atol=1e-6)


def test_void_pixels_lie_in_a_batch_where_they_lie_in_the_frame(dataset, tmp_path):
    palette = read_videos(made.write_palette(tmp_path), "train")
    palette = dataclasses.replace(palette, categories=dict.fromkeys(palette.categories, "cat"))
    batch = next(loader_of(palette))
    size = batch.images.shape[1]
    void = unpack_mask(batch.targets.void, size)
    for i, frame in enumerate(batch.frame):
        picture = Image.fromarray((made.index_masks()[frame] == 255).astype(np.uint8) * 255)
        large = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(void[i], large >= 128)
        assert void[i].any()
    assert next(loader_of(dataset)).targets.void is None  # nothing to carry where there is none


def test_a_phrase_is_asked_where_any_frame_shows_it(dataset):
    (video,) = dataset.videos
    square = evaluation_clips(video, 3, 84)[0]  # frames 0, 1, 2: the dog is in the last one only
    names = cutting.phrases_of_videos(dataset)
    asked, objects = cutting.questions_of_clip(
        square, names, config().data, SAMPLING, targets=2, seed=0, epoch=0, row=0
    )
    assert {q.phrase for q in asked if q.targets} == {"cat", "dog"}
    assert objects == [1, 2]
    early = dataclasses.replace(square, frames=(0, 1, 0))
    asked, objects = cutting.questions_of_clip(
        early, names, config().data, SAMPLING, targets=2, seed=0, epoch=0, row=0
    )
    assert [(q.phrase, q.targets) for q in asked] == [("cat", (0,)), ("dog", ())]
    assert objects == [1]


def test_objects_beyond_the_limit_make_a_phrase_not_exhaustive(dataset):
    (video,) = dataset.videos
    clip = dataclasses.replace(evaluation_clips(video, 3, 84)[0], frames=(2, 3, 2))
    double = tuple(
        dataclasses.replace(
            f,
            annotations=f.annotations
            + tuple(dataclasses.replace(a, id=a.id + 5) for a in f.annotations),
        )
        for f in video.labels
    )
    clip = dataclasses.replace(clip, video=dataclasses.replace(video, labels=double))
    names = cutting.phrases_of_videos(dataset)
    few = SAMPLING._replace(max_objects=3)
    asked, objects = cutting.questions_of_clip(
        clip, names, config().data, few, targets=4, seed=0, epoch=0, row=0
    )
    assert objects == [1, 2, 6]
    assert {q.phrase: q.exhaustive for q in asked if q.targets} == {"cat": True, "dog": False}


def equal(a, b) -> bool:
    import jax

    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_batches_depend_on_their_number_alone(dataset):
    """Not on workers, nor on where the loader was entered, nor on the other clips of the batch."""
    augmented = {"max_prompts": 3, "flip": True, "crop": 0.7, "exemplars": 1}
    first = loader_of(dataset, data=augmented)
    wanted = [next(first) for _ in range(4)]
    assert not equal(wanted[0].images, wanted[1].images)
    again = loader_of(dataset, data=augmented)
    [next(again) for _ in range(2)]
    state = again.get_state()
    later = loader_of(dataset, data=augmented)
    later.set_state(state)
    assert equal(next(later), wanted[2])
    with_workers = loader_of(dataset, data={**augmented, "workers": 1})
    assert all(equal(next(with_workers), w) for w in wanted)
    with_workers.close()
    halves = [
        make_clip_loader(
            dataset, ("cat", "dog", "bird", "ship"), np.ones((4, 16), np.int32),
            config(data=augmented), SAMPLING, process_index=k, process_count=2,
        )
        for k in range(2)
    ]  # fmt: skip
    for want in wanted:
        parts = [next(half) for half in halves]
        np.testing.assert_array_equal(np.concatenate([p.images for p in parts]), want.images)
        np.testing.assert_array_equal(np.concatenate([p.clip for p in parts]), want.clip)
    with pytest.raises(DataError, match="frames 3 -> 2"):
        loader_of(dataset, Sampling(2)).set_state(state)


def test_pixels_change_alike_in_all_frames_and_targets_do_not(dataset):
    asked = {"max_prompts": 3, "negatives": 1}
    plain, grey = (next(loader_of(dataset, data={**asked, "grey": g})) for g in (0.0, 1.0))
    assert (np.ptp(plain.images, axis=-1) > 10).any((1, 2)).all()
    assert np.ptp(grey.images, axis=-1).max() <= 1
    np.testing.assert_array_equal(plain.targets.masks, grey.targets.masks)


def test_a_batch_that_is_no_whole_number_of_clips_is_refused(dataset):
    with pytest.raises(DataError, match="no whole number of clips of 4"):
        loader_of(dataset, Sampling(4))


def test_a_whole_video_in_clips(dataset):
    (video,) = dataset.videos
    assert [c.frames for c in evaluation_clips(video, 4, 84)] == [(0, 1, 2, 3), (4, 5, 5, 5)]
    assert len({t for c in evaluation_clips(video, 4, 84) for t in c.transforms}) == 1


def test_exemplars_are_shown_in_frames_that_show_them(dataset):
    (video,) = dataset.videos
    from sam3jax.data.clip_loader import clip_arrays
    from sam3jax.data.prompts import Shapes

    clip = evaluation_clips(video, 3, 84)[0]
    questions = [Question("dog", 2, (0,), (0,)), Question("visual", 2, (0,), (0,))]
    arrays = clip_arrays(clip, questions, [2], {"dog": 1, "visual": 3}, Shapes(2, 1, 1, 1))
    assert arrays["box_valid"][:, 0, 0].tolist() == [False, False, True]
    assert arrays["valid"][:, 1].tolist() == [False, False, True], "asks nothing without its box"
    annotation = video.labels[2].annotations[1]
    assert decode_mask(annotation, video.height, video.width).any()
    np.testing.assert_array_equal(arrays["box_prompts"][2, 0, 0], arrays["boxes"][2, 0])


def test_an_object_thinner_than_a_pixel_keeps_its_box_in_a_crop_as_in_a_picture(dataset):
    (video,) = dataset.videos
    mask = np.zeros((video.height, video.width), np.uint8, order="F")
    mask[video.height // 2, 4:-4] = 1
    rle = coco_mask.encode(mask)
    box = (4.0, float(video.height // 2), float(video.width - 8), 1.0)
    thin = Annotation(1, 1, box, rle, False, float(mask.sum()))
    edge = (2, 2, video.width - 4, video.height - 4)
    transform = Transform(edge, (8, 8), False, 0, (0, 0), (8, 8))
    for picture in (video, frame_record(video, 0)):
        moved = move_instance(thin, picture, transform, True)
        assert moved is not None
        assert moved[1] is None
        assert moved[0][3] > 0
