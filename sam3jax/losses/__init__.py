"""The training losses, equal to torch's in value and gradient."""

from sam3jax.losses.detection import breakdown, compute_losses

__all__ = ["breakdown", "compute_losses"]
