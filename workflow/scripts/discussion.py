"""The report's discussion: each paragraph is computed from the rows, and left out when they say nothing on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import deciding
from findings import (
    Comparison,
    Row,
    comparisons,
    compressing,
    count,
    describe,
    group_summary,
    grouped,
    kept_share,
    middle,
    percent,
    times,
    token_match,
)


def paragraphs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(topic, text) in reading order."""
    pairs = compressing(comparisons(rows))
    if not pairs and not deciding.against_fixed(rows):
        return []
    compared = (
        ("Speed", _speed),
        ("Batch size", lambda pairs: _by(pairs, "batch_size", "At batch {}")),
        ("Requests", lambda pairs: _by(pairs, "workload", "On {}")),
        ("Where the time goes", _latency),
        ("Methods", _methods),
    )
    topics = (
        *((topic, write(pairs)) for topic, write in compared if pairs),
        ("Memory", _memory(rows)),
        ("Green contexts", _green_contexts(rows)),
        ("Decisions", _decisions(rows)),
    )
    return [(topic, text) for topic, text in topics if text]


def _speed(pairs: Sequence[Comparison]) -> str:
    verdicts = Counter(pair.verdict for pair in pairs)
    worst, best = min(pairs, key=lambda p: p.speedup), max(pairs, key=lambda p: p.speedup)
    text, decided = "", [pair for pair in pairs if pair.noise is not None]
    if verdicts["undecided"]:
        text = (
            f"{verdicts['undecided']} of {len(pairs)} comparisons rest on a single repeat, so nothing tells a "
            "difference from noise there. "
        )
    if decided:
        noise, which = middle(pair.noise for pair in decided), " with repeats" if text else ""
        text += (
            f"Of {count(len(decided), 'comparison')}{which}, {verdicts['faster']} are faster than their baseline by "
            f"more than the spread of the repeats, {verdicts['slower']} are slower, and {verdicts['same']} lie within "
            f"it. That spread is {noise:.1%} of the median in the typical pair. "
        )
    rows = [pair.row for pair in pairs]
    low, high = (f"{times(pair.speedup)} ({describe(pair.row, rows)})" for pair in (worst, best))
    return f"{text}The range is {low} to {high}." if len(pairs) > 1 else f"{text}The speed-up is {low}."


def _by(pairs: Sequence[Comparison], key: str, phrase: str) -> str:
    groups = grouped(pairs, lambda row: row[key])
    if len(groups) < 2:
        return ""
    said = [
        f"{phrase.format(name)} the median is {times(group['speedup'])}" for name, group in groups.items()
    ]
    return "; ".join([said[0], *(text[0].lower() + text[1:] for text in said[1:])]) + "."


def _latency(pairs: Sequence[Comparison]) -> str:
    all_of = group_summary(pairs)
    if all_of["ttft"] is None:
        return ""
    text = (
        "Compression runs behind the prefill, so its own work is paid before the first token: the median time to "
        f"first token is {times(all_of['ttft'])} the baseline's."
    )
    if all_of["tpot"] is None:
        return text
    then = ":" if all_of["tpot"] < 1 else ", and yet"
    return (
        text + f" Decoding reads a shorter cache{then} a further token takes {times(all_of['tpot'])} as long."
    )


def _methods(pairs: Sequence[Comparison]) -> str:
    groups = grouped(pairs, lambda row: row["method"])
    said = []
    for name, group in groups.items():
        match = f" and {percent(group['agreement'])} equal tokens" if group["agreement"] is not None else ""
        said.append(f"{name} has {times(group['speedup'])} the baseline's throughput{match}")
    return "In the median cell, " + "; ".join(said) + "."


def _memory(rows: Sequence[Row]) -> str:
    compressed = [row for row in rows if row["kv_len_before"]]
    if not compressed:
        return ""
    before, after = (middle(row[name] for row in compressed) for name in ("kv_len_before", "kv_len_after"))
    freed = sum(row["pages_freed"] or 0 for row in compressed)
    lost = [row for row in compressed if token_match(row) is not None and token_match(row) < 0.5]
    text = (
        f"A typical request holds {before:,.0f} KV entries per head before compression and {after:,.0f} after it "
        f"({percent(middle(kept_share(row) for row in compressed))}); {freed:,} pages went back to the pool in one "
        "repeat of every cell."
    )
    if lost:
        text += f" In {len(lost)} of {len(compressed)} compressed cells, less than half of the output is unchanged."
    return text


def _green_contexts(rows: Sequence[Row]) -> str:
    asked = [row for row in rows if row["greenctx"] and row["status"] == "ok"]
    if not asked:
        return ""
    had = [row for row in asked if row["greenctx_available"]]
    text = f"{len(had)} of the {count(len(asked), 'measured cell')} that ask for green contexts had them."
    reasons = Counter(row["greenctx_reason"] for row in asked if row["greenctx_reason"])
    if reasons:
        listed = "; ".join(f"{reason} ({n} cells)" for reason, n in reasons.most_common())
        text += f" {'Of these' if len(had) == len(asked) else 'Otherwise'}: {listed}."
    text += _splits(rows, had)
    if not had:
        text += (
            " Their variants therefore ran without any split, and differ from compression-only in nothing that a "
            "partition could cause."
        )
        text += _same_work(rows)
    return text


def _splits(rows: Sequence[Row], had: Sequence[Row]) -> str:
    """What splits that bind gain or lose beside compression alone, for the same requests and method."""

    def work(row: Row) -> tuple[Any, ...]:
        return row["baseline_id"], row["method"], row["compression_factor"]

    alone = {
        work(row): row["throughput_tok_s"]
        for row in rows
        if row["variant"] == "compression-only" and row["status"] == "ok"
    }
    bound = [row for row in had if row["greenctx_main_stream"] and work(row) in alone and row["granted_sms"]]
    sms = sorted({row["granted_sms"]["compress"] for row in bound})
    if len(sms) < 2:
        return ""
    ratios = [row["throughput_tok_s"] / alone[work(row)] for row in bound]
    gains = sum(ratio > 1 for ratio in ratios)
    return (
        f" With {', '.join(map(str, sms[:-1]))} or {sms[-1]} SMs for compression and the others for everything else, "
        f"{times(min(ratios))} to {times(max(ratios))} of compression-only's throughput was left: "
        f"{gains or 'none'} of {count(len(ratios), 'cell')} gained."
    )


def _same_work(rows: Sequence[Row]) -> str:
    """Without partitions and decisions all compressed variants do the same, which makes them a control."""
    groups = grouped(
        [pair for pair in comparisons(rows) if pair.row["policy"] == "fixed"], lambda row: row["variant"]
    )
    if len(groups) < 2 or any(row["policy"] == "auto" for row in rows):
        return ""
    low, high = (times(pick(group["speedup"] for group in groups.values())) for pick in (min, max))
    return (
        f" Since all of them did the same work, the range of their medians, {low} to {high}, measures the noise "
        "between cells, and no smaller difference means anything here."
    )


def _decisions(rows: Sequence[Row]) -> str:
    named = [
        row for row in rows if row["variant"] in ("auto-tune+greenctx", "triad") and row["status"] == "ok"
    ]
    decided = [row for row in named if row["policy"] == "auto"]
    said = " ".join(filter(None, (deciding.sentence(deciding.against_fixed(rows)), _left_whole(decided))))
    if not named or len(decided) == len(named):
        return said
    return (
        f"In {len(named) - len(decided)} of the {count(len(named), 'cell')} of auto-tune+greenctx and triad the engine "
        "decided nothing by itself: they ran the fixed policy, as their rows say."
    ) + (f" {said}" if said else "")


def _left_whole(decided: Sequence[Row]) -> str:
    """Cells in which compression was not worth it, beside their baselines."""
    whole = [
        row for row in decided if row["compressed_requests"] == 0 and row["speedup_vs_baseline"] is not None
    ]
    if not whole:
        return ""
    low, high = (times(pick(row["speedup_vs_baseline"] for row in whole)) for pick in (min, max))
    kept = (decision for row in whole for decision in (row["decisions"] or {}).get("decisions", []))
    why = "; ".join(dict.fromkeys(each["reason"] for each in kept if each["about"] == "compression"))
    return (
        f"In {count(len(whole), 'cell')} with a baseline it compressed nothing{why and f' ({why})'}, and has "
        f"{low if low == high else f'{low} to {high}'} the baseline's throughput."
    )
