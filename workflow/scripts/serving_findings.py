"""What serving rows say beside the paper's claims. Pure functions of the table: nothing of ours is typed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
HEADLINE_POLICY = "p1c1d8"  # the configuration behind the paper's headline
LOADED = 2.0  # a static policy still sustains a rate if its TPOT is within so many times its unloaded one
FULL = "full"


@dataclass(frozen=True)
class Claim:
    """A statement of arXiv:2503.08461, marked as theirs, or a target of ours (theirs empty), and what we measured."""

    what: str
    theirs: str
    wanted: float
    ours: float | None
    where: str

    @property
    def verdict(self) -> str:
        if self.ours is None:
            return "not measured"
        return "reached" if self.ours >= self.wanted else "missed"


def measured(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Ok rows with these fields, lowest rate first."""
    found = [r for r in rows if r["status"] == "ok" and all(r[k] == v for k, v in wanted.items())]
    return sorted(found, key=lambda row: row["rate"])


def engines(rows: Sequence[Row]) -> list[tuple[str, str, str, bool]]:
    """(model, policy, setting, immediate release), in order of appearance."""
    return list(dict.fromkeys((r["model"], r["policy"], r["setting"], r["immediate_release"]) for r in rows))


def sustained_rate(rows: Sequence[Row]) -> float | None:
    """The highest measured rate whose p99 TTFT is within the limit, and all lower ones too."""
    best = None
    for row in sorted(rows, key=lambda row: row["rate"]):
        if not row["sustained"]:
            break
        best = row["rate"]
    return best


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Per model and compressed setting that was run under `dynamic`, what can be compared. Rates that were measured
    while something else kept the CPU busy are left out."""
    rows = [row for row in rows if not row["host_busy"]]
    found: list[Claim] = []
    for model, policy, setting, release in engines(rows):
        if policy == "dynamic" and setting != FULL and release:
            found += _of_setting(rows, model, setting)
    return found


def _of_setting(rows: Sequence[Row], model: str, setting: str) -> list[Claim]:
    where = f"{model}, {setting}"
    ours = measured(rows, model=model, setting=setting, policy="dynamic", immediate_release=True)
    first = measured(rows, model=model, setting=setting, policy=HEADLINE_POLICY, immediate_release=True)
    ttft, at_ttft = _best(ours, first, lambda a, b: b["ttft_s"]["mean"] / a["ttft_s"]["mean"])
    speed, at_speed = _best(ours, first, lambda a, b: a["output_tok_s"] / b["output_tok_s"])
    static, at_static = _against_statics(rows, ours, model, setting)
    held = measured(rows, model=model, setting=setting, policy="dynamic", immediate_release=False)
    calm = [
        [row for row in own if row["sustained"]] for own in (ours, held)
    ]  # overloaded engines hold other requests
    memory, at_memory = _best(*calm, lambda a, b: 1 - a["mean_kv_bytes"] / b["mean_kv_bytes"])
    full = measured(rows, model=model, setting=FULL, policy="dynamic", immediate_release=True)
    rate, full_rate = sustained_rate(ours), sustained_rate(full)
    gain = rate / full_rate if rate and full_rate else None
    saturated = _saturation(rows, ours, model, setting)
    said = [
        Claim(
            f"mean TTFT, {HEADLINE_POLICY} over dynamic",
            "up to 19.3 times lower",
            19.3,
            ttft,
            f"{where}{at_ttft}",
        ),
        Claim(
            f"throughput, dynamic over {HEADLINE_POLICY}",
            "up to 12.1 times",
            12.1,
            speed,
            f"{where}{at_speed}",
        ),
        Claim(
            "share of KV memory in use saved by immediate release",
            "20 % less",
            0.2,
            memory,
            f"{where}{at_memory}",
        ),
        Claim("sustained rate, requests per second", "stable to 40", 40.0, rate, where),
        Claim("mean TTFT, best static policy over dynamic", "", 5.0, static, f"{where}{at_static}"),
        Claim("throughput at saturation, dynamic over the best static policy", "", 1.5, saturated, where),
        Claim("sustained rate over that of the uncompressed cache", "", 1.5, gain, where),
    ]
    return [claim for claim in said if claim.ours is not None]


def _best(
    ours: Sequence[Row], theirs: Sequence[Row], ratio: Callable[[Row, Row], float]
) -> tuple[float | None, str]:
    """The largest ratio over the rates that both were measured at, and at which."""
    by_rate = {row["rate"]: row for row in theirs}
    values = [(ratio(row, by_rate[row["rate"]]), row["rate"]) for row in ours if row["rate"] in by_rate]
    if not values:
        return None, ""
    value, rate = max(values)
    return value, f", at {rate:g} requests/s"


def _statics(rows: Sequence[Row], model: str, setting: str) -> dict[str, list[Row]]:
    names = {r["policy"] for r in rows if r["policy"].startswith("p") and r["model"] == model}
    found = {n: measured(rows, model=model, setting=setting, policy=n, immediate_release=True) for n in names}
    return {name: own for name, own in found.items() if own}


def _against_statics(
    rows: Sequence[Row], ours: Sequence[Row], model: str, setting: str
) -> tuple[float | None, str]:
    """Mean TTFT over ours at the highest rate that a static policy sustains within `LOADED` times its unloaded TPOT."""
    by_rate = {row["rate"]: row for row in ours}
    best: tuple[float, float, str] | None = (
        None  # rate, minus TTFT, policy: the highest rate, then the lowest TTFT
    )
    for name, own in _statics(rows, model, setting).items():
        if own[0]["tpot_s"] is None:
            continue
        unloaded = own[0]["tpot_s"]["mean"]
        kept = [
            r
            for r in own
            if r["tpot_s"] and r["tpot_s"]["mean"] <= LOADED * unloaded and r["rate"] in by_rate
        ]
        if kept:
            point = (kept[-1]["rate"], -kept[-1]["ttft_s"]["mean"], name)
            best = point if best is None else max(best, point)
    if best is None:
        return None, ""
    rate, minus_ttft, name = best
    return -minus_ttft / by_rate[rate]["ttft_s"]["mean"], f", {name} at {rate:g} requests/s"


def _saturation(rows: Sequence[Row], ours: Sequence[Row], model: str, setting: str) -> float | None:
    statics = [row["output_tok_s"] for own in _statics(rows, model, setting).values() for row in own]
    if not statics or not ours:
        return None
    return max(row["output_tok_s"] for row in ours) / max(statics)


def overview(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line per engine: what it sustains, and its best throughput and goodput over the rates."""
    lines = []
    for model, policy, setting, release in engines(rows):
        own = measured(rows, model=model, policy=policy, setting=setting, immediate_release=release)
        lines.append(
            {
                "model": model,
                "policy": policy,
                "setting": setting if release else f"{setting}, pages held",
                "rates": ", ".join(f"{row['rate']:g}" for row in own),
                "sustained": sustained_rate(own),
                "output_tok_s": max((row["output_tok_s"] for row in own), default=None),
                "goodput": max((row["goodput_requests_s"] for row in own), default=None),
                "ttft": own[-1]["ttft_s"] if own else None,
                "tpot": own[-1]["tpot_s"] if own else None,
                "peak_kv_bytes": max((row["peak_kv_bytes"] for row in own), default=None),
            }
        )
    return lines
