"""Open-loop load: what arrives and when, what the numbers mean, and that a row comes back whatever happens."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from tiny_llava import IMAGE_TOKEN, write_tiny_llava

from fastcache import LLM
from fastcache.bench.prompts import Vocabulary
from fastcache.bench.serving.cell import engine_options, measure, warm_sequences
from fastcache.bench.serving.cells import ServingCell, expand_serving
from fastcache.bench.serving.drive import Recording, drive, warm_up
from fastcache.bench.serving.metrics import summarise
from fastcache.bench.serving.row import blank_rows
from fastcache.bench.serving.supervise import run_serving
from fastcache.bench.serving.workload import plan_arrivals
from fastcache.errors import ConfigError, DatasetError, UnknownName
from fastcache.results import RequestMetrics, RequestOutput
from fastcache.stats import EngineStats, KVSample

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/serving.schema.yaml").read_text(encoding="utf-8"))
TRACE = str(ROOT / "tests/data/heavy_trace.csv")
WORDS = Vocabulary(1000, None)
SECTION = {
    "workload": {"context": 40, "output": {"low": 2, "high": 6}},
    "rates": [4, 2],
    "runs": [
        {"policies": ["dynamic", "p1c1d8"], "methods": ["full", "knorm"], "compression_factors": [2]},
        {"methods": ["knorm"], "compression_factors": [2], "immediate_release": [False], "rates": [8]},
    ],
    "slo": {"ttft_s": 0.5, "tpot_s": 0.1},
    "window_s": 3,
}
CONFIG = {"models": {"smollm2": {"load_format": "dummy"}}, "serving": SECTION}


def cell(**changes) -> ServingCell:
    values = {"model": "smollm2", "load_format": "dummy", "rates": [2, 4], "workload": SECTION["workload"]}
    return ServingCell.from_dict(values | changes)


def load(rate=5.0, window_s=20.0, seed=0, **workload):
    given = cell(workload=SECTION["workload"] | workload).workload
    return plan_arrivals(given, rate, window_s, seed, WORDS)


def test_a_section_becomes_a_cell_per_engine_with_all_its_rates():
    cells = expand_serving(CONFIG)
    assert [(c.policy, c.setting, c.immediate_release, c.rates) for c in cells] == [
        ("dynamic", "full", True, (2.0, 4.0)),
        ("dynamic", "knorm x2", True, (2.0, 4.0)),
        ("p1c1d8", "full", True, (2.0, 4.0)),
        ("p1c1d8", "knorm x2", True, (2.0, 4.0)),
        ("dynamic", "knorm x2", False, (8.0,)),
    ]
    assert len({c.id for c in cells}) == 5 and expand_serving({"models": {}}) == []
    assert [ServingCell.from_dict(json.loads(json.dumps(c.to_dict()))) for c in cells] == cells


def test_a_run_may_name_variants_and_triad_keeps_the_slo_of_a_token():
    runs = [{"policies": ["default"], "variants": ["compression-only", "triad"], "methods": ["knorm"]}]
    fixed, triad = expand_serving(CONFIG | {"serving": SECTION | {"runs": runs}})
    assert (fixed.variant, fixed.scheduled_by) == ("compression-only", "default")
    assert (triad.variant, triad.scheduled_by) == ("triad", "triad") and fixed.id != triad.id
    assert {"tuning", "tpot_bound_s"} & set(engine_options(fixed)) == set()
    assert engine_options(triad)["tuning"] == "all" and engine_options(triad)["tpot_bound_s"] == 0.1
    assert [row["policy"] for row in blank_rows(triad)] == ["triad"] * 2


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"runs": [{"variants": ["triad"], "methods": ["knorm"]}]}, ConfigError, "takes no policy 'dynamic'"),
        ({"runs": [{"policies": ["default"], "variants": ["triad"]}]}, UnknownName, "baseline"),
        ({"rate": [1]}, UnknownName, "rates"),
        ({"rates": [0]}, ConfigError, "positive number"),
        ({"runs": [{"policy": ["fcfs"]}]}, UnknownName, "policies"),
        ({"runs": [{"policies": ["fcsf"]}]}, UnknownName, "fcfs"),
        ({"runs": [{"methods": ["snapkw"]}]}, UnknownName, "snapkv"),
        ({"runs": [{"methods": [{"name": "knorm", "parms": {}}]}]}, UnknownName, "params"),
        ({"runs": [{"methods": [{"params": {}}]}]}, ConfigError, "a name or"),
        ({"runs": [{"models": ["smolm2"]}]}, UnknownName, "smollm2"),
        ({"workload": {"context": 8, "output": 8, "arrivals": "poison"}}, UnknownName, "poisson"),
        ({"workload": {"context": 8, "output": 8, "arrivals": "trace"}}, ConfigError, "needs `trace`"),
        ({"workload": {"context": {"low": 9, "high": 8}, "output": 8}}, ConfigError, "above high"),
        ({"workload": {"context": {"low": 1, "high": 8, "median": 4}, "output": 8}}, ConfigError, "sigma"),
    ],
)
def test_a_mistake_in_the_section_is_named(change, error, words):
    with pytest.raises(error, match=words):
        expand_serving(CONFIG | {"serving": SECTION | change})


def test_the_seed_alone_decides_and_requests_do_not_depend_on_the_rate():
    assert load() == load() and load() != load(seed=1)
    slow, fast = load(rate=2.0), load(rate=20.0)
    assert [a.request for a in slow] == [a.request for a in fast][: len(slow)]
    assert len(fast) > 5 * len(slow)


def test_arrivals_have_the_rate_that_was_asked_for():
    times = [a.time_s for a in load(rate=30.0, window_s=60.0)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    # 1,800 exponential gaps: their mean is 1/rate within 10 %, and their deviation is their mean.
    assert statistics.fmean(gaps) == pytest.approx(1 / 30, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 30, rel=0.1)
    assert [a.time_s for a in load(rate=4.0, window_s=2.0, arrivals="fixed")] == [i / 4 for i in range(8)]


def test_lengths_are_fixed_uniform_or_log_normal():
    made = load(rate=50.0, context={"low": 20, "high": 400, "median": 100, "sigma": 0.6})
    lengths = [len(a.request.prompt_token_ids) for a in made]
    assert min(lengths) >= 20 and max(lengths) <= 400
    assert statistics.median(lengths) == pytest.approx(100, rel=0.1)
    assert {a.request.max_tokens for a in made} == {2, 3, 4, 5, 6}
    assert {len(a.request.prompt_token_ids) for a in load()} == {40}


def test_a_trace_gives_its_lengths_and_its_arrivals_scaled_to_the_rate():
    bounds = {"context": {"low": 1, "high": 600}, "output": {"low": 1, "high": 1000}}
    made = load(rate=6.0, window_s=10.0, trace=TRACE, arrivals="trace", **bounds)
    assert len(made) == 60 and made[0].time_s == 0
    assert made[-1].time_s == pytest.approx(59 / 6, rel=0.35)  # the mean gap is that of the rate
    gaps = [b.time_s - a.time_s for a, b in itertools.pairwise(made)]
    assert statistics.stdev(gaps) > 1.2 * statistics.fmean(gaps), "its bursts are gone"
    first = made[0].request
    assert (len(first.prompt_token_ids), first.max_tokens) == (600, 109)
    with pytest.raises(DatasetError, match="none of 120 rows"):
        load(trace=TRACE, context={"low": 9000, "high": 9001}, output=5)


def test_a_prompt_set_gives_the_prompts_that_fit(tmp_path):
    texts = ["a" * n for n in (5, 12, 18, 30)]
    lines = ({"messages": [{"role": "user", "content": text}]} for text in texts)
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = Vocabulary(1000, lambda text: [ord(letter) for letter in text], 999, 8)
    sent = {"context": {"low": 10, "high": 20}, "output": 3, "dataset": str(tmp_path / "set.jsonl")}
    made = plan_arrivals(cell(workload=sent).workload, 5.0, 2.0, 0, words)
    assert {len(a.request.prompt_token_ids) for a in made} == {12, 18}
    assert {a.request.max_tokens for a in made} == {3} and len(made) > 4
    again = plan_arrivals(cell(workload=sent).workload, 10.0, 2.0, 0, words)
    assert [a.request for a in again][: len(made)] == [a.request for a in made]
    seen = plan_arrivals(cell(workload=sent | {"images": 1}).workload, 5.0, 2.0, 0, words)
    assert {len(a.request.prompt_token_ids) for a in seen} == {8 + 5, 8 + 12}
    with pytest.raises(DatasetError, match="none of 4 prompts has 50 to 60 tokens"):
        plan_arrivals(cell(workload=sent | {"context": {"low": 50, "high": 60}}).workload, 5.0, 2.0, 0, words)
    with pytest.raises(ConfigError, match="give one"):
        cell(workload=sent | {"trace": TRACE})


def test_a_trace_without_times_says_so(tmp_path):
    (tmp_path / "t.csv").write_text("ContextTokens,GeneratedTokens\n5,5\n6,5\n", encoding="utf-8")
    with pytest.raises(DatasetError, match="TIMESTAMP is None"):
        load(trace=str(tmp_path / "t.csv"), arrivals="trace", context={"low": 1, "high": 9}, output=5)


def output(arrival, scheduled, tokens, finished=None, reason="length"):
    metrics = RequestMetrics(
        arrival, scheduled, tokens[0] if tokens else None, finished or tokens[-1], tuple(tokens), 10, len(tokens),
        0, None, None, 0, False, 0,
    )  # fmt: skip
    return RequestOutput("r", (1,) * 10, [1] * len(tokens), "", reason, metrics)


def test_the_numbers_of_a_row_by_hand():
    outputs = [
        output(100.0, 100.1, [100.2, 100.3, 100.4]),  # TTFT 0.2, TPOT 0.1, end to end 0.4
        output(101.0, 101.5, [102.0, 102.05]),  # TTFT 1.0: misses the SLO of 0.5
        output(102.0, None, [], finished=110.0, reason="cancelled"),  # waited 8 s for nothing
    ]
    kv = [KVSample(100.0, 4, 0, 0, 0, 1, 0), KVSample(105.0, 0, 1, 1, 0, 1, 0)]
    stats = EngineStats(prefill_time_s=2.0, decode_time_s=3.0, peak_pages=4, kv=kv)
    row = summarise(cell(slo_ttft_s=0.5, slo_tpot_s=0.1001), Recording(100.0, 110.0, outputs, stats), 1000)
    assert (row["requests"], row["finished"], row["without_first_token"]) == (3, 2, 1)
    assert row["ttft_s"]["mean"] == pytest.approx((0.2 + 1.0 + 8.0) / 3) and row["ttft_s"][
        "p50"
    ] == pytest.approx(1.0)
    assert row["tpot_s"]["mean"] == pytest.approx((0.1 + 0.05) / 2)
    gaps = [
        after - before for o in outputs[:2] for before, after in itertools.pairwise(o.metrics.token_times_s)
    ]
    assert row["token_gap_s"]["mean"] == pytest.approx(statistics.fmean(gaps))
    assert row["normalised_latency_s"]["mean"] == pytest.approx((0.4 / 3 + 1.05 / 2) / 2)
    assert row["queue_s"]["mean"] == pytest.approx(0.3)
    assert row["output_tok_s"] == pytest.approx(0.5) and row["throughput_tok_s"] == pytest.approx(2.5)
    assert row["goodput_requests_s"] == pytest.approx(0.1) and row["slo_attainment"] == pytest.approx(1 / 3)
    assert row["sustained"] is False
    assert row["stage_share"] == pytest.approx(
        {"prefill": 0.2, "mixed": 0, "decode": 0.3, "compress": 0, "idle": 0.5}
    )
    assert row["mean_pages"] == pytest.approx(3.0) and row["peak_kv_bytes"] == 4000


def tiny_cell(folder, **changes):
    small = {
        "model_path": str(folder),
        "load_format": "auto",
        "device": "cpu",
        "max_num_seqs": 4,
        "page_size": 4,
    }
    return cell(**small | {"rates": [20, 60], "window_s": 0.5, "drain_s": 100} | changes)


def test_an_engine_under_load_gives_valid_rows_and_a_record_of_every_token(tiny_model):
    folder = tiny_model("llama", 4, 2, 16, 48, 2, False)
    result = measure(tiny_cell(folder, method="knorm", compression_factor=2), lambda _: None)
    for row in result["rows"]:
        jsonschema.Draft202012Validator(SCHEMA).validate(row)
        assert row["status"] == "ok", row["error"]
        records = result["requests"][row["row_id"]]
        assert len(records) == row["requests"] == row["finished"] == row["compressed_requests"]
        assert sum(len(r["token_times_s"]) for r in records) == row["output_tokens"]
        assert all(r["arrival_s"] <= r["token_times_s"][0] for r in records)
    assert result["rows"][1]["requests"] > result["rows"][0]["requests"]


def test_triad_under_load_measures_before_its_rates_and_its_rows_say_what_it_decided(tiny_model):
    folder = tiny_model("llama", 4, 2, 16, 48, 2, False)
    options = {"method": "knorm", "compression_factor": 2, "policy": "default", "variant": "triad"}
    limits = {"max_num_batched_tokens": 128, "slo_tpot_s": 0.05}
    result = measure(tiny_cell(folder, rates=[40], **options, **limits), lambda _: None)
    (row,) = result["rows"]
    jsonschema.Draft202012Validator(SCHEMA).validate(row)
    assert row["status"] == "ok", row["error"]
    costs = row["decisions"]["costs"]
    assert costs["decode_fixed_s"] is not None and costs["prefill_s_per_token"] > 0
    decided = [d["count"] for d in row["decisions"]["decisions"] if d["about"] == "compression"]
    assert sum(decided) == row["requests"]


def test_an_untrained_compressor_is_for_an_untrained_model_alone_and_its_rows_say_so(tiny_model):
    folder = tiny_model("llama", 4, 2, 16, 48, 2, False)
    given = {"policies": ["dynamic"], "methods": [{"name": "mlp", "params": {"checkpoint": "dummy"}}]}
    small = {"device": "cpu", "page_size": 4}
    for load_format, status, said in (("dummy", "ok", "seeded random"), ("auto", "failed", "dummy weights")):
        models = {"tiny": {"path": str(folder), "load_format": load_format}}
        section = {**SECTION, "runs": [given], "rates": [20], "window_s": 0.3, "max_num_seqs": 4}
        (one,) = expand_serving({"models": models, "serving": section, "engine": small})
        assert one.setting == "mlp x5, checkpoint dummy"
        (row,) = measure(one, lambda _: None)["rows"]
        jsonschema.Draft202012Validator(SCHEMA).validate(row)
        assert row["status"] == status, row["error"]
        assert said in (row["error"]["message"] if row["error"] else "; ".join(row["notes"]))
        if status == "ok":
            assert row["compressor"]["kind"] == "dummy" and row["compressed_requests"] == row["requests"]


def test_what_is_not_done_in_time_is_ended_and_leaves_the_engine_clean(tiny_model):
    folder = tiny_model("llama", 4, 2, 16, 48, 2, False)
    one = tiny_cell(folder, workload={"context": 40, "output": 700}, max_model_len=800)
    llm = LLM(**engine_options(one))
    recording = drive(llm, plan_arrivals(one.workload, 100.0, 0.2, 0, Vocabulary(320, None)), 0.3)
    llm.check_books()
    assert llm.load().pages_used == 0 and not llm.has_unfinished()
    row = summarise(one, recording, 1)
    assert row["finished"] == 0 and row["without_first_token"] > 0 and row["tpot_s"] is None
    assert row["ttft_s"]["p99"] <= row["elapsed_s"]


def test_warming_up_brings_up_every_small_batch_and_as_many_as_a_policy_can_have(tiny_model):
    assert [warm_sequences(cell(policy=p)) for p in ("dynamic", "fcfs", "p1c1d8", "p4c9d2")] == [
        256,
        256,
        32,
        36,
    ]
    folder = tiny_model("llama", 4, 2, 16, 48, 2, False)
    one = tiny_cell(folder, workload={"context": 40, "output": 60}, max_num_seqs=24)
    llm = LLM(**engine_options(one))
    sizes, launch = [], llm._runner.launch
    llm._runner.launch = lambda step, seeds: (sizes.append(step.decode_tokens), launch(step, seeds))[1]
    warm_up(llm, plan_arrivals(one.workload, 8.0, 1.0, 0, Vocabulary(320, None)), 24)
    assert set(range(1, 9)) <= set(sizes) and max(sizes) > 16
    assert llm.stats().mixed_steps > 0 and not llm.has_unfinished()


def test_pictures_are_served_and_warming_up_looks_at_few(tmp_path):
    folder = write_tiny_llava(tmp_path)
    workload = {"context": {"low": 24, "high": 30}, "output": {"low": 3, "high": 6}, "images": 1}
    one = tiny_cell(folder, model="llava-mlp", workload=workload, rates=[10], max_num_seqs=32, method="knorm",
                    compression_factor=2)  # fmt: skip
    llm = LLM(**engine_options(one))
    looked, embed = [], llm._runner.pictures.embeddings
    llm._runner.pictures.embeddings = lambda step, ids: (
        looked.extend(c.seq.request.request_id for c in step.chunks if c.seq.request.images),
        embed(step, ids),
    )[1]
    words = Vocabulary(320, None, IMAGE_TOKEN, llm.describe()["tokens_per_image"])
    arrivals = plan_arrivals(one.workload, 10.0, 0.5, 0, words)
    warm_up(llm, arrivals, 32)
    assert len(set(looked)) == 24 + 8  # of the full batch, and of those that come one by one
    llm.close()
    (row,) = measure(one, lambda _: None)["rows"]
    jsonschema.Draft202012Validator(SCHEMA).validate(row)
    assert row["status"] == "ok" and row["finished"] == row["requests"] > 0, row["error"]


def test_a_cell_that_cannot_run_has_a_failed_row_for_every_rate(tmp_path):
    result = measure(tiny_cell(tmp_path / "nowhere"), lambda _: None)
    assert [row["status"] for row in result["rows"]] == ["failed"] * 2
    for row in result["rows"]:
        jsonschema.Draft202012Validator(SCHEMA).validate(row)


HALF = """
import json, sys
content = json.load(open(sys.argv[1]))
from fastcache.bench.serving.cells import ServingCell
from fastcache.bench.serving.row import blank_rows
rows = blank_rows(ServingCell.from_dict(content))
rows[0]["status"] = "ok"
json.dump({"rows": rows, "requests": {}}, open(sys.argv[2], "w"))
"""


@pytest.mark.parametrize(
    "end, status", [("sys.exit(7)", "crashed"), ("import time; time.sleep(60)", "timeout")]
)
def test_a_process_that_dies_keeps_the_rates_it_had_measured(end, status):
    one = cell(timeout_s=8)
    result = run_serving(one, [sys.executable, "-c", HALF + end])
    assert [row["status"] for row in result["rows"]] == ["ok", status]
    lost = run_serving(one, [sys.executable, "-c", "raise SystemExit(1)"])
    assert [row["status"] for row in lost["rows"]] == ["crashed"] * 2
    assert set(lost["rows"][0]) == set(blank_rows(one)[0]) == set(SCHEMA["properties"])
