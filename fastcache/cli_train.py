"""Train the networks of method `mlp` for a model, on text, and judge them on text they never saw. With --shapes, on
pictures of coloured shapes, for the model of `fastcache train-shapes`; quality cells judge those.

The result is one safetensors file with its training record inside. A run that was cut short goes on from
OUTPUT.state when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastcache.cli_training import add_files, add_run, add_settings, begin_log, source, tell
from fastcache.cli_types import number, positive_int
from fastcache.config import require

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

    material = parser.add_mutually_exclusive_group(required=True)
    material.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text to train on")
    material.add_argument("--shapes", action="store_true", help="train on pictures, networks for them too")
    add_files(parser)
    parser.add_argument(
        "--factor", type=positive_int, default=TrainConfig.factor, help="entries merged into one"
    )
    add_settings(parser, TrainConfig, SETTINGS)
    add_run(parser)
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


def run(args: argparse.Namespace) -> int:
    from fastcache.training.job import Job
    from fastcache.training.trainer import TrainConfig

    begin_log()
    config = TrainConfig(factor=args.factor, **{name: getattr(args, name) for name in SETTINGS})
    require(
        not (args.shapes and args.heldout),
        "--heldout is text; pictures that are held out come by themselves.",
    )
    job = Job(
        args.model, args.text or [], args.heldout, args.output, config, args.device, args.dtype, source()
    )
    record = job.run(args.judge_contexts, args.judge_windows, args.stop_after, args.finish_within)
    return tell(record, job.state_file)
