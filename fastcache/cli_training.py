"""What the commands that train have in common: settings as flags, and runs that may be cut short and go on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcache.bench.provenance import PACKAGE, git_commit, source_digest
from fastcache.cli_types import number
from fastcache.config import DEVICES, DTYPES

STOPPED = 3


def add_settings(parser: argparse.ArgumentParser, config: type, meanings: Mapping[str, str]) -> None:
    """A flag for each named setting of a config class, with its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, meaning in meanings.items():
        kind = number if isinstance(defaults[name], float) else int
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=defaults[name], help=meaning)


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help=", ".join(DEVICES))
    parser.add_argument(
        "--stop-after", type=number, metavar="SECONDS", help="save and stop then; exit code 3"
    )


def add_files(parser: argparse.ArgumentParser) -> None:
    """Of a command that trains networks for a model."""
    parser.add_argument("--model", required=True, metavar="PATH", help="a local Hugging Face folder")
    parser.add_argument(
        "--heldout", type=Path, metavar="FILE", help="UTF-8 text to judge on, of other documents"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.safetensors")
    parser.add_argument(
        "--dtype", default=None, choices=DTYPES, help="of the model; default bfloat16 on a GPU, else float32"
    )


def begin_log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)


def source() -> dict[str, Any]:
    """Which code trains, for the record."""
    return {"commit": git_commit(), "training_source": source_digest(PACKAGE / "training")}


def tell(record: Any | None, state: Path) -> int:
    """Print what came of a run, None if it was cut short; returns the exit code."""
    if record is None:
        sys.stderr.write(f"stopped early; start again to go on from {state}\n")
        return STOPPED
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    return 0
