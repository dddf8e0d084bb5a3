"""What results/published/h100-llava/README.md and docs/llava.md say, against the rows beside the former."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "results/published/h100-llava"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def rows_of(file: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / file).read_text(encoding="utf-8").splitlines()]


ROWS = rows_of("rows.jsonl")
BINDING = rows_of("rows.jsonl")  # of the configuration whose split binds
VARIANTS = (("baseline", None), ("compression-only", "mlp"), ("triad", "mlp"))
CELL = re.compile(r"(\d+) x (\d+) \+ 128")


def row(label: str, picture: bool, variant: str, method: str | None = None, among=ROWS) -> dict:
    batch, context = map(int, CELL.match(label).groups())
    key = (batch, context, variant, bool(picture), method)
    (found,) = (
        r
        for r in among
        if (r["batch_size"], r["context_used"], r["variant"], bool(r["images"]), r["method"]) == key
    )
    return found


def lines() -> list[list[str]]:
    found = (line for line in PAGE.splitlines() if line.startswith("|") and CELL.search(line))
    return [[part.strip() for part in line.strip("|").split("|")] for line in found]


@pytest.mark.parametrize("line", lines(), ids=lambda line: " ".join(line[:3]))
def test_throughput(line):
    label, picture, method, *figures = line
    full = row(label, picture == "yes", "baseline")["throughput_tok_s"]
    ours = [
        row(label, picture == "yes", v, method)["throughput_tok_s"] for v in ("compression-only", "triad")
    ]
    assert figures == [f"{full:,.0f}", *(f"{speed:,.0f}, {speed / full:.2f}" for speed in ours)]


def test_every_cell_is_on_the_page_and_none_failed():
    assert {r["status"] for r in ROWS} == {"ok"} and len(lines()) == 6 and len(ROWS) == 6 + 6 + 5
    assert f"all {len(ROWS)} cells ended well" in PAGE
    assert {r["git_commit"][:7] for r in ROWS} == {"a608dfb"}  # and no "-dirty" behind it
    assert all(len(r["git_commit"]) == 40 for r in ROWS)


def test_what_ran_at_once():
    ran = [row("32 x 3968 + 128", True, *which)["peak_running"] for which in VARIANTS]
    assert "{} sequences fit at once uncompressed, and all {} when compressed".format(*ran[:2]) in PAGE
    assert f"`triad` got to {ran[2]}." in PAGE


def test_what_merging_costs():
    costs = json.loads((FOLDER / "costs.json").read_text(encoding="utf-8"))["measured"]
    share = {name: f"{cost['share_of_prefill']:.1%}" for name, cost in costs.items()}
    mlp = costs["mlp"]
    measured = f"`mlp` takes {1e3 * mlp['step_seconds']:.2f} ms, {share['mlp']} of the step's time"
    for page in (PAGE, (ROOT / "docs/llava.md").read_text(encoding="utf-8")):
        assert measured in page and f"bound is {1e3 * mlp['limit_seconds']:.2f} ms" in page
        assert ("goal 3%: held" in page) == (mlp["share_of_prefill"] <= 0.03)
    assert f"`snapkv` takes {share['snapkv']}, `streaming_llm` {share['streaming_llm']}" in PAGE
    old = json.loads((FOLDER / "costs-a608dfb.json").read_text(encoding="utf-8"))["measured"]["mlp"]
    assert f"it was {1e3 * old['step_seconds']:.2f} ms, {old['share_of_prefill']:.1%}" in PAGE
    full, merged = (row("16 x 2048 + 128", True, *which)["prefill_tok_s"] for which in VARIANTS[:2])
    assert f"with pictures is {1 - merged / full:.1%} slower than the baseline's" in PAGE


def test_where_the_time_of_triad_goes():
    ours, theirs = (row("16 x 2048 + 128", True, v, "mlp", BINDING) for v in ("compression-only", "triad"))
    for name, stage in (
        ("prefill", "prefill"),
        ("compression after it", "compress"),
        ("decode", "decode"),
    ):
        assert f"| {name} | {ours['stage_s'][stage]:.3f} | {theirs['stage_s'][stage]:.3f} |" in PAGE
    assert f"| all | {ours['elapsed_s']:.3f} | {theirs['elapsed_s']:.3f} |" in PAGE
    peaks = [r["peak_kv_bytes"] / 2**30 for r in (theirs, ours)]
    assert "{:.2f} GiB at most, not {:.2f}".format(*peaks) in PAGE
    costs = theirs["decisions"]["costs"]
    after, prefill = 1e6 * costs["exposed"]["after:32"], 1e6 * costs["prefill_s_per_token"]
    assert f"{after:.1f} us a token on 32 SMs, where\n  the prefill itself takes {prefill:.1f}" in PAGE
    inside = json.loads((FOLDER / "costs-a608dfb.json").read_text(encoding="utf-8"))["costs"]["mlp"][
        "seconds_per_token"
    ]
    assert f"it is the {1e6 * inside:.1f} us of `costs-a608dfb.json`" in PAGE


def test_what_triad_was_given_and_chose():
    triads = [r for r in BINDING if r["variant"] == "triad"]
    for r in triads:
        assert r["granted_sms"] == {"main": 100, "compress": 32} and not r["cell"]["greenctx_bound"]
        assert r["greenctx_main_stream"] and r["decisions"]["places"] == ["beside:32", "after:32"]
        assert "beside:32" not in r["decisions"]["costs"]["exposed"]
        assert r["decisions"]["measured"] == (r["batch_size"] > 4)
    snapkv = [
        row("16 x 2048 + 128", True, v, "snapkv", BINDING)["prefill_tok_s"]
        for v in ("compression-only", "triad")
    ]
    assert f"at {snapkv[1] / snapkv[0]:.2f} of the speed, where 100 / 132 is {100 / 132:.2f}" in PAGE
    theirs, ours = (
        row("32 x 3968 + 128", True, v, "mlp", BINDING)["steps"]["decode"]
        for v in ("compression-only", "triad")
    )
    assert f"{ours} decode steps were needed, not {theirs}" in PAGE
    two = row("2 x 2048 + 128", True, "triad", "mlp", BINDING)
    assert two["steps"]["compress"] == 1 and f"differ by {two['repeats']['spread']:.0%}" in PAGE


def test_docs_quote_the_least_and_the_greatest_ratio():
    ratios = sorted(float(line[4].split(", ")[1]) for line in lines())
    span = f"{ratios[0]:.2f} to {ratios[-1]:.2f} times"
    page = (ROOT / "docs/llava.md").read_text(encoding="utf-8")
    assert f"{span} the baseline's throughput" in page
    assert f"and `mlp` {span}" in (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    pair = [row("16 x 2048 + 128", picture, "baseline")["throughput_tok_s"] for picture in (True, False)]
    assert f"the baseline runs at {pair[0] / pair[1]:.2f} of its speed without pictures" in page
