"""Runs a cell in a child process and always comes back with a row. Imports no torch.

A CUDA error, a killed process or a hang can only be survived from outside. The child is a fresh interpreter
(never a fork, which CUDA does not survive), leads its own process group so that a timeout ends its helpers
too, and dies with its parent, so that an interrupted run leaves no process holding a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcache.bench.row import blank_row, failure, write_json

CHILD = (sys.executable, "-m", "fastcache.bench.cell")
PARENT_VARIABLE = "FASTCACHE_PARENT_PID"
STARTED_VARIABLE = (
    "FASTCACHE_STARTED_S"  # time.monotonic() when the child was started; one clock for all processes
)
PR_SET_PDEATHSIG = 1
# How often a thread looks before it sleeps until the others arrive. The default looks for milliseconds: no faster on an
# idle CPU, and up to seven times slower on one where anything else runs. The user's environment comes before this.
SHORT_SPIN = {"GOMP_SPINCOUNT": "1000"}


Outcome = tuple[Any | None, dict[str, Any]]


def run_cell(
    cell: Any,
    command: Sequence[str] = CHILD,
    blank: Callable[[Any], dict[str, Any]] = blank_row,
    run: Callable[[dict[str, Any], float, Sequence[str]], Outcome] | None = None,
) -> dict[str, Any]:
    """The row of `cell`, whatever happens to the process that measures it.

    `command` gets two more arguments: the file with the cell, and the file to write its row to. `blank` makes the
    row of a cell of which nothing is measured. `run` stands in for `run_child`.
    """
    row, problem = (run or run_child)(cell.to_dict(), cell.timeout_s, command)
    late = problem.get("status") == "timeout"
    return blank(cell) | problem if late or row is None else row


def run_child(content: dict[str, Any], timeout_s: float, command: Sequence[str]) -> Outcome:
    """(what the child wrote, as far as it came; the fields of a failure, none if it ended by itself and wrote).

    `command` gets two more arguments: the file with `content`, and the file to write to.
    """
    with tempfile.TemporaryDirectory(prefix="fastcache-cell-") as folder:
        source, target = Path(folder, "cell.json"), Path(folder, "row.json")
        write_json(source, content)
        started = time.monotonic()
        child = subprocess.Popen(
            [*command, str(source), str(target)],
            stdin=subprocess.DEVNULL,
            stdout=own_stderr(),
            env=child_environment(started),
            start_new_session=True,
        )
        problem: dict[str, Any] = {}
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            problem = timed_out(timeout_s)
        finally:
            end(child)
        wrote = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else None
        if not problem and (wrote is None or code != 0):
            problem = failure("crashed", "ProcessDied", how_it_died(code, time.monotonic() - started))
        return wrote, problem


def timed_out(timeout_s: float) -> dict[str, Any]:
    message = f"no result after {timeout_s:g} s; the process was ended. Raise timeout_s to wait longer."
    return failure("timeout", "Timeout", message)


def child_environment(started: float) -> dict[str, str]:
    return {**SHORT_SPIN, **os.environ, PARENT_VARIABLE: str(os.getpid()), STARTED_VARIABLE: str(started)}


def end(child: subprocess.Popen[Any]) -> None:
    """End the child's whole group; harmless if it has ended already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is gone
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def how_it_died(code: int, seconds: float) -> str:
    after = f"after {seconds:.1f} s, before it wrote a row"
    if code >= 0:
        return f"the measuring process exited with code {code} {after}; its messages are in the log."
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = " The system kills with SIGKILL when memory runs out." if name == "SIGKILL" else ""
    return f"the measuring process was ended by {name} {after}.{hint}"


def die_with_parent() -> None:
    """Called by the child: ask the kernel to end it when its parent ends. Linux only; elsewhere no effect."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    expected = os.environ.get(PARENT_VARIABLE)
    if expected is not None and os.getppid() != int(expected):  # the parent ended before the request
        os.kill(os.getpid(), signal.SIGKILL)


def own_stderr() -> int:
    """Where a child's messages go: a descriptor, or `subprocess.DEVNULL` if this process has none."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return subprocess.DEVNULL
