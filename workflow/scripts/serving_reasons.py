"""Why a serving target was missed, as far as the rows show it: numbers of the rows compared, no guesses."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
IDLE = 0.1  # an engine that was idle for more than this share was not at its limit


def name(row: Row) -> str:
    held = "" if row["immediate_release"] else ", pages held"
    return f"{row['policy']}, {row['setting']}{held} at {row['rate']:g}/s"


def shares(row: Row) -> str:
    """Where its time went."""
    parts = [f"{stage} {share:.0%}" for stage, share in row["stage_share"].items() if share >= 0.005]
    return f"{name(row)}: {', '.join(parts)}"


def pool(row: Row) -> float:
    return row["peak_pages"] / max(1, row["num_pages"] - 1)


def throughput(ours: Row, theirs: Row) -> str:
    said = f"{shares(ours)}; {shares(theirs)}."
    if ours["stage_share"]["idle"] > IDLE:
        return f"{said} Ours was not at its limit."
    prompts = ours["stage_share"]["prefill"] + ours["stage_share"]["mixed"]
    bound = ours["output_tok_s"] / prompts / theirs["output_tok_s"] if prompts else float("inf")
    return (
        f"{said} Had all its time gone into steps with prompts, as fast as they were, it would be {bound:.1f} times; "
        f"at most {ours['peak_running']} requests ran at once against {theirs['peak_running']}."
    )


def first_token(ours: Row, theirs: Row) -> str:
    parts = []
    for row in (ours, theirs):
        whole, waiting = (1e3 * row[what]["mean"] for what in ("ttft_s", "queue_s"))
        idle = row["stage_share"]["idle"]
        parts.append(
            f"{name(row)} has a mean TTFT of {whole:.0f} ms, {waiting:.0f} ms of it before its first step, and is idle "
            f"{idle:.0%} of the time"
        )
    return "; ".join(parts) + "."


def memory(ours: Row, held: Row) -> str:
    samples = held["pages_over_time"]
    total = sum(s["before"] + s["compressed"] + s["whole"] + s["held"] for s in samples)
    late = sum(s["held"] for s in samples) / total if total else 0.0
    before = sum(s["before"] for s in ours["pages_over_time"])
    own = sum(s["before"] + s["compressed"] + s["whole"] for s in ours["pages_over_time"])
    return (
        f"Of the pages that {name(held)} had in use, {late:.0%} were held for nothing; of those that {name(ours)} had, "
        f"{before / own if own else 0.0:.0%} were contexts not yet compressed."
    )


def sustained(last: Row, failed: Row | None) -> str:
    """`last`: at the highest rate that is sustained; `failed`: at the next one, None if no higher was measured."""
    if failed is None:
        return f"No rate above {last['rate']:g}/s was measured."
    late, most, used = failed["ttft_s"]["p99"], failed["peak_running"], pool(failed)
    return f"{shares(failed)}; p99 TTFT {late:.1f} s, at most {most} requests at once, {used:.0%} of the KV pool."


def over_full(ours: tuple[Row, Row | None], full: tuple[Row, Row | None]) -> str:
    """(highest sustained row, the next one) of the compressed and of the uncompressed cache."""
    return f"Compressed: {sustained(*ours)} Uncompressed: {sustained(*full)}"


def isolation(ours: Row, theirs: Row) -> str:
    parts = []
    for row in (ours, theirs):
        ttft, tpot, gap = (1e3 * row[what]["p99"] for what in ("ttft_s", "tpot_s", "token_gap_s"))
        parts.append(
            f"{shares(row)}, p99 of TTFT {ttft:.0f} ms, TPOT {tpot:.1f} ms, between two tokens {gap:.1f} ms"
        )
    return "; ".join(parts) + "."
