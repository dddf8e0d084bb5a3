"""What serving rows say beside the paper's claims. Pure functions of the table: nothing of ours is typed in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import serving_reasons as reasons

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

    `reason`: for a miss, what the rows show about it.
    """

    what: str
    theirs: str
    wanted: float
    ours: float | None
    where: str
    reason: str = ""

    @property
    def verdict(self) -> str:
        if self.ours is None:
            return "not measured"
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


def measured(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Ok rows with these fields, lowest rate first."""
    found = [r for r in rows if r["status"] == "ok" and all(r[k] == v for k, v in wanted.items())]
    return sorted(found, key=lambda row: row["rate"])


def engines(rows: Sequence[Row]) -> list[tuple[str, str, str, bool]]:
    """(model, policy, setting, immediate release), in order of appearance."""
    return list(dict.fromkeys((r["model"], r["policy"], r["setting"], r["immediate_release"]) for r in rows))


def sustained_rate(rows: Sequence[Row]) -> float | None:
    """The highest measured rate whose p99 TTFT is within the limit, and all lower ones too."""
    last, _ = sustained_edge(rows)
    return last["rate"] if last else None


def sustained_edge(rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """The row of the highest sustained rate, and the first one above it."""
    last = None
    for row in sorted(rows, key=lambda row: row["rate"]):
        if not row["sustained"]:
            return last, row
        last = row
    return last, None


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


def told_apart(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the lengths in the name of a model that served several workloads: only rows of the same requests
    can be compared."""
    asked: dict[str, set[str]] = {}
    for row in rows:
        asked.setdefault(row["model"], set()).add(json.dumps(row["cell"]["workload"], sort_keys=True))
    several = {model for model, workloads in asked.items() if len(workloads) > 1}
    return [row | {"model": _with_lengths(row)} if row["model"] in several else row for row in rows]


def _with_lengths(row: Row) -> str:
    workload = row["cell"]["workload"]
    lengths = " + ".join(
        f"{workload[part]['low']}-{workload[part]['high']}" for part in ("context", "output")
    )
    arrivals = "" if workload["arrivals"] == "poisson" else f", {workload['arrivals']} arrivals"
    return f"{row['model']} ({lengths} tokens{arrivals})"


def _of_setting(rows: Sequence[Row], model: str, setting: str) -> list[Claim]:
    def own(policy: str = "dynamic", release: bool = True, setting: str = setting) -> list[Row]:
        return measured(rows, setting=setting, policy=policy, immediate_release=release)

    ours, first, full = own(), own(HEADLINE_POLICY), own(setting=FULL)
    policies = {row["policy"] for row in rows if row["policy"].startswith("p")}
    statics = [found for policy in sorted(policies) if (found := own(policy))]
    edges = sustained_edge(ours), sustained_edge(full)
    held = _memory(ours, own(release=False))
    best, same = _against_statics(ours, statics), _most(ours, first, _ttft)
    most, over_static = _saturation(ours, [first]), _saturation(ours, statics)
    ttft, speed = reasons.first_token, reasons.throughput
    said = [
        _claim(f"mean TTFT, {HEADLINE_POLICY} over dynamic", "up to 19.3 times lower", 19.3, same, ttft),
        _claim(f"throughput, dynamic over {HEADLINE_POLICY}", "up to 12.1 times", 12.1, most, speed),
        _claim(
            "share of KV memory in use saved by immediate release", "20 % less", 0.2, held, reasons.memory
        ),
        _sustained(edges[0]),
        _claim("mean TTFT, best static policy over dynamic", "", 5.0, best, ttft),
        _claim("throughput at saturation, dynamic over the best static policy", "", 1.5, over_static, speed),
        _over_full(*edges),
    ]
    where = f"{model}, {setting}"
    # A setting that was run under one policy alone was not meant to be compared with others.
    return [replace(claim, where=where + claim.where) for claim in said if claim.ours is not None or statics]


def _claim(what: str, theirs: str, wanted: float, found: Found, why: Callable[[Row, Row], str]) -> Claim:
    missed = found.value is not None and found.value < wanted
    return Claim(
        what, theirs, wanted, found.value, found.where, why(found.ours, found.theirs) if missed else ""
    )


def _sustained(edge: tuple[Row | None, Row | None]) -> Claim:
    rate = edge[0]["rate"] if edge[0] else None
    missed = rate is not None and rate < STABLE_RATE
    reason = reasons.sustained(*edge) if missed else ""
    return Claim("sustained rate, requests per second", "stable to 40", STABLE_RATE, rate, "", reason)


def _over_full(ours: tuple[Row | None, Row | None], full: tuple[Row | None, Row | None]) -> Claim:
    """Not known while one that was not driven beyond its limit could change the answer."""
    what, wanted = "sustained rate over that of the uncompressed cache", 1.5
    if ours[0] is None or full[0] is None:
        return Claim(what, "", wanted, None, "")
    gain = ours[0]["rate"] / full[0]["rate"]
    where = f", at {ours[0]['rate']:g} against {full[0]['rate']:g} requests/s"
    if full[1] is None or (ours[1] is None and gain < wanted):
        return Claim(what, "", wanted, None, f"{where}, both sustained: no limit was found")
    reason = reasons.over_full(ours, full) if gain < wanted else ""
    return Claim(what, "", wanted, gain, where, reason)


def _ttft(ours: Row, theirs: Row) -> float:
    return theirs["ttft_s"]["mean"] / ours["ttft_s"]["mean"]


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
    return Found(_ttft(a, b), a, b)


def _saturation(ours: Sequence[Row], statics: Sequence[Sequence[Row]]) -> Found:
    """The most that each can do; a static policy that was not driven beyond what it can do is left out."""
    driven = [
        own
        for own in statics
        if own and (own[-1]["finished"] < own[-1]["requests"] or not own[-1]["sustained"])
    ]
    if not ours or not driven:
        return Found()
    a = max(ours, key=lambda row: row["output_tok_s"])
    b = max((row for own in driven for row in own), key=lambda row: row["output_tok_s"])
    return Found(a["output_tok_s"] / b["output_tok_s"], a, b)


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
