"""What each metric says, in a sentence, and whether less of it is better: for reports."""

from __future__ import annotations

# In the order in which people want to know them.
MEANINGS = {
    "segm/AP": "average precision of masks, over overlaps of .5 to .95: how well ranked, found and outlined",
    "segm/AP50": "the same where half an overlap is enough: how well ranked and found",
    "segm/AP75": "the same at an overlap of .75: how well outlined",
    "bbox/AP": "average precision of boxes, over overlaps of .5 to .95",
    "bbox/AP50": "average precision of boxes where half an overlap is enough",
    "bbox/AP75": "the same at an overlap of .75",
    "segm/AR": "average recall of masks, over overlaps of .5 to .95, whatever their score",
    "bbox/AR": "average recall of boxes, over overlaps of .5 to .95, whatever their score",
    "recall": "share of the instances that are found, at the threshold",
    "precision": "share of the finds that are an instance, at the threshold",
    "false_alarms": "share of the questions about what is not there that are answered by a find",
    "false_alarms_empty": "share of the pictures without any object in which something is found",
    "cgF1": "SA-Co's score: F1 of what is there (pmF1) times being right about whether it is there (IL_MCC)",
    "pmF1": "F1 of finds where the phrase is there, over overlaps of .5 to .95",
    "IL_MCC": "correlation of saying that a phrase is there with its being there; 0 is chance",
    "video/HOTA": "objects followed through video: how well found (DetA) and kept apart (AssA)",
    "video/J&F": "overlap (J) and boundary (F) of each object's best track, as DAVIS counts",
    "video/switches": "how often an object becomes another one, per object",
    "video/steadiness": "1 minus the mean change of an object's score from a frame to the next",
    "clicks/mIoU@1": "mean overlap (IoU) of masks with the truth after one click",
    "clicks/mIoU@2": "the same after two clicks",
    "clicks/mIoU@3": "the same after three clicks",
    "clicks/mIoU@5": "the same after five clicks",
    "clicks/mIoU@10": "the same after ten clicks",
    "clicks/mIoU@20": "the same after twenty clicks",
    "clicks/NoC@85": "clicks until the overlap is .85; where it never is, all that were made",
    "clicks/NoC@90": "clicks until the overlap is .9; where it never is, all that were made",
    "clicks/reached@85": "share of the objects that reach an overlap of .85",
    "clicks/reached@90": "share of the objects that reach an overlap of .9",
    "clicks/boundary_F": "how well the last outline lies on the true one, as DAVIS counts",
    "clicks/predicted_IoU_error": "mean error of the overlap that the model predicts of itself",
    "clicks/calibration_error": "the same of many masks together: whether those said to be .8 are .8 on average",
}
_SIZES = {
    "small": "instances of less than 32 x 32 pixels",
    "medium": "instances of 32 x 32 to 96 x 96 pixels",
    "large": "instances of more than 96 x 96 pixels",
}
_WORSE = ("loss", "error", "false_alarm", "NoC", "switches")


def less_is_better(metric: str) -> bool:
    """Whether a smaller value of a metric is the better one: losses, errors and false alarms."""
    return any(word in metric for word in _WORSE)


def meaning(metric: str) -> str:
    """A sentence about a metric; "" where there is none."""
    name, _, size = metric.rpartition("_")
    if size in _SIZES and name in MEANINGS:
        return f"{name} of {_SIZES[size]}"
    return MEANINGS.get(metric, "")


def by_importance(names: list[str]) -> list[str]:
    """The metrics that people look at first, then the others in their own order."""
    first = [name for name in MEANINGS if name in names]
    return first + [name for name in names if name not in MEANINGS]
