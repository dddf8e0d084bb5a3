"""Whole quality cells: their numbers against transformers on a tiny model, and sense on the real small one."""

from __future__ import annotations

import pytest
import torch
from kvpress_oracle import PRESSES, prefill
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastcache.bench.quality.cells import QualityCell
from fastcache.bench.quality.measure import measure_quality
from fastcache.bench.quality.row import blank_row
from fastcache.bench.quality.texts import load_prose, windows

CONTEXT, OUTPUT = 150, 12
TASKS = (
    {"name": "continuation", "context": CONTEXT, "output": OUTPUT, "samples": 3},
    {"name": "greedy", "context": CONTEXT, "output": 8, "samples": 2},
    {"name": "needles4", "context": 1100, "samples": 1},
)


def cell(folder, **changes) -> QualityCell:
    values = {"model": "tiny", "model_path": str(folder), "method": "knorm", "compression_ratio": 0.5}
    return QualityCell.from_dict({**values, "tasks": TASKS, "device": "cpu", "dtype": "float32", **changes})


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("llama", 6, 2, 16, 64, 3, max_positions=2048)


@torch.no_grad()
def test_continuation_numbers_equal_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = windows(
        load_prose(None),
        lambda t: tokenizer(t, add_special_tokens=False).input_ids,
        CONTEXT + 1 + OUTPUT,
        3,
        0,
    )
    full_nll, nll, kl = [], [], []
    for ids in texts:
        full = model(torch.tensor([ids[:-1]])).logits[0, CONTEXT:].log_softmax(-1)
        cache = prefill(model, ids[:CONTEXT], PRESSES["streaming_llm"](0.5))
        positions = torch.arange(CONTEXT, len(ids) - 1)[None]
        rest = torch.tensor([ids[CONTEXT:-1]])
        ours = model(rest, past_key_values=cache, position_ids=positions).logits[0].log_softmax(-1)
        answer = torch.tensor(ids[CONTEXT + 1 :])[:, None]
        full_nll.append(-full.gather(1, answer).mean())
        nll.append(-ours.gather(1, answer).mean())
        kl.append(torch.nn.functional.kl_div(ours, full, log_target=True, reduction="batchmean"))
    row = measure_quality(
        cell(folder, method="streaming_llm")
    )  # knorm has ties here: equal tokens, equal norms
    assert row["status"] == "ok", row["error"]
    got = row["tasks"]["continuation"]
    for name, values in (("nll_full", full_nll), ("nll", nll), ("kl", kl)):
        assert got[name] == pytest.approx(float(torch.stack(values).mean()), abs=2e-4), name
    assert row["kept"] == pytest.approx(0.5, abs=0.01) and row["kv_bytes_share"] == row["kept"]
    assert set(row) == set(blank_row(cell(folder))) and row["uncompressed_requests"] == 0
    assert "not used" in row["tasks"]["needles4"]["skipped"] and row["notes"]


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"method": "full", "compression_ratio": None}, 1.0),
        ({"method": "full", "compression_ratio": None, "kv_dtype": "fp8"}, 0.5),
        ({"method": "no_context", "compression_ratio": None}, 0.0),
        ({"query_aware": True}, 0.5),
        ({"kv_dtype": "fp8"}, 0.25),
    ],
    ids=["full", "fp8", "no-context", "query-aware", "evicted-fp8"],
)
def test_each_kind_of_row(folder, changes, share):
    row = measure_quality(cell(folder, **changes))
    assert row["status"] == "ok", row["error"]
    assert row["kv_bytes_share"] == pytest.approx(share, abs=0.01)
    kl, dnll = (row["tasks"]["continuation"][name] for name in ("kl", "dnll"))
    if row["label"] == "full":
        assert (kl, dnll, row["tasks"]["greedy"]["identical"]) == (0, 0, 2)
    else:
        assert kl > 0 and dnll != 0


def test_a_cell_that_fails_is_a_row_that_says_why(folder, tmp_path):
    missing = measure_quality(cell(tmp_path / "nothing"))
    assert missing["status"] == "failed" and missing["error"]["type"] == "ModelFolderError"
    assert missing["tasks"] == {} and missing["kept"] is None
    short = measure_quality(
        cell(folder, method="snapkv", tasks=({"name": "continuation", "context": 20, "samples": 1},))
    )
    assert short["uncompressed_requests"] == 1 and "too short for the method" in short["notes"][0]


@pytest.mark.slow
def test_the_real_model_knows_what_it_read_and_only_that(smollm2):
    tasks = (
        {"name": "needles4", "context": 256, "samples": 2},
        {"name": "continuation", "context": 96, "output": 24, "samples": 2},
    )
    rows = [
        measure_quality(cell(smollm2, tasks=tasks, **changes))
        for changes in (
            {"method": "no_context", "compression_ratio": None},
            {"method": "snapkv", "compression_ratio": 0.3, "query_aware": True},
        )
    ]
    without, asked = (row["tasks"]["needles4"] for row in rows)
    assert without["accuracy_full"] >= 0.8 and without["skipped"] is None
    assert without["accuracy"] <= 0.1 < 0.5 <= asked["accuracy"]
    assert rows[0]["tasks"]["continuation"]["dnll"] > 0.1 > rows[1]["tasks"]["continuation"]["dnll"]
