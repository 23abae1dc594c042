"""The second neck: the same pyramid as the detector's, with its own weights, for clicks and tracks.

Answers to `sam2_convs` of sam3.model.necks. Both necks read one pass of the trunk.
"""

from __future__ import annotations

from sam3jax.model.neck import Neck


class TrackerNeck(Neck):
    """ViT features [I, y, x, D] -> levels [I, 4y, 4x, d], [I, 2y, 2x, d], [I, y, x, d]."""
