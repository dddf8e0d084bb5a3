"""Budget files for tests: random shares whose mean is what the ratio leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def write_budgets(path: Path, layers: int, kv_heads: int, ratio: float, seed: int = 0) -> np.ndarray:
    """Write shares for one ratio, from nearly nothing to everything; returns them, (layers, kv_heads)."""
    rng = np.random.default_rng(seed)
    shares = rng.beta(0.3, 0.3, (layers, kv_heads))
    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (shares * middle).clip(0, 1).mean() < 1 - ratio else (low, middle)
    shares = (shares * high).clip(0, 1)
    entry = {"compression_ratio": ratio, "shares": shares.tolist()}
    path.write_text(json.dumps({"format": "fastcache-head-budgets-1", "budgets": [entry]}), encoding="utf-8")
    return shares
