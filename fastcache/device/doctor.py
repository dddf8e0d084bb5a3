"""Say what this machine can run: torch, CUDA, GPU, attention, sgl_kernel, green contexts, and what is missing.

`diagnose` is pure over `Facts` and the needs of a configuration. Exit code 0 when everything the configuration
needs is here, 1 when not, with what to install; without a configuration nothing but the CPU run is needed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastcache.device.doctor_facts import Facts, gather
from fastcache.errors import ConfigError

GREENCTX_VARIANTS = ("greenctx-only", "auto-tune+greenctx", "triad")
MARKS = {True: "ok", False: "MISSING", None: "-"}
GPU_TORCH = "install a CUDA build of torch (pip install torch) and the NVIDIA driver"


@dataclass(frozen=True)
class Needs:
    """What a configuration asks of the machine."""

    cuda: bool = False
    attention: str = "auto"
    greenctx: bool = False
    require_greenctx: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Needs:
        """Needs of a workflow configuration (config/config.yaml). Absent sections need nothing."""
        engine, greenctx = config.get("engine") or {}, config.get("greenctx") or {}
        variants = config.get("variants") or GREENCTX_VARIANTS
        return cls(
            str(engine.get("device", "auto")).startswith("cuda"),
            str(engine.get("attention_backend", "auto")),
            any(variant in GREENCTX_VARIANTS for variant in variants),
            bool(greenctx.get("require", False)),
        )


@dataclass(frozen=True)
class Check:
    """One line of the answer. `ok` None: worth knowing, nothing to judge. `fix` says what to do when not ok."""

    name: str
    ok: bool | None
    found: str
    needed: bool = False
    fix: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All checks, the verdict, and one line that says it."""

    headline: str
    ok: bool
    checks: tuple[Check, ...]
    facts: Facts

    def to_dict(self) -> dict[str, Any]:
        checks = [asdict(check) for check in self.checks]
        return {"headline": self.headline, "ok": self.ok, "checks": checks, "facts": self.facts.to_dict()}

    def text(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [self.headline, ""]
        for check in self.checks:
            lines.append(f"  {check.name:<{width}}  {MARKS[check.ok]:<7}  {check.found}")
            if check.fix and (check.ok is False):
                lines.append(f"  {'':<{width}}           -> {check.fix}")
        return "\n".join(lines) + "\n"


def diagnose(facts: Facts, needs: Needs = Needs()) -> Diagnosis:
    """Judge the facts against the needs. Pure."""
    checks = (
        Check("python", None, facts.python),
        Check("torch", None, f"{facts.torch} (CUDA {facts.torch_cuda or 'none: a CPU build'})"),
        _gpu(facts, needs),
        *_attention(facts, needs),
        _sgl(facts),
        Check("sgl_kernel shim", None, f"{facts.shim['status']}: {facts.shim['reason']}"),
        Check("C++ compiler", None, facts.compiler or "none (only a shim needs one)"),
        Check("cuda-bindings", None, facts.cuda_bindings or "not installed"),
        *_split(facts),
        _green_contexts(facts, needs),
        *(_attempt(attempt) for attempt in facts.attempts),
    )
    lacking = [check for check in checks if check.needed and check.ok is False]
    return Diagnosis(_headline(facts, lacking), not lacking, checks, facts)


def _gpu(facts: Facts, needs: Needs) -> Check:
    if not facts.cuda_visible:
        driver = f"driver {facts.driver}" if facts.driver else "no NVIDIA driver"
        return Check(
            "GPU", False if needs.cuda else None, f"none visible to torch ({driver})", needs.cuda, GPU_TORCH
        )
    found = f"{facts.gpu}, compute capability {facts.capability}, driver {facts.driver or 'unknown'}"
    return Check("GPU", True, found, needs.cuda)


def _attention(facts: Facts, needs: Needs) -> list[Check]:
    checks = []
    for name, there in facts.attention.items():
        needed = needs.attention == name
        ok = True if there else (False if needed else None)
        fix = None if there else "pip install 'fastcache[gpu]'"
        checks.append(Check(f"attention: {name}", ok, "available" if there else "not installed", needed, fix))
    return checks


def _sgl(facts: Facts) -> Check:
    match = (
        f"the wheel made for torch {facts.torch} is {facts.sgl_match}"
        if facts.sgl_match
        else (f"no release is made for torch {facts.torch}")
    )
    if facts.sgl_version is None:
        return Check("sgl_kernel", None, f"not installed; {match}")
    kind = "" if facts.sgl_complete else ", the green-context library only"
    return Check("sgl_kernel", None, f"{facts.sgl_version}{kind}; {match}")


def _split(facts: Facts) -> list[Check]:
    if facts.granularity is None:
        return []
    sms = facts.granularity
    found = (
        f"{sms['total']}, split in steps of {sms['alignment']} (at least {sms['minimum']}; {sms['source']})"
    )
    checks = [Check("SMs", None, found)]
    if facts.max_connections == "1":
        found = "CUDA_DEVICE_MAX_CONNECTIONS=1: all streams share one hardware queue"
        checks.append(Check("hardware queues", False, found, fix="unset it, or set it to 32, before the run"))
    return checks


def _green_contexts(facts: Facts, needs: Needs) -> Check:
    won = next((attempt["provider"] for attempt in facts.attempts if attempt["ok"]), None)
    works = won is not None and won != "plain_streams"
    found = f"by {won}" if works else f"not available: {facts.provider_reason}"
    fix = None if works else _green_fix(facts)
    ok = works or (False if needs.require_greenctx else None)
    return Check("green contexts", ok, found, needs.require_greenctx, fix)


def _green_fix(facts: Facts) -> str:
    if not facts.cuda_visible:
        return GPU_TORCH
    wheel = f" or pip install --no-deps '{facts.sgl_match}'" if facts.sgl_match else ""
    return f"pip install 'cuda-bindings>=12.9'{wheel}; the driver must be 550 (CUDA 12.4) or newer"


def _attempt(attempt: Mapping[str, Any]) -> Check:
    return Check(f"  {attempt['provider']}", None, "works" if attempt["ok"] else str(attempt["cause"]))


def _headline(facts: Facts, lacking: list[Check]) -> str:
    if lacking:
        what = "; ".join(f"{check.name}: {check.found}" for check in lacking)
        return f"This configuration cannot run here. Missing: {what}."
    if not facts.cuda_visible:
        return "No CUDA GPU here, so no green contexts and no GPU timings; the CPU run works."
    return "Everything this configuration needs is here."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the whole diagnosis as JSON")
    parser.add_argument(
        "--config", type=Path, metavar="CONFIG.yaml", help="judge what this configuration needs"
    )


def run(args: argparse.Namespace) -> int:
    """`fastcache doctor`: 0 when everything needed is here, 1 when not."""
    # What a run would warn about is what this command prints.
    logging.getLogger("fastcache").setLevel(logging.ERROR)
    needs = Needs() if args.config is None else Needs.of(_read(args.config))
    diagnosis = diagnose(gather(), needs)
    sys.stdout.write(json.dumps(diagnosis.to_dict(), indent=1) + "\n" if args.json else diagnosis.text())
    return 0 if diagnosis.ok else 1


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as a configuration: {error}.") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} is not a configuration: a YAML mapping is expected.")
    return values
