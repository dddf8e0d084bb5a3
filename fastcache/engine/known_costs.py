"""Costs measured before, as tuning may begin with: a file of `fastcache cost`, if it is about this engine."""

from __future__ import annotations

from pathlib import Path

import torch

from fastcache.compression.cost import load_costs
from fastcache.config import EngineConfig
from fastcache.device.info import device_info
from fastcache.engine.observed import KnownCosts
from fastcache.errors import ConfigError

FACTS = ("model", "factor", "dtype", "context", "sequences_per_step", "prefill_seconds_per_token", "device")


def known_costs(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> KnownCosts | None:
    """What `config.costs` says, None without one.

    Errors: `ConfigError` for a file of another model, type, factor, method or device.
    """
    if config.costs is None:
        return None
    costs, facts = load_costs(Path(config.costs))
    missing = [name for name in FACTS if name not in facts]
    if missing:
        raise ConfigError(
            f"costs {config.costs!r} does not say {', '.join(missing)}; measure it again: {_how(config)}"
        )
    ours = {
        "model": Path(config.model).name,
        "dtype": str(dtype).removeprefix("torch."),
        "factor": round(1 / (1 - config.compression.compression_ratio), 3),
        "device": device_info(str(device))["name"],
    }
    theirs = {
        "model": Path(facts["model"]).name,
        "dtype": facts["dtype"],
        "factor": round(facts["factor"], 3),
        "device": facts["device"]["name"],
    }
    for name, value in ours.items():
        if value != theirs[name]:
            raise ConfigError(
                f"costs {config.costs!r} were measured with {name} {theirs[name]!r}, this engine has {value!r}: "
                + _how(config)
            )
    method = config.compression.method
    if method not in costs:
        raise ConfigError(
            f"costs {config.costs!r} has no method {method!r}, only {', '.join(sorted(costs))}: {_how(config)}"
        )
    tokens = facts["sequences_per_step"] * facts["context"]
    prefill_s = facts["prefill_seconds_per_token"] * tokens
    return KnownCosts(facts["sequences_per_step"], facts["context"], prefill_s, costs[method].seconds(tokens))


def _how(config: EngineConfig) -> str:
    return f"`fastcache cost --model {config.model} --output FILE` on this device, or leave `costs` out."
