"""Train the small multimodal model of coloured shapes from scratch: pictures, questions and answers from a seed.

The result is a Hugging Face folder that the engine loads, with `training.json` beside the weights. A run that was cut
short goes on from FOLDER.state when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastcache.cli_training import add_run, add_settings, begin_log, tell

SETTINGS = {
    "steps": "optimiser steps",
    "align_steps": "first steps, in which the vision tower alone learns to name what a patch shows",
    "coarse_steps": "steps after those, in which the language model alone learns to answer over one token per cell",
    "align_weight": "weight of the naming beside the answers in the remaining steps",
    "pictures_per_step": "pictures per step",
    "most_pictures": "most pictures in a prompt",
    "questions_per_picture": "questions per picture",
    "learning_rate": "highest learning rate",
    "seed": "of the first weights, the pictures and the questions",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastcache.training.shapes_trainer import ShapesTrainConfig

    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument(
        "--start", type=Path, metavar="FOLDER", help="go on from this model's weights, with a new seed"
    )
    add_settings(parser, ShapesTrainConfig, SETTINGS)
    add_run(parser)


def run(args: argparse.Namespace) -> int:
    from fastcache.training.shapes_trainer import ShapesTrainConfig, ShapesTrainer

    begin_log()
    config = ShapesTrainConfig(**{name: getattr(args, name) for name in SETTINGS})
    state = args.output.with_name(args.output.name + ".state")
    trainer = ShapesTrainer(config, state, args.device, args.start)
    done = trainer.run(stop_after_s=args.stop_after)
    return tell(trainer.finish(args.output)["heldout_accuracy"] if done else None, state)
