"""The published torch trainer's step with the LoRA layers of `bench_step`, on a CPU.

    python -m scripts.bench_step_torch --dtype float32 --run 2

Adapters sit on the same layers as in `bench_step`: beside the linear layers of ViT, fusion encoder and
decoder, and on q, k, v and output of every attention there (their matrices are formed in the forward
pass, since torch's attention takes weights, not modules). Everything else is frozen. Dropout,
stochastic depth and activation checkpointing as published. bfloat16 means autocast.
`bench_step --torch` runs this in a process of its own. Needs the test extra (the sam3 package).
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import resource
import time

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from sam3jax.config import LoraConfig
from tests import torch_reference as reference


class Beside(nn.Module):
    """A frozen linear layer plus scale * B A x."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.layer, self.scale = layer, scale
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) * layer.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.scale * (x @ self.a.T @ self.b.T)


class Within(nn.Module):
    """A frozen matrix of `parts` stacked square projections, plus scale * B A of each."""

    def __init__(self, weight: torch.Tensor, parts: int, rank: int, scale: float):
        super().__init__()
        rows, width = weight.shape[0] // parts, weight.shape[1]
        self.scale = scale
        self.a = nn.Parameter(torch.randn(parts, rank, width) * width**-0.5)
        self.b = nn.Parameter(torch.zeros(parts, rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.b @ self.a).flatten(0, 1)


def add_lora(model: nn.Module, config: LoraConfig) -> int:
    """Freeze the model and put adapters on what `config.targets` names; returns their parameters."""
    model.requires_grad_(False)
    scale = config.alpha / config.rank
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if any(fnmatch.fnmatchcase(f"{name}.", f"{target}*") for target in config.targets)
    ]
    for name, module in chosen:
        if isinstance(module, nn.MultiheadAttention):
            for owner, key, parts in (
                (module, "in_proj_weight", 3),
                (module.out_proj, "weight", 1),
            ):
                adapter = Within(getattr(owner, key), parts, config.rank, scale)
                parametrize.register_parametrization(owner, key, adapter, unsafe=True)
        elif isinstance(module, nn.Linear) and not name.endswith("out_proj"):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, Beside(module, config.rank, scale))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            not name.endswith("original") and name.split(".")[-1] in ("a", "b")
        )
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--run", type=int, default=1, metavar="STEPS")
    parser.add_argument("--size", choices=("published", "small"), default="published")
    options = parser.parse_args()
    size = reference.PUBLISHED if options.size == "published" else reference.SMALL
    model = reference.detector(size, seed=0, dropout=0.1)
    trained = add_lora(model, LoraConfig())
    example = reference.example(size, seed=0, images=1, prompts=1, max_targets=3)
    example["num_targets"][:] = 3
    boxes = np.random.default_rng(0).uniform(0.2, 0.5, example["boxes"].shape)
    example["boxes"] = boxes.astype(np.float32)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4)
    wrapper = reference.loss_wrapper()
    rough = options.dtype == "bfloat16"
    times = []
    for _ in range(options.run):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if rough else contextlib.nullcontext():
            out, _ = reference.forward(model, example, train=True)
        target = model.back_convert(reference._datapoint(example)[1])
        loss = wrapper.compute_loss(out, target)["core_loss"]
        middle = time.perf_counter()
        loss.backward()
        nn.utils.clip_grad_norm_(adapters, 0.1)
        optimizer.step()
        times.append(time.perf_counter() - start)
        del out
        print(f"torch step {times[-1]:.2f} s, of which forward and loss {middle - start:.2f} s, loss {float(loss.detach()):.3f}", flush=True)  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"trained": trained, "seconds": times, "peak_gb": peak}))


if __name__ == "__main__":
    main()
