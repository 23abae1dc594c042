"""How steady scores are over a video, from the predictions of its frames."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from sam3jax.evaluation.ground_truth import by_pair, overlaps, result_region
from sam3jax.evaluation.video import steadiness

_SAME = 0.5  # overlap of a detection with the object that it is of


def steadiness_of(records: Iterable[Any], predictions: Iterable[Mapping[str, Any]]) -> float:
    """`video.steadiness` of the objects' scores: of each the best that lies on it, 0 where none does.

    records: FrameRecords in their order; predictions: COCO results. Boxes are compared: it is asked whether
    the object was found, not how well.
    """
    found = by_pair(list(predictions))
    scores: dict[tuple[int, int, Any], list[list[float]]] = defaultdict(list)
    last: dict[tuple[int, int, Any], int] = {}
    place: dict[int, int] = defaultdict(int)  # annotated frames of a video so far
    for record in records:
        number = place[record.video] = place[record.video] + 1
        for a in record.annotations:
            if a.iscrowd:
                continue
            key = (record.video, a.category_id, a.id)
            if last.get(key) != number - 1:
                scores[key].append([])  # it was out of sight: another piece
            last[key] = number
            here = found.get((record.id, a.category_id), [])
            regions = [result_region(p, "bbox") for p in here]
            same = overlaps(regions, [list(a.bbox)], crowd=False)[:, 0] >= _SAME
            best = max((p["score"] for p, s in zip(here, same) if s), default=0.0)
            scores[key][-1].append(best)
    return steadiness(piece for pieces in scores.values() for piece in pieces)
