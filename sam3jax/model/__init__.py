"""The detector as Flax Linen modules; each file names the torch file that it answers to."""

from sam3jax.model.interactive import Interactive
from sam3jax.model.sam3 import Sam3
from sam3jax.model.segmentation_head import draw_masks

__all__ = ["Interactive", "Sam3", "draw_masks"]
