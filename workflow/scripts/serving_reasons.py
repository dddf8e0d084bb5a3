"""Why a serving target was missed, as far as the rows show it: numbers of the rows compared, no guesses."""

from __future__ import annotations

from collections.abc import Sequence
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


def prompt_seconds(row: Row) -> float:
    """Seconds of steps with prompts in them, per prompt."""
    share = row["stage_share"]["prefill"] + row["stage_share"]["mixed"]
    return share * row["elapsed_s"] / row["requests"]


def millis(spread: dict[str, float] | None, which: str) -> str:
    """One number of a distribution, which is None where no request got that far."""
    return f"{1e3 * spread[which]:.1f} ms" if spread else "(unknown)"


def decoding(row: Row) -> str:
    """How many sequences share a decode step, and how long one takes."""
    counts = [sample["running"] for sample in row["pages_over_time"]]
    mean = sum(counts) / max(1, len(counts))
    return (
        f"{name(row)} decodes {mean:.1f} sequences at once, a token every {millis(row['token_gap_s'], 'p50')}"
    )


def throughput(ours: Row, theirs: Row, wanted: float) -> str:
    said = f"{shares(ours)}; {shares(theirs)}. On average {decoding(theirs)} (median); {decoding(ours)}."
    if ours["stage_share"]["idle"] > IDLE:
        return f"{said} Ours was not at its limit."
    prompts = ours["stage_share"]["prefill"] + ours["stage_share"]["mixed"]
    bound = ours["output_tok_s"] / prompts / theirs["output_tok_s"] if prompts else float("inf")
    taken = prompt_seconds(ours)
    needed = wanted * theirs["output_tok_s"] * ours["requests"] / ours["output_tokens"]
    return (
        f"{said} Had all its time gone into steps with prompts, as fast as they were, it would be {bound:.1f} times; "
        f"at most {ours['peak_running']} requests ran at once against {theirs['peak_running']}. "
        f"{wanted:g} times needs {needed:.0f} prompts per second; at {1e3 * taken:.1f} ms of such steps for each, "
        f"{1 / taken if taken else float('inf'):.0f} are the most."
    )


def ttft_ratio(ours: Row, theirs: Row) -> float:
    return theirs["ttft_s"]["mean"] / ours["ttft_s"]["mean"]


def piled_up(pairs: Sequence[tuple[Row, Row]], worst: Row | None) -> str:
    """For a ratio of mean TTFT taken at `worst`, which the slower policy does not sustain; pairs are (ours, theirs)."""
    if worst is None or worst["sustained"]:
        return ""
    calm = [(a, b) for a, b in pairs if b["sustained"]][-1:]
    held = "".join(
        f" At {b['rate']:g}/s, the highest rate it sustains, it is {ttft_ratio(a, b):.1f} times.{growing(b)}"
        for a, b in calm
    )
    return (
        f"{name(worst)} is overloaded: its TTFT is what piled up while requests arrived for {worst['window_s']:g} s, "
        f"and would grow with that time.{held}"
    )


def over_rates(best: Sequence[tuple[Row, Row]], chosen: Row | None) -> str:
    """(ours, the static policy with the lowest mean TTFT) at every common rate, and how `chosen` stood at its rate."""
    if chosen is None:
        return ""
    each = ", ".join(f"{ttft_ratio(a, b):.2f} at {b['rate']:g}/s ({b['policy']})" for a, b in best)
    return f"Against the lowest mean TTFT of any static policy it is {each}.{growing(chosen)}"


def growing(row: Row) -> str:
    """Whether a queue was growing as arrivals ended: a rate can be within the limit until then, and only until then."""
    last = [s for s in row["pages_over_time"] if s["time_s"] <= row["window_s"]][-1:]
    if not last or last[0]["waiting"] <= last[0]["running"]:
        return ""
    return (
        f" As arrivals ended after {row['window_s']:g} s, {last[0]['waiting']} requests waited for {row['policy']} at "
        f"{row['rate']:g}/s and {last[0]['running']} ran: over a longer time it would not sustain that rate."
    )


def not_driven(rows: Sequence[Row]) -> str:
    """`rows`: the highest of each policy that was not driven beyond what it can do."""
    known = "; ".join(f"{name(row)}, {row['output_tok_s']:.0f} tok/s" for row in rows)
    return f"Left out, not driven beyond what they can do: {known}." if known else ""


def piling(row: Row) -> str:
    """Why a sustained rate would not be with more time: prompts came faster than they can be served."""
    came, most = row["requests"] / row["window_s"], 1 / max(prompt_seconds(row), 1e-9)
    if came <= most:
        return ""
    return (
        f"{row['rate']:g}/s held for the {row['window_s']:g} s that requests arrived, not for longer: {came:.1f} came "
        f"per second, and steps with prompts took {1e3 / most:.1f} ms for each, enough for {most:.0f}, so a queue grew."
    )


def no_limit(ours: Row, full: Row) -> str:
    """Both caches sustain the same rate, the highest measured: what differs there."""

    def side(row: Row) -> str:
        taken, kv = prompt_seconds(row), row["mean_kv_bytes"] / 2**30
        return (
            f"{row['output_tok_s']:,.0f} generated tok/s, mean TPOT {millis(row['tpot_s'], 'mean')}, "
            f"{row['finished']} of {row['requests']} requests finished in time, {kv:.1f} GiB of KV on average, at most "
            f"{pool(row):.0%} of the pool, {1e3 * taken:.1f} ms of steps with prompts for each, enough for "
            f"{1 / max(taken, 1e-9):.0f} per second"
        )

    return (
        f"Both sustain {ours['rate']:g}/s, and no higher rate was measured: no limit was found. There, compressed: "
        f"{side(ours)}. Uncompressed: {side(full)}."
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
    """`last`: at the highest rate that is sustained, None if none is; `failed`: at the next one, None if no higher was
    measured. One of them is there."""
    if failed is None:
        return f"No rate above {last['rate']:g}/s was measured."
    late, most, used = failed["ttft_s"]["p99"], failed["peak_running"], pool(failed)
    return (
        f"{shares(failed)}; p99 TTFT {late:.1f} s, at most {most} requests at once, {used:.0%} of the KV pool, "
        f"a token every {millis(failed['token_gap_s'], 'p50')} (median)."
    )


def against_full(pairs: Sequence[tuple[Row, Row]], at: Row | None) -> str:
    """Memory beside the uncompressed cache's, at the rate of `at`; pairs are (ours, uncompressed)."""
    same = [(a, b) for a, b in pairs if at and a["rate"] == at["rate"]]
    return "".join(
        f"Against the uncompressed cache at {a['rate']:g}/s it is {1 - a['mean_kv_bytes'] / b['mean_kv_bytes']:.2f}: "
        "holding pages keeps the whole context and the compressed one."
        for a, b in same
    )


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
