"""What results/published/h100-llava/README.md and docs/llava.md say, against the rows beside the former."""

from __future__ import annotations

import json
import re
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
ROWS = [json.loads(line) for line in (FOLDER / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
PLAN = json.loads((FOLDER / "plan.json").read_text(encoding="utf-8"))
BY_KEY = {(r["batch_size"], r["context_used"], bool(r["images"]), r["variant"], r["method"]): r for r in ROWS}
TRIADS = [r for r in ROWS if r["variant"] == "triad"]
SPEED = "throughput_tok_s"


def row(batch: int, context: int, picture: bool, which: tuple[str, str | None]) -> dict:
    return BY_KEY[(batch, context, picture, *which)]


def beside(triad: dict) -> dict:
    """The row of the same requests that compresses inline."""
    return row(triad["batch_size"], triad["context_used"], bool(triad["images"]), COMPRESSED)


def lines() -> list[list[str]]:
    found = (line for line in PAGE.splitlines() if line.startswith("|") and CELL.search(line))
    return [[part.strip() for part in line.strip("|").split("|")] for line in found]


def ends(values, digits: int = 2) -> str:
    values = list(values)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def gains(picture: bool | None = None) -> list[float]:
    """Compression only against the baseline, with `mlp`."""
    return [
        row(b, c, p, COMPRESSED)[SPEED] / row(b, c, p, BASELINE)[SPEED]
        for p in (True, False)
        for c in CONTEXTS
        for b in BATCHES
        if picture in (None, p)
    ]


@pytest.mark.parametrize("line", lines(), ids=lambda line: " ".join(line[:3]))
def test_throughput(line):
    label, picture, method, *figures = line
    batch, context = map(int, CELL.match(label).groups())
    full = row(batch, context, picture == "yes", BASELINE)[SPEED]
    ours = []
    for variant in ("compression-only", "triad"):
        found = BY_KEY.get((batch, context, picture == "yes", variant, method))
        ours.append(f"{found[SPEED]:,.0f}, {found[SPEED] / full:.2f}" if found else "not measured")
    assert figures == [f"{full:,.0f}", *ours]


def test_every_cell_is_on_the_page_and_those_that_are_missing_are_said_to_be():
    cells = {r["cell_id"]: r["cell"] for r in ROWS}
    assert cells == {name: PLAN["cells"][name] for name in cells} and len(BY_KEY) == len(ROWS) == 60
    missing = [cell for name, cell in PLAN["cells"].items() if name not in cells]
    assert {cell["variant"] for cell in missing} == {"triad"} and len(missing) == 14
    assert sum("not measured" in line for line in lines()) == len(missing) and len(lines()) == 25
    for page in (PAGE, DOCS):
        assert f"f {len(PLAN['cells'])} cells {len(ROWS)} were measured" in page.replace("its ", "")
    counts = [sum(r["variant"] == name for r in ROWS) for name in ("baseline", "compression-only", "triad")]
    assert (
        "the {} of the baseline, the {} with compression only, and {} of the 25 of triad".format(*counts)
        in PAGE
    )
    assert (
        f"and {counts[2]} of the 25 of `triad`" in DOCS and f"the other {len(missing)}; `plan.json`" in PAGE
    )


def test_how_they_were_measured():
    assert {r["status"] for r in ROWS} == {"ok"} and {r["git_commit"][:7] for r in ROWS} == {"272a924"}
    assert all(len(r["git_commit"]) == 40 for r in ROWS)  # no "-dirty" behind it
    assert len({r["source_digest"] for r in ROWS}) == 1
    assert {len(r["repeats"]["values"]) for r in ROWS} == {1}
    shared = sorted(r["process_cells_before"] for r in ROWS if r["variant"] != "triad")
    assert shared == list(range(len(shared)))  # one after another
    assert sorted(r["process_cells_before"] for r in TRIADS) == [0] * 10 + [len(shared)]


def test_compression_only_against_the_baseline():
    assert f"is {ends(gains())} times the baseline, more with" in PAGE
    assert f"It is {ends(gains())} times the baseline's throughput" in DOCS
    assert f"`mlp` gave {ends(gains())} times the baseline's" in text(ROOT / "README.md")
    for picture in (True, False):
        ratios = [f"{gain:.2f}" for gain in gains(picture)]
        for i, context in enumerate(CONTEXTS):
            cells = [("no", "yes")[picture], str(context), *ratios[4 * i : 4 * i + 4]]
            assert f"| {' | '.join(cells)} |" in DOCS
            assert ratios[4 * i : 4 * i + 4] == sorted(ratios[4 * i : 4 * i + 4])  # larger batches gain more
        for batch in range(4):
            assert ratios[batch::4] == sorted(ratios[batch::4])  # and longer contexts


def test_what_ran_at_once():
    for picture in (True, False):
        both = [row(32, 3968, picture, which) for which in (BASELINE, COMPRESSED)]
        ran = [r["peak_running"] for r in both]
        assert "{} sequences fit at once uncompressed, and all {} when compressed".format(*ran) in PAGE
        assert f"fit only compressed: {ran[0]} ran at once without" in DOCS
        peaks = [r["peak_kv_bytes"] / 2**30 for r in both]
        assert "in use is {:.1f} GiB and {:.1f} GiB".format(*peaks) in PAGE


def test_what_pictures_cost():
    pairs = {
        which: [(row(b, c, True, which), row(b, c, False, which)) for c in CONTEXTS for b in BATCHES]
        for which in (BASELINE, COMPRESSED)
    }
    shares = {which: [seen[SPEED] / text_[SPEED] for seen, text_ in of] for which, of in pairs.items()}
    assert f"leaves {ends(shares[BASELINE])} of the baseline's throughput without one" in PAGE
    assert f"and {ends(shares[COMPRESSED])} of that with compression, least at 32 x 1024 in both" in PAGE
    assert all(min(found) == found[3] for found in shares.values())
    assert (
        f"leaves {ends(share for of in shares.values() for share in of)} of the throughput of the same cell without"
        in DOCS
    )
    every = [pair for of in pairs.values() for pair in of]
    all_of_it = median((a["elapsed_s"] - z["elapsed_s"]) / a["batch_size"] for a, z in every)
    prefill = median((a["stage_s"]["prefill"] - z["stage_s"]["prefill"]) / a["batch_size"] for a, z in every)
    assert f"adds {1e3 * all_of_it:.1f} ms in the median pair of cells" in PAGE
    assert f"vision tower included, takes {1e3 * prefill:.1f} ms" in PAGE
    assert f"{1e3 * all_of_it:.1f} ms a picture in the median, most of it on the host" in DOCS
    assert prefill < all_of_it / 2


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


def test_triad_against_compression_only():
    ratios = [r[SPEED] / beside(r)[SPEED] for r in TRIADS]
    assert f"has {ends(ratios)} times the throughput of `compression-only`" in PAGE
    assert f"`triad` had {ends(ratios)} times the throughput of compression only" in DOCS
    full = (row(r["batch_size"], r["context_used"], bool(r["images"]), BASELINE) for r in TRIADS)
    assert f"and {ends(r[SPEED] / f[SPEED] for r, f in zip(TRIADS, full, strict=True))} times" in PAGE


def test_what_triad_chose_and_at_what_price():
    places = []
    for r in TRIADS:
        assert r["granted_sms"] == {"main": 132, "compress": 32} and r["cell"]["greenctx_bound"]
        (place,) = (d for d in r["decisions"]["decisions"] if d["about"] == "place")
        places.append((r, place["choice"], place["costs"]["exposed"], place["reason"]))
    moved = [p for p in places if p[1].startswith("beside:")]
    inline = [p for p in places if p[1] == "inline"]
    assert len(moved) + len(inline) == len(TRIADS) and {p[3] for p in moved} == {
        "adds least to the main stream"
    }
    free = [p for p in moved if p[2][p[1]] == 0.0]
    assert f"In {len(moved)} of its {len(TRIADS)} cells it ran compression beside the prefill" in PAGE
    assert f"In {len(free)} of those it had priced that at nothing" in PAGE

    def took(stage: str, of: list) -> str:
        return ends(p[0]["stage_s"][stage] / beside(p[0])["stage_s"][stage] for p in of)

    assert f"the prefill took {took('prefill', free)} times as long" in PAGE
    theirs, ours = row(16, 2048, True, ("triad", "mlp")), row(16, 2048, True, COMPRESSED)
    seconds = [r["stage_s"]["prefill"] for r in (theirs, ours)]
    assert "with pictures {:.3f} s, not {:.3f}".format(*seconds) in PAGE
    assert f"Decoding took {took('decode', moved)} times as long" in PAGE
    same = "{:.2f} and {:.2f} times".format(*sorted(p[0][SPEED] / beside(p[0])[SPEED] for p in inline)[::-1])
    assert (
        f"In the other {len(inline)} cells triad chose what `compression-only` does, and has {same}" in PAGE
    )
