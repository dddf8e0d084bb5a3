"""The proof on a machine without a GPU, and its bookkeeping on one that is imitated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastcache.device import green_context, proof
from fastcache.device.partition import Partition
from fastcache.device.probe import Sample
from fastcache.device.sms import DeviceSms
from fastcache.errors import ConfigError, OutputPathError, UnsupportedCombination

NO_GPU = "the device is a CPU"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(output: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    proof.add_arguments(parser)
    return proof.run(parser.parse_args(["--output", str(output), *more]))


def test_without_a_gpu_it_records_why(tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "environment" / "greenctx.json"
    assert run(output) == 0
    record = json.loads(output.read_text())
    assert record["status"] == "unavailable" and record["passed"] is None and NO_GPU in record["reason"]
    assert record["splits"] == [] and record["schema"] == proof.SCHEMA
    assert [path.name for path in output.parent.iterdir()] == ["greenctx.json"]
    assert NO_GPU in capsys.readouterr().out


def test_without_a_gpu_it_is_an_error_where_required(tmp_path: Path, no_gpu: None) -> None:
    with pytest.raises(UnsupportedCombination, match=NO_GPU):
        run(tmp_path / "greenctx.json", "--require")


def test_an_output_that_cannot_be_written(tmp_path: Path, no_gpu: None) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputPathError, match="cannot be written"):
        run(tmp_path / "file" / "greenctx.json")


class FakeProbe:
    """Answers as an H100 would for a 104/28 split; `lie` breaks one answer."""

    device = "cuda:0"

    def __init__(self, lie: str | None = None) -> None:
        self.lie = lie

    def measure(self, stream: str, blocks: int) -> Sample:
        first, size = {"main": (0, 104), "compress": (104, 28)}[stream]
        if self.lie == "overlap" and stream == "compress":
            first = 100
        wall = 2000 if blocks <= size or self.lie == "capacity" else 4000
        return Sample(frozenset(range(first, first + min(blocks, size))), wall, 0, wall)

    def graph_ids(self, partition: Partition, stream: str, blocks: int) -> tuple[frozenset[int], bool]:
        return frozenset(range(132 if self.lie == "graph" else 104)), self.lie != "guard"

    def unnamed_graph_ids(self, stream: str, blocks: int) -> frozenset[int]:
        return frozenset(range(132))

    def delay(self, *_: object) -> float:
        return 80_000 if self.lie == "independence" else 65


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch):
    granted = {"main": 104, "compress": 28}
    made = Partition("main", "compress", "op", True, True, True, None, granted, granted)
    monkeypatch.setattr(green_context, "partition", lambda *_: made)
    errors = SimpleNamespace(value={"gemm": 0.0, "attention": 0.001})
    monkeypatch.setattr(proof, "compute_errors", lambda *_: errors.value)

    def measure(lie: str | None = None) -> dict:
        if lie == "compute":
            errors.value = {"gemm": float("nan")}
        return proof.prove_split(FakeProbe(lie), DeviceSms(132, 8, 8), 0.2, frozenset(range(132)), 80_000)

    return measure


def test_a_true_split_passes(split) -> None:
    record = split()
    assert record["passed"] and record["granted_sms"] == {"main": 104, "compress": 28}
    assert json.loads(json.dumps(record)) == record, "the record is plain JSON"


@pytest.mark.parametrize(
    ("lie", "parts"),
    [
        ("overlap", {"identity"}),
        ("capacity", {"capacity_main", "capacity_compress"}),
        ("graph", {"graph"}),
        ("guard", {"graph"}),
        ("independence", {"independence"}),
        ("compute", {"compute_main", "compute_compress"}),
    ],
)
def test_each_part_can_fail_the_proof_and_is_named(split, lie: str, parts: set[str]) -> None:
    record = split(lie)
    assert not record["passed"]
    assert {
        name for name, part in record.items() if isinstance(part, dict) and part.get("passed") is False
    } == parts
    (line,) = proof._failures({"passed": True}, {"passed": True}, [record])
    assert line == f"split 0.2: {', '.join(name for name in record if name in parts)}"


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch):
    """Run the memory part with a device whose free memory falls by `leak` bytes with every change of split."""
    import torch

    launches: list[str] = []
    leak = SimpleNamespace(bytes=0)
    made = Partition("main", "compress", "op", True, True, True)
    monkeypatch.setattr(green_context, "partition", lambda *_: made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda *_: (10**11 - leak.bytes * len(launches) // 2, 10**11)
    )
    probe = SimpleNamespace(
        device="cuda:0",
        buffers=lambda blocks: None,
        launch=lambda stream, *_: launches.append(stream),
    )

    def run_changes(changes: int, leaked: int = 0) -> dict:
        leak.bytes = leaked
        return proof.change_splits(probe, (0.2, 0.5), changes)

    return run_changes


@pytest.mark.parametrize(("changes", "samples"), [(4, 4), (20, 20), (39, 39), (200, 20), (1000, 20)])
def test_a_short_run_of_changes_has_samples_too(changed, changes: int, samples: int) -> None:
    record = changed(changes)
    assert record["passed"] and record["changes"] == changes and len(record["free_bytes"]) == samples


@pytest.mark.parametrize("changes", [20, 1000])
def test_a_leak_is_seen_in_a_short_and_in_a_long_run(changed, changes: int) -> None:
    assert not changed(changes, leaked=8 << 20)["passed"]


@pytest.mark.parametrize("changes", [0, 3, -1])
def test_too_few_changes_are_refused_before_anything_runs(tmp_path: Path, changes: int) -> None:
    with pytest.raises(ConfigError, match="4 changes"):
        run(tmp_path / "greenctx.json", f"--changes={changes}")
    assert not list(tmp_path.iterdir())


def test_a_proof_that_cannot_be_carried_out_is_recorded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(**_: object) -> dict:
        raise RuntimeError("CUDA error: an illegal\n memory access")

    monkeypatch.setattr(proof, "prove", fail)
    assert run(tmp_path / "greenctx.json") == 1
    record = json.loads((tmp_path / "greenctx.json").read_text())
    assert record["status"] == "failed" and record["passed"] is False and record["splits"] == []
    assert record["reason"] == "RuntimeError: CUDA error: an illegal memory access"
    assert record["reason"] in capsys.readouterr().out
