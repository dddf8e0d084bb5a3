"""The chain from nothing to networks for pictures: it runs, and what is trained is not trained again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastcache.compression.merge_checkpoint import read_checkpoint

BRIEF = f"{sys.executable} {Path(__file__).with_name('brief_training.py')}"
FILE = "results/shapes/f5.safetensors"


@pytest.mark.slow
def test_a_chain_that_was_cut_goes_on_where_it_was(workplace, succeed, monkeypatch):
    monkeypatch.setenv("FASTCACHE_TRAIN_COMMAND", BRIEF)
    monkeypatch.setenv("BREAK_TRAINING", "results/shapes/model")
    assert workplace.snakemake(FILE).returncode != 0
    folder = workplace.folder / "results/shapes"
    assert (folder / "model.state").is_file() and not (folder / "model/model.safetensors").exists()
    monkeypatch.delenv("BREAK_TRAINING")
    succeed(workplace.snakemake(FILE))
    assert (workplace.folder / "trained.txt").read_text(encoding="utf-8").splitlines() == [
        "results/shapes/base whole",
        "results/shapes/model cut",
        "results/shapes/model whole",
        f"{FILE} whole",
    ]
    assert "continuing at step 1" in (workplace.folder / "results/logs/train_shapes/model.log").read_text()
    record = json.loads((folder / "model/training.json").read_text(encoding="utf-8"))
    assert record["start"]["config"]["steps"] == 4 and record["config"]["seed"] == 1
    checkpoint = read_checkpoint(str(workplace.folder / FILE))
    assert checkpoint.layout.factor == 5 and checkpoint.kinds == ("ik", "iv", "tk", "tv")
    assert not list(folder.glob("*.state"))
