"""Tracks of whole videos measured: `evaluation.tracks`, with answers that are known."""

from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as rle_codec

from sam3jax.data.video_folders import read_videos
from sam3jax.evaluation.tracks import asked_of, evaluate_tracks
from sam3jax.video.association import RELEASED
from sam3jax.video.objects import VideoFrame, VideoObject
from tests.video_folders import FRAMES, SIZE, object_masks, write_palette, write_ytvis

BOTH = ("video/HOTA", "video/DetA", "video/AssA", "video/J", "video/F", "video/J&F")


class Answers:
    """Stands for VideoPredictor. answers: phrase -> masks [frames, n, Y, X] of its tracks."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def objects(self, frames, phrases, reverse=False):
        self.asked.append(list(phrases))
        for t in range(len(frames)):
            found, id = [], 0
            for phrase in phrases:
                for mask in self.answers.get(phrase, np.zeros((FRAMES, 0, *SIZE), bool))[t]:
                    id += 1
                    if mask.any():
                        rle = rle_codec.encode(np.asfortranarray(mask, "u1"))
                        found.append(VideoObject(id, phrase, 0.9, (0, 0, 1, 1), rle))
            yield VideoFrame(t, SIZE[1], SIZE[0], tuple(found))


@pytest.fixture
def ytvis(tmp_path):
    return read_videos(write_ytvis(tmp_path / "data"), "train")


def truth() -> dict:
    masks = object_masks()
    return {"cat": masks[:, :1], "dog": masks[:, 1:]}


def test_right_tracks_count_fully(ytvis):
    predictor = Answers(truth())
    found = evaluate_tracks(predictor, ytvis)
    assert [round(found[n], 6) for n in BOTH] == [1.0] * 6
    assert found["video/switches"] == 0
    assert predictor.asked == [["cat", "dog", "bird"]]


def test_a_track_of_another_phrase_does_not_count(ytvis):
    found = evaluate_tracks(Answers({"dog": truth()["cat"], "cat": truth()["dog"]}), ytvis)
    assert found["video/HOTA"] == 0
    assert found["video/J"] < 0.5


def test_nothing_found_is_nothing(ytvis):
    found = evaluate_tracks(Answers({}), ytvis)
    assert found["video/HOTA"] == found["video/J"] == found["video/F"] == 0


def test_half_a_track_and_a_false_one(ytvis):
    half = truth()
    half["cat"] = half["cat"].copy()
    half["cat"][3:] = False
    half["bird"] = np.ones((FRAMES, 1, *SIZE), bool)
    found = evaluate_tracks(Answers(half), ytvis)
    # 5 of the 8 masks are found, and 6 are false; the cat's track holds 3 of the 6, the dog's is whole.
    assert found["video/DetA"] == pytest.approx(5 / (8 + 6))
    assert found["video/AssA"] == pytest.approx((3 * 3 / 6 + 2 * 1) / 5)
    assert found["video/J"] == pytest.approx((3 / 6 + 1) / 2)


def test_a_phrase_that_is_annotated_in_part_has_no_false_tracks(ytvis):
    false = {**truth(), "bird": np.ones((FRAMES, 1, *SIZE), bool)}
    videos = tuple(replace(v, not_exhaustive_ids=frozenset({3})) for v in ytvis.videos)
    assert evaluate_tracks(Answers(false), ytvis)["video/DetA"] < 0.9
    assert evaluate_tracks(Answers(false), replace(ytvis, videos=videos))["video/DetA"] == 1


def test_a_video_that_names_its_negatives_is_asked_those_and_what_is_there(ytvis):
    video = replace(ytvis.videos[0], negative_ids=frozenset({3}))
    assert set(asked_of(video, ytvis).values()) == {"cat", "dog", "bird"}
    assert set(asked_of(replace(video, negative_ids=frozenset()), ytvis).values()) == {"cat", "dog"}


def test_void_pixels_are_neither_right_nor_wrong(tmp_path):
    videos = read_videos(write_palette(tmp_path / "data"), "train")
    (phrase,) = videos.categories.values()
    wide = object_masks()
    wide[..., -2:] = True  # into void; where the second object is absent its track is in void alone
    in_void = np.zeros((FRAMES, 1, *SIZE), bool)
    in_void[..., -2:] = True
    found = evaluate_tracks(Answers({phrase: np.concatenate([wide, in_void], 1)}), videos)
    assert [round(found[n], 6) for n in BOTH] == [1.0] * 6


@pytest.mark.parametrize("threshold", [0.1, 0.25, 0.5, 0.9])
def test_rules_keep_their_place_above_the_threshold(threshold):
    rules = RELEASED.above(threshold)
    assert threshold < rules.new_score < rules.confident_score < 1
    share = lambda score: (score - threshold) / (1 - threshold)
    assert share(rules.new_score) == pytest.approx(0.4)
    assert share(rules.confident_score) == pytest.approx(0.6)
    assert RELEASED.above(0.5) == RELEASED
