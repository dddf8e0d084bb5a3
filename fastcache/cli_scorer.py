"""Train the networks of method `kvzap` for a model: what KVzip's replay scores, told from hidden states.

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

from fastcache.cli_types import number, positive_int
from fastcache.config import DEVICES, DTYPES

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
STOPPED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastcache.training.scorer import ScorerConfig

    defaults = {field.name: field.default for field in dataclasses.fields(ScorerConfig)}
    parser.add_argument("--model", required=True, metavar="PATH", help="a local Hugging Face folder")
    parser.add_argument(
        "--text", required=True, nargs="+", type=Path, metavar="FILE", help="UTF-8 text to train on"
    )
    parser.add_argument(
        "--heldout", type=Path, metavar="FILE", help="UTF-8 text to judge on, of other documents"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.safetensors")
    for name, meaning in SETTINGS.items():
        kind = number if isinstance(defaults[name], float) else int
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=defaults[name], help=meaning)
    parser.add_argument("--device", default="auto", help=", ".join(DEVICES))
    parser.add_argument(
        "--dtype", default=None, choices=DTYPES, help="of the model; default bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--judge-windows", type=positive_int, default=16, help="held-out texts")
    parser.add_argument(
        "--stop-after", type=number, metavar="SECONDS", help="save and stop then; exit code 3"
    )


def run(args: argparse.Namespace) -> int:
    import fastcache.training as training
    from fastcache.bench.provenance import git_commit, source_digest
    from fastcache.training.scorer import ScorerConfig
    from fastcache.training.scorer_job import ScorerJob

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    config = ScorerConfig(**{name: getattr(args, name) for name in SETTINGS})
    source = {"commit": git_commit(), "training_source": source_digest(Path(training.__file__).parent)}
    job = ScorerJob(args.model, args.text, args.heldout, args.output, config, args.device, args.dtype, source)
    record = job.run(args.judge_windows, args.stop_after)
    if record is None:
        sys.stderr.write(f"stopped early; start again to go on from {args.output.with_suffix('.state')}\n")
        return STOPPED
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    return 0
