"""Two sets of rows side by side: which cells got slower by more than chance. Pure but for reading; imports no torch.

Cells are matched by what they compute, not by their ids: where the model lies, how often it was measured and settings
younger than a row make no other cell. A reference row and the row judged need not come from one version of the source.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache.bench.cellconfig import CellConfig
from fastcache.config import require
from fastcache.errors import ResultFileError, UserError

Row = Mapping[str, Any]
RATES = ("throughput_tok_s", "prefill_tok_s", "decode_tok_s")
# Settings of a cell that change nothing of what it computes.
NOT_THE_WORK = {"device": "auto", "timeout_s": 1800.0, "repeats": 3, "warmup": 1}


@dataclass(frozen=True)
class Pair:
    """One cell in both sets. Ratios are new over old, above 1 is faster; None where a side has no number.

    `noise`: the larger of the two relative spreads over repeats (0 where single repeats cannot show any).
    """

    name: str
    old: float | None
    new: float | None
    ratios: Mapping[str, float | None]
    noise: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    pairs: list[Pair]
    only_old: list[str]
    only_new: list[str]

    @property
    def regressions(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.verdict in ("slower", "failed")]


def load(path: Path) -> list[Row]:
    """Rows from a file with one JSON object a line (`results/rows.jsonl`) or with a list (`fastcache bench`).

    Errors: `ResultFileError`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, text.splitlines()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultFileError(f"{path} cannot be read as rows: {error}.") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not {"cell", "cell_id", "status", "repeats"} <= set(row):
            raise ResultFileError(
                f"{path}: entry {number} is no row of a cell; give the rows.jsonl of a run, or what "
                "`fastcache bench` wrote."
            )
    return rows


def compare(old: Iterable[Row], new: Iterable[Row], threshold: float) -> Comparison:
    """Match and judge. `threshold` is the relative loss of throughput from which on a cell is slower, if it also
    exceeds the noise. Errors: `UserError` where the two have no cell in common, `ConfigError` for the threshold."""
    require(0 <= threshold < 1, f"threshold is {threshold!r}; allowed is a share from 0 to below 1.")
    before, after = _by_work(old), _by_work(new)
    pairs = [_pair(before[work], after[work], threshold) for work in before if work in after]
    if not pairs:
        raise UserError("the two sets have no cell in common: nothing can be compared.")
    return Comparison(
        pairs,
        [rows[-1]["cell_id"] for work, rows in before.items() if work not in after],
        [rows[-1]["cell_id"] for work, rows in after.items() if work not in before],
    )


def _by_work(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of the same work together: a cell measured again is one cell with more repeats."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(work_of(row), []).append(row)
    return found


def work_of(row: Row) -> str:
    """What tells two cells apart. Settings that a row is too old to have count as their defaults."""
    try:
        cell = CellConfig.from_dict(row["cell"])
        return dataclasses.replace(cell, **NOT_THE_WORK, model_path=cell.model_path and "a folder").id
    except ValueError:
        return row["cell_id"]  # a cell of another version, that this one cannot build


def _pair(old: Sequence[Row], new: Sequence[Row], threshold: float) -> Pair:
    values = [[v for row in _measured(rows) for v in row["repeats"]["values"]] for rows in (old, new)]
    noise = max((_spread(v) for v in values), default=0.0)
    ratios = {rate: _ratio(_middle(old, rate), _middle(new, rate)) for rate in RATES}
    first, second = (statistics.median_low(v) if v else None for v in values)
    return Pair(
        new[-1]["cell_id"], first, second, ratios, noise, _verdict(old, new, ratios, noise, threshold)
    )


def _verdict(
    old: Sequence[Row], new: Sequence[Row], ratios: Mapping[str, float | None], noise: float, threshold: float
) -> str:
    if not _measured(old):
        return "not measured before" if _measured(new) else "failed in both"
    if not _measured(new):
        return "failed"
    if any(row.get("host_busy") for row in (*old, *new)):
        return "undecided"  # something else kept the CPU busy: the times are not the cell's own
    change = ratios["throughput_tok_s"] - 1
    if abs(change) <= max(threshold, noise):
        return "same"
    return "faster" if change > 0 else "slower"


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "ok"]


def _middle(rows: Sequence[Row], rate: str) -> float | None:
    values = [row[rate] for row in _measured(rows) if row[rate] is not None]
    return statistics.median_low(values) if values else None


def _spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / statistics.median_low(values) if values else 0.0


def _ratio(old: float | None, new: float | None) -> float | None:
    return new / old if old and new else None


COLUMNS = ("old tok/s", "new tok/s", "ratio", "prefill", "decode", "spread", "verdict", "cell")


def format_comparison(found: Comparison) -> str:
    """A plain-text table, the largest loss first, then what only one of the two has."""
    pairs = sorted(found.pairs, key=lambda p: p.ratios["throughput_tok_s"] or 0.0)
    lines = [COLUMNS, *(_line(pair) for pair in pairs)]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    table = [
        "  ".join(
            text.rjust(w) if i < 6 else text.ljust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    sides = (("old set", found.only_old), ("new set", found.only_new))
    only = [f"only in the {which}: {name}" for which, names in sides for name in names]
    return "\n".join(line.rstrip() for line in table + only)


def _line(pair: Pair) -> tuple[str, ...]:
    rates = ("-" if value is None else f"{value:,.0f}" for value in (pair.old, pair.new))
    ratios = ("-" if pair.ratios[rate] is None else f"{pair.ratios[rate]:.3f}" for rate in RATES)
    return (*rates, *ratios, f"{pair.noise:.1%}", pair.verdict, pair.name)
