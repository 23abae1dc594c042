"""How much of the host's time the devices hide while a video is detected: shown by a sleep.

    python -m scripts.bench_video_overlap --frames 48 --chunk 4

The host sleeps for as long as the devices take for a chunk. Without overlap the two add up; printed is
which part of the smaller one is hidden.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

from sam3jax.config import ModelConfig
from sam3jax.model import Sam3
from sam3jax.model.init import init_params
from sam3jax.training.mesh import make_mesh
from sam3jax.types import Prompts
from sam3jax.video.chunks import ChunkOptions, VideoDetector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--chunk", type=int, default=4, help="frames per device and chunk")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = Sam3(ModelConfig(preset="tiny"))
    variables = {"params": init_params(model.config, 0)}
    tokens = np.ones((1, model.config.text_length), np.int32)
    text = jax.jit(lambda v, t: model.apply(v, t, method="encode_text"))(variables, tokens)
    prompts = Prompts(
        text_id=np.zeros((1, 1), np.int32),
        valid=np.ones((1, 1), bool),
        boxes=np.zeros((1, 1, 0, 4), np.float32),
        box_labels=np.zeros((1, 1, 0), np.int32),
        box_valid=np.zeros((1, 1, 0), bool),
    )
    chunk = ChunkOptions(frames_per_device=options.chunk)
    run = VideoDetector(model, variables, text, prompts, make_mesh(), chunk)
    video = np.random.default_rng(0).integers(0, 256, (options.frames, 252, 252, 3), np.uint8)
    chunks = -(-options.frames // run.width)

    def seconds(sleep: float) -> float:
        start = time.perf_counter()
        for number, _ in run.detections(video):
            if (number + 1) % run.width == 0:
                time.sleep(sleep)
        return time.perf_counter() - start

    seconds(0.0)  # compiles
    for _ in range(options.rounds):
        alone = seconds(0.0)
        sleep = alone / chunks
        slept = sleep * (options.frames // run.width)
        together = seconds(sleep)
        hidden = (alone + slept - together) / min(alone, slept)
        print(
            f"devices {alone:.2f} s, host {slept:.2f} s, together {together:.2f} s: "
            f"{hidden:.0%} of the smaller hidden"
        )


if __name__ == "__main__":
    main()
