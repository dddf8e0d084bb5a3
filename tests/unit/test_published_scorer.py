"""The scorer that ships: small, whole, and with a record that says what made it and what it knows."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastcache.compression.kvzap import KVzapRater, read_scorer
from fastcache.compression.states import StateFit

FILE = Path(__file__).resolve().parents[2] / "results/published/compressors/smollm2-kvzap.safetensors"
SMOLLM2 = StateFit(30, 576, 3, torch.float32, torch.device("cpu"))


def test_it_is_small_and_fits_its_model():
    assert FILE.stat().st_size < 10_000_000
    tensors, _ = read_scorer(str(FILE))
    rater = KVzapRater(str(FILE), tensors, SMOLLM2)
    rated = rater.rate(29, torch.randn(5, 576, generator=torch.Generator().manual_seed(0)))
    assert rated.shape == (5, 3) and rated.isfinite().all()


def test_its_record_says_what_made_it_and_lies_beside_it():
    _, record = read_scorer(str(FILE))
    assert record == json.loads(FILE.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["model"]["kind"] == "checkpoint" and record["device"] and record["commit"]
    assert len(record["losses"]) == record["config"]["epochs"] and record["losses"][-1] < record["losses"][0]
    assert not set(record["heldout"]["text"].values()) & set(record["text"].values())


def test_it_tells_heads_best_entries_far_better_than_chance():
    heldout = read_scorer(str(FILE))[1]["heldout"]
    assert heldout["r2"] > 0.4 and heldout["rank_correlation"] > 0.6
    # By chance it would be 1 - ratio.
    assert heldout["overlap"]["0.5"] > 0.7 and heldout["overlap"]["0.8"] > 0.5
