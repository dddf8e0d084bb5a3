"""What docs/serving.md and the README say of serving on an H100, against the published rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from serving_findings import claims
from serving_reasons import pool, prompt_seconds

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results/published/h100-serving"
ROWS = [json.loads(line) for line in (PUBLISHED / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
QWEN, LLAVA, METHOD = "qwen3-8b", "llava-mlp", "snapkv x5"


def flat(path: str, heading: str = "") -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    return " ".join(text.split(heading)[-1].split()) if heading else " ".join(text.split())


PAGE = flat("docs/serving.md", "## On an H100")


def row(model: str, policy: str, rate: float, setting: str = METHOD) -> dict:
    key = (model, policy, rate, setting, True)
    names = ("model", "policy", "rate", "setting", "immediate_release")
    (found,) = (r for r in ROWS if tuple(r[n] for n in names) == key)
    return found


def decoding(one: dict) -> tuple[float, float]:
    counts = [sample["running"] for sample in one["pages_over_time"]]
    return sum(counts) / len(counts), 1e3 * one["token_gap_s"]["p50"]


def waiting(one: dict) -> int:
    """Requests without a step as arrivals ended."""
    return [s["waiting"] for s in one["pages_over_time"] if s["time_s"] <= one["window_s"]][-1]


def ttft(policy: str, rate: float) -> float:
    return row(QWEN, policy, rate)["ttft_s"]["mean"] / row(QWEN, "dynamic", rate)["ttft_s"]["mean"]


P8, ALL = row(QWEN, "p1c1d8", 40), row(QWEN, "dynamic", 60)
SEEN_8, SEEN_ALL = row(LLAVA, "p1c1d8", 10), row(LLAVA, "dynamic", 24)
FULL, SEEN_FULL = row(QWEN, "dynamic", 60, "full"), row(LLAVA, "dynamic", 24, "full")


def test_the_rows_are_whole_and_of_the_configs_that_are_named():
    schema = yaml.safe_load((ROOT / "workflow/schemas/serving.schema.yaml").read_text(encoding="utf-8"))
    planned = 0
    for name, model in (("serving-h100", QWEN), ("serving-h100-llava", LLAVA)):
        config = yaml.safe_load((ROOT / f"config/{name}.yaml").read_text(encoding="utf-8"))
        runs = config["serving"]["runs"]
        planned += sum(len(run["policies"]) * len(run["methods"]) * len(run["rates"]) for run in runs)
        assert {r["cell"]["window_s"] for r in ROWS if r["model"] == model} == {config["serving"]["window_s"]}
    assert len({r["row_id"] for r in ROWS}) == len(ROWS) == planned
    for one in ROWS:
        Draft202012Validator(schema).validate(one)
        assert one["status"] == "ok" and not one["host_busy"] and "H100" in one["device"]["name"]
        later = one["method"] == "expected_attention"
        assert (
            one["git_commit"][:7] == ("1a671ac" if later else "a608dfb") and "dirty" not in one["git_commit"]
        )


@pytest.mark.parametrize("claim", [c for c in claims(ROWS) if METHOD in c.where], ids=lambda c: c.where)
def test_every_target_is_in_the_table(claim):
    start = f"| {claim.what} | {claim.theirs or 'our own target'} | {claim.wanted:g} |"
    (line,) = (part for part in (ROOT / "docs/serving.md").read_text().splitlines() if part.startswith(start))
    cell = line.strip("|").split("|")[3 if claim.where.startswith(QWEN) else 4].strip()
    where = claim.where.split(METHOD)[1].removeprefix(", ")
    figure = "not measured" if claim.ours is None else f"{claim.ours:.2f}, {claim.verdict}"
    assert cell == figure + (f" ({where})" if where else "")


def test_the_published_page_has_every_target():
    page = (PUBLISHED / "report.html").read_text(encoding="utf-8")
    for claim in claims(ROWS):
        figure = "-" if claim.ours is None else f"{claim.ours:,.2f}"
        assert f'<td class="n">{figure}</td>' in page and claim.where in page
        assert claim.reason in page.replace("&#39;", "'") and claim.caveat in page.replace("&#39;", "'")


def test_what_reached_means():
    best = [ttft(policy, rate) for policy, rate in (("p1c1d8", 2), ("p1c1d8", 12), ("p1c1d8", 16))]
    best += [min(ttft(p, 20) for p in ("p1c1d8", "p2c2d8", "p3c3d6", "p4c4d8")), ttft("p1c1d8", 40)]
    assert "{:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f} times that of `dynamic`".format(*best) in PAGE
    assert f"finishes at most {max(r['requests_s'] for r in (P8, row(QWEN, 'p1c1d8', 20))):.1f} of" in PAGE
    assert f"{waiting(row(QWEN, 'p4c4d8', 20))} requests waited for `p4c4d8`" in PAGE
    assert f"at 40/s, {waiting(row(QWEN, 'dynamic', 40))} for `dynamic`" in PAGE
    full = row(QWEN, "dynamic", 40, "full")
    saved = 1 - row(QWEN, "dynamic", 40)["mean_kv_bytes"] / full["mean_kv_bytes"]
    assert f"the memory saved is {saved:.2f}." in PAGE
    readme = flat("README.md")
    assert f"{best[3]:.2f} times lower mean TTFT" in readme and f"{best[1]:.2f} times at 12" in readme
    assert f"{saved:.0%}".replace("%", " %") + " less KV memory" in readme
    assert f"{ALL['output_tok_s'] / P8['output_tok_s']:.2f} times the throughput of the paper's" in readme


def test_why_twelve_times_the_throughput_is_out_of_reach():
    def needed(ours: dict, theirs: dict) -> float:
        return 12.1 * theirs["output_tok_s"] * ours["requests"] / ours["output_tokens"]

    (n8, t8), (n, t) = decoding(P8), decoding(ALL)
    assert (
        f"decodes {n8:.1f} sequences at once, a token every {t8:.1f} ms (median), `dynamic` {n:.1f}" in PAGE
    )
    assert (
        f"and {t:.1f} ms, in steps that carry prompts {ALL['stage_share']['mixed']:.0%} of the time" in PAGE
    )
    taken = prompt_seconds(ALL)
    assert f"needs {needed(ALL, P8):.0f} prompts per second; {1e3 * taken:.1f} ms of such steps" in PAGE
    assert f"are enough for {1 / taken:.0f}. LLaVA: {needed(SEEN_ALL, SEEN_8):.0f} against" in PAGE
    (n8, t8), (n, t) = decoding(SEEN_8), decoding(SEEN_ALL)
    most = 1 / prompt_seconds(SEEN_ALL)
    assert f"against {most:.0f}, with {n8:.1f} sequences at {t8:.1f} ms against {n:.1f} at {t:.1f} ms" in PAGE
    whole = ALL["throughput_tok_s"], P8["throughput_tok_s"]
    assert "{:,.0f} against {:,.0f} tokens per second".format(*whole) in PAGE
    assert f"shapes, {whole[0] / whole[1]:.2f} times" in PAGE


def test_what_is_said_of_the_uncompressed_cache():
    assert f"{ALL['output_tok_s']:,.0f} and {FULL['output_tok_s']:,.0f} generated tok/s" in PAGE
    assert f"the {1 / prompt_seconds(ALL):.0f} and {1 / prompt_seconds(FULL):.0f} per second that fit" in PAGE
    speeds = f"{SEEN_ALL['output_tok_s']:,.0f} against {SEEN_FULL['output_tok_s']:,.0f} tok/s"
    tpot = [1e3 * r["tpot_s"]["mean"] for r in (SEEN_ALL, SEEN_FULL)]
    assert speeds + " and a TPOT of {:.1f} against {:.1f} ms".format(*tpot) in PAGE
    done = f"finished {SEEN_FULL['finished']} of {SEEN_FULL['requests']} requests in time"
    assert f"up to {pool(SEEN_FULL):.0%} of its pool full, {done}, the compressed one" in PAGE
    assert f"the compressed one {SEEN_ALL['finished']}." in PAGE


@pytest.mark.parametrize("one", [r for r in ROWS if r["rate"] == 40], ids=lambda r: r["row_id"])
def test_engines_at_forty_requests_per_second(one):
    held = "" if one["immediate_release"] else ", pages held"
    times = f"{1e3 * one['ttft_s']['mean']:,.0f} | {1e3 * one['tpot_s']['mean']:.1f}"
    rest = f"{1e3 * one['token_gap_s']['p99']:.0f} | {one['output_tok_s']:,.0f} | {one['mean_kv_bytes'] / 2**30:.2f}"
    assert f"| {one['policy']}, {one['setting']}{held} | {times} | {rest} |" in PAGE


def test_the_other_sentences():
    slow, snapkv = row(QWEN, "dynamic", 40, "expected_attention x5"), row(QWEN, "dynamic", 40)
    (earlier,) = map(json.loads, (PUBLISHED / "rows-a608dfb.jsonl").read_text(encoding="utf-8").splitlines())
    assert earlier["row_id"] == slow["row_id"] and not slow["sustained"]
    taken = [1e3 * prompt_seconds(r) for r in (slow, snapkv)]
    said = f"a token every {1e3 * slow['token_gap_s']['p50']:.0f} ms, and {taken[0]:.1f} ms of steps with prompts"
    assert f"{said} for each prompt, where snapkv takes {taken[1]:.1f}." in PAGE
    assert f"{earlier['output_tok_s']:,.0f} instead of {slow['output_tok_s']:,.0f} generated tok/s" in PAGE
    ratios = [
        row(LLAVA, "p1c1d8", rate)["ttft_s"]["mean"] / row(LLAVA, "dynamic", rate)["ttft_s"]["mean"]
        for rate in (5, 10)
    ]
    assert "sustains 5/s, where it is {:.2f}, not 10/s, where it is {:.2f};".format(*ratios) in PAGE
    fcfs = row(QWEN, "fcfs", 60)
    first = [1e3 * r["ttft_s"]["mean"] for r in (fcfs, ALL)]
    assert f"{first[0]:.0f} against {first[1]:.0f} ms, and {fcfs['output_tok_s']:,.0f} tok/s there" in PAGE
    gaps = [1e3 * r["token_gap_s"]["p99"] for r in (fcfs, ALL)]
    assert f"(p99 {gaps[0]:.0f} against {gaps[1]:.0f} ms)" in PAGE
    good = [r["goodput_requests_s"] for r in (fcfs, ALL)]
    assert f"{good[0]:.1f} instead of {good[1]:.1f} requests per second are within the SLO" in PAGE
