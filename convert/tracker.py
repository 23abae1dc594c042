"""Names of the tracker and the second neck: official <-> transformers.

Tensors that no task uses are carried, and translated so that a whole checkpoint can change its layout.
The second neck and the interactive heads are rows of THE table; the names of the memory are here. Facts from transformers' Sam3VideoModel and the published state dict; nothing here is
turned or scaled, only renamed. Two exceptions: transformers holds the four point embeddings in one
table, and the prompt encoder's random frequencies a second time as `shared_image_embedding` (dropped where it is the same, as it is).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from sam3jax.weights.names import TRACKER_TEMPLATES
from sam3jax.weights.tensor_file import Tensor
from sam3jax.weights.tracker_names import (
    FREQUENCIES,
    INTERACTIVE_NECK,
    PROPAGATION_NECK,
    SECOND_NECK,
    TRACKER,
    TRACKER_HUGGINGFACE,
)

OFFICIAL, HUGGINGFACE = TRACKER, TRACKER_HUGGINGFACE
NECKS = (f"{SECOND_NECK}.", f"{INTERACTIVE_NECK}.", f"{PROPAGATION_NECK}.")
_SHARED = "shared_image_embedding.positional_embedding"
_POINTS = "sam_prompt_encoder.point_embeddings.{i}.weight", "prompt_encoder.point_embed.weight"
_POINT = re.compile(re.escape(OFFICIAL) + r"sam_prompt_encoder\.point_embeddings\.(\d+)\.weight")
_STACK = 16  # more layers than any stack of the tracker has

# Whole names, or owners of `.weight` and `.bias`; {i} numbers layers.
_NAMES: tuple[tuple[str, str], ...] = (
    ("maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    ("no_mem_pos_enc", "no_memory_positional_encoding"),
    ("no_obj_ptr", "no_object_pointer"),
    ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    ("mask_downsample", "mask_downsample"),
    ("obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer"),
    ("maskmem_backbone.mask_downsampler.encoder.12", "memory_encoder.mask_downsampler.final_conv"),
    ("maskmem_backbone.pix_feat_proj", "memory_encoder.feature_projection"),
    ("maskmem_backbone.out_proj", "memory_encoder.projection"),
    ("transformer.encoder.norm", "memory_attention.layer_norm"),
)  # fmt: skip


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Carried tensors of the transformers layout by their official names; unknown ones as they are."""
    back = {new: old for old, new in _table().items()}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == HUGGINGFACE + _POINTS[1] and len(tensor.shape) == 2:
            for i in range(tensor.shape[0]):
                out[OFFICIAL + _POINTS[0].format(i=i)] = _row(tensor, i)
        else:
            out[_renamed(name, back)] = tensor
    twin, original = out.get(HUGGINGFACE + _SHARED), out.get(FREQUENCIES)
    if twin and original and np.array_equal(twin.read(), original.read()):
        del out[HUGGINGFACE + _SHARED]
    return out


def to_huggingface(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Carried official tensors by their transformers names, and those that have none."""
    out: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    points = _joined_points(tensors)
    for name, tensor in tensors.items():
        new = _renamed(name, _table())
        if points and _POINT.fullmatch(name):
            continue
        if new != name or name.startswith((HUGGINGFACE, "tracker_neck.")):
            out[new] = tensor
        else:
            rest[name] = tensor
    if points:
        out[HUGGINGFACE + _POINTS[1]] = points
    frequencies = _table()[FREQUENCIES]
    if frequencies in out:
        out.setdefault(HUGGINGFACE + _SHARED, out[frequencies])
    return out, rest


def is_tracker(name: str) -> bool:
    """Whether a carried tensor belongs to the tracker or its necks, in either layout."""
    return name.startswith((OFFICIAL, HUGGINGFACE, *NECKS, "tracker_neck."))


def is_multiplex(names: Iterable[str]) -> bool:
    """Whether these are the names of a SAM 3.1 checkpoint: its necks, or its tracker's memory."""
    own = (f"{INTERACTIVE_NECK}.", f"{PROPAGATION_NECK}.", f"{OFFICIAL}model.")
    return any(name.startswith(own) for name in names)


def _joined_points(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The table of the point embeddings; None where they are not rows 0, 1, ... of one shape and dtype."""
    points = {int(m[1]): t for name, t in tensors.items() if (m := _POINT.fullmatch(name))}
    rows = [points[i] for i in sorted(points)]
    if sorted(points) != list(range(len(points))) or len({(t.shape, t.dtype) for t in rows}) != 1:
        return None
    if len(rows[0].shape) != 2 or rows[0].shape[0] != 1:
        return None
    join = lambda slot: np.concatenate([row.read() for row in rows])[slot]
    return Tensor((len(rows), rows[0].shape[1]), rows[0].dtype, join)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    if name in table:
        return table[name]
    owner, dot, leaf = name.rpartition(".")
    return (
        f"{table[owner]}.{leaf}" if dot and leaf in ("weight", "bias") and owner in table else name
    )


@functools.cache
def _table() -> dict[str, str]:
    """Official name -> transformers name, layer by layer: of the memory from here, else THE table."""
    table = {OFFICIAL + old: HUGGINGFACE + new for old, new in (*_NAMES, *_layers())}
    for old, new in TRACKER_TEMPLATES:
        for i in range(_STACK if "{layer}" in old else 1):
            table[old.replace("{layer}", str(i))] = new.replace("{layer}", str(i))
    return table


def _layers() -> Iterator[tuple[str, str]]:
    def attention(old: str, new: str) -> Iterator[tuple[str, str]]:
        for part in ("q_proj", "k_proj", "v_proj"):
            yield f"{old}.{part}", f"{new}.{part}"
        yield f"{old}.out_proj", f"{new}.o_proj"

    def mlp(old: str, new: str) -> Iterator[tuple[str, str]]:
        for i, name in enumerate(("proj_in", "layers.0", "proj_out")):
            yield f"{old}.layers.{i}", f"{new}.{name}"

    for i in range(_STACK):
        old, new = f"transformer.encoder.layers.{i}", f"memory_attention.layers.{i}"
        for part in ("self_attn", "cross_attn_image"):
            yield from attention(f"{old}.{part}", f"{new}.{part}")
        yield from ((f"{old}.linear{k}", f"{new}.linear{k}") for k in (1, 2))
        yield from ((f"{old}.norm{k}", f"{new}.layer_norm{k}") for k in (1, 2, 3))

        old, new = f"maskmem_backbone.fuser.layers.{i}", f"memory_encoder.memory_fuser.layers.{i}"
        yield f"{old}.gamma", f"{new}.scale"
        yield f"{old}.norm", f"{new}.layer_norm"
        yield f"{old}.dwconv", f"{new}.depthwise_conv"
        yield from ((f"{old}.pwconv{k}", f"{new}.pointwise_conv{k}") for k in (1, 2))

    for i in range(4):
        old, new = (
            "maskmem_backbone.mask_downsampler.encoder",
            f"memory_encoder.mask_downsampler.layers.{i}",
        )
        yield f"{old}.{3 * i}", f"{new}.conv"
        yield f"{old}.{3 * i + 1}", f"{new}.layer_norm"
    yield from mlp("obj_ptr_proj", "object_pointer_proj")


def _row(tensor: Tensor, i: int) -> Tensor:
    return Tensor((1, *tensor.shape[1:]), tensor.dtype, lambda slot: tensor.read()[i : i + 1][slot])
