"""Tuning may start from a file of `fastcache cost`, if that is about the same engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastcache import LLM
from fastcache.compression.cost import MethodCost, save_costs
from fastcache.config import EngineConfig
from fastcache.device.info import device_info
from fastcache.engine.known_costs import known_costs
from fastcache.errors import ConfigError

METHOD = {"method": "knorm", "compression_ratio": 0.8}
RECORDED = Path(__file__).parents[2] / "results/published/h100-compression/costs.json"


def facts(model: str) -> dict:
    return {
        "model": model,
        "factor": 5.0,
        "dtype": "float32",
        "context": 100,
        "sequences_per_step": 4,
        "prefill_seconds_per_token": 1e-3,
        "device": {"name": device_info("cpu")["name"]},
    }


def costs_file(tmp_path, name: str, **changes) -> str:
    path = tmp_path / "costs.json"
    save_costs(path, {"knorm": MethodCost(1e-5, 2e-3, None)}, {**facts(name), **changes})
    return str(path)


def test_an_engine_starts_from_what_was_measured_before(tiny_model, tmp_path):
    folder = tiny_model("llama", 4, 2, 16, 48, 2, False)
    given = {"device": "cpu", "tuning": "all", "compression": METHOD, "dtype": "float32"}
    llm = LLM(folder, **given, costs=costs_file(tmp_path, str(folder)))
    costs = llm.decisions()["costs"]
    assert costs["prefill_s_per_token"] == pytest.approx(1e-3)
    assert costs["exposed"] == {"inline": pytest.approx(1e-5 + 2e-3 / 400)}
    assert LLM(folder, **given).decisions()["costs"]["exposed"] == {}


def test_the_recorded_file_is_understood(monkeypatch):
    recorded = json.loads(RECORDED.read_text())
    name, step_s = recorded["device"]["name"], recorded["measured"]["snapkv"]["step_seconds"]
    monkeypatch.setattr("fastcache.engine.known_costs.device_info", lambda device: {"name": name})
    config = EngineConfig(
        "qwen3-8b",
        tuning="all",
        costs=str(RECORDED),
        compression={"method": "snapkv", "compression_ratio": 0.8},
    )
    known = known_costs(config, torch.bfloat16, torch.device("cpu"))
    assert known.sequences * known.context <= 32_768
    assert known.inline_s == pytest.approx(step_s) and 0.7 < known.prefill_s < 0.8


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "another"}, "model 'another'"),
        ({"factor": 2.0}, "factor 2.0"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16'"),
        ({"device": {"name": "NVIDIA H100"}}, "device 'NVIDIA H100'"),
    ],
)
def test_a_file_about_another_engine_is_refused(tmp_path, changes, words):
    path = costs_file(tmp_path, "small", **changes)
    config = EngineConfig("/models/small", tuning="all", costs=path, compression=METHOD)
    with pytest.raises(ConfigError, match=words):
        known_costs(config, torch.float32, torch.device("cpu"))


def test_a_file_without_its_facts_is_refused(tmp_path):
    path = tmp_path / "costs.json"
    save_costs(path, {"knorm": MethodCost(1e-5, 2e-3, None)}, {"model": "small"})
    config = EngineConfig("small", tuning="all", costs=str(path), compression=METHOD)
    with pytest.raises(ConfigError, match="does not say factor, dtype, context"):
        known_costs(config, torch.float32, torch.device("cpu"))


def test_a_method_that_was_not_measured_is_named_and_so_is_a_use_without_tuning(tmp_path):
    path = costs_file(tmp_path, "small")
    config = EngineConfig("small", tuning="all", costs=path, compression=METHOD | {"method": "snapkv"})
    with pytest.raises(ConfigError, match="no method 'snapkv'"):
        known_costs(config, torch.float32, torch.device("cpu"))
    for given in ({}, {"tuning": "all"}):
        with pytest.raises(ConfigError, match="costs are what tuning starts from"):
            EngineConfig("small", costs=path, **given)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"tuning": "all", "tpot_bound_s": 0}, "positive number"),
        ({"tuning": "all", "tpot_bound_s": True}, "positive number"),
        ({"tuning": "compression", "tpot_bound_s": 0.03}, "kept by tuning 'all'"),
    ],
)
def test_a_bound_on_tpot_that_cannot_be_meant_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        EngineConfig("small", **given)
