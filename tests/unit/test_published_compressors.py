"""Compressors that ship: small, whole, with a record of what made them, and better than methods without training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastcache.compression.merge_checkpoint import check_shapes, read_checkpoint

FOLDER = Path(__file__).resolve().parents[2] / "results/published/compressors"
SHAPES = {"smollm2": (30, 64)}  # layers, head size
MERGING = sorted(FOLDER.glob("*-f*.safetensors"))


@pytest.fixture(params=MERGING or [None], ids=lambda file: file.stem if file else "none")
def file(request):
    if request.param is None:
        pytest.skip("no compressor is published yet")
    return request.param


def test_it_is_small_and_fits_its_model(file):
    assert file.stat().st_size < 10_000_000
    model, factor = file.stem.split("-f")
    checkpoint = read_checkpoint(str(file))
    assert checkpoint.layout.factor == int(factor) and not checkpoint.unused
    check_shapes(checkpoint, *SHAPES[model], int(factor))


def test_its_record_says_what_made_it_and_lies_beside_it(file):
    record = read_checkpoint(str(file)).record
    assert record == json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["steps"] >= 0.95 * record["config"]["steps"]
    assert record["losses"][-1]["hidden"] < record["losses"][0]["hidden"]
    assert record["model"]["kind"] == "checkpoint" and record["device"] and record["commit"]
    assert not set(record["heldout"]["text"].values()) & set(record["text"].values())


def test_it_beats_what_needs_no_training_with_as_many_entries(file):
    contexts = read_checkpoint(str(file)).record["heldout"]["contexts"]
    assert {"512", "1024"} <= set(contexts)
    for judged in contexts.values():
        for rival in ("streaming_llm", "random"):
            assert judged[rival]["kept"] == judged["mlp"]["kept"]
            assert judged["mlp"]["perplexity"] < judged[rival]["perplexity"], rival


def test_the_readme_beside_it_quotes_its_record(file):
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    judged = read_checkpoint(str(file)).record["heldout"]["contexts"]
    contexts = [judged["512"], judged["1024"]]
    for name in ("full", "mlp", "streaming_llm", "random", "knorm", "keydiff", "snapkv"):
        numbers = (f"{c[name]['kept']} | {c[name]['perplexity']:.2f} | {c[name]['kl']:.3f}" for c in contexts)
        assert f"| {name} | {' | '.join(numbers)} |" in page
