"""Names: which layout a checkpoint has, what stands before its names, and official <-> transformers.

Everything behind this file works on the official names of a bare detector. What is not the detector's
is carried: the tracker and the second neck under the names they came with, the detector's own dead
tensors and its stored RoPE tables under official names.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from convert import tracker
from sam3jax.files import FileError
from sam3jax.weights.names import VIT, dead_entries, templates
from sam3jax.weights.parts import common_dtype
from sam3jax.weights.tensor_file import Tensor

_WRAPPERS = ("module.", "model.", "state_dict.")  # DDP, Lightning
_INNER_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_ANY_WRAPPERS = f"(?:{'|'.join(map(re.escape, _WRAPPERS))})*"
DETECTOR = {"official": "detector.", "huggingface": "detector_model."}
TRACKER = {"official": ("tracker.",), "huggingface": ("tracker_model.", "tracker_neck.")}
CLASS_POSITION = f"{VIT}.pos_embed.class_position"  # the row of pos_embed that transformers drops
# Buffers that some versions of transformers store; carried, for the way back only.
_COMPUTED = re.compile(r"\.(position_ids|rotary_emb\.\w+|inv_freq)$")
# SAM 3.1 stores the two parts of the complex tables apart.
_FREQS = re.compile(r"\.blocks\.\d+\.attn\.freqs_cis(_real|_imag)?$")
INTERACTIVE = "inst_interactive_predictor."

_LIVE_ROOTS = {
    "official": (
        "backbone.vision_backbone.trunk.",
        "transformer.decoder.",
        "segmentation_head.",
        "dot_prod_scoring.",
        "backbone.language_backbone.",
    ),
    "huggingface": ("detr_decoder.", "detr_encoder.", "dot_product_scoring.", "text_encoder."),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """kind: "official" or "huggingface". wrapper and detector: what stands before a detector's name.

    doubled: the tracker's prefix stands twice, as some versions of transformers (5.23) write it.
    """

    kind: str
    wrapper: str = ""
    detector: str = ""
    doubled: bool = False


@dataclasses.dataclass(frozen=True)
class Sorted:
    """A checkpoint's tensors by use: live and dead ones under official names, the rest as they came.

    stored: of the transformers layout, the detector's tensors as the file holds them, q, k and v apart,
    by their bare names; None of the official one.
    """

    layout: Layout
    live: dict[str, Tensor]
    carried: dict[str, Tensor]
    unknown: tuple[str, ...]
    stored: dict[str, Tensor] | None = None


def sort_tensors(
    tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor] | None = None
) -> Sorted:
    """Tell the layout of a checkpoint and sort its tensors; `beside` are those an export kept aside.

    Raises FileError, by name, for SAM and SAM 2 checkpoints, trackers and anything else.
    """
    tensors = unwrapped(tensors)
    wrapper = _wrapper(tensors)
    bare = {n.removeprefix(wrapper): t for n, t in tensors.items() if n.startswith(wrapper)}
    kind, detector = _recognise(bare)
    double = 2 * tracker.HUGGINGFACE
    doubled = any(name.startswith(double) for name in bare)
    bare = {name.replace(double, tracker.HUGGINGFACE): tensor for name, tensor in bare.items()}
    inside: dict[str, Tensor] = {}
    beside = dict(beside or {})
    carried: dict[str, Tensor] = {}
    unknown = [name for name in tensors if not name.startswith(wrapper)]
    stored = None
    for name, tensor in bare.items():
        inner = name.removeprefix(detector)
        if detector and not name.startswith(detector):
            if name.startswith(TRACKER[kind]):
                carried[name] = tensor
            else:
                unknown.append(wrapper + name)
        elif inner.startswith(INTERACTIVE):
            carried[inner] = tensor
        elif not detector and name.startswith(TRACKER[kind]):
            carried[name] = tensor
        else:
            inside[inner] = tensor
    if kind == "huggingface":
        carried |= {DETECTOR[kind] + n: t for n, t in inside.items() if _COMPUTED.search(n)}
        inside = {name: t for name, t in inside.items() if not _COMPUTED.search(name)}
        stored = {with_text_model(name): tensor for name, tensor in inside.items()}
        inside, lost = from_huggingface(inside, beside.get(CLASS_POSITION))
        unknown += [wrapper + detector + name for name in lost]
        carried = tracker.to_official(carried)
    live: dict[str, Tensor] = {}
    for name, tensor in inside.items():
        template = _official_template(name)
        if name.startswith(tracker.NECKS) or _FREQS.search(name) or template in _dead():
            carried[name] = tensor
        elif template in _live():
            live[name] = tensor
        else:
            unknown.append(wrapper + detector + name)
    layout = Layout(kind, wrapper, detector, doubled)
    return Sorted(layout, live, carried | beside, tuple(unknown), stored)


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what torch.compile, FSDP and activation checkpointing put into names, anywhere."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = _INNER_WRAPPERS.sub("", name)
        if bare in out:
            raise FileError(f"{name} and {bare} are one tensor under two names: remove one of them")
        out[bare] = tensor
    return out


def to_huggingface(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a bare detector by their transformers names, and what that layout has no place for."""
    out: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        template, number = _split(name, _official_parts())
        if template is None or not _official_parts()[template]:
            rest[name] = tensor
            continue
        parts = [part.replace("{n}", number) for part in _official_parts()[template]]
        kind = _kinds()[template]
        if kind == "positions":
            rest[CLASS_POSITION] = _rows(tensor, 0, 1, axis=1)
            out[parts[0]] = _rows(tensor, 1, tensor.shape[1], axis=1)
        elif kind == "projection":
            out[parts[0]] = _transposed(tensor)
        else:
            step = tensor.shape[0] // len(parts)
            for i, part in enumerate(parts):
                out[part] = tensor if len(parts) == 1 else _rows(tensor, i * step, (i + 1) * step)
    return out, rest


def from_huggingface(
    tensors: Mapping[str, Tensor], class_position: Tensor | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of transformers' Sam3Model by their official names, and the names that have none.

    class_position: the row of pos_embed that transformers drops; no output depends on it.
    q, k and v that are not all there, or not of one shape, are left out: `convert.weights.misfits` names them.
    """
    pieces, lost = _pieces(tensors)
    out: dict[str, Tensor] = {}
    for name, parts in pieces.items():
        template = _official_template(name)
        ordered = [parts[i] for i in sorted(parts)]
        if template is None or len(ordered) != len(_official_parts()[template]):
            continue
        if len(ordered) > 1 and (len({t.shape for t in ordered}) > 1 or not ordered[0].shape):
            continue
        kind = _kinds()[template]
        if kind == "positions":
            out[name] = _with_class_position(ordered[0], class_position)
        elif kind == "projection":
            out[name] = _transposed(ordered[0])
        else:
            out[name] = ordered[0] if len(ordered) == 1 else _joined(ordered)
    return out, lost


def huggingface_shapes(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """{transformers name: shape} of what an official tensor of this shape is there; {} if nothing."""
    template, number = _split(name, _official_parts())
    if template is None:
        return {}
    parts = [part.replace("{n}", number) for part in _official_parts()[template]]
    kind = _kinds()[template]
    if kind == "positions":
        shape = (shape[0], shape[1] - 1, *shape[2:])
    elif kind == "projection":
        shape = shape[::-1]
    elif len(parts) > 1:
        shape = (shape[0] // len(parts), *shape[1:])
    return dict.fromkeys(parts, shape)


def mixed_dtypes(stored: Mapping[str, Tensor]) -> list[str]:
    """Official tensors whose q, k and v are stored in different dtypes by transformers."""
    pieces = _pieces(stored)[0]
    return [n for n, parts in pieces.items() if len({t.dtype for t in parts.values()}) > 1]


def _pieces(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[int, Tensor]], list[str]]:
    """Transformers tensors as the numbered parts of official ones, and the names that have no place."""
    pieces: dict[str, dict[int, Tensor]] = {}
    lost: list[str] = []
    for name, tensor in tensors.items():
        template, number = _split(with_text_model(name), _huggingface_parts())
        if template is None:
            lost.append(name)
            continue
        official, part = _huggingface_parts()[template]
        parts = pieces.setdefault(official.replace("{n}", number), {})
        if part in parts:  # with and without `text_model`
            lost.append(name)
        parts.setdefault(part, tensor)
    return pieces, lost


def _recognise(bare: Mapping[str, Tensor]) -> tuple[str, str]:
    """The layout and the detector's prefix, or FileError with what it is instead."""
    joined = "\n" + "\n".join(bare)
    if found := _detector(bare):
        return found
    if re.search(
        r"\nimage_encoder\.(trunk|neck)\.|\nvision_encoder\.backbone\.blocks\.|\nsam_mask_decoder\.",
        joined,
    ):
        raise FileError(
            "this is a SAM 2 checkpoint (Hiera image encoder, no text tower); SAM 2 has no phrases to train. "
            "Take sam3.pt or model.safetensors from the repository facebook/sam3"
        )
    if re.search(r"\n(image_encoder\.blocks|vision_encoder\.layers)\.", joined):
        raise FileError(
            "this is a SAM 1 checkpoint; take sam3.pt or model.safetensors from facebook/sam3"
        )
    if re.search(
        r"\n(tracker|tracker_model|memory_attention|mask_decoder|maskmem_backbone)\.", joined
    ):
        raise FileError(
            "this checkpoint holds a SAM 3 tracker without its detector; take the whole sam3.pt or model.safetensors"
        )
    if "\nvit/" in joined:
        raise FileError(
            "these are the arrays of a model folder whose config.json is damaged or gone: convert the checkpoint again"
        )
    some = ", ".join(list(bare)[:3])
    raise FileError(
        f"no SAM 3 detector in this checkpoint of {len(bare)} tensors (the first: {some})"
    )


def _detector(names: Iterable[str]) -> tuple[str, str] | None:
    """The layout and the detector's prefix, if there is a detector among these bare names."""
    joined = "\n" + "\n".join(names)
    for kind, roots in _LIVE_ROOTS.items():
        for detector in (DETECTOR[kind], ""):
            if any("\n" + detector + root in joined for root in roots):
                return kind, detector
    return None


def _wrapper(names: Iterable[str]) -> str:
    """What stands before the names of most tensors of a detector; without one, before all tensors."""
    names = list(names)
    wrappers = Counter(m.group() for name in names if (m := re.match(_ANY_WRAPPERS, name)))
    for wrapper, _ in wrappers.most_common():
        if _detector(n.removeprefix(wrapper) for n in names if n.startswith(wrapper)):
            return wrapper
    return next(iter(wrappers)) if len(wrappers) == 1 else ""


def with_text_model(name: str) -> str:
    """Some versions of transformers write CLIP's tower without its inner `text_model`."""
    start = "text_encoder."
    inner = ("text_model.", "text_projection.")
    if name.startswith(start) and not name.removeprefix(start).startswith(inner):
        return f"{start}text_model.{name.removeprefix(start)}"
    return name


def _split(name: str, table: Mapping[str, object]) -> tuple[str | None, str]:
    """The template that a name is of, with `{n}` for its layer, and the layer's number."""
    if name in table:
        return name, ""
    for match in re.finditer(r"(?<=\.)\d+(?=\.)", name):
        template = f"{name[: match.start()]}{{n}}{name[match.end() :]}"
        if template in table:
            return template, match.group()
    return None, ""


def _official_template(name: str) -> str | None:
    return _split(name, _official_parts())[0]


def _template(name: str) -> str:
    return name.replace("{block}", "{n}").replace("{layer}", "{n}")


@functools.cache
def _official_parts() -> dict[str, tuple[str, ...]]:
    """Official template -> its transformers templates, q, k, v in order; none where it has no place."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for entry, _ in templates():
        found = parts.setdefault(_template(entry.torch), [])
        found += [((entry.third or 0) + i, _template(n)) for i, n in enumerate(entry.huggingface)]
    return {name: tuple(part for _, part in sorted(found)) for name, found in parts.items()}


@functools.cache
def _huggingface_parts() -> dict[str, tuple[str, int]]:
    """Transformers template -> (official template, which part of it)."""
    return {
        part: (name, i) for name, parts in _official_parts().items() for i, part in enumerate(parts)
    }


@functools.cache
def _kinds() -> dict[str, str]:
    return {_template(entry.torch): kind for entry, kind in templates()}


@functools.cache
def _dead() -> frozenset[str]:
    return frozenset(_template(entry.torch) for entry in dead_entries())


@functools.cache
def _live() -> frozenset[str]:
    return frozenset(_official_parts()) - _dead()


def _rows(tensor: Tensor, start: int, stop: int, axis: int = 0) -> Tensor:
    shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])
    index = (slice(None),) * axis + (slice(start, stop),)
    return Tensor(shape, tensor.dtype, lambda slot: tensor.read()[index][slot])


def _joined(tensors: list[Tensor]) -> Tensor:
    shape = (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:])
    dtype = common_dtype({t.dtype for t in tensors})
    join = lambda slot: np.concatenate([t.read().astype(dtype) for t in tensors])[slot]
    return Tensor(shape, dtype, join)


def _transposed(tensor: Tensor) -> Tensor:
    return Tensor(tensor.shape[::-1], tensor.dtype, lambda slot: tensor.read().T[slot])


def _with_class_position(positions: Tensor, first: Tensor | None) -> Tensor:
    if len(positions.shape) != 3:
        return positions  # misshapen, to be reported
    shape = (1, positions.shape[1] + 1, positions.shape[2])

    def get(slot: tuple[int, ...]) -> np.ndarray:
        row = np.zeros((1, 1, shape[2]), positions.dtype) if first is None else first.read()
        return np.concatenate([row.astype(positions.dtype), positions.read()], 1)[slot]

    return Tensor(shape, positions.dtype, get)
