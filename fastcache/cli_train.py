"""Train the networks of method `mlp` for a model, on text, and judge them on text they never saw. With --shapes, on
pictures of coloured shapes, for the model of `fastcache train-shapes`; quality cells judge those.

The result is one safetensors file with its training record inside. A run that was cut short goes on from
OUTPUT.state when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

from fastcache.cli_types import number, positive_int
from fastcache.config import DEVICES, DTYPES, require

SETTINGS = {
    "steps": "optimiser steps",
    "hidden": "width of the networks",
    "n_sink": "first entries that are never merged",
    "recent": "last entries that are never merged",
    "min_context": "shortest context of a training step, in tokens",
    "context": "longest context of a training step, in tokens",
    "continuation": "tokens behind the context on which the loss is taken",
    "batch_size": "windows per step",
    "learning_rate": "highest learning rate",
    "hidden_weight": "weight of the hidden-state term beside the divergence",
    "seed": "of the networks' first weights and of the windows",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastcache.training.trainer import TrainConfig

    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    parser.add_argument("--model", required=True, metavar="PATH", help="a local Hugging Face folder")
    material = parser.add_mutually_exclusive_group(required=True)
    material.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text to train on")
    material.add_argument("--shapes", action="store_true", help="train on pictures, networks for them too")
    parser.add_argument(
        "--heldout", type=Path, metavar="FILE", help="UTF-8 text to judge on, of other documents"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.safetensors")
    parser.add_argument(
        "--factor", type=positive_int, default=defaults["factor"], help="entries merged into one"
    )
    for name, meaning in SETTINGS.items():
        kind = number if isinstance(defaults[name], float) else int
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=defaults[name], help=meaning)
    parser.add_argument("--device", default="auto", help=", ".join(DEVICES))
    parser.add_argument(
        "--dtype", default=None, choices=DTYPES, help="of the model; default bfloat16 on a GPU, else float32"
    )
    parser.add_argument(
        "--judge-windows", type=positive_int, default=64, help="held-out windows per context length"
    )
    parser.add_argument(
        "--judge-contexts", type=positive_int, nargs="+", default=[512, 1024], help="context lengths"
    )
    parser.add_argument(
        "--finish-within",
        type=number,
        metavar="SECONDS",
        help="train for at most this long, with fewer steps if need be, and end as planned",
    )
    parser.add_argument(
        "--stop-after", type=number, metavar="SECONDS", help="save and stop then; exit code 3"
    )


STOPPED = 3


def run(args: argparse.Namespace) -> int:
    import fastcache.training as training
    from fastcache.bench.provenance import git_commit, source_digest
    from fastcache.training.job import Job
    from fastcache.training.trainer import TrainConfig

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    config = TrainConfig(factor=args.factor, **{name: getattr(args, name) for name in SETTINGS})
    source = {"commit": git_commit(), "training_source": source_digest(Path(training.__file__).parent)}
    require(
        not (args.shapes and args.heldout),
        "--heldout is text; pictures that are held out come by themselves.",
    )
    job = Job(args.model, args.text or [], args.heldout, args.output, config, args.device, args.dtype, source)
    result: dict[str, Any] | None = job.run(
        args.judge_contexts, args.judge_windows, args.stop_after, args.finish_within
    )
    if result is None:
        sys.stderr.write(f"stopped early; start again to go on from {job.state_file}\n")
        return STOPPED
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0
