"""Clocks during a measurement: read through the driver's interface, summed up, absent where there is no GPU."""

from __future__ import annotations

import time
from types import SimpleNamespace

from fastcache.device import clocks
from fastcache.device.clocks import ClockWatch, read_sensors, summary


def test_a_cpu_has_no_clocks_to_watch():
    assert ClockWatch("cpu").stop() is None


def test_readings_become_ranges(monkeypatch):
    monkeypatch.setattr(clocks, "PERIOD_S", 0.001)
    watch = ClockWatch("cuda", read=lambda: {"sm_mhz": 1980.0, "power_w": 700.5})
    end = time.monotonic() + 30
    while not watch._readings and time.monotonic() < end:
        time.sleep(0.001)
    one = {"min": 1980.0, "median": 1980.0, "max": 1980.0}
    assert watch.stop()["sm_mhz"] == one


def test_a_sensor_that_fails_once_is_left_out():
    readings = [{"sm_mhz": 1.0, "power_w": 3.0}, {"sm_mhz": 2.0}]
    assert summary(readings) == {"sm_mhz": {"min": 1.0, "median": 1.5, "max": 2.0}}
    assert summary([]) is None


def test_sensors_are_asked_with_their_kind_and_told_in_their_unit():
    asked = []

    def answer(name, value):
        def function(handle, *arguments):
            asked.append((name, arguments[:-1]))
            arguments[-1]._obj.value = value
            return 0

        return function

    library = SimpleNamespace(
        nvmlDeviceGetClockInfo=answer("clock", 1755),
        nvmlDeviceGetTemperature=lambda *arguments: 3,  # not supported
        nvmlDeviceGetPowerUsage=answer("power", 650_250),
    )
    assert read_sensors(library, None) == {"sm_mhz": 1755, "memory_mhz": 1755, "power_w": 650.25}
    assert asked == [("clock", (1,)), ("clock", (2,)), ("power", ())]
