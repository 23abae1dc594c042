"""Which finds people see: the same ones in predict, panels and reports.

Above the threshold of their phrase, and each thing once: of two finds of a phrase on the same thing the
weaker is left out. Metrics look at all finds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sam3jax.config import EvalConfig
from sam3jax.inference.full_size import distinct


@dataclass(frozen=True)
class Shown:
    """threshold: score above which a find is shown, thresholds: that of a phrase; nms: IoU of masks (of boxes
    where there are none) above which the weaker of two is left out, None for never.
    """

    threshold: float = 0.5
    thresholds: Mapping[str, float] = field(default_factory=dict)
    nms: float | None = None

    @classmethod
    def by(cls, config: EvalConfig, thresholds: Mapping[str, float] | None = None) -> Shown:
        """As a run's settings say; thresholds: those that a validation chose for its phrases."""
        return cls(config.threshold, dict(thresholds or {}), config.shown_nms)

    @classmethod
    def told(cls, about: Mapping[str, Any]) -> Shown:
        """From what evaluation.json holds."""
        told = about.get("shown", {"threshold": about.get("threshold", 0.5)})
        return cls(**told)

    def of(
        self, results: Sequence[Mapping[str, Any]], names: Mapping[int, str]
    ) -> list[Mapping[str, Any]]:
        """Those of the COCO results of one picture that are shown, strongest first."""
        by_phrase: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for result in sorted(results, key=lambda r: -r["score"]):
            phrase = names.get(result["category_id"], "")
            if result["score"] > self.thresholds.get(phrase, self.threshold):
                by_phrase[result["category_id"]].append(result)
        kept: list[Mapping[str, Any]] = []
        for found in by_phrase.values():
            kept += [found[k] for k in distinct([_region(r) for r in found], self.nms)]
        return sorted(kept, key=lambda r: -r["score"])


def _region(result: Mapping[str, Any]) -> Any:
    mask = result.get("segmentation")
    return list(result["bbox"]) if mask is None else mask
