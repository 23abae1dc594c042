"""Click on every object of a data set, on all devices of all processes, and measure the masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sam3jax.config import ClicksConfig
from sam3jax.data.ledger import DataError
from sam3jax.data.loader import EvalLoader
from sam3jax.evaluation.click_metrics import boundary_f, scores_of
from sam3jax.evaluation.processes import of_all_processes
from sam3jax.evaluation.progress import Advance, length, untold
from sam3jax.inference.click_rounds import Evaluated, evaluation_rounds
from sam3jax.model import Interactive
from sam3jax.types import AXIS, ClickBatch
from sam3jax.weights.tree import Tree


@dataclass(frozen=True)
class ClickedPicture:
    """A picture with its K objects after each of R clicks, for a panel.

    image_id: its row in the data set. truth [K, Y, X] and masks [R, K, Y, X] bool, on the model's square;
    ious [R, K]; clicks [R, K, 3]: x and y in pixels of that square, and the label.
    """

    image_id: int
    truth: np.ndarray
    masks: np.ndarray
    ious: np.ndarray
    clicks: np.ndarray


@dataclass(frozen=True)
class ClickEvaluation:
    """metrics: name -> value. objects: one record each, in the order of the data. curve: mIoU after each
    click. calibration: (mean predicted, mean true IoU, masks) of each tenth. pictures: to draw."""

    metrics: dict[str, float]
    objects: list[dict[str, Any]]
    curve: list[float]
    calibration: list[tuple[float, float, int]]
    pictures: list[ClickedPicture] = field(default_factory=list)


def click_on_dataset(
    model: Interactive,
    mesh: Mesh,
    variables: Tree,
    loader: EvalLoader,
    config: ClicksConfig,
    *,
    batches: int | None = None,
    panels: int = 0,
    advance: Advance = untold,
) -> ClickEvaluation:
    """Evaluate every object of the loader's batches, whose pictures divide among the mesh's devices.

    variables: on the devices of the mesh. batches: no more than these. panels: pictures kept to be drawn.
    advance: told per batch. Raises DataError where no object is as large as a pixel of the model.
    """
    objects: list[dict[str, Any]] = []
    pictures: list[ClickedPicture] = []
    rows = NamedSharding(mesh, P(AXIS))
    total, waiting = length(loader, batches), None

    def read(number: int, batch: ClickBatch, found: Evaluated) -> None:
        objects.extend(_objects(batch, found))
        if len(pictures) < panels:
            pictures.extend(_pictures(batch, found, config, panels - len(pictures)))
        advance(number, total)

    for number, batch in enumerate(islice(loader, total), 1):
        # The devices click on this batch while the host measures the one before.
        running = (
            number,
            batch,
            _rounds(model, mesh, config, variables, jax.device_put(batch, rows)),
        )
        if waiting is not None:
            read(*waiting)
        waiting = running
    if waiting is not None:
        read(*waiting)
    objects = [record for part in of_all_processes(objects) for record in part]
    if not objects:
        raise DataError(
            "no object of these pictures is left to click on: each is smaller than a pixel of the model, "
            f"which sees pictures at {model.config.image_size} x {model.config.image_size}; ask about larger objects, "
            "or cut the pictures into parts"
        )
    scores = scores_of(objects)
    return ClickEvaluation(
        scores.metrics(), objects, scores.curve(), scores.calibration(), pictures
    )


# The model is a static argument: two evaluations of one model share what is compiled.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _rounds(
    model: Interactive, mesh: Mesh, config: ClicksConfig, variables: Tree, batch: ClickBatch
) -> Evaluated:
    run = lambda variables, batch: evaluation_rounds(model, variables, batch, config)
    by_round: Any = P(None, AXIS)
    by_row: Any = P(AXIS)
    out = Evaluated(by_round, by_round, by_round, by_row, by_row)
    split = jax.shard_map(run, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=out)
    return split(variables, batch)


def _objects(batch: ClickBatch, found: Evaluated) -> list[dict[str, Any]]:
    """Records of the real objects of a batch."""
    valid = np.asarray(batch.valid & batch.image_valid[:, None])
    edge = batch.edge
    ious, predicted, last = (np.asarray(x) for x in (found.iou, found.predicted, found.masks[-1]))
    first = (np.asarray(found.points)[:, 2] + 0.5) / edge  # behind the corners of a box
    records = []
    for i, k in zip(*map(np.ndarray.tolist, np.nonzero(valid)), strict=True):
        row = i * valid.shape[1] + k
        truth = np.unpackbits(batch.masks[i, k], axis=-1, count=edge).astype(bool)
        records.append(
            {
                "image_id": int(batch.image_id[i]),
                "click": first[row].tolist(),
                "ious": [round(float(x), 4) for x in ious[:, row]],
                "predicted": [round(float(x), 4) for x in predicted[:, row]],
                "boundary_F": round(boundary_f(last[row], truth), 4),
            }
        )
    return records


def _pictures(
    batch: ClickBatch, found: Evaluated, config: ClicksConfig, most: int
) -> list[ClickedPicture]:
    edge, per = batch.edge, batch.valid.shape[1]
    out = []
    for i in np.flatnonzero(batch.image_valid)[:most].tolist():
        k = np.flatnonzero(batch.valid[i])
        rows = i * per + k
        at = slice(2, 2 + config.valid_clicks)  # behind the corners of a box
        points, labels = (np.asarray(x)[rows, at] for x in (found.points, found.labels))
        clicks = np.concatenate([points, labels[..., None]], -1).transpose(1, 0, 2)
        truth = np.unpackbits(batch.masks[i, k], axis=-1, count=edge).astype(bool)
        masks, ious = np.asarray(found.masks)[:, rows], np.asarray(found.iou)[:, rows]
        out.append(ClickedPicture(int(batch.image_id[i]), truth, masks, ious, clicks))
    return out
