"""What serving rows say beside the paper's claims. Pure functions of the table: nothing of ours is typed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import serving_reasons as reasons
from serving_rows import engines, measured, sustained_edge, sustained_rate, told_apart

Row = dict[str, Any]
HEADLINE_POLICY = "p1c1d8"  # the configuration behind the paper's headline
LOADED = 2.0  # a static policy still sustains a rate if its TPOT is within so many times its unloaded one
STABLE_RATE = 40.0  # requests per second up to which the paper calls itself stable
FULL = "full"
TRIAD, FIXED = "triad", "default"
ISOLATION = (
    ("TPOT", "tpot_s", 2.0),
    ("time between two tokens", "token_gap_s", 2.0),
    ("TTFT", "ttft_s", 1 / 1.2),
)
LOAD = 0.75  # of saturation: isolation is judged at the highest rate up to it


@dataclass(frozen=True)
class Claim:
    """A statement of arXiv:2503.08461, marked as theirs, or a target of ours (theirs empty), and what we measured.

    `reason`: for a miss, what the rows show about it. `open`: no limit was found, so more load could change the answer.
    `caveat`: what a reader must know to read the number rightly.
    """

    what: str
    theirs: str
    wanted: float
    ours: float | None
    where: str
    reason: str = ""
    open: bool = False
    caveat: str = ""

    @property
    def verdict(self) -> str:
        if self.ours is None:
            return "not measured"
        if self.open:
            return "not shown"
        return "reached" if self.ours >= self.wanted else "missed"


@dataclass(frozen=True)
class Found:
    """A ratio of two rows, ours first. An empty one was not measured."""

    value: float | None = None
    ours: Row | None = None
    theirs: Row | None = None

    @property
    def where(self) -> str:
        if self.ours is None:
            return ""
        rates = [f"{row['rate']:g}" for row in (self.ours, self.theirs)]
        at = rates[0] if rates[0] == rates[1] else " against ".join(rates)
        policy = "" if self.theirs["policy"] == self.ours["policy"] else f", {self.theirs['policy']}"
        return f"{policy}, at {at} requests/s"


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Per model and compressed setting that was run under `dynamic` or `triad`, what can be compared. Rates that were
    measured while something else kept the CPU busy are left out."""
    found: list[Claim] = []
    calm = told_apart([row for row in rows if not row["host_busy"]])
    for model, policy, setting, release in engines(calm):
        if policy == "dynamic" and setting != FULL and release:
            found += _of_setting([row for row in calm if row["model"] == model], model, setting)
        if policy == TRIAD and release:
            found += _isolation([row for row in calm if row["model"] == model], model, setting)
    return found


def _of_setting(rows: Sequence[Row], model: str, setting: str) -> list[Claim]:
    def own(policy: str = "dynamic", release: bool = True, setting: str = setting) -> list[Row]:
        return measured(rows, setting=setting, policy=policy, immediate_release=release)

    ours, first, full = own(), own(HEADLINE_POLICY), own(setting=FULL)
    policies = {row["policy"] for row in rows if row["policy"].startswith("p")}
    statics = [found for policy in sorted(policies) if (found := own(policy))]
    edges = sustained_edge(ours), sustained_edge(full)
    held = _memory(ours, own(release=False))
    best, same = _against_statics(ours, statics), _most(ours, first, reasons.ttft_ratio)
    most, over_static = _saturation(ours, [first]), _saturation(ours, statics)
    ttft, speed = reasons.first_token, reasons.throughput
    at_ease = [row for own in statics if not driven(own) for row in own[-1:]]
    said = [
        _claim(f"mean TTFT, {HEADLINE_POLICY} over dynamic", "up to 19.3 times lower", 19.3, same, ttft),
        _claim(
            f"generated tok/s, dynamic over {HEADLINE_POLICY}",
            "up to 12.1 times",
            12.1,
            most,
            partial(speed, wanted=12.1),
        ),
        _claim(
            "share of KV memory in use saved by immediate release", "20 % less", 0.2, held, reasons.memory
        ),
        _sustained(edges[0]),
        _claim("mean TTFT, best static policy over dynamic", "", 5.0, best, ttft),
        _claim(
            "generated tok/s at saturation, dynamic over the best static policy",
            "",
            1.5,
            over_static,
            partial(speed, wanted=1.5),
        ),
        _over_full(*edges),
    ]
    said[0] = replace(said[0], caveat=reasons.piled_up(_pairs(ours, first), same.theirs))
    said[2] = replace(said[2], caveat=reasons.against_full(_pairs(ours, full), held.ours))
    said[4] = replace(said[4], caveat=reasons.over_rates(_lowest(ours, statics), best.theirs))
    said[5] = replace(said[5], caveat=reasons.not_driven(at_ease))
    where = f"{model}, {setting}"
    # A setting that was run under one policy alone was not meant to be compared with others.
    return [replace(claim, where=where + claim.where) for claim in said if claim.ours is not None or statics]


def _claim(what: str, theirs: str, wanted: float, found: Found, why: Callable[[Row, Row], str]) -> Claim:
    missed = found.value is not None and found.value < wanted
    reason = why(found.ours, found.theirs) if missed else ""
    return Claim(what, theirs, wanted, found.value, found.where, reason)


def _sustained(edge: tuple[Row | None, Row | None]) -> Claim:
    """Zero where not even the lowest rate is sustained."""
    last, failed = edge
    rate = last["rate"] if last else 0.0 if failed else None
    unknown = last is not None and failed is None and rate < STABLE_RATE
    reason = reasons.sustained(*edge) if rate is not None and rate < STABLE_RATE else ""
    caveat = reasons.piling(last) if last else ""
    return Claim(
        "sustained rate, requests per second", "stable to 40", STABLE_RATE, rate, "", reason, unknown, caveat
    )


def _over_full(ours: tuple[Row | None, Row | None], full: tuple[Row | None, Row | None]) -> Claim:
    """Open while one that was not driven beyond its limit could change the answer."""
    what, wanted = "sustained rate over that of the uncompressed cache", 1.5
    if ours[0] is None or full[0] is None:
        return Claim(what, "", wanted, None, "")
    gain = ours[0]["rate"] / full[0]["rate"]
    where = f", at {ours[0]['rate']:g} against {full[0]['rate']:g} requests/s"
    unknown = (full[1] is None and (ours[1] is None or gain >= wanted)) or (ours[1] is None and gain < wanted)
    if full[1] is None and ours[1] is None and gain != 1:
        return Claim(what, "", wanted, None, f"{where}: no limit was found")
    if full[1] is None and ours[1] is None:
        return Claim(what, "", wanted, gain, where, reasons.no_limit(ours[0], full[0]), open=True)
    reason = reasons.over_full(ours, full) if unknown or gain < wanted else ""
    return Claim(what, "", wanted, gain, where, reason, unknown)


def _pairs(ours: Sequence[Row], theirs: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of the same rate."""
    by_rate = {row["rate"]: row for row in theirs}
    return [(row, by_rate[row["rate"]]) for row in ours if row["rate"] in by_rate]


def _isolation(rows: Sequence[Row], model: str, setting: str) -> list[Claim]:
    """What decoding is spared of other requests' prefill, against the same engine that takes prompts first."""
    ours, fixed = (measured(rows, setting=setting, policy=p, immediate_release=True) for p in (TRIAD, FIXED))
    most = [row["requests_s"] for row in fixed if row["finished"] < row["requests"] or not row["sustained"]]
    calm = [(a, b) for a, b in _pairs(ours, fixed) if most and b["rate"] <= LOAD * max(most)]
    pair = [(a, b) for a, b in calm if a["tpot_s"] and b["tpot_s"]][-1:]
    where, why = f"{model}, {setting}", reasons.isolation
    said = [
        (
            f"p99 {what}, prompts first over triad",
            wanted,
            [(b[name]["p99"] / a[name]["p99"], a, b) for a, b in pair],
        )
        for what, name, wanted in ISOLATION
    ]
    speed = [(a["throughput_tok_s"] / b["throughput_tok_s"], a, b) for a, b in pair]
    said.append(("throughput, triad over prompts first", 0.97, speed))
    found = [_claim(what, "", wanted, Found(*(each[0] if each else ())), why) for what, wanted, each in said]
    return [replace(claim, where=where + claim.where) for claim in found]


def _most(ours: Sequence[Row], theirs: Sequence[Row], ratio: Callable[[Row, Row], float]) -> Found:
    pairs = _pairs(ours, theirs)
    return max((Found(ratio(a, b), a, b) for a, b in pairs), key=lambda found: found.value, default=Found())


def _lowest(ours: Sequence[Row], statics: Sequence[Sequence[Row]]) -> list[tuple[Row, Row]]:
    """At each common rate ours, and the static policy with the lowest mean TTFT."""
    best: dict[float, tuple[Row, Row]] = {}
    for a, b in (pair for own in statics for pair in _pairs(ours, own)):
        if b["rate"] not in best or b["ttft_s"]["mean"] < best[b["rate"]][1]["ttft_s"]["mean"]:
            best[b["rate"]] = (a, b)
    return [best[rate] for rate in sorted(best)]


def _memory(ours: Sequence[Row], held: Sequence[Row]) -> Found:
    """The least over the rates that both sustain: overloaded engines hold other requests."""
    pairs = [(a, b) for a, b in _pairs(ours, held) if a["sustained"] and b["sustained"]]
    saved = (Found(1 - a["mean_kv_bytes"] / b["mean_kv_bytes"], a, b) for a, b in pairs)
    return min(saved, key=lambda found: found.value, default=Found())


def _against_statics(ours: Sequence[Row], statics: Sequence[Sequence[Row]]) -> Found:
    """Mean TTFT over ours at the highest rate that a static policy sustains, its TPOT within `LOADED` times its
    unloaded one; of several such policies, against the one with the lowest TTFT."""
    kept = []
    for own in statics:
        unloaded = own[0]["tpot_s"]
        top = sustained_rate(own)
        if unloaded is None or top is None:
            continue
        limit = LOADED * unloaded["mean"]
        calm = [r for r in own if r["rate"] <= top and r["tpot_s"] and r["tpot_s"]["mean"] <= limit]
        kept += _pairs(ours, calm)[-1:]
    if not kept:
        return Found()
    a, b = max(kept, key=lambda pair: (pair[1]["rate"], -pair[1]["ttft_s"]["mean"]))
    return Found(reasons.ttft_ratio(a, b), a, b)


def driven(own: Sequence[Row]) -> bool:
    """Whether these rows of one engine go beyond what it can do."""
    return own[-1]["finished"] < own[-1]["requests"] or not own[-1]["sustained"]


def _saturation(ours: Sequence[Row], statics: Sequence[Sequence[Row]]) -> Found:
    """The most that each can do; a static policy that was not driven beyond what it can do is left out."""
    known = [own for own in statics if own and driven(own)]
    if not ours or not known:
        return Found()
    a = max(ours, key=lambda row: row["output_tok_s"])
    b = max((row for own in known for row in own), key=lambda row: row["output_tok_s"])
    return Found(a["output_tok_s"] / b["output_tok_s"], a, b)
