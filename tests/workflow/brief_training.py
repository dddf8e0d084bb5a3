"""Stands in for `fastcache`: the training commands as they are, with few and small steps behind what the rules ask for.

Every command is noted in `trained.txt` in the working directory. The one whose output is BREAK_TRAINING stops after its
first step, as a run that is cut; its state stays.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fastcache.cli import main

SMALL = {
    "train-shapes": ["--pictures-per-step", "2", "--questions-per-picture", "1"],
    "train-compressor": ["--steps", "2", "--batch-size", "1", "--hidden", "8"],
}
FIRST = ["--steps", "4", "--align-steps", "1", "--coarse-steps", "1"]

if __name__ == "__main__":
    given = sys.argv[1:]
    output = given[given.index("--output") + 1]
    small = [*SMALL[given[0]], "--device", "cpu"]
    if given[0] == "train-shapes":
        small += ["--steps", "2"] if "--start" in given else FIRST
    cut = os.environ.get("BREAK_TRAINING") == output
    with Path("trained.txt").open("a") as note:
        note.write(f"{output} {'cut' if cut else 'whole'}\n")
    sys.exit(main([*given, *small, *(["--stop-after", "0"] if cut else [])]))
