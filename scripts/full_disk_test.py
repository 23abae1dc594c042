"""Train into disks that are too small, then make room: `unshare -m python -m scripts.full_disk_test FOLDER`.

Each disk is a tmpfs, so this takes the right to mount (root, in a mount namespace of its own). Each training must
end with status 2 and one sentence; what was saved must open; the same command, after room was made, must end with
the files of a run left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from scripts.kill_test import compare, opens, saved, start

SIZES = (8, 300, 700, 3000, 6000, 9000, 14_000, 18_000)  # kilobytes


def main() -> int:
    """Returns 1 where a full disk gave more than a sentence, or lost something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="new folder for the runs")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help="of the disks, kilobytes"
    )
    options = parser.parse_args()
    alone, wrong, full = options.folder / "alone", 0, 0
    if not saved(alone) and start(alone).wait():
        return 1
    for size in options.sizes:
        run = options.folder / f"disk_{size}"
        run.mkdir()
        mount(run, size)
        status, log = start(run).wait(), run.with_suffix(".log")
        said = log.read_text()
        sentences = [line for line in said.splitlines() if line.startswith("error: ")]
        problem = opens(run)
        if status:
            full += 1
            clean = status == 2 and len(sentences) == 1 and "Traceback" not in said
            wrong += not clean or bool(problem)
        print(f"{size} kB: status {status}, steps {saved(run)}, {problem or 'opens'}; {' / '.join(sentences)}", flush=True)  # fmt: skip
        mount(run, 100_000, again=True)
        status = start(run).wait()
        wrong += bool(status or compare(alone, run))
    print(f"{len(options.sizes)} disks, {full} of them full; {wrong} went wrong")
    return int(bool(wrong))


def mount(folder: Path, size: int, again: bool = False) -> None:
    """A disk of so many kilobytes; again: there is one, it gets more."""
    how = f"{'remount,' if again else ''}size={size}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], check=True)


if __name__ == "__main__":
    sys.exit(main())
