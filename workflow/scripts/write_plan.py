"""The config and everything that follows from it: the cells to measure, and those excluded by a named rule."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from config_check import WORKFLOW_KEYS

from fastcache.bench.matrix import expand
from fastcache.bench.quality.cells import expand_quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=json.loads, required=True, help="the whole config as JSON")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    expansion = expand(args.config, other_keys=WORKFLOW_KEYS)
    plan = {
        "quality": [cell.id for cell in expand_quality(args.config)],
        "config": args.config,
        "cells": {cell.id: cell.to_dict() for cell in expansion.cells},
        "excluded": [
            {"cell": e.cell.to_dict(), "rule": e.rule, "reason": e.reason} for e in expansion.excluded
        ],
    }
    part = args.output.with_suffix(".part")
    part.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    os.replace(part, args.output)


if __name__ == "__main__":
    main()
