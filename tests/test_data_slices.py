"""Neighbours of slices: which files they are, that turned ones turn, and that their lack is said."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sam3jax.data.coco import DataError
from sam3jax.data.folders import read_dataset
from sam3jax.data.pictures import Reading, open_rgb, read_header
from sam3jax.data.volumes import neighbours
from tests.coco_folders import annotation, write

H, W = 40, 60
THREE = Reading(slices=3)


def slices(folder, names, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        Image.fromarray(np.full((H, W), 20 * k, np.uint8)).save(folder / name, **options)
    return folder


def listed(folder, names, size=(W, H)):
    images = [{"id": k, "file_name": n, "width": size[0], "height": size[1]} for k, n in enumerate(names)]  # fmt: skip
    items = [annotation(k, k, 1, (2, 2, 9, 9)) for k in range(len(names))]
    return write(folder, items, images=images, pictures=False)


NAMES = {
    "endings with a number": ("a1.jp2", "a2.jp2", "a3.jp2"),
    "Roboflow's": ("a1_png.rf.9e1.png", "a2_png.rf.77.png", "a3_png.rf.0f4.png"),
    "numbers before the slice": ("p7_1.png", "p7_2.png", "p7_3.png"),
    "zeros": ("a008.png", "a009.png", "a010.png"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_neighbours_have_the_next_numbers(tmp_path, kind):
    names = NAMES[kind]
    slices(tmp_path, [*names, "p8_2.png", "x.png"])
    assert [f.name for f in neighbours(tmp_path / names[1])] == list(names)


def test_several_files_of_the_next_number_are_no_neighbours(tmp_path):
    """Roboflow writes several versions of each picture."""
    names = ["a1.rf.aa.png", "a1.rf.bb.png", "a2.rf.cc.png", "a3.rf.dd.png"]
    slices(tmp_path, names)
    found = [f.name for f in neighbours(tmp_path / names[2])]
    assert found == [names[2], names[2], names[3]]
    assert [f.name for f in neighbours(tmp_path / names[1])] == [names[1], names[1], names[2]]


def test_a_neighbour_that_is_a_link_is_not_followed(tmp_path):
    slices(tmp_path / "e", ["a1.png"])
    slices(tmp_path / "d", ["a2.png", "a3.png"])
    (tmp_path / "d/a1.png").symlink_to(tmp_path / "e/a1.png")
    found = neighbours(tmp_path / "d/a2.png")
    assert [f.name for f in found] == ["a2.png", "a2.png", "a3.png"]


def test_pictures_without_neighbours_are_said_and_none_at_all_is_an_error(tmp_path):
    names = ["s1.png", "s2.png", "photo.png"]
    data = read_dataset(listed(slices(tmp_path / "a", names), names), reading=THREE)
    assert data.problems == {"picture has no neighbours: its three channels are equal": 1}
    lonely = listed(slices(tmp_path / "b", ["x.png", "y.png"]), ["x.png", "y.png"])
    with pytest.raises(DataError, match=r"slices=3 finds no neighbours of 2 of 2 pictures"):
        read_dataset(lonely, reading=THREE)


def test_turned_slices_are_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    names = ["s1.png", "s2.png", "s3.png"]
    slices(tmp_path, names, exif=exif)
    upright = open_rgb(tmp_path / "s2.png", (H, W), reading=THREE)
    assert (upright.size, upright.getpixel((0, 0))) == ((H, W), (0, 20, 40))
    assert open_rgb(tmp_path / "s2.png", (W, H), reading=THREE).size == (W, H)


def test_volumes_of_more_dimensions_are_read_or_refused_by_name(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="NIfTI needs nibabel")
    values = np.zeros((W, H, 4, 1), np.int16)
    values[:20, :10, 2] = 1000
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "one.nii.gz")
    assert read_header(tmp_path / "one.nii.gz").frames == 4
    found = np.asarray(open_rgb(tmp_path / "one.nii.gz", (W, H), frame=2))[..., 0]
    assert found[:10, :20].min() > 200
    assert found[10:].max() == 0
    several = np.zeros((W, H, 4, 3), np.int16)
    nibabel.save(nibabel.Nifti1Image(several, np.eye(4)), tmp_path / "three.nii.gz")
    colour = np.zeros((W, H, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nibabel.save(nibabel.Nifti1Image(colour, np.eye(4)), tmp_path / "colour.nii")
    for name, says in (("three.nii.gz", "holds 3 volumes"), ("colour.nii", "are in colour")):
        with pytest.raises(DataError, match=says):
            read_header(tmp_path / name)
