"""The published records of the GPU proof: raw numbers judged again, and each number on the page found in them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcache.device import probe_logic as logic

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "results" / "published" / "h100-greenctx"
QUOTE = re.compile(
    r"^\| (?P<claim>[^|]+) \| (?P<measured>[^|]+) \| `(?P<file>[^`]+)` \| `(?P<field>[^`]+)` \|$"
)


def record(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def values(node: Any, path: list[str]) -> Iterator[Any]:
    """What `path` leads to: `*` all entries, `#` their number, `[key=value,...]` the entries that match."""
    if not path:
        yield node
        return
    head, *rest = path
    if head == "#":
        yield len(node)
    elif head == "*":
        for each in node:
            yield from values(each, rest)
    elif head.startswith("["):
        wanted = dict(pair.split("=") for pair in head[1:-1].split(","))
        for each in node:
            if all(str(each[key]) == value for key, value in wanted.items()):
                yield from values(each, rest)
    else:
        yield from values(node[head], rest)


def quotes() -> list[re.Match[str]]:
    lines = (ROOT / "docs" / "green-contexts.md").read_text(encoding="utf-8").splitlines()
    return [found for line in lines if (found := QUOTE.match(line))]


def test_the_page_quotes_records() -> None:
    assert len(quotes()) >= 30


@pytest.mark.parametrize("quote", quotes(), ids=lambda quote: f"{quote['file']}:{quote['field']}")
def test_a_quoted_number_is_in_its_record(quote: re.Match[str]) -> None:
    """Least and greatest of the field's values, rounded as the page rounds them."""
    found = list(values(record(quote["file"]), quote["field"].split("/")))
    said = [text.replace(",", "") for text in quote["measured"].split(" to ")]
    digits = len(said[0].partition(".")[2])
    assert found and [float(text) for text in said] == sorted(
        {round(min(found), digits), round(max(found), digits)}
    )


@pytest.mark.parametrize("name", ["greenctx.json", "greenctx-shim.json"])
def test_the_raw_numbers_of_a_proof_pass_when_judged_again(name: str) -> None:
    proof = record(name)
    assert proof["status"] == "proven" and len(proof["splits"]) == 7
    for split in proof["splits"]:
        granted = split["granted_sms"]["main"], split["granted_sms"]["compress"]
        sides = split["identity"]["main_ids"], split["identity"]["compress_ids"]
        assert logic.judge_identity(*sides, granted, proof["whole_device"]["ids"])["passed"]
        assert sum(granted) == proof["device"]["sm_count"] and split["granted_from"] == "op"
        for side, blocks in zip(("main", "compress"), granted, strict=True):
            waves = split[f"capacity_{side}"]
            assert waves["blocks"] == blocks
            assert logic.judge_capacity(2000, waves["wall_us"], waves["wall_one_more_us"], blocks)["passed"]
        alone = split["independence"]
        assert logic.judge_independence(20_000, alone["delay_us"], alone["plain_streams_delay_us"])["passed"]
        assert split["graph"]["guard_refused"] and split["graph"]["replayed_count"] == granted[0]
    memory = proof["memory"]
    assert logic.judge_memory(memory["free_bytes"], memory["changes"], 2 << 20)["passed"]


def test_every_provider_that_makes_a_pair_makes_the_same_disjoint_one() -> None:
    providers = record("providers.json")
    pairs = [name for name in providers if name != "torch_green"]
    assert pairs == ["sgl_kernel:spatial_ops", "sgl_kernel:spatial_ops+shim", "cuda_bindings"]
    for name in pairs:
        for split in providers[name]["splits"]:
            main, compress = set(split["main"]["ids"]), set(split["compress"]["ids"])
            assert not main & compress and split["granted"] == [len(main), len(compress)]
    granted = [[split["granted"] for split in providers[name]["splits"]] for name in pairs]
    assert granted[0] == granted[1] == granted[2]
    assert all("main" not in split for split in providers["torch_green"]["splits"]), "a cap on one side only"


def test_one_step_failed_and_the_readme_says_which() -> None:
    failed = [step["name"] for step in record("steps.json") if step["exit"] != 0]
    assert failed == ["chain with LD_PRELOAD"]
    assert all(name in (FOLDER / "README.md").read_text(encoding="utf-8") for name in failed)


def test_the_sweep_is_whole_and_its_csv_holds_the_same() -> None:
    rows = record("sm_sweep.json")["rows"]
    with (FOLDER / "sm_sweep.csv").open(newline="") as file:
        flat = list(csv.DictReader(file))
    assert [float(row["makespan_ms"]) for row in flat] == [row["makespan_ms"] for row in rows]
    ratios = {row["compress_ratio"] for row in rows if row["mode"] == "together"}
    assert min(ratios) == 0.06 and max(ratios) == 0.5 and len(ratios) == 9
    assert len(rows) == 3 + 2 * 3 * 2 + 9 * (2 * 3 + 3 * 2)
    for row in rows:
        assert len(row["repeats_ms"]) == 3 and min(row["repeats_ms"]) > 0 and row["rate"] > 0


def test_whole_runs_on_a_split():
    """Each row of the sweep is a line of the table."""
    page = (
        (ROOT / "docs" / "green-contexts.md").read_text(encoding="utf-8").split("## Whole runs on a split")[1]
    )
    lines = (ROOT / "results/published/h100-sm-sweep/rows.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        sms = row["granted_sms"] or {"compress": "-", "main": "all"}
        rates = (f"{row[name]:,.0f}" for name in ("throughput_tok_s", "prefill_tok_s", "decode_tok_s"))
        assert f"| {row['variant']} | {sms['compress']}, {sms['main']} | {' | '.join(rates)} |" in page
    assert len(lines) == 7
