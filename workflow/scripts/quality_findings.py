"""What the quality rows say: points with a score and a price, and the best method for every budget. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
# The score a figure shows: retrieval first, since perplexity saturates; else how far the distribution stays the same.
SCORES = (
    ("shapes", "accuracy"),
    ("needles4", "accuracy"),
    ("needle", "accuracy"),
    ("kv_lookup", "accuracy"),
    ("continuation", "top1"),
)
NAMES = {
    ("shapes", "accuracy"): "questions about pictures answered",
    ("needles4", "accuracy"): "needles found, of four per context",
    ("needle", "accuracy"): "needles found",
    ("kv_lookup", "accuracy"): "keys looked up",
    ("continuation", "top1"): "same likeliest next token as the whole cache",
}
# Standard errors of a difference that tell two scores apart; the best of several is flattered, so one would be few.
APART = 2.0


def score_of(rows: Sequence[Row]) -> tuple[str, str] | None:
    """(task, field) of the first score that some row has and no row says may not be used."""
    for task, field in SCORES:
        found = [row["tasks"][task] for row in rows if task in row["tasks"]]
        if found and all(result["skipped"] is None for result in found):
            return task, field
    return None


def points(rows: Sequence[Row], speed: Sequence[Row] = ()) -> list[Row]:
    """A point per ok row: its score, its price in KV bytes, and the throughput of the speed cells that ran the same
    model, method, settings and ratio (the median over cells, relative to their baselines); None where there is none."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        ok = [row for row in rows if row["model"] == model and row["status"] == "ok"]
        score = score_of(ok)
        for row in ok if score else ():
            result = row["tasks"].get(score[0], {})
            found.append(
                {
                    "cell_id": row["cell_id"],
                    "model": model,
                    "label": row["label"],
                    "guard": row["guard"] or row["method"] == "full",
                    "compression_ratio": row["compression_ratio"],
                    "score_name": NAMES[score],
                    "score": result.get(score[1]),
                    "score_se": result.get(f"{score[1]}_se"),
                    "kl": row["tasks"].get("continuation", {}).get("kl"),
                    "kept": row["kept"],
                    "kv_bytes_share": row["kv_bytes_share"],
                    "kv_bytes_per_token": row["kv_bytes_per_token"],
                    "speedup": _speedup(row, speed),
                }
            )
    return found


def _speedup(row: Row, speed: Sequence[Row]) -> float | None:
    values = sorted(
        other["speedup_vs_baseline"]
        for other in speed
        if other["speedup_vs_baseline"] is not None and _settings(other) == _quality_settings(row)
    )
    return values[(len(values) - 1) // 2] if values else None


def _quality_settings(row: Row) -> tuple[Any, ...]:
    cell, ratio = row["cell"], row["compression_ratio"]
    if row["method"] == "full":
        return (row["model"], None, None, {}, None, row["kv_dtype"])
    ratio = None if ratio is None else round(ratio, 4)
    return (row["model"], row["method"], ratio, cell["method_params"], row["head_budgets"], row["kv_dtype"])


def _settings(row: Row) -> tuple[Any, ...]:
    cell, factor = row["cell"], row["compression_factor"]
    if row["variant"] not in ("baseline", "compression-only"):
        return ()
    ratio = None if factor is None else round(1 - 1 / factor, 4)
    params, heads = cell.get("method_params") or {}, cell.get("head_budgets")
    return (row["model"], row["method"], ratio, params, heads, cell.get("kv_dtype") or "auto")


def best_per_budget(found: Sequence[Row]) -> list[Row]:
    """For each model and distinct share of KV bytes (to the percent) the best method, beside what the whole cache does
    and the best guard that holds no more bytes."""
    lines = []
    for model in dict.fromkeys(point["model"] for point in found):
        own = [p for p in found if p["model"] == model and p["score"] is not None]
        full = next((p for p in own if p["label"] == "full"), None)
        budgets: dict[float, list[Row]] = {}
        for point in own:
            if not point["guard"]:
                budgets.setdefault(round(point["kv_bytes_share"], 2), []).append(point)
        for share in sorted(budgets, reverse=True):
            best = max(budgets[share], key=lambda p: p["score"])
            loss = None if full is None else full["score"] - best["score"]
            beside = _beside_guard(best, own, share)
            lines.append({**best, "budget": share, "of": len(budgets[share]), "loss": loss} | beside)
    return lines


def _beside_guard(best: Row, own: Sequence[Row], share: float) -> Row:
    """The best guard within `share`, and whether `best` beats it: yes, no, or not told apart. The errors are taken as
    independent, which asks for more than paired ones would."""
    guards = [
        p for p in own if p["guard"] and p["label"] != "full" and round(p["kv_bytes_share"], 2) <= share
    ]
    if not guards:
        return {"rival": None, "beats": None}
    rival = max(guards, key=lambda p: (p["score"], p["kv_bytes_share"]))
    errors = (best["score_se"], rival["score_se"])
    if None in errors:
        return {"rival": rival, "beats": None}
    difference = best["score"] - rival["score"]
    clear = abs(difference) > APART * math.hypot(*errors)
    return {"rival": rival, "beats": ("yes" if difference > 0 else "no") if clear else "not told apart"}


def pictures(rows: Sequence[Row]) -> list[Row]:
    """For each model that was asked about pictures: its rows, the kinds of question, and examples with every answer."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model and "shapes" in row["tasks"]]
        if own:
            results = [row["tasks"]["shapes"] for row in own]
            kinds = list(dict.fromkeys(kind for result in results for kind in result["kinds"]))
            shown = results[0]["examples"]
            # Rows of another seed or number of pictures were asked other questions.
            alike = [row for row in own if _asked(row) == _asked(own[0])]
            found.append({"model": model, "rows": own, "kinds": kinds, "examples": shown, "alike": alike})
    return found


def _asked(row: Row) -> list[tuple[str, str]]:
    return [(each["picture"], each["question"]) for each in row["tasks"]["shapes"]["examples"]]
