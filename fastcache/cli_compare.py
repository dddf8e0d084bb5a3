"""Compare two sets of rows cell by cell, say yours with the published ones: ratio, spread, and what got slower.

Exit code: 1 if a cell lost more throughput than the threshold and than its repeats differ, or has no numbers any more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastcache.bench.compare import compare, format_comparison, load
from fastcache.cli_types import number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "old", type=Path, metavar="A.jsonl", help="the reference: rows.jsonl, or a list of rows"
    )
    parser.add_argument("new", type=Path, metavar="B.jsonl", help="the rows to judge")
    parser.add_argument("--threshold", type=number, default=0.05, help="relative loss that counts")


def run(args: argparse.Namespace) -> int:
    found = compare(load(args.old), load(args.new), args.threshold)
    slower = len(found.regressions)
    sys.stdout.write(
        f"{format_comparison(found)}\n\n{len(found.pairs)} cells in both; {slower} failed, or are slower by more than "
        f"{args.threshold:.0%} and than their repeats differ\n"
    )
    return 1 if slower else 0
