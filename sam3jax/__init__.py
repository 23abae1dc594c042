"""SAM 3 in JAX: fine-tune, evaluate and run the promptable detector. See README.md."""
