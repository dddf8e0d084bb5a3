"""The doctor: verdicts on recorded environments, and the command on this one."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastcache.device import doctor, doctor_facts
from fastcache.device.doctor import Needs, diagnose
from fastcache.device.doctor_facts import Facts
from fastcache.errors import ConfigError

CPU = Facts(
    python="3.12.3",
    torch="2.13.0+cpu",
    torch_cuda=None,
    gpu=None,
    capability=None,
    driver=None,
    cuda_visible=False,
    attention={"torch-sdpa": True, "flashinfer": False},
    sgl_version=None,
    sgl_complete=None,
    sgl_match=None,
    cuda_bindings=None,
    granularity=None,
    shim={"status": "not needed", "reason": "torch is a CPU build", "forwarded": 0, "refused": {}},
    compiler="/usr/bin/c++",
    provider="none",
    provider_reason="the device is a CPU, which has no SMs to split",
    attempts=[{"provider": "cuda", "ok": False, "kind": "cpu_torch", "cause": "the device is a CPU"}],
)
H100 = replace(
    CPU,
    torch="2.11.0+cu130",
    torch_cuda="13.0",
    gpu="NVIDIA H100 80GB HBM3",
    capability="9.0",
    driver="580.159.04",
    cuda_visible=True,
    attention={"torch-sdpa": True, "flashinfer": True},
    sgl_match="sglang-kernel==0.4.2",
    cuda_bindings="13.0.3",
    granularity={"total": 132, "minimum": 8, "alignment": 8, "source": "driver"},
    provider="cuda_bindings",
    provider_reason=None,
    attempts=[
        {
            "provider": "sgl_kernel",
            "ok": False,
            "kind": "not_installed",
            "cause": "sgl_kernel is not installed",
        },
        {"provider": "cuda_bindings", "ok": True, "kind": None, "cause": None},
    ],
)
BROKEN = replace(
    H100,
    provider="plain_streams",
    provider_reason="cuda_bindings: cuda-bindings is not installed",
    attempts=[
        {
            "provider": "cuda_bindings",
            "ok": False,
            "kind": "not_installed",
            "cause": "cuda-bindings is not installed",
        },
        {"provider": "plain_streams", "ok": True, "kind": None, "cause": None},
    ],
)


def find(diagnosis: doctor.Diagnosis, name: str) -> doctor.Check:
    return next(check for check in diagnosis.checks if check.name.strip() == name)


def test_a_cpu_machine_in_one_line() -> None:
    diagnosis = diagnose(CPU)
    assert diagnosis.ok
    assert (
        diagnosis.headline == "No CUDA GPU here, so no green contexts and no GPU timings; the CPU run works."
    )
    assert "no SMs to split" in find(diagnosis, "green contexts").found


def test_a_gpu_machine_shows_chain_granularity_and_wheel() -> None:
    diagnosis = diagnose(H100, Needs(cuda=True, greenctx=True, require_greenctx=True))
    assert diagnosis.ok and diagnosis.headline == "Everything this configuration needs is here."
    assert find(diagnosis, "green contexts").found == "by cuda_bindings"
    assert "132, split in steps of 8" in find(diagnosis, "SMs").found
    assert "sglang-kernel==0.4.2" in diagnosis.text()
    assert "sgl_kernel is not installed" in diagnosis.text()


@pytest.mark.parametrize(
    ("facts", "needs", "missing", "fix"),
    [
        (CPU, Needs(cuda=True), "GPU", "CUDA build of torch"),
        (CPU, Needs(attention="flashinfer"), "attention: flashinfer", "fastcache[gpu]"),
        (CPU, Needs(require_greenctx=True), "green contexts", "NVIDIA driver"),
        (BROKEN, Needs(require_greenctx=True), "green contexts", "cuda-bindings>=12.9"),
    ],
)
def test_what_is_needed_and_missing_fails_with_what_to_install(
    facts: Facts, needs: Needs, missing: str, fix: str
) -> None:
    diagnosis = diagnose(facts, needs)
    assert not diagnosis.ok and missing in diagnosis.headline
    check = find(diagnosis, missing)
    assert check.ok is False and fix in check.fix and check.fix in diagnosis.text()


def test_a_fallback_that_is_allowed_is_told_and_not_an_error() -> None:
    diagnosis = diagnose(BROKEN, Needs(greenctx=True))
    assert diagnosis.ok
    assert "cuda-bindings is not installed" in find(diagnosis, "green contexts").found


def test_one_hardware_queue_is_a_warning() -> None:
    assert find(diagnose(replace(H100, max_connections="1")), "hardware queues").ok is False
    assert not any(check.name == "hardware queues" for check in diagnose(H100).checks)


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        ({}, Needs(greenctx=True)),
        ({"variants": ["baseline"]}, Needs()),
        (
            {"engine": {"device": "cuda:1", "attention_backend": "flashinfer"}, "variants": ["baseline"]},
            Needs(True, "flashinfer"),
        ),
        ({"variants": ["triad"], "greenctx": {"require": True}}, Needs(greenctx=True, require_greenctx=True)),
        ({"engine": None, "greenctx": None, "variants": ["compression-only"]}, Needs()),
    ],
)
def test_needs_of_a_configuration(config: dict, needs: Needs) -> None:
    assert Needs.of(config) == needs


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(arguments))


def test_the_command_here(capsys: pytest.CaptureFixture) -> None:
    assert run("--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] and answer["facts"]["torch"] and answer["facts"]["attempts"]


@pytest.mark.parametrize("facts", [CPU, H100])
def test_exit_code_and_json_agree(
    facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda: facts)
    config = tmp_path / "config.yaml"
    config.write_text("engine: {device: cuda}\nvariants: [triad]\n")
    code = run("--json", "--config", str(config))
    assert code == (0 if json.loads(capsys.readouterr().out)["ok"] else 1) == (0 if facts is H100 else 1)


@pytest.mark.parametrize("content", [None, "- a\n- b\n", "a: [1\n"])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        run("--config", str(path))


def test_attention_names_are_the_engines() -> None:
    """The doctor may not import the attention package; its table is held to that package's here."""
    from fastcache.attention.select import BACKENDS

    assert set(BACKENDS) <= set(doctor_facts.ATTENTION)
