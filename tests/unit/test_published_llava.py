"""What results/published/h100-llava/README.md and docs/llava.md say, against the rows beside the former."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "results/published/h100-llava"
CONTEXTS, BATCHES = (1024, 2048, 3968), (2, 4, 16, 32)
BASELINE, COMPRESSED = ("baseline", None), ("compression-only", "mlp")
CELL = re.compile(r"(\d+) x (\d+) \+ 128")


def text(path: Path) -> str:
    """With each paragraph on one line: where lines break says nothing."""
    return re.sub(r"(?<=\S)\n *(?=[^\s|\-#])", " ", path.read_text(encoding="utf-8"))


PAGE, DOCS = text(FOLDER / "README.md"), text(ROOT / "docs/llava.md")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def by_key(rows: list[dict]) -> dict[tuple, dict]:
    return {
        (r["batch_size"], r["context_used"], bool(r["images"]), r["variant"], r["method"]): r for r in rows
    }


ROWS, BEFORE = read("rows.jsonl"), read("rows-272a924.jsonl")
PLAN = json.loads((FOLDER / "plan.json").read_text(encoding="utf-8"))
BY_KEY, BEFORE_BY_KEY = by_key(ROWS), by_key(BEFORE)
TRIADS = [r for r in ROWS if r["variant"] == "triad"]
SPEED = "throughput_tok_s"


def row(batch: int, context: int, picture: bool, which: tuple[str, str | None], of: dict = BY_KEY) -> dict:
    return of[(batch, context, picture, *which)]


def same_requests(triad: dict, variant: str) -> dict:
    """The row of another variant, of the same method where it has one."""
    method = None if variant == "baseline" else triad["method"]
    return row(triad["batch_size"], triad["context_used"], bool(triad["images"]), (variant, method))


def inline(triad: dict) -> dict:
    return same_requests(triad, "compression-only")


def lines(columns: int = 6) -> list[list[str]]:
    """Of the tables whose first column names requests."""
    found = (line for line in PAGE.splitlines() if line.startswith("|") and CELL.search(line))
    parted = [[part.strip() for part in line.strip("|").split("|")] for line in found]
    return [parts for parts in parted if len(parts) == columns]


def ends(values, digits: int = 2) -> str:
    values = list(values)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def ratios(rows: list[dict], other, field: str | None = None) -> list[float]:
    """Of throughput, or of a stage's seconds, to what `other` gives for a row."""
    if field is None:
        return [r[SPEED] / other(r)[SPEED] for r in rows]
    return [r["stage_s"][field] / other(r)["stage_s"][field] for r in rows]


def gains(picture: bool) -> list[float]:
    """Compression only against the baseline, with `mlp`."""
    pairs = ((b, c, picture) for c in CONTEXTS for b in BATCHES)
    return [row(*each, COMPRESSED)[SPEED] / row(*each, BASELINE)[SPEED] for each in pairs]


@pytest.mark.parametrize("line", lines(), ids=lambda line: " ".join(line[:3]))
def test_throughput(line):
    label, picture, method, *figures = line
    batch, context = map(int, CELL.match(label).groups())
    full = row(batch, context, picture == "yes", BASELINE)[SPEED]
    ours = []
    for variant in ("compression-only", "triad"):
        found = row(batch, context, picture == "yes", (variant, method))[SPEED]
        ours.append(f"{found:,.0f}, {found / full:.2f}")
    assert figures == [f"{full:,.0f}", *ours]


def test_every_cell_is_there_and_on_the_page():
    assert {r["cell_id"]: r["cell"] for r in ROWS} == PLAN["cells"]
    assert len(BY_KEY) == len(ROWS) == 74 and len(lines()) == len(TRIADS) == 25
    assert len({tuple(line[:3]) for line in lines()}) == 25
    assert f"All of its {len(ROWS)} cells" in PAGE and f"all {len(ROWS)} cells, each once" in DOCS


def test_how_they_were_measured():
    assert {r["status"] for r in ROWS} == {"ok"} and {r["git_commit"][:7] for r in ROWS} == {"9ad49d2"}
    assert all(len(r["git_commit"]) == 40 for r in ROWS + BEFORE)  # no "-dirty" behind it
    assert len({r["source_digest"] for r in ROWS}) == 1
    assert {len(r["repeats"]["values"]) for r in ROWS} == {1}
    began = sorted(datetime.fromisoformat(r["started_at"]) for r in ROWS)
    assert f"the last began {(began[-1] - began[0]).total_seconds():.0f} s after the first" in PAGE
    assert f"processes that at most {max(r['process_cells_before'] for r in ROWS) + 1} cells shared" in PAGE
    assert "of commit 9ad49d2 without changes" in PAGE


def test_the_rows_of_before_are_comparable():
    assert {r["status"] for r in BEFORE} == {"ok"} and {r["git_commit"][:7] for r in BEFORE} == {"272a924"}
    assert {r["variant"] for r in BEFORE} == {"baseline", "compression-only"} and len(BEFORE) == 49
    for same in ("device", "versions", "attention_backend"):
        assert len({json.dumps(r[same], sort_keys=True) for r in ROWS + BEFORE}) == 1
    assert all(r["cell"] == BY_KEY[key]["cell"] for key, r in BEFORE_BY_KEY.items())


def test_what_is_said_of_noise():
    text_only = [key for key in BEFORE_BY_KEY if not key[2]]
    then = ends(BY_KEY[key][SPEED] / BEFORE_BY_KEY[key][SPEED] for key in text_only)
    assert f"The {len(text_only)} cells without pictures" in PAGE
    assert f"have {then} times the throughput that they had" in PAGE
    decode = {
        (b, c, which): row(b, c, True, which)["stage_s"]["decode"]
        / row(b, c, False, which)["stage_s"]["decode"]
        for which in (BASELINE, COMPRESSED)
        for b in BATCHES
        for c in CONTEXTS
    }
    assert f"takes {ends(decode.values())} times as long with pictures as without" in PAGE
    odd = decode.pop((4, 1024, COMPRESSED))
    assert f"at 4 x 1024 compressed it is {odd:.2f}, else {min(decode.values()):.2f} or more" in PAGE


def test_compression_only_against_the_baseline():
    every = ends(gains(True) + gains(False))
    assert f"is {every} times the baseline, more with" in PAGE
    assert f"It is {every} times the baseline's throughput" in DOCS
    assert f"`mlp` gave {every} times the baseline's" in text(ROOT / "README.md")
    for picture in (True, False):
        found = [f"{gain:.2f}" for gain in gains(picture)]
        for i, context in enumerate(CONTEXTS):
            cells = [("no", "yes")[picture], str(context), *found[4 * i : 4 * i + 4]]
            assert f"| {' | '.join(cells)} |" in DOCS
            assert found[4 * i : 4 * i + 4] == sorted(found[4 * i : 4 * i + 4])  # larger batches gain more
        for batch in range(4):
            assert found[batch::4] == sorted(found[batch::4])  # and longer contexts


def test_merging_beside_evicting():
    full = row(16, 2048, True, BASELINE)[SPEED]
    said = [
        f"{row(16, 2048, True, (variant, method))[SPEED] / full:.2f}"
        for variant in ("compression-only", "triad")
        for method in ("mlp", "snapkv")
    ]
    inside = "`mlp` has {} times the baseline's throughput and `snapkv` {}; in `triad` {} and {}."
    assert inside.format(*said) in PAGE


def test_what_ran_at_once():
    for picture in (True, False):
        found = [row(32, 3968, picture, which) for which in (BASELINE, COMPRESSED, ("triad", "mlp"))]
        ran = [r["peak_running"] for r in found]
        assert "{} sequences fit at once uncompressed, and all {} when compressed".format(*ran) in PAGE
        assert f"fit only compressed: {ran[0]} ran at once without" in DOCS and ran[1] == ran[2]
        peaks = [r["peak_kv_bytes"] / 2**30 for r in found]
        assert "in use is {:.1f} GiB and {:.1f} GiB".format(*peaks) in PAGE and peaks[1] == peaks[2]


def outside_s(of: dict) -> float:
    """Of a row's time, what is no step's."""
    return of["elapsed_s"] - sum(of["stage_s"].values())


def per_picture(rows: dict, batches: tuple[int, ...], seconds) -> float:
    """Milliseconds that a picture adds: the median over pairs of cells with and without."""
    pairs = (
        (row(b, c, True, which, rows), row(b, c, False, which, rows))
        for which in (BASELINE, COMPRESSED)
        for b in batches
        for c in CONTEXTS
    )
    return 1e3 * median((seconds(a) - seconds(z)) / a["batch_size"] for a, z in pairs)


def test_what_pictures_cost():
    def elapsed(r: dict) -> float:
        return r["elapsed_s"]

    both = (BEFORE_BY_KEY, BY_KEY)
    for batches in ((2,), (4,), (16,), (32,), BATCHES):
        figures = [per_picture(rows, batches, part) for part in (elapsed, outside_s) for rows in both]
        label = str(batches[0]) if len(batches) == 1 else "any"
        assert f"| {label} | {' | '.join(f'{figure:.1f}' for figure in figures)} |" in PAGE
    then, now = (per_picture(rows, BATCHES, lambda r: r["stage_s"]["prefill"]) for rows in both)
    assert f"takes {now:.1f} ms of it in the median pair, and took {then:.1f}" in PAGE
    then, now = (per_picture(rows, BATCHES, elapsed) for rows in both)
    assert f"{now:.1f} ms a picture in the median, and {then:.1f} ms at 272a924" in DOCS


def test_what_pictures_leave():
    shares = [
        [row(b, c, True, which)[SPEED] / row(b, c, False, which)[SPEED] for c in CONTEXTS for b in BATCHES]
        for which in (BASELINE, COMPRESSED)
    ]
    assert f"leaves {ends(shares[0])} of the baseline's throughput without one" in PAGE
    assert f"and {ends(shares[1])} of that with compression" in PAGE
    assert f"leaves {ends(shares[0] + shares[1])} of the throughput of the same cell without" in DOCS


def test_where_batching_pictures_gains():
    def grown(least: int, which: tuple) -> str:
        found = [row(32, c, True, which)[SPEED] / row(least, c, True, which)[SPEED] for c in CONTEXTS]
        return "{:.2f}, {:.2f} and {:.2f} times".format(*found)

    assert f"have {grown(4, BASELINE)} the throughput of batches of 4" in PAGE
    assert f"uncompressed, and {grown(4, COMPRESSED)} when compressed" in PAGE
    assert f"From 16 to 32 it is {grown(16, BASELINE)} uncompressed" in PAGE
    assert f"and {grown(16, COMPRESSED)} compressed" in PAGE


def test_what_merging_costs():
    costs = json.loads((FOLDER / "costs.json").read_text(encoding="utf-8"))["measured"]
    share = {name: f"{cost['share_of_prefill']:.1%}" for name, cost in costs.items()}
    mlp = costs["mlp"]
    measured = f"`mlp` takes {1e3 * mlp['step_seconds']:.2f} ms, {share['mlp']} of the step's time"
    for page in (PAGE, DOCS):
        assert measured in page and f"bound is {1e3 * mlp['limit_seconds']:.2f} ms" in page
        assert ("goal 3%: held" in page) == (mlp["share_of_prefill"] <= 0.03)
    assert f"`snapkv` takes {share['snapkv']}, `streaming_llm` {share['streaming_llm']}" in PAGE
    full, merged = (row(16, 2048, True, which)["prefill_tok_s"] for which in (BASELINE, COMPRESSED))
    assert f"with pictures is {1 - merged / full:.1%} slower than the baseline's" in PAGE


def test_triad_against_the_others():
    every = ends(ratios(TRIADS, inline))
    full = ends(ratios(TRIADS, lambda r: same_requests(r, "baseline")))
    assert f"`triad` has {every} times the throughput of `compression-only`, and {full} times" in PAGE
    assert f"`triad` had {every} times the throughput of compression only" in DOCS
    assert {r["steps"]["mixed"] for r in TRIADS} == {0}


def place(r: dict) -> dict:
    assert r["granted_sms"] == {"main": 132, "compress": 32} and r["cell"]["greenctx_bound"]
    (found,) = (d for d in r["decisions"]["decisions"] if d["about"] == "place")
    return found


MOVED = [r for r in TRIADS if place(r)["choice"] != "inline"]


def test_where_triad_compressed():
    alike = [r for r in TRIADS if r not in MOVED]
    assert {place(r)["reason"] for r in alike} == {"no other place adds clearly less to the main stream"}
    assert {place(r)["reason"] for r in MOVED} == {"adds least to the main stream"}
    assert {place(r)["choice"] for r in MOVED} == {"beside:32", "beside:16"}
    pictured = sum(bool(r["images"]) for r in MOVED)
    assert f"All {len(MOVED)} have 2 or 4 requests, and {pictured} have pictures." in PAGE
    assert {r["batch_size"] for r in MOVED} == {2, 4}
    assert f"In {len(alike)} of its {len(TRIADS)} cells, all those of 16 and 32 requests among them" in PAGE
    assert f'main stream": {ends(ratios(alike, inline))} times the throughput, as equal cells' in PAGE
    slow = [ratio for ratio in ratios(MOVED, inline) if ratio < 0.97]
    assert f"In the other {len(MOVED)} it compressed beside the prefill" in PAGE
    assert f"{ends(ratios(MOVED, inline))} times, below 0.97 in {len(slow)} of them" in PAGE
    for said in (
        f"In {len(alike)} of its {len(TRIADS)} cells it did the same",
        f"in {len(MOVED)}, of 2 and 4",
    ):
        assert said in DOCS


def test_at_what_price():
    table = {(line[0], line[1]): line[2:] for line in lines(9)}
    assert len(table) == len(MOVED)
    for r in MOVED:
        found, costs = inline(r), place(r)["costs"]["exposed"]
        full, tokens = same_requests(r, "baseline")["stage_s"]["prefill"], r["prompt_tokens"]
        took = [1e6 * (each["stage_s"]["prefill"] - full) / tokens for each in (found, r)]
        prices = [1e6 * costs[name] for name in ("inline", place(r)["choice"])]
        label = f"{r['batch_size']} x {r['context_used']} + 128", ("no", "yes")[bool(r["images"])]
        stages = [r["stage_s"][stage] / found["stage_s"][stage] for stage in ("prefill", "decode")]
        figures = [f"{r[SPEED] / found[SPEED]:.3f}", *(f"{stage:.2f}" for stage in stages)]
        for price, real in zip(prices, took, strict=True):
            figures += [f"{price:.2f}", f"{real:.2f}"]
        assert table[label] == figures
        assert costs == r["decisions"]["costs"]["exposed"]  # behind the timed round as before it
    free = [r for r in MOVED if place(r)["costs"]["exposed"][place(r)["choice"]] == 0.0]
    assert "yet two are nothing still" in PAGE and len(free) == 2


def test_what_the_place_cost():
    slow = [r for r in MOVED if r[SPEED] / inline(r)[SPEED] < 0.97]
    assert f"took {ends(ratios(slow, inline, 'decode'))} times as long in the {len(slow)}" in PAGE
    longer = [1e3 * (r["stage_s"]["prefill"] - inline(r)["stage_s"]["prefill"]) for r in slow]
    assert f"The prefill's part is {ends(longer, 0)} ms of about a second" in PAGE
    assert all(0.9 < r["elapsed_s"] < 1.3 for r in slow)
