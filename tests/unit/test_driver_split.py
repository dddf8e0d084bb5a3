"""Splits through cuda-bindings, against a libcuda.so.1 of our own: call order, granted counts, teardown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from native import fake_driver

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

PRELUDE = """
import json
from fastcache.device.providers import driver_split as d
from fastcache.device.providers.base import ProviderError
from fastcache.device.sms import plan_split
def show(**values): print(json.dumps(values))
"""
SPLIT = PRELUDE + "main, compress = d.create(0, plan_split(d.device_sms(0), {0}, {1}))\n"
SHOW = "show(main=main.sms, compress=compress.sms)\n"
CAUGHT = PRELUDE + (
    "try:\n    main, compress = d.create(0, plan_split(d.device_sms(0), 0.2, 0.8))\n"
    "except ProviderError as error:\n    show(kind=error.kind, cause=str(error))\n"
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    fake_driver(folder)
    return folder


class Child:
    """Runs code in a process that sees the fake driver; keeps its answer and the driver's call log."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log

    def __call__(self, code: str, **knobs: str) -> dict:
        self.log.unlink(missing_ok=True)
        settings = {f"FAKE_CUDA_{name}": value for name, value in knobs.items()}
        environment = (
            os.environ | settings | {"FAKE_CUDA_LOG": str(self.log), "LD_LIBRARY_PATH": str(self.folder)}
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def child(driver: Path, tmp_path: Path) -> Child:
    return Child(driver, tmp_path / "calls.log")


def test_a_whole_split_is_one_group_and_the_remainder(child: Child) -> None:
    assert child(SPLIT.format(0.2, 0.8) + SHOW) == {"main": 104, "compress": 28}
    assert child.calls == [
        "cuDeviceGetDevResource sms=132",
        "cuDeviceGetDevResource sms=132",
        "cuDevSmResourceSplitByCount min=104 of=132 -> 1x104 rest=28",
        "cuGreenCtxCreate ctx=1 sms=104",
        "cuGreenCtxStreamCreate stream=1 ctx=1 priority=0",
        "cuGreenCtxCreate ctx=2 sms=28",
        "cuGreenCtxStreamCreate stream=2 ctx=2 priority=0",
    ]


def test_the_compression_side_can_be_the_group(child: Child) -> None:
    assert child(SPLIT.format(0.12, 0.88) + SHOW) == {"main": 116, "compress": 16}
    assert "cuDevSmResourceSplitByCount min=16 of=132 -> 1x16 rest=116" in child.calls


def test_idle_sms_come_from_an_outer_group_that_does_not_stay(child: Child) -> None:
    assert child(SPLIT.format(0.25, 0.5) + SHOW) == {"main": 64, "compress": 32}
    assert child.calls[2:5] == [
        "cuDevSmResourceSplitByCount min=96 of=132 -> 1x96 rest=36",
        "cuGreenCtxCreate ctx=1 sms=96",
        "cuDevSmResourceSplitByCount min=64 of=96 -> 1x64 rest=32",
    ]
    assert child.calls[-1] == "cuGreenCtxDestroy ctx=1"


def test_granted_is_what_the_driver_says_not_what_was_asked(child: Child) -> None:
    assert child(SPLIT.format(0.2, 0.8) + SHOW, GRANT_LESS="2") == {"main": 102, "compress": 26}


def test_teardown_destroys_each_stream_before_its_context(child: Child) -> None:
    child(SPLIT.format(0.2, 0.8) + "d.destroy((main, compress))\nshow()")
    assert child.calls[-4:] == [
        "cuStreamDestroy stream=1",
        "cuGreenCtxDestroy ctx=1",
        "cuStreamDestroy stream=2",
        "cuGreenCtxDestroy ctx=2",
    ]


def test_foreign_streams_are_asked_for_their_context_first(child: Child) -> None:
    child(SPLIT.format(0.2, 0.8) + "d.destroy_by_stream((compress.stream,))\nshow()")
    assert child.calls[-3:] == [
        "cuStreamGetGreenCtx stream=2 -> ctx=2",
        "cuStreamDestroy stream=2",
        "cuGreenCtxDestroy ctx=2",
    ]


def test_the_fake_driver_notices_the_wrong_order(child: Child) -> None:
    """The order test above can fail: a context destroyed first leaks its stream."""
    wrong = "cu = d._driver()\ncu.cuGreenCtxDestroy(main.context)\ncu.cuStreamDestroy(cu.CUstream(main.stream))\nshow()"
    child(SPLIT.format(0.2, 0.8) + wrong)
    assert child.calls[-1] == "cuStreamDestroy stream=1 -> leaked"


@pytest.mark.parametrize(
    ("call", "undone"),
    [
        ("cuDevSmResourceSplitByCount", []),
        ("cuDevResourceGenerateDesc", []),
        ("cuGreenCtxCreate", []),
        ("cuGreenCtxStreamCreate", ["cuGreenCtxDestroy ctx=1"]),
        ("cuGreenCtxGetDevResource", ["cuGreenCtxDestroy ctx=1"]),
    ],
)
def test_a_failing_call_is_named_and_everything_made_is_undone(
    child: Child, call: str, undone: list[str]
) -> None:
    answer = child(CAUGHT, FAIL=call)
    assert answer["kind"] == "driver_error" and call in answer["cause"]
    assert [line for line in child.calls if "Destroy" in line] == undone


def test_a_driver_without_the_call_is_too_old(child: Child) -> None:
    answer = child(CAUGHT, MISSING="cuGreenCtxStreamCreate")
    assert answer["kind"] == "too_old" and "cuGreenCtxStreamCreate" in answer["cause"]


def test_no_device(child: Child) -> None:
    assert child(CAUGHT, SMS="0")["kind"] == "driver_error"


def test_no_driver_at_all(child: Child, tmp_path: Path) -> None:
    if Path("/usr/lib/x86_64-linux-gnu/libcuda.so.1").exists():
        pytest.skip("this machine has a real driver")
    child.folder = tmp_path
    assert child(CAUGHT)["kind"] == "no_driver"


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, [132, 8, 8]),
        ({"SMS": "108", "MIN": "0", "ALIGN": "0", "CC": "8"}, [108, 4, 2]),
        ({"SMS": "148", "MIN": "0", "ALIGN": "0", "CC": "10"}, [148, 8, 8]),
        ({"SMS": "114", "MIN": "16", "ALIGN": "16"}, [114, 16, 16]),
    ],
)
def test_granularity_is_the_drivers_or_the_tables(child: Child, knobs: dict, expected: list[int]) -> None:
    from cuda.bindings import driver

    if knobs.get("ALIGN", "0") != "0" and not hasattr(driver.CUdevResource().sm, "smCoscheduledAlignment"):
        pytest.skip("this cuda-bindings is older than the driver's granularity fields (13.0)")
    code = PRELUDE + "s = d.device_sms(0)\nshow(sms=[s.total, s.minimum, s.alignment], source=s.source)"
    assert child(code, **knobs) == {"sms": expected, "source": "driver"}
