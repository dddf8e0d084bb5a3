"""The clocks a GPU runs at while it is measured: two runs that differ may differ in these alone."""

from __future__ import annotations

import ctypes
import statistics
import threading
from collections.abc import Callable, Sequence
from typing import Any

LIBRARY = "libnvidia-ml.so.1"  # comes with the driver
PERIOD_S = 0.5
# Sensor -> (NVML's function, its arguments between the device and the result, what one unit is worth).
SENSORS: dict[str, tuple[str, tuple[int, ...], float]] = {
    "sm_mhz": ("nvmlDeviceGetClockInfo", (1,), 1.0),
    "memory_mhz": ("nvmlDeviceGetClockInfo", (2,), 1.0),
    "temperature_c": ("nvmlDeviceGetTemperature", (0,), 1.0),
    "power_w": ("nvmlDeviceGetPowerUsage", (), 1e-3),
}
Reading = dict[str, float]


class ClockWatch:
    """Reads the sensors of a CUDA device twice a second from a thread, from creation to `stop`."""

    def __init__(self, device: str, read: Callable[[], Reading] | None = None) -> None:
        """`read` stands in for the device in tests; else there is nothing to read on a CPU."""
        self._read = read or (sensors_of(device) if device.startswith("cuda") else None)
        self._readings: list[Reading] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._read is not None:
            self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(PERIOD_S):
            self._readings.append(self._read())

    def stop(self) -> dict[str, Any] | None:
        """{sensor: {min, median, max}}; None where nothing was read."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        return summary(self._readings)


def summary(readings: Sequence[Reading]) -> dict[str, Any] | None:
    """Sensors that every reading has, since a device may lack one."""
    if not readings:
        return None
    names = [name for name in SENSORS if all(name in reading for reading in readings)]
    columns = {name: [reading[name] for reading in readings] for name in names}
    return {n: {"min": min(v), "median": statistics.median(v), "max": max(v)} for n, v in columns.items()}


def sensors_of(device: str) -> Callable[[], Reading] | None:
    """A function that reads the sensors of `device`; None where the driver's library is missing or denies them."""
    import torch

    # By its UUID, since CUDA_VISIBLE_DEVICES renumbers devices for CUDA alone. It is used here and recorded nowhere.
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.device(device)).uuid}"
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        return None
    return lambda: read_sensors(library, handle)


def read_sensors(library: Any, handle: Any) -> Reading:
    found = {}
    for name, (function, arguments, unit) in SENSORS.items():
        value = ctypes.c_uint()
        if getattr(library, function)(handle, *arguments, ctypes.byref(value)) == 0:
            found[name] = value.value * unit
    return found
