"""What docs/performance.md says of compression, against the published rows: every number, and what held or missed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastcache.bench.work import step_bytes
from fastcache.compression.layer import WAITING_BYTES
from fastcache.models.config import ModelConfig
from fastcache.models.presets import PRESETS

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results/published/h100-compression"
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
ROWS = [json.loads(line) for line in (PUBLISHED / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
CELL = re.compile(r"(\d+) x (\d+) \+ (\d+)")
MOST = {"streaming_llm": 2, "knorm": 2, "keydiff": 2, "random": 2, "snapkv": 3, "tova": 3}
MOST |= {"expected_attention": 3, "h2o": 10, "observed_attention": None}
LEAST = {(64, 3968): 33_700, (64, 3072): 24_200, (64, 2048): 17_400, (256, 2048): 30_000, (32, 3072): 5_700}


def section(heading: str) -> str:
    return PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]


def said(heading: str) -> str:
    """The section's words without their line breaks."""
    return " ".join(section(heading).split())


def table(heading: str, first: str) -> list[list[str]]:
    """Lines whose first column looks like `first`."""
    lines = [line[2:-2].split("|") for line in section(heading).splitlines() if line.startswith("| ")]
    return [[part.strip() for part in parts] for parts in lines if re.match(first, parts[0])]


WITH = "With compression (snapkv, factor 5)"
WON = "What was to be won with it"
POOLS = "How large a KV pool makes it worth it"
COST = "What a method costs"
SHAPES = r".*\d x \d"


def row_of(
    batch: int, context: int, output: int, factor: float | None, kv: str = "bfloat16", **engine
) -> dict:
    """The one row of these requests; engine: what the configurations vary and is not as usual."""
    wanted = (batch, context, output, factor, kv)
    names = ("batch_size", "context_used", "output_used", "compression_factor", "kv_dtype")
    settings = {"num_pages": None, "enable_prefix_caching": False} | engine
    (row,) = (
        row
        for row in ROWS
        if tuple(row[name] for name in names) == wanted and row["cell"].items() >= settings.items()
    )
    return row


def shape(label: str) -> tuple[int, int, int]:
    return tuple(map(int, CELL.search(label).groups()))


def speed(row: dict) -> float:
    return row["throughput_tok_s"]


def peers(variant: str) -> dict[str, int]:
    lines = (PUBLISHED / "../peers/peers.jsonl").read_text(encoding="utf-8").splitlines()
    found = [
        row for row in map(json.loads, lines) if (row["system"], row["variant"]) == ("vllm 0.26.0", variant)
    ]
    return {row["workload"]: row["total_tok_s"] for row in found}


def test_the_rows_are_one_experiment():
    assert len(ROWS) == 25 and {row["status"] for row in ROWS} == {"ok"}
    assert len({row["git_commit"] for row in ROWS}) == 1 and "dirty" not in ROWS[0]["git_commit"]
    assert len({(row["source_digest"], json.dumps(row["device"])) for row in ROWS}) == 1
    assert not any(row["host_busy"] for row in ROWS)
    plan = json.loads((PUBLISHED / "plan.json").read_text(encoding="utf-8"))
    assert list(plan["cells"]) == [row["cell_id"] for row in ROWS]
    assert all(plan["cells"][row["cell_id"]] == row["cell"] for row in ROWS)
    report = (PUBLISHED / "report.html").read_text(encoding="utf-8")
    assert all(f"<code>{row['cell_id']}</code>" in report for row in ROWS)


@pytest.mark.parametrize("line", table(WITH, SHAPES), ids=lambda line: line[0])
def test_speed_with_compression(line):
    full, row = (row_of(*shape(line[0]), factor) for factor in (None, 5))
    assert ("32B" in line[0]) == (row["model"] == "qwen3-32b")
    assert line[1:] == [
        f"{speed(full):,.0f}",
        f"{speed(row):,.0f}",
        f"{speed(row) / speed(full):.2f}",
        f"{full['peak_running']}, {row['peak_running']}",
        f"{full['peak_kv_bytes'] / 2**30:.1f}, {row['peak_kv_bytes'] / 2**30:.1f}",
    ]


def test_repeats_first_tokens_and_the_prefix_cache():
    repeated = [row for row in ROWS if len(row["repeats"]["values"]) > 1]
    widest = max(row["repeats"]["spread"] for row in repeated)
    assert f"they differ by at most {100 * widest:.1f} %" in said(WITH)
    closest = speed(row_of(64, 3072, 512, 5))
    assert closest / LEAST[64, 3072] - 1 < widest and "held by less than repeats differ" in said(WON)
    assert all(speed(row) == min(row["repeats"]["values"]) for row in ROWS)
    cached = row_of(64, 3968, 128, None, enable_prefix_caching=True)
    full, row = (row_of(64, 3968, 128, factor) for factor in (None, 5))
    first, later = (each["ttft_s"]["p50"] for each in (full, row))
    step = row["stage_s"]["prefill"] / row["steps"]["prefill"]
    assert f"after {later:.2f} s instead of {first:.2f}" in said(WITH) and 0.45 < (later - first) / step < 0.6
    assert f"{speed(cached):,.0f} instead of {speed(row_of(64, 3968, 128, None)):,.0f} at 64" in said(WITH)


def late(row: dict, before: float) -> float:
    """How much later than the end of `before` steps, all alike, the median first token was noticed, in steps."""
    return row["ttft_s"]["p50"] * row["steps"]["prefill"] / row["stage_s"]["prefill"] - before


def test_how_late_first_tokens_were_noticed():
    """Eight of 64 prompts fit a step, and one of 32: medians lie between the 4th and 5th, and the 16th and 17th."""
    full, row = (row_of(64, 3968, 128, factor) for factor in (None, 5))
    earlier = (PUBLISHED / "rows-853ce4b.jsonl").read_text(encoding="utf-8").splitlines()
    (apart,) = (
        row
        for row in map(json.loads, earlier)
        if (row["model"], row["variant"]) == ("qwen3-32b", "compression-only")
    )
    steps = late(row, 4.5)
    seconds = steps * row["stage_s"]["prefill"] / row["steps"]["prefill"]
    assert f"there {seconds:.2f} s sooner, {steps:.2f} of a prefill step" in said(WITH)
    tpot = row["tpot_s"]["p50"]
    assert f"are {1e3 * seconds / 127:.1f} ms, beside the {1e3 * tpot:.1f} of the row" in said(WITH)
    assert f"are {late(full, 4.5):.2f} of a step late" in said(WITH)
    together = late(row_of(32, 3072, 256, 5), 16.5)
    assert (
        f"was {late(apart, 16.5):.2f} of a step late in `rows-853ce4b.jsonl`, and {together:.2f} in"
        in said(WITH)
    )


def test_the_readme_quotes_the_least_and_the_greatest_ratio():
    ratios = sorted(float(line[3]) for line in table(WITH, SHAPES))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"gave {ratios[0]:.2f} to {ratios[-1]:.2f} times the baseline's throughput" in readme


@pytest.mark.parametrize("line", table(WON, SHAPES), ids=lambda line: line[0])
def test_what_was_to_be_won(line):
    batch, context, output = shape(line[0])
    name, row = f"{batch}x{context}+{output}", row_of(batch, context, output, 5)
    least = LEAST[batch, context]
    expected = [f"{speed(row):,.0f}", f"{least:,}", "held" if speed(row) >= least else "missed"]
    if row["model"] == "qwen3-32b":
        assert line[1:] == ["-", "-", *expected, "-", "-", "-", "not run"]
        return
    vllm, fp8 = (peers(variant)[name] for variant in ("baseline", "fp8 KV"))
    half = row_of(batch, context, output, 2, "float8_e4m3fn")
    ratio, bar = speed(half) / fp8, 1.0 if context == 3968 else 1.1
    expected += [f"{speed(half):,.0f}", f"{ratio:.2f}", f"{bar}", "held" if ratio >= bar else "missed"]
    assert line[1:] == [f"{vllm:,}", f"{fp8:,}", *expected]


def test_what_is_said_of_fp8():
    text, requests = said(WON), [shape(line[0]) for line in table(WON, SHAPES)[:4]]
    full = [row_of(*each, None, "float8_e4m3fn") for each in requests]
    half = [row_of(*each, 2, "float8_e4m3fn") for each in requests]
    speeds = [f"{speed(row):,.0f}" for row in full]
    assert f"our engine gives {', '.join(speeds[:3])} and {speeds[3]}" in text
    theirs = [peers("fp8 KV")[f"{b}x{c}+{o}"] for b, c, o in requests]
    beside = sorted(speed(row) / peer for row, peer in zip(full, theirs, strict=True))
    gained = sorted(speed(row) / speed(base) for row, base in zip(half, full, strict=True))
    assert f"which is {beside[0]:.2f} to {beside[-1]:.2f} times vLLM's" in text
    assert f"{gained[0]:.2f} to {gained[-1]:.2f} times the baseline with fp8 KV" in text
    mbu = {
        kv: sorted(row["decode_mbu"] for row in ROWS if row["kv_dtype"] == kv)
        for kv in ("float8_e4m3fn", "bfloat16")
    }
    low, high = (f"{found[0]:.2f} to {found[-1]:.2f}" for found in mbu.values())
    assert f"an MBU of {low} only, where bfloat16 has {high} in" in text


def test_why_one_was_missed():
    """Bytes and times of the row, what its decode could be at other shares of the copy rate, and what is not the KV."""
    text = said(WON)
    row, full = (row_of(64, 2048, 1024, factor) for factor in (5, None))
    decode, steps, target = row["stage_s"]["decode"], row["steps"]["decode"], LEAST[64, 2048]
    rest, copy, tokens = row["elapsed_s"] - decode, row["ceiling_copy_bytes_s"], row["total_tokens"]
    read = row["decode_mbu"] * copy * decode / steps
    weights = step_bytes(ModelConfig.from_hf(PRESETS["qwen3-8b"], "preset"), "bfloat16")
    for sentence in (
        f"Of the {row['elapsed_s']:.2f} s at 64 x 2048 + 1024, prefill takes {row['stage_s']['prefill']:.2f} "
        f"(MFU {row['prefill_mfu']:.2f}) and {steps:,} decode steps {decode:.2f}, {1e3 * decode / steps:.2f} ms each",
        f"reads {weights / 1e9:.1f} GB of weights and {(read - weights) / 1e9:.1f} GB of KV on average, "
        f"{1e3 * read / copy:.2f} ms at the copy rate of {copy / 1e12:.2f} TB/s: an MBU of {row['decode_mbu']:.2f}",
    ):
        assert sentence in text

    def at(mbu: float) -> float:
        return tokens / (rest + decode * row["decode_mbu"] / mbu)

    best = max(each["decode_mbu"] for each in ROWS)
    needed = decode * row["decode_mbu"] / (tokens / target - rest)
    assert f"would give {at(1):,.0f} tok/s, and {target:,} takes an MBU of {needed:.2f}" in text
    assert f"in this run, {best:.2f}, would give {at(best):,.0f}." in text
    assert (
        f"of the {target - speed(row):,.0f} tok/s that are missing, {at(best) - speed(row):,.0f} are ours to find, "
        f"and {target - at(best):,.0f} would"
    ) in text
    longer = full["stage_s"]["decode"] / full["steps"]["decode"] - decode / steps
    more = (
        full["decode_mbu"]
        * full["ceiling_copy_bytes_s"]
        * full["stage_s"]["decode"]
        / full["steps"]["decode"]
        - read
    )
    without = decode / steps - (read - weights) * longer / more
    left = without - weights / copy
    assert (
        f"{more / 1e9:.1f} GB less and takes {1e3 * longer:.2f} ms less, {more / longer / 1e12:.2f} TB/s"
        in text
    )
    assert (
        f"{1e3 * without:.2f} ms of a step do not depend on the KV, where its weights take {1e3 * weights / copy:.2f}"
        in text
    )
    too_long = (row["elapsed_s"] - tokens / target) / steps
    assert f"The other {1e3 * left:.2f} ms" in text and f"leave {1e3 * (left - too_long):.2f} ms" in text


@pytest.mark.parametrize("line", table(POOLS, r"\d"), ids=lambda line: line[0])
def test_pools(line):
    pages = int(line[0].replace(",", ""))
    given = {"num_pages": pages} if pages < 20_000 else {}
    full, row = (row_of(256, 2048, 512, factor, **given) for factor in (None, 5))
    assert full["num_pages"] == pages
    assert line[1:] == [
        f"{pages * full['page_size'] * full['kv_bytes_per_token'] / 2**30:.1f}",
        f"{speed(full):,.0f}",
        f"{speed(row):,.0f}",
        f"{speed(row) / speed(full):.2f}",
        f"{full['peak_running']}, {row['peak_running']}",
    ]


def test_what_is_said_of_pools():
    ratios = [float(line[4]) for line in table(POOLS, r"\d")]
    assert min(ratios) > 1 and max(ratios) == ratios[0] and len(ratios) == 4
    small = [row_of(256, 2048, 512, 5, num_pages=pages)["steps"]["decode"] for pages in (7_680, 11_520)]
    assert small == [1022, 1022] and "1,022 decode steps, two rounds of 511" in said(POOLS)
    full, row = (row_of(64, 3968, 128, factor) for factor in (None, 5))
    prefill = row["stage_s"]["prefill"] - full["stage_s"]["prefill"]
    step = (full["stage_s"]["decode"] - row["stage_s"]["decode"]) / row["steps"]["decode"]
    assert f"prefill by {1e3 * prefill:.0f} ms and shortens a decode step by {1e3 * step:.2f} ms" in said(
        POOLS
    )
    first = 1  # of the tokens comes from prefill
    assert f"less than about {first + prefill / step:.0f} tokens" in said(POOLS)


def test_what_methods_cost():
    held, paged = (
        json.loads((PUBLISHED / name).read_text(encoding="utf-8"))
        for name in ("costs.json", "costs-paged.json")
    )
    assert (held["paged"], paged["paged"]) == (False, True)
    assert [line[0] for line in table(COST, r"[a-z]\w+ $")][1:] == list(held["measured"]) == list(MOST)
    for name, cost in held["measured"].items():
        limit, step, share = 1e3 * cost["limit_seconds"], 1e3 * cost["step_seconds"], cost["share_of_prefill"]
        most = MOST[name]
        verdict = "- | -" if most is None else f"{most}% | {'held' if 100 * share <= most else 'missed'}"
        pages = f"{paged['measured'][name]['share_of_prefill']:.1%}" if name in paged["measured"] else "-"
        assert f"| {name} | {limit:.2f} | {step:.2f} | {share:.1%} | {verdict} | {pages} |" in section(COST)
    extra, more = (max(c["extra_bytes"] for c in costs["costs"].values()) for costs in (held, paged))
    assert f"at most {extra / 2**20:.0f} MiB beside the step's tensors, {more / 2**20:.0f} out of" in said(
        COST
    )
    assert f"at most {WAITING_BYTES / 2**30:.1f} GiB more" in said(COST) and WAITING_BYTES + more <= 2 * 2**30


def test_what_is_said_of_expected_attention():
    costs = json.loads((PUBLISHED / "costs.json").read_text(encoding="utf-8"))
    cost, measured = (costs[part]["expected_attention"] for part in ("costs", "measured"))
    tokens = costs["sequences_per_step"] * costs["context"]
    growing = cost["seconds_per_token"] * tokens
    assert (
        f"its {1e3 * measured['step_seconds']:.2f} ms are {1e3 * cost['fixed_seconds']:.2f} that every step takes and "
        f"{1e3 * growing:.2f} that grow with tokens: these alone are "
        f"{growing / tokens / costs['prefill_seconds_per_token']:.2%} of the prefill, and "
        f"{growing / measured['limit_seconds']:.1f} times the bound"
    ).replace("%", " %") in said(COST)


def test_the_tables_are_found():
    assert [len(table(*each)) for each in ((WITH, SHAPES), (WON, SHAPES), (POOLS, r"\d"))] == [5, 5, 4]
