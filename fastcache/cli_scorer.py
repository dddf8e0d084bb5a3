"""Train the networks of method `kvzap` for a model: what KVzip's replay scores, told from hidden states.

The result is one safetensors file with its training record inside. A run that was cut short goes on from
OUTPUT.state when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastcache.cli_training import add_files, add_run, add_settings, begin_log, source, tell
from fastcache.cli_types import positive_int

SETTINGS = {
    "hidden": "width of the networks",
    "windows": "texts that are replayed",
    "min_context": "shortest of them, in tokens",
    "context": "longest of them, in tokens",
    "tokens": "tokens drawn of each",
    "epochs": "passes over all drawn tokens",
    "batch_size": "tokens per optimiser step",
    "learning_rate": "highest learning rate",
    "weight_decay": "of AdamW",
    "seed": "of the networks' first weights and of what is drawn",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastcache.training.scorer import ScorerConfig

    parser.add_argument(
        "--text", required=True, nargs="+", type=Path, metavar="FILE", help="UTF-8 text to train on"
    )
    add_files(parser)
    add_settings(parser, ScorerConfig, SETTINGS)
    add_run(parser)
    parser.add_argument("--judge-windows", type=positive_int, default=16, help="held-out texts")


def run(args: argparse.Namespace) -> int:
    from fastcache.training.scorer import ScorerConfig
    from fastcache.training.scorer_job import ScorerJob

    begin_log()
    config = ScorerConfig(**{name: getattr(args, name) for name in SETTINGS})
    job = ScorerJob(
        args.model, args.text, args.heldout, args.output, config, args.device, args.dtype, source()
    )
    return tell(job.run(args.judge_windows, args.stop_after), args.output.with_suffix(".state"))
