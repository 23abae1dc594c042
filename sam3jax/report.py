"""python -m sam3jax.report RUN: writes report.html into a run folder."""

import sys

from sam3jax.viewing.report import main

if __name__ == "__main__":
    sys.exit(main())
