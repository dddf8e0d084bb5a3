"""Static budgets: what share of a context each (layer, KV head) keeps, known before a request arrives.

Heads differ much more in how many entries they need than in which ones, and the difference is a property of the model:
calibrated once, it lets a cheap score keep what a costly one would (as DuoAttention, arXiv:2410.10819, and LU-KV find
with other means). `fastcache calibrate` writes the file that is read here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcache.compression.base import budget
from fastcache.compression.registry import BUDGET_FORMAT as FORMAT
from fastcache.errors import ConfigError

# Every head keeps the attention sinks: without them a head's softmax has nowhere to put what it does not need.
FLOOR = 4


@dataclass(frozen=True, eq=False)
class HeadBudgets:
    """Shares by compression ratio. ratios: ascending, in (0, 1). shares: (ratios, layers, kv_heads) in [0, 1]."""

    ratios: tuple[float, ...]
    shares: np.ndarray

    @classmethod
    def load(cls, path: str | Path) -> HeadBudgets:
        """Errors: `ConfigError` for a file that cannot be read or is not one of ours."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
            entries = sorted(content["budgets"], key=lambda entry: entry["compression_ratio"])
            ratios = tuple(float(entry["compression_ratio"]) for entry in entries)
            shares = np.asarray([entry["shares"] for entry in entries], np.float64)
            if shares.ndim != 3 or not ((shares >= 0) & (shares <= 1)).all():
                raise ValueError("its shares are no (layers, kv_heads) tables of numbers from 0 to 1")
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"head_budgets {str(path)!r} cannot be used ({error}); allowed is a file that "
                "`fastcache calibrate --model PATH --output FILE` wrote."
            ) from None
        return cls(ratios, shares)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, kv_heads)"""
        return self.shares.shape[1:]

    def at(self, compression_ratio: float) -> np.ndarray:
        """(layers, kv_heads) shares, linear between the calibrated ratios, 1 at ratio 0 and 0 at ratio 1."""
        ratios = np.asarray((0.0, *self.ratios, 1.0))
        shares = np.concatenate((np.ones_like(self.shares[:1]), self.shares, np.zeros_like(self.shares[:1])))
        upper = int(np.searchsorted(ratios, compression_ratio).clip(1, len(ratios) - 1))
        weight = (compression_ratio - ratios[upper - 1]) / (ratios[upper] - ratios[upper - 1])
        return (1 - weight) * shares[upper - 1] + weight * shares[upper]

    def kept(self, num_tokens: int, compression_ratio: float) -> np.ndarray:
        """(layers, kv_heads) int64: entries of each head; together exactly what equal budgets would keep.

        Each head keeps at least the first entries of `FLOOR` and at most all. The rounding goes to the largest
        fractions, the lower (layer, head) first.
        """
        total = budget(num_tokens, compression_ratio) * self.shares[0].size
        low, high = min(FLOOR, budget(num_tokens, compression_ratio)), num_tokens
        return divide(self.at(compression_ratio).ravel(), total, low, high).reshape(self.shape)


def divide(weights: np.ndarray, total: int, low: int, high: int) -> np.ndarray:
    """Integers proportional to `weights` that sum to `total`, each in [low, high]; low x n <= total <= high x n."""
    lower, upper = 0.0, 2.0 * high / max(weights[weights > 0].min(), 1e-12)
    for _ in range(200):  # bisection for the factor at which the clipped shares sum to the total
        middle = (lower + upper) / 2
        lower, upper = (
            (middle, upper) if (weights * middle).clip(low, high).sum() < total else (lower, middle)
        )
    exact = (weights * upper).clip(low, high)
    counts = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    while (missing := total - int(counts.sum())) > 0:
        room = order[counts[order] < high][:missing]
        counts[room] += 1
    return counts
