"""The command line: `fastcache COMMAND ...`. Each command is a module of its own, loaded when it is named.

A command module has `add_arguments(parser)` and `run(args) -> exit code`. A mistake of the user is one
sentence on stderr and exit code 2, never a traceback; a bug of ours keeps its traceback. Imports no torch.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastcache import __version__
from fastcache.errors import ConfigError, UnknownName, UserError

COMMANDS = {
    "bench": ("fastcache.cli_bench", "measure a matrix of cells and write one JSON list of rows"),
    "calibrate": ("fastcache.cli_calibrate", "find out how much each KV head of a model must keep"),
    "cell": ("fastcache.cli_cell", "measure one cell described by a JSON file and write its row"),
    "compare": ("fastcache.cli_compare", "compare two sets of rows and say which cells got slower"),
    "cost": ("fastcache.cli_cost", "measure what compression methods cost beside a prefill on this device"),
    "doctor": ("fastcache.device.doctor", "say what this machine can run, and what is missing"),
    "generate": ("fastcache.cli_generate", "continue prompts with a model, with or without compression"),
    "quality": (
        "fastcache.cli_quality",
        "measure what one compressed cache still knows, beside the whole one",
    ),
    "prove-greenctx": (
        "fastcache.device.proof",
        "prove that a split of this GPU's SMs is real, or record why there is none",
    ),
    "serve": ("fastcache.cli_serve", "answer OpenAI's clients over HTTP, with or without compression"),
    "serving-cell": (
        "fastcache.cli_serving_cell",
        "measure one engine under open-loop load and write its rows",
    ),
    "shim": (
        "fastcache.device.shim",
        "build the library that lets an installed sgl_kernel load, if one is needed",
    ),
    "train-shapes": (
        "fastcache.cli_train_shapes",
        "train the small multimodal model of coloured shapes from scratch",
    ),
    "train-compressor": ("fastcache.cli_train", "train the networks of method mlp for a model, on text"),
    "train-scorer": ("fastcache.cli_scorer", "train the networks of method kvzap for a model, on text"),
}
USER_MISTAKE, INTERRUPTED = 2, 128 + signal.SIGINT


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one; "None", "False" and nothing tell a reader nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, "")
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """argparse that speaks like the rest of us: a misspelt flag is answered with the nearest one."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        """argparse calls this for a wrong value; one sentence is enough, without the whole usage before it."""
        raise ConfigError(f"{message}. `{self.prog} --help` lists what is allowed.")

    def parse_strictly(self, arguments: Sequence[str]) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(arguments)
        for given in unknown:
            if given.startswith("-"):
                raise UnknownName("flag", given.partition("=")[0], self._option_string_actions)
            self.error(f"unexpected argument {given!r}")
        return parsed


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command; returns the exit code. `prog` is the name shown in usage lines."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments, prog)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str], prog: str | None) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else USER_MISTAKE
    if arguments[0] == "--version":
        print(f"fastcache {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise UnknownName("command", name, COMMANDS)
    module = importlib.import_module(COMMANDS[name][0])
    parser = Parser(prog=prog or f"fastcache {name}", description=module.__doc__)
    module.add_arguments(parser)
    return module.run(parser.parse_strictly(rest))


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastcache COMMAND [options]",
            "",
            "commands:",
            *lines,
            "",
            "`fastcache COMMAND --help` explains one.",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
