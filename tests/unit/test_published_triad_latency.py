"""What results/published/h100-triad-latency/README.md says, against the rows and times beside it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import test_published_triad as closed
import yaml
from jsonschema import Draft202012Validator
from serving_findings import claims
from test_published_triad import rows_of, text

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "results/published/h100-triad-latency"
ROWS, EARLIER = rows_of("rows.jsonl", FOLDER), rows_of("rows-038f6a8.jsonl", FOLDER)
TIMES = json.loads((FOLDER / "token-times.json").read_text(encoding="utf-8"))
PAGE, DOCS = text(FOLDER / "README.md"), text(ROOT / "docs/scheduling.md").split("## On an H100")[1]
STALL_S = 0.1
ONE, TRIAD = "compression-only", "triad"


def row(rate: float, variant: str, rows: list[dict] = ROWS) -> dict:
    (found,) = (r for r in rows if (r["rate"], r["variant"]) == (rate, variant))
    return found


def both(rate: float, rows: list[dict] = ROWS) -> tuple[dict, dict]:
    return row(rate, ONE, rows), row(rate, TRIAD, rows)


def lines(start: str) -> list[list[str]]:
    after = PAGE.split(f"| {start}")[1].split("\n\n")[0].splitlines()[2:]
    return [[part.strip() for part in line.strip("|").split("|")] for line in after]


def stalls(one: dict) -> list[tuple[float, list[int]]]:
    """(seconds without a token for anybody, lengths of the prompts whose first token ends them), the long ones."""
    known = TIMES[one["row_id"]]
    times, first = known["token_times_s"], {}
    for _, time_s, prompt in known["requests"]:
        first.setdefault(time_s, []).append(prompt)
    return [
        (after - before, first.get(after, []))
        for before, after in pairwise(times)
        if after - before > STALL_S
    ]


def alone(one: dict) -> dict[int, float]:
    return {prompts[0]: seconds for seconds, prompts in stalls(one) if len(prompts) == 1}


def waits(one: dict, outside: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    asked = TIMES[one["row_id"]]["requests"]
    return np.array([first - came for came, first, _ in asked if not outside[0] <= came < outside[1]])


@pytest.mark.parametrize("line", lines("requests/s"), ids=lambda line: " ".join(line[:2]))
def test_every_rate(line):
    rate, variant, *said = line
    one = row(float(rate.split(",")[0]), variant, EARLIER if "other" in rate else ROWS)
    ms = {name: [1e3 * one[name][p] for p in ("p50", "p99")] for name in ("ttft_s", "tpot_s", "token_gap_s")}
    assert said == [
        "{:,.0f} / {:,.0f}".format(*ms["ttft_s"]),
        "{:.1f} / {:.1f}".format(*ms["tpot_s"]),
        f"{ms['token_gap_s'][1]:,.0f}",
        f"{one['throughput_tok_s']:,.0f}",
        f"{one['requests_s']:.1f}",
    ]


def test_the_rows_are_whole_and_of_the_config():
    schema = yaml.safe_load((ROOT / "workflow/schemas/serving.schema.yaml").read_text(encoding="utf-8"))
    config = yaml.safe_load((ROOT / "config/triad-latency.yaml").read_text(encoding="utf-8"))["serving"]
    assert sorted(r["rate"] for r in ROWS) == sorted(2 * config["rates"]) and len(lines("requests/s")) == 8
    assert {r["cell"]["window_s"] for r in ROWS + EARLIER} == {config["window_s"]}
    for one in ROWS + EARLIER:
        Draft202012Validator(schema).validate(one)
        assert one["status"] == "ok" and not one["host_busy"] and "H100" in one["device"]["name"]
        assert one["git_commit"][:7] == ("9ad49d2" if one in ROWS else "038f6a8")
        assert len(one["git_commit"]) == 40 and one["finished"] == one["requests"]
    assert set(TIMES) == {r["row_id"] for r in ROWS + EARLIER}


def test_times_of_tokens_are_those_of_the_rows():
    for one in ROWS + EARLIER:
        known = TIMES[one["row_id"]]
        assert len(known["requests"]) == one["requests"]
        assert sum(prompt for _, _, prompt in known["requests"]) == one["prompt_tokens"]
        assert np.percentile(waits(one), 99) == pytest.approx(one["ttft_s"]["p99"], abs=1e-4)
        assert {first for _, first, _ in known["requests"]} <= set(known["token_times_s"])


def test_the_targets():
    theirs, ours = both(34)
    tpot, ttft = (ours[name]["p99"] / theirs[name]["p99"] for name in ("tpot_s", "ttft_s"))
    speed = ours["throughput_tok_s"] / theirs["throughput_tok_s"]
    assert [line[2:] for line in lines("what")] == [
        [f"{tpot:.2f}", "held"],
        [f"{ttft:.2f}", "missed"],
        [f"{speed:.2f}", "held"],
    ]
    assert tpot <= 0.5 and ttft > 1.2 and abs(speed - 1) <= 0.03
    verdicts = {c.what.split(",")[0]: c.verdict for c in claims(ROWS) if "between" not in c.what}
    assert verdicts == {"p99 TPOT": "reached", "p99 TTFT": "missed", "throughput": "reached"}


def test_why_first_tokens_come_late():
    theirs, ours = both(34)
    assert (
        f"within {1e3 * ours['cell']['slo_tpot_s']:.0f} ms, {ours['stage_share']['mixed']:.0%} of the time"
        in PAGE
    )
    slow = [1e3 * r["ttft_s"]["p99"] for r in (ours, theirs)]
    usual = [1e3 * r["ttft_s"]["p50"] for r in (ours, theirs)]
    assert (
        "in a hundred {:.0f} ms instead of {:.0f}, the median request {:.0f} instead of {:.0f}".format(
            *slow, *usual
        )
        in PAGE
    )
    (stall,) = stalls(ours)
    assert f"One stall of {stall[0]:.2f} s" in PAGE
    rest = [np.percentile(waits(one, (2.0, 4.0)), 99) for one in (ours, theirs)]
    assert f"is {1e3 * rest[0]:.0f} ms, still {rest[0] / rest[1]:.2f} times" in PAGE


def test_how_near_saturation_it_was():
    (theirs, ours), load = both(72), both(34)[0]
    most = [r["requests_s"] for r in (theirs, ours)]
    assert "At 72/s, more than either can do, {:.1f} and {:.1f} requests".format(*most) in PAGE
    assert "34/s is {:.0%} and {:.0%} of that".format(*(34 / m for m in most)) in PAGE
    came = load["requests"] / load["window_s"]
    assert f"{load['requests']} requests came in the ten seconds, {came:.1f}/s" in PAGE
    assert "which is {:.0%} and {:.0%};".format(*(came / m for m in most)) in PAGE
    tokens = [a["throughput_tok_s"] / b["throughput_tok_s"] for a, b in zip(both(34), both(72), strict=True)]
    assert "the last arrival, {:.0%} and {:.0%}.".format(*tokens) in PAGE
    assert not theirs["sustained"] and not ours["sustained"]


def test_what_stalled_at_the_first_rate():
    first, later, other = row(28, ONE), row(34, ONE), row(34, ONE, EARLIER)
    waited = [seconds for seconds, _ in stalls(first)]
    assert f"it has {len(waited)} times of more than {STALL_S} s in which no request got a token" in PAGE
    assert f"{sum(waited):.1f} s together, the longest {max(waited):.2f} s" in PAGE
    longest = np.diff(TIMES[later["row_id"]]["token_times_s"]).max()
    assert not stalls(later) and f"it has none; the longest is {longest:.2f} s" in PAGE
    here, there = alone(first), alone(other)
    told = ", ".join(f"{n:,} after {here[n]:.2f} s" for n in (1092, 1028, 641))
    assert f"of 926 tokens after {here[926]:.2f} s, {told}." in PAGE
    seconds = sum(s for s, _ in stalls(other))
    assert f"has {len(stalls(other))} such times, {seconds:.1f} s together" in PAGE
    assert f"1,028 tokens ({there[1028]:.2f} s) and 641 tokens ({there[641]:.2f} s)" in PAGE
    warmer = [stalls(row(rate, TRIAD)) for rate in (28, 34)]
    assert f"has {len(warmer[0])} such times at 28/s, {sum(s for s, _ in warmer[0]):.1f} s together" in PAGE
    assert f"and {len(warmer[1])} at 34/s" in PAGE


def test_which_ratios_have_stalls_in_them():
    ratios = [ours["tpot_s"]["p99"] / one["tpot_s"]["p99"] for one, ours in (both(28), both(34, EARLIER))]
    assert "(p99 TPOT {:.2f} and {:.2f} of".format(*ratios) in PAGE


def ratio(ours: dict, theirs: dict) -> float:
    return ours["throughput_tok_s"] / theirs["throughput_tok_s"]


def test_the_table_of_the_docs():
    found = [ratio(*closed.pair(label)[::-1]) for label, *_ in closed.lines("requests |")]
    short = ratio(*(closed.row(64, 512, 4, variant) for variant in (TRIAD, "baseline")))
    theirs, ours = both(34)
    tpot, ttft = (ours[name]["p99"] / theirs[name]["p99"] for name in ("tpot_s", "ttft_s"))
    took = json.loads((closed.FOLDER / "policy-overhead.json").read_text(encoding="utf-8"))
    deciding = [took[f"{kind}_step_us"] for kind in ("decode", "mixed", "prefill")]
    facts = [
        (f"{min(found[:5]):.3f} to {max(found[:5]):.3f}", min(found[:5]) >= 0.99),
        *(
            (f"{value:.3f}", value >= wanted)
            for value, wanted in zip([*found[5:], short], (1.04, 1.04, 0.99), strict=True)
        ),
        *((f"{value:.2f}", value <= most) for value, most in ((tpot, 0.5), (ttft, 1.2))),
        (f"{ratio(ours, theirs):.2f}", ratio(ours, theirs) >= 0.97),
        *((f"{us:.0f} us", us <= 50) for us in deciding),
    ]
    rows = [line.strip("|").split("|") for line in DOCS.splitlines() if line.startswith("|")][2:]
    said = [tuple(part.strip() for part in line[2:]) for line in rows]
    assert said == [(figure, "held" if held else "missed") for figure, held in facts]
    readme = text(ROOT / "README.md")
    assert f"{found[5]:.2f} times on a mixed load; at 34 requests per second its p99" in readme
    assert f"time per token was {tpot:.2f} of" in readme and f"to the first {ttft:.2f} times" in readme


def test_the_sentences_of_the_docs():
    one, triad = closed.ONE, closed.ALL
    steps = triad["steps"]["mixed"]
    fewer = one["steps"]["decode"] - triad["steps"]["decode"]
    each = 1e3 * triad["stage_s"]["mixed"] / steps
    assert f"{steps} mixed steps, {each:.1f} ms each, took the place of {fewer} decode steps" in DOCS
    assert 0.45 < triad["stage_s"]["prefill"] / one["stage_s"]["prefill"] < 0.55
    splits = sorted(
        (r["granted_sms"]["compress"], ratio(r, closed.WHOLE))
        for r in closed.ROWS
        if r["greenctx_main_stream"] and r["variant"] == "greenctx-only"
    )
    assert "on {}, {}, {} or {} SMs".format(*(sms for sms, _ in splits)) in DOCS
    assert "has {:.2f}, {:.2f}, {:.2f} and {:.2f} of".format(*(share for _, share in splits)) in DOCS
    gaps = [1e3 * r["token_gap_s"]["p99"] for r in both(34)[::-1]]
    assert "(p99 between two tokens {:.0f} ms, not {:.0f})".format(*gaps) in DOCS
