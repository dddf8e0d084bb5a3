"""Triad beside the best that decides nothing: sentence, tiles, table; and figures of a sweep beside other requests."""

from __future__ import annotations

import deciding
import discussion
import findings
import plot_decisions
import plot_kv_memory
import plot_sm_ratio
import plot_throughput
import plot_timeline
import plotting
import pytest
from rows import SMALL_MATRIX, row

from fastcache.bench.matrix import expand
from fastcache.bench.table import enrich

SPEEDS = {"compression-only": 100.0, "greenctx-only": 80.0, "triad": 104.0}
SHARES = (0.06, 0.5)
SAMPLES = {"time_s": [0.0, 0.5], "before": [9, 1], "compressed": [0, 4], "whole": [0, 0], "held": [0, 2]}
WHY = "compression costs more than these outputs give back"


def decision(about: str, choice: str, reason: str, number: int = 4) -> dict:
    return {
        "about": about,
        "choice": choice,
        "reason": reason,
        "count": number,
        "inputs": {},
        "outcome": None,
    }


def decided(*kept: dict) -> dict:
    steps = {"count": 4, "predicted_s": 0.02, "measured_s": 0.021}
    return {"decisions": list(kept), "measured": True, "costs": {}, "places": [], "steps": {"decode": steps}}


def cells_of(variants: list[str], output: int, **greenctx: object) -> list:
    work = {"name": "synthetic-long", "context": 512, "output": output}
    config = SMALL_MATRIX | {
        "workloads": [work],
        "variants": variants,
        "batch_sizes": [4],
        "methods": ["snapkv"],
    }
    return [c for c in expand(config | {"greenctx": greenctx}).cells if c.variant in variants]


def measured(cell, speed: float, sms: int, **more: object) -> dict:
    granted = (
        {"main": 132 - sms if cell.greenctx_main_stream else 132, "compress": sms} if cell.greenctx else None
    )
    place = decision("place", f"beside:{sms}" if cell.greenctx_main_stream else "inline", "no other")
    return row(
        cell,
        throughput_tok_s=speed,
        policy="auto" if cell.variant == "triad" else "fixed" if cell.compressed else None,
        greenctx_available=cell.greenctx or None,
        granted_sms=granted,
        decisions=decided(place) if cell.variant == "triad" else None,
        kv_timeline=SAMPLES,
        **more,
    )


@pytest.fixture
def rows() -> list[dict]:
    """A workload where triad may leave the split, one swept over binding splits, and one too short to compress."""
    free = {"splits": [{"compress_ratio": 0.125}], "bound": True}
    swept = {"splits": [{"compress_ratio": share} for share in SHARES], "main_stream": True}
    mixed = {"prefill": 1, "mixed": 30, "compress": 0, "decode": 10}
    made = []
    for cell in cells_of(list(SPEEDS), 64, **free):
        made.append(
            measured(cell, SPEEDS[cell.variant], 16, **({"steps": mixed} if cell.variant == "triad" else {}))
        )
    for cell in cells_of(list(SPEEDS), 32, **swept):
        speed = 200.0 if cell.variant == "compression-only" else 180 - 100 * cell.greenctx_compress_ratio
        made.append(measured(cell, speed, 8 if cell.greenctx_compress_ratio == SHARES[0] else 68))
    for cell in cells_of(["baseline", "triad"], 4, **free):
        speed, left = (
            (500.0, {})
            if cell.variant == "baseline"
            else (505.0, {"kv_len_before": None, "kv_len_after": None})
        )
        made.append(measured(cell, speed, 16, **left))
        if left:
            made[-1] |= {
                "compressed_requests": 0,
                "uncompressed_requests": 4,
                "decisions": decided(decision("compression", "whole", WHY)),
            }
    return enrich(made)


def test_a_split_that_binds_is_told_from_one_that_may_be_left(rows):
    found = deciding.against_fixed(rows)
    assert [each.bound for each in found] == [False, False, True, True]
    assert [each.best["variant"] for each in found] == [
        "compression-only",
        "baseline",
        *2 * ["compression-only"],
    ]
    said = deciding.sentence(found)
    x = findings.TIMES
    assert (
        f"triad has 1.01{x} to 1.04{x} its throughput, over 2 sets of the same requests; least on triad"
        in said
    )
    assert f"Bound to a split of the SMs, it has 0.65{x} to 0.87{x} its throughput, over 2 sets" in said
    alone = deciding.sentence([each for each in found if each.bound])
    assert alone.startswith("Bound to a split of the SMs, triad has") and alone.endswith(
        "that decides nothing."
    )
    assert [number for number, _ in deciding.tiles(found)][1:] == [
        f"{n}{x}" for n in ("1.01", "1.04", "0.87")
    ]
    assert deciding.against_fixed([r | {"host_busy": True} for r in rows]) == []


def test_the_table_says_what_was_decided(rows):
    lines = deciding.table(rows, deciding.against_fixed(rows))
    assert [line["split"] for line in lines] == [
        *2 * ["at most 16 SMs"],
        "bound to 124 + 8 SMs",
        "bound to 64 + 68 SMs",
    ]
    assert lines[0]["decided"] == "4 of 4 compressed, inline, 30 of 41 steps mixed"
    assert lines[1]["decided"] == "0 of 4 compressed, prompts first"
    assert lines[2]["decided"] == "4 of 4 compressed, beside on 8 SMs, prompts first"
    assert (
        lines[0]["throughput"] == [100.0, 104.0] and lines[0]["ratio"] == 1.04 and lines[0]["noise"] == 0.02
    )
    single = [r | {"repeats": r["repeats"] | {"values": [1.0]}} for r in rows]
    assert {line["noise"] for line in deciding.table(single, deciding.against_fixed(single))} == {None}


def test_a_cell_that_compressed_nothing_does_not_say_what_compression_is_worth(rows):
    pairs = findings.comparisons(rows)
    assert len(pairs) == 1 and findings.compressing(pairs) == []
    assert "No compressed cell can be compared" in findings.headline(rows)
    said = dict(discussion.paragraphs(rows))
    assert not {"Speed", "Where the time goes", "Methods"} & set(said) and "Memory" in said
    assert f"it compressed nothing ({WHY}), and has 1.01{findings.TIMES} the baseline's" in said["Decisions"]


def test_the_discussion_says_that_no_split_gains(rows):
    said, x = dict(discussion.paragraphs(rows))["Green contexts"], findings.TIMES
    assert f"With 8 or 68 SMs for compression and the others for everything else, 0.65{x} to 0.87{x}" in said
    assert "none of 4 cells gained" in said
    for each in rows:
        if each["granted_sms"] == {"main": 124, "compress": 8}:
            each["throughput_tok_s"] = 210.0
    assert "2 of 4 cells gained" in dict(discussion.paragraphs(rows))["Green contexts"]


def test_a_sweep_is_drawn_apart_from_other_requests(rows):
    frame = plotting.frame(rows)
    figure, points = plot_sm_ratio.draw(frame)
    swept = frame.loc[frame["cell_id"].isin(points["cell_id"]), "panel"].unique()
    assert len(points) == 4 and list(swept) == [figure.axes[0].get_title()]
    assert set(points["sms"]) == {8, 68}
    dashed = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert dashed == [200.0]  # of the same requests, not a mean over others
    one = frame[frame["row"].map(lambda r: r["output_requested"] == 64)]
    assert len(plot_sm_ratio.draw(one)[1]) == 2  # nothing was swept: what there is


def test_figures_of_one_workload_take_the_one_with_most_variants(rows):
    frame = plotting.frame(
        [r for r in rows if not (r["output_requested"] == 64 and r["variant"] == "greenctx-only")]
    )
    assert {r["output_requested"] for r in plotting.largest(frame)} == {32}
    assert {r["output_requested"] for r in plotting.largest(plotting.frame(rows))} == {64}
    figure, _ = plot_timeline.draw(plotting.frame(rows))
    shown = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title().splitlines()[0] for ax in shown] == ["compression-only", "greenctx-only", "triad"]
    assert len({ax.get_xlim() + ax.get_ylim() for ax in shown}) == 1
    assert all(not ax.child_axes for ax in shown)  # none of these rows tells what ran when
    assert "512 + 64 tokens" in plot_decisions.draw(plotting.frame(rows))[0].axes[-1].get_title()


def test_what_ran_when_is_above_the_pages(rows):
    steps = {
        "stage": ["prefill", "mixed", "decode"],
        "stream": ["main"] * 3,
        "start_s": [0.0, 0.2, 0.4],
        "end_s": [0.2, 0.4, 0.5],
        "steps": [1, 3, 9],
    }
    known = [r | {"step_timeline": steps if r["variant"] == "triad" else None} for r in rows]
    figure, points = plot_timeline.draw(plotting.frame(known))
    strips = [(ax, *ax.child_axes) for ax in figure.axes if ax.child_axes]
    assert len(strips) == 1 and strips[0][1].get_title().startswith("triad")
    assert [label.get_text() for label in strips[0][1].get_yticklabels()] == ["decode", "mixed", "prefill"]
    assert strips[0][1].get_xlim() == strips[0][0].get_xlim()
    assert points["stage"].notna().sum() == 3


def test_where_a_baseline_has_no_row_numbers_are_beside_compression_only(rows):
    figure, _ = plot_throughput.draw(plotting.frame(rows))
    said = [text.get_text().strip() for text in figure.axes[0].texts]
    assert f"104   1.04{findings.TIMES}" in said and "100" in said and f"505   1.01{findings.TIMES}" in said
    assert figure.axes[0].get_title().endswith("or compression-only's")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert any(label.startswith("triad \N{LESS-THAN OR EQUAL TO}12.5%/100%") for label in labels)
    assert any(label.startswith("greenctx-only 12.5%/100%") for label in labels)
    assert any(label.startswith("triad 50%/50%") for label in labels)


def test_a_cell_that_compressed_nothing_is_no_failure(rows):
    figure, _ = plot_kv_memory.draw(plotting.frame(rows))
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said.count("nothing was compressed") == 1 and "ok" not in said


def test_the_table_says_how_often_prefill_and_decode_had_a_side_of_the_sms_each(rows):
    triad = next(r for r in rows if r["variant"] == "triad" and r["decisions"])
    kept = [
        decision("balance", "side by side, 100+32", "saves most", 30),
        decision("balance", "side by side, 84+48", "saves most", 4),
        decision("balance", "prefill alone", "prompts first", 9),
    ]
    row = triad | {"decisions": decided(*kept), "steps": {"prefill": 43, "mixed": 0, "decode": 200}}
    assert deciding._decided(row).endswith("34 prefills beside decode steps, mostly on 100+32 SMs")
    plain = row | {"decisions": decided(kept[-1])}
    assert deciding._decided(plain).endswith("prompts first")
