"""What a large data set costs: `python -m scripts.bench_data FOLDER [--what start|doctor|speed|augment]`.

FOLDER gets 20,000 small pictures of 2,000 categories, seven outlined objects each, on the first call.

start    seconds until training can begin, to the first batch, and the memory that this takes
doctor   seconds of `sam3jax doctor`
speed    pictures a second that one core loads at the model's size, plain and augmented
augment  milliseconds of each change of pixels on a picture of 1008 x 1008
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES, CATEGORIES, OBJECTS = 20_000, 2_000, 7
SMALL, LARGE = (64, 48), (1280, 960)


def write(root: Path, pictures: int, size: tuple[int, int]) -> Path:
    """A Roboflow folder with a train split; does nothing where it is there already."""
    folder = root / f"{pictures}x{size[0]}" / "train"
    if (folder / "_annotations.coco.json").exists():
        return folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size
    images, annotations = [], []

    def one(k: int) -> None:
        rng = np.random.default_rng(k)
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{k:06d}.jpg")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(pictures)))
    rng = np.random.default_rng(0)
    for k in range(pictures):
        images.append({"id": k, "file_name": f"{k:06d}.jpg", "width": width, "height": height})
        for category in rng.integers(0, CATEGORIES, OBJECTS).tolist():
            w, h = (rng.uniform(0.1, 0.4, 2) * size).tolist()
            x, y = (rng.uniform(0, 1, 2) * (width - w, height - h)).tolist()
            outline = [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]
            annotations.append(
                {"id": len(annotations), "image_id": k, "category_id": category, "iscrowd": 0,
                 "bbox": [x, y, w, h], "area": w * h / 2, "segmentation": [outline]}
            )  # fmt: skip
    categories = [{"id": k, "name": f"thing {k}"} for k in range(CATEGORIES)]
    raw = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(raw))
    return folder.parent


def start(root: Path) -> None:
    from sam3jax.config import parse_config
    from sam3jax.data.datasets import open_datasets
    from sam3jax.data.loader import make_train_loader
    from sam3jax.data.prompts import balance, tokenize, vocabulary
    from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer

    data = write(root, PICTURES, SMALL)
    config = parse_config({"model": {"preset": "tiny"}, "batch_size": 8, "data": {"train": str(data)}})  # fmt: skip
    tokenizer = Tokenizer(build_byte_tokenizer(config.model.vocab_size), config.model.text_length)
    begin, cpu = time.perf_counter(), time.process_time()
    train, _ = open_datasets(config)
    read = time.perf_counter()
    phrases = vocabulary(config.data, train)
    tokens = tokenize(phrases, tokenizer)
    balance(train, config.data, config.seed)
    loader = make_train_loader(train, phrases, tokens, config)
    made, cpu = time.perf_counter(), time.process_time() - cpu
    next(loader)
    first = time.perf_counter()
    loader.close()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"read {read - begin:.2f} s, loader {made - read:.2f} s, start {made - begin:.2f} s ({cpu:.2f} s of one core)"
    )
    print(f"first batch {first - made:.2f} s, peak memory {memory:.2f} GB")


def doctor(root: Path) -> None:
    from sam3jax.doctor import main

    data = write(root, PICTURES, SMALL)
    begin = time.perf_counter()
    main([str(data), "--output", str(root / "doctor")])
    print(f"doctor {time.perf_counter() - begin:.1f} s")


def speed(root: Path) -> None:
    from sam3jax.config import parse_config
    from sam3jax.data.folders import read_dataset
    from sam3jax.data.loader import _Rows, _TrainBatch
    from sam3jax.data.prompts import training_shapes, vocabulary

    dataset = read_dataset(write(root, 64, LARGE))
    for name, augment in (("plain", "off"), ("standard", "standard")):
        settings = {"train": "x", "augment": augment, "max_prompts": 8}
        config = parse_config({"data": settings, "batch_size": 8})
        rows = _Rows(8, 0, 1, "batch_size")
        shapes = training_shapes(dataset, config.data)
        batch_of = _TrainBatch(dataset, vocabulary(config.data, dataset), config, shapes, rows)
        batch_of(0)
        begin = time.process_time()
        for number in range(8):
            batch_of(number)
        spent = time.process_time() - begin
        print(f"{name}: {64 / spent:.1f} pictures a second and core, {1e3 * spent / 64:.1f} ms each")  # fmt: skip


def augment(root: Path) -> None:
    from sam3jax.config import DataConfig
    from sam3jax.data.augmentation import draw_change

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8))
    picture = coarse.resize((1008, 1008), Image.Resampling.BICUBIC)
    standard = DataConfig(augment="standard").model_dump()
    names = ("brightness", "contrast", "colour", "grey", "blur", "noise")
    some = {name: {name: standard[name]} for name in names}
    for name, settings in {**some, "standard": {n: standard[n] for n in names}}.items():
        config, times = DataConfig(**settings), []
        for seed in range(100):
            change = draw_change(np.random.default_rng(seed), config)
            begin = time.process_time()
            if change is not None:
                change(picture)
            times.append(time.process_time() - begin)
        print(f"{name}: {1e3 * np.mean(times):.1f} ms a picture, {1e3 * np.max(times):.1f} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path)
    kinds = {"start": start, "doctor": doctor, "speed": speed, "augment": augment}
    parser.add_argument("--what", choices=kinds, nargs="+", default=list(kinds))
    options = parser.parse_args()
    for kind in options.what:
        print(f"-- {kind}")
        kinds[kind](options.folder)


if __name__ == "__main__":
    main()
