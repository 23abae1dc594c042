"""Pixels: bit depths, transparency, EXIF, frames, slices, and files that are too large."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from sam3jax import doctor
from sam3jax.config import parse_config
from sam3jax.data.coco import DataError
from sam3jax.data.datasets import open_datasets
from sam3jax.data.depth import to_bytes
from sam3jax.data.folders import read_dataset
from sam3jax.data.pictures import Reading, open_rgb, read_header
from tests.coco_folders import annotation, picture, write

H, W = 40, 60
GREY = (np.arange(H * W).reshape(H, W) % 200 + 20).astype(np.uint8)


def save(path, values):
    Image.fromarray(values).save(path)
    return path


DEPTHS = {
    "10 bits in 16": ("png", GREY.astype(np.uint16) * 4),
    "12 bits in 16": ("png", GREY.astype(np.uint16) * 16),
    "14 bits in 16": ("png", GREY.astype(np.uint16) * 64),
    "16 bits": ("png", GREY.astype(np.uint16) * 256),
    "8 bits in 16": ("png", GREY.astype(np.uint16)),
    "8 bits in 16, TIFF": ("tif", GREY.astype(np.uint16)),
    "int32 of 0..255": ("tif", GREY.astype(np.int32)),
    "int32 of 12 bits": ("tif", GREY.astype(np.int32) * 16),
    "float of 0..1": ("tif", GREY.astype(np.float32) / 255),
    "float of 0..255": ("tif", GREY.astype(np.float32)),
    "float of 16 bits": ("tif", GREY.astype(np.float32) * 256),
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_pictures_of_any_depth_look_like_their_eight_bit_twin(tmp_path, kind):
    ending, values = DEPTHS[kind]
    found = np.asarray(open_rgb(save(tmp_path / f"a.{ending}", values)))
    assert found.shape == (H, W, 3)
    np.testing.assert_allclose(found[..., 0], GREY, atol=1)


def test_numbers_without_a_natural_range_span_their_own():
    hounsfield = np.linspace(-1000, 2000, 100).astype(np.int32).reshape(10, 10)
    found = to_bytes(hounsfield)
    assert (found.min(), found.max()) == (0, 255)
    assert (np.diff(found.ravel().astype(int)) >= 0).all()
    damaged = hounsfield.astype(np.float32)
    damaged[0, 0], damaged[0, 1] = np.nan, np.inf
    assert to_bytes(damaged).max() == 255
    assert to_bytes(np.zeros((2, 2), np.int32)).max() == 0
    assert to_bytes(np.full((2, 2), -7, np.int32)).max() == 0
    assert to_bytes(np.full((2, 2), 10**9, np.int64)).shape == (2, 2)


def test_a_window_is_one_scale_for_all(tmp_path):
    file = save(tmp_path / "a.tif", np.array([[-1000, 0, 500, 1000, 3000]], np.int32))
    found = np.asarray(open_rgb(file, reading=Reading(window=(0, 1000))))[0, :, 0]
    assert found.tolist() == [0, 0, 128, 255, 255]
    items = [annotation(0, 0, 1, (0, 0, 3, 1), segmentation=[])]
    images = [{"id": 0, "file_name": "a.tif", "width": 5, "height": 1}]
    write(tmp_path, items, images=images, pictures=False)
    data = {"train": str(tmp_path), "window": [0, 1000]}
    train, _ = open_datasets(parse_config({"model": {"preset": "tiny"}, "data": data}))
    assert np.asarray(train.images[0].open())[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert not train.problems  # it was asked for; else it is said once
    assert sum("more than eight bits" in s for s in read_dataset(tmp_path).problems) == 1


def png(values, bits, colour):
    """A PNG by hand: Pillow writes no sixteen-bit colours."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_sixteen_bit_colours_are_read_or_refused_and_never_black(tmp_path):
    colours = np.repeat(GREY[..., None], 3, -1).astype(np.uint16)
    full = tmp_path / "full.png"
    full.write_bytes(png(colours * 256, 16, 2))
    np.testing.assert_array_equal(np.asarray(open_rgb(full)), colours)
    few = tmp_path / "few.png"
    few.write_bytes(png(colours * 4, 16, 2))
    with pytest.raises(DataError, match=r"few\.png has colours of sixteen bits .* all but black"):
        open_rgb(few)
    images = [{"id": 0, "file_name": "few.png", "width": W, "height": H}]
    write(tmp_path, [annotation(0, 0, 1, (2, 2, 9, 9))], images=images, pictures=False)
    with pytest.raises(DataError, match="all but black"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(tmp_path, mode):
    clear = Image.new("RGBA", (W, H), (0, 0, 0, 0))
    clear.paste((200, 200, 200, 255), (10, 10, 30, 30))
    image = {"P": clear.quantize(16), "LA": clear.convert("LA"), "RGBA": clear}[mode]
    file = tmp_path / "a.png"
    image.save(file)
    found = np.asarray(open_rgb(file))
    assert (found[0, 0] == 255).all()
    np.testing.assert_allclose(found[20, 20], 200, atol=2)


def test_half_transparent_is_half_white(tmp_path):
    file = save(tmp_path / "a.png", np.full((4, 4, 4), (100, 0, 0, 128), np.uint8))
    np.testing.assert_allclose(np.asarray(open_rgb(file))[0, 0], [177, 127, 127], atol=1)


def bomb(file, edge):
    Image.new("L", (edge, edge)).save(file, compress_level=9)


def test_a_small_file_does_not_become_gigabytes(tmp_path):
    bomb(tmp_path / "a.png", 15_000)  # 225 megapixels in some kilobytes
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.png has .*megapixels"):
        open_rgb(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png has .*megapixels"):
        read_header(tmp_path / "a.png")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert Image.MAX_IMAGE_PIXELS  # Pillow's own guard stays on
    images = [{"id": 0, "file_name": "a.png", "width": 15_000, "height": 15_000}]
    write(tmp_path, [annotation(0, 0, 1, (2, 2, 9, 9))], images=images, pictures=False)
    with pytest.raises(DataError, match="megapixels"):
        read_dataset(tmp_path)


def test_the_limit_is_a_setting(tmp_path):
    picture(tmp_path / "a.png", 1200, 1000)
    open_rgb(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"1 megapixels, at most 1 are read.*data\.max_megapixels"):
        open_rgb(tmp_path / "a.png", reading=Reading(megapixels=1))


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_orientations_that_do_not_exist_turn_nothing(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(tmp_path / "a.jpg", 60, 40, exif=exif)
    assert read_header(tmp_path / "a.jpg").orientation == 1
    assert open_rgb(tmp_path / "a.jpg").size == (60, 40)


def test_doctor_tells_pictures_read_upright_from_those_read_as_stored(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    for k in range(3):
        picture(tmp_path / f"{k}.png", 60, 40, exif=exif)
        assert read_header(tmp_path / f"{k}.png").displayed == (40, 60)
    images = [
        {"id": k, "file_name": f"{k}.png", "width": w, "height": h}
        for k, (w, h) in enumerate([(40, 60), (60, 40), (40, 60)])
    ]
    items = [annotation(k, k, 1, (2, 2, 9, 9)) for k in range(3)]
    write(tmp_path, items, images=images, pictures=False)
    assert doctor.main([str(tmp_path), "--output", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert "2 pictures are stored turned or mirrored; they are read upright" in out
    assert "1 pictures are stored turned and read as stored" in out
    assert "predict turns them" in out


def test_exif_behind_the_pixels_of_a_png_counts_in_header_and_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.png", 60, 40)
    data = (tmp_path / "a.png").read_bytes()
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + block))
    end = data.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(data[:end] + chunk + data[end:])
    assert read_header(tmp_path / "a.png").displayed == (40, 60)
    assert open_rgb(tmp_path / "a.png").size == (40, 60)


# ---- frames and slices


@pytest.fixture
def stack(tmp_path):
    """A TIFF of five pages; page k is grey 20 (k + 1)."""
    pages = [Image.new("L", (W, H), 20 * (k + 1)) for k in range(5)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    return tmp_path


def pages(folder, *frames, **data):
    images = [{"id": k, "file_name": "a.tif", "width": W, "height": H} | ({} if f is None else {"frame": f}) for k, f in enumerate(frames)]  # fmt: skip
    items = [annotation(k, k, 1, (2, 2, 9, 9)) for k in range(len(frames))]
    write(folder, items, images=images, pictures=False)
    data = {"train": str(folder), **data}
    train, _ = open_datasets(parse_config({"model": {"preset": "tiny"}, "data": data}))
    return train, [np.asarray(r.open())[0, 0].tolist() for r in train.images]


def test_frames_can_be_asked_and_are_said_where_nobody_asks(stack):
    train, values = pages(stack, 0, 3, 4)
    assert values == [[20] * 3, [80] * 3, [100] * 3]
    assert [len(r.annotations) for r in train.images] == [1, 1, 1]
    assert not any("several frames" in s for s in train.problems)
    train, values = pages(stack, None)
    assert values == [[20] * 3]
    assert any("several frames: the first is read" in s for s in train.problems)
    with pytest.raises(DataError, match=r"has 5 frames, counted from 0; frame 5 is asked"):
        pages(stack, 5)


def test_a_slice_and_its_neighbours_are_the_channels(stack):
    _, values = pages(stack, 0, 2, 4, slices=3)
    assert values == [[20, 20, 40], [40, 60, 80], [80, 100, 100]]


def test_neighbours_in_a_folder_follow_the_numbers_in_their_names(tmp_path):
    for name, value in (("s9", 90), ("s10", 100), ("s11", 110), ("t10", 7), ("photo", 3)):
        save(tmp_path / f"{name}.png", np.full((H, W), value, np.uint8))
    images = [{"id": k, "file_name": n, "width": W, "height": H} for k, n in enumerate(["s10.png", "t10.png", "photo.png"])]  # fmt: skip
    items = [annotation(k, k, 1, (2, 2, 9, 9)) for k in range(3)]
    write(tmp_path, items, images=images, pictures=False)
    data = {"train": str(tmp_path), "slices": 3}
    train, _ = open_datasets(parse_config({"model": {"preset": "tiny"}, "data": data}))
    values = [np.asarray(r.open())[0, 0].tolist() for r in train.images]
    assert values == [[90, 100, 110], [7, 7, 7], [3, 3, 3]]


def test_slices_share_one_scale(tmp_path):
    levels = [np.full((H, W), v, np.uint16) for v in (100, 900, 4000)]
    Image.fromarray(levels[0]).save(
        tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(v) for v in levels[1:]]
    )
    _, values = pages(tmp_path, 1, slices=3)
    assert values == [[100 // 16, 900 // 16, 4000 // 16]]


def test_volumes_without_their_library_say_which(tmp_path):
    pytest.importorskip("PIL")
    for name, library in (("a.nii.gz", "nibabel"), ("a.dcm", "pydicom")):
        (tmp_path / name).write_bytes(b"x")
        try:
            __import__(library)
        except ImportError:
            with pytest.raises(DataError, match=f"needs {library}: pip install {library}"):
                open_rgb(tmp_path / name)
        else:
            with pytest.raises(DataError, match="cannot be read"):
                open_rgb(tmp_path / name)


def test_nifti_slices_are_frames(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="NIfTI needs nibabel")
    values = np.zeros((W, H, 4), np.int16)
    values[:20, :10, 2] = 1000  # x up to 20, y up to 10
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii.gz")
    assert read_header(tmp_path / "a.nii.gz").size == (W, H)
    with pytest.raises(DataError, match="frame 99 is asked for"):
        open_rgb(tmp_path / "a.nii.gz", frame=99)
    found = np.asarray(open_rgb(tmp_path / "a.nii.gz", (W, H), frame=2))[..., 0]
    assert found[:10, :20].min() > 200
    assert found[10:].max() == found[:, 20:].max() == 0


def dicom(file, values, **fields):
    """A small CT slice: stored = (Hounsfield units + 1000)."""
    pydicom = pytest.importorskip("pydicom", reason="DICOM needs pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = pydicom.dataset.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    data.Rows, data.Columns = values.shape
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 15, 0, 1
    data.PhotometricInterpretation = fields.pop("photometric", "MONOCHROME2")
    data.RescaleSlope, data.RescaleIntercept = 1, -1000
    data.PixelData = values.astype("<u2").tobytes()
    data.save_as(file, enforce_file_format=True)


def test_dicom_is_read_in_hounsfield_units(tmp_path):
    values = np.zeros((H, W))
    values[:10, :20] = 2000  # 1000 HU
    dicom(tmp_path / "a.dcm", values)
    assert read_header(tmp_path / "a.dcm").size == (W, H)
    found = np.asarray(open_rgb(tmp_path / "a.dcm", reading=Reading(window=(0, 2000))))[..., 0]
    assert found[0, 0] == 128
    assert found[20, 30] == 0
    dicom(tmp_path / "b.dcm", values, photometric="MONOCHROME1")  # low values are bright
    found = np.asarray(open_rgb(tmp_path / "b.dcm"))[..., 0]
    assert found[0, 0] == 0
    assert found[20, 30] == 255


def test_heic_is_read_where_its_reader_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="HEIC needs pillow-heif")
    heif.register_heif_opener()
    PICTURE = Image.fromarray(np.full((64, 96, 3), (200, 60, 20), np.uint8))
    PICTURE.save(tmp_path / "a.heic", quality=95)
    assert read_header(tmp_path / "a.heic").size == (96, 64)
    np.testing.assert_allclose(
        np.asarray(open_rgb(tmp_path / "a.heic"))[30, 40], (200, 60, 20), atol=8
    )


def test_heic_names_its_reader(tmp_path):
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 50)
        with pytest.raises(DataError, match="pip install pillow-heif"):
            open_rgb(tmp_path / "a.HEIC")
    else:
        pytest.skip("pillow-heif is installed")


def test_pictures_that_are_all_but_black_are_named(tmp_path, capsys):
    write(tmp_path / "d", [annotation(k, k, 1, (2, 2, 9, 9)) for k in range(3)])
    save(tmp_path / "d" / "1.png", np.full((H, W), 3, np.uint8))
    assert doctor.main([str(tmp_path / "d"), "--output", str(tmp_path / "o")]) == 0
    assert "all but black: 1.png" in capsys.readouterr().out
