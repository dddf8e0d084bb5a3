"""One measurement per GPU: a token for a device, held by a process as long as it lives, and taken by nobody else.

The token is a lock on a file of the machine, not of a folder: two runs in two checkouts do not measure on one device at
once. Killed processes lose their locks, so nothing has to be cleaned up.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

POLL_S = 0.2
VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_devices() -> list[str]:
    """Names of the devices this process may use: what CUDA_VISIBLE_DEVICES says, else the driver's indices."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []  # no driver, no devices: a CPU run
    return answer.split()


def wanted(device: str) -> bool:
    """Whether a cell's `device` leaves the choice to us: not a CPU, and no device by number."""
    return device in ("auto", "cuda")


def take(devices: Sequence[str], folder: Path | None = None) -> tuple[str, IO[str]]:
    """(a free device, the open file that is its token). Waits until one is free."""
    folder = folder or Path(tempfile.gettempdir())
    while True:
        for name in devices:
            token = (folder / f"fastcache-{getpass.getuser()}-gpu-{name.replace('/', '_')}.lock").open("a")
            try:
                fcntl.flock(token, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                token.close()
                continue
            return name, token
        time.sleep(POLL_S)
