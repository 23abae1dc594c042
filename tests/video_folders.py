"""Small videos in every format: squares that move, enter, leave, with void pixels around."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

SIZE = (24, 36)  # rows, columns
FRAMES = 6
SHARED = Path(__file__).parents[2] / "shared" / "data" / "davis_video"


def object_masks(frames: int = FRAMES, size: tuple[int, int] = SIZE) -> np.ndarray:
    """[frames, 2 objects, Y, X] bool: one square wanders, the other is in frames 2 and 3 only."""
    out = np.zeros((frames, 2, *size), bool)
    for t in range(frames):
        out[t, 0, 3:10, 2 + 3 * t : 11 + 3 * t] = True
    out[2:4, 1, 12:20, 20:30] = True
    return out


def index_masks(frames: int = FRAMES) -> np.ndarray:
    """[frames, Y, X]: objects 1 and 2, and a column of void pixels (255)."""
    masks = object_masks(frames)
    out = np.where(masks[:, 1], 2, np.where(masks[:, 0], 1, 0))
    out[:, :, -2:] = 255
    return out.astype(np.uint8)


def pictures(frames: int = FRAMES) -> np.ndarray:
    """[frames, Y, X, 3] uint8, objects in colours on noise."""
    noise = np.random.default_rng(0).integers(60, 90, (frames, *SIZE, 3)).astype(np.uint8)
    masks = object_masks(frames)
    noise[masks[:, 0]] = (200, 40, 40)
    noise[masks[:, 1]] = (40, 40, 200)
    return noise


def write_palette(root: Path, name: str = "walk", every: int = 1) -> Path:
    """JPEGImages and Annotations; `every`: of how many frames one is annotated."""
    frames, masks = root / "JPEGImages" / name, root / "Annotations" / name
    frames.mkdir(parents=True)
    masks.mkdir(parents=True)
    for t, (picture, index) in enumerate(zip(pictures(), index_masks())):
        Image.fromarray(picture).save(frames / f"{t:05d}.jpg", quality=95)
        if t % every == 0:
            image = Image.fromarray(index, "P")
            image.putpalette([0, 0, 0, 200, 40, 40, 40, 40, 200] + [90] * 759)
            image.save(masks / f"{t:05d}.png")
    return root


def write_ytvis(root: Path) -> Path:
    """One JSON beside JPEGImages/, null where the object is absent; a cat, a dog, no bird."""
    write_palette(root)
    masks = object_masks()
    annotations = []
    for k in range(2):
        segmentations = []
        for mask in masks[:, k]:
            if not mask.any():
                segmentations.append(None)
                continue
            rle = rle_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
            segmentations.append({"size": rle["size"], "counts": rle["counts"].decode()})
        boxes = [None if s is None else rle_codec.toBbox(s).tolist() for s in segmentations]
        annotations.append(
            {"id": k + 1, "video_id": 7, "category_id": k + 1, "segmentations": segmentations, "bboxes": boxes}
        )  # fmt: skip
    raw = {
        "videos": [
            {"id": 7, "width": SIZE[1], "height": SIZE[0], "file_names": [f"walk/{t:05d}.jpg" for t in range(FRAMES)]}
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in ((1, "cat"), (2, "dog"), (3, "bird"))],
    }  # fmt: skip
    for part in (root / "Annotations" / "walk").iterdir():
        part.unlink()
    (root / "Annotations" / "walk").rmdir()
    (root / "Annotations").rmdir()
    (root / "instances.json").write_text(json.dumps(raw))
    return root


def write_film(
    path: Path, frames: np.ndarray, rate: int = 5, codec: str = "libx264", group: int = 4
) -> Path:
    """A film of [N, Y, X, 3] with a key frame every `group` frames. Needs PyAV."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": str(group), "crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def few_bits(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 2 or 4 bits a pixel, which Pillow cannot write: header, packed rows, end."""
    step = 8 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % step))).astype(np.uint8)
    rows = np.zeros((len(values), padded.shape[1] // step), np.uint8)
    for k in range(step):
        rows |= padded[:, k::step] << (8 - bits * (k + 1))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
