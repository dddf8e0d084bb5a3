"""Cells of one run share a measuring process (bench/worker.py) where that is asked for. Imports no torch.

Every cell keeps its own supervisor, file, row and failure; only the process that measures survives its cell for
`FASTCACHE_KEEP_PROCESS_S` seconds and waits for the next. It is found by a socket whose name is a digest of all that
decides what a fresh process would be: source, interpreter, packages, environment, working directory and device.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcache.bench import supervise
from fastcache.bench.provenance import PACKAGE, source_digest
from fastcache.bench.row import blank_row, failure, write_json
from fastcache.bench.worker import is_gone, process_of
from fastcache.device.info import versions
from fastcache.errors import ConfigError

log = logging.getLogger(__name__)

KEEP_VARIABLE = "FASTCACHE_KEEP_PROCESS_S"  # seconds; 0 or nothing is a process for each cell
RUN_VARIABLE = (
    "FASTCACHE_RUN_PID"  # the run that cells belong to: with it ends the process that waits for its next one
)
WORKER = (sys.executable, "-m", "fastcache.bench.worker")
# Differ between two cells of one run and decide nothing.
PASSING = (
    RUN_VARIABLE,
    supervise.PARENT_VARIABLE,
    supervise.STARTED_VARIABLE,
    "_",
    "SHLVL",
    "LINES",
    "COLUMNS",
)
GREETING_S = 5.0  # an idle process greets at once; one that does not is busy with another cell
DYING_S = 30.0  # for a process that has closed its connection, or was killed, to be gone
OLD_S = 86400.0  # a name in the folder of sockets that is older is removed
POLL_S = 0.05
LONGEST_PATH = 100  # bytes that the name of a socket may have
# Processes that this one has started: only their parent is told how they ended.
_started: dict[int, subprocess.Popen[Any]] = {}


def run_cell(
    cell: Any,
    command: Sequence[str] = supervise.CHILD,
    blank: Callable[[Any], dict[str, Any]] = blank_row,
) -> dict[str, Any]:
    """As `supervise.run_cell`, in a process that waits for a cell of this kind if processes are kept."""
    keep = keep_seconds()
    if not keep or not on_gpu(cell.device):
        return supervise.run_cell(cell, command, blank)
    return supervise.run_cell(cell, WORKER, blank, functools.partial(run_kept, keep_s=keep))


def keep_seconds() -> float:
    """Errors: `ConfigError` if the variable is no number of seconds."""
    given = os.environ.get(KEEP_VARIABLE) or "0"
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"{KEEP_VARIABLE} is {given!r}; allowed is a number of seconds, 0 for none.")
    return seconds


def on_gpu(device: str) -> bool:
    """A process is kept for what CUDA costs to start; "auto" is a GPU where NVIDIA's tools are."""
    return device.startswith("cuda") or (device == "auto" and shutil.which("nvidia-smi") is not None)


def run_kept(
    content: dict[str, Any], timeout_s: float, command: Sequence[str], keep_s: float
) -> supervise.Outcome:
    """As `supervise.run_child`. `command` starts a worker, with one more argument, `keep_s`."""
    deadline = time.monotonic() + timeout_s
    kept = Kept.waiting(content["device"], command) or Kept.start(content["device"], command, keep_s)
    if kept is None:
        log.warning("no socket for a process that waits for cells: this cell has a process of its own")
        return supervise.run_child(content, timeout_s, supervise.CHILD)
    with tempfile.TemporaryDirectory(prefix="fastcache-cell-") as folder, kept:
        source, target = Path(folder, "cell.json"), Path(folder, "row.json")
        write_json(source, content)
        problem = kept.measure(source, target, content["device"], deadline, timeout_s)
        wrote = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else None
        return wrote, problem


class Kept:
    """A connection to a worker, new or not. Leaving it before the worker has answered ends the worker."""

    def __init__(self, connection: socket.socket, pid: int, greeting: dict[str, Any] | None) -> None:
        self._connection, self._pid, self._greeting = connection, pid, greeting
        self._process, self._since, self._answered = process_of(pid), time.monotonic(), False

    @classmethod
    def waiting(cls, device: str, command: Sequence[str]) -> Kept | None:
        """The worker that waits for such a cell, if there is one and it is not busy."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(socket_path(device, command)))
            greeting = receive(connection, time.monotonic() + GREETING_S)
        except OSError:
            greeting = None  # no file, nobody behind it, or just ended; or busy
        if greeting is None:
            connection.close()
            return None
        return cls(connection, greeting["pid"], greeting)

    @classmethod
    def start(cls, device: str, command: Sequence[str], keep_s: float) -> Kept | None:
        """A new worker, which those find who come later. None where no socket can be made."""
        path = socket_path(device, command)
        unfinished = path.with_suffix(f".{os.getpid()}")
        connection = socket.socket(socket.AF_UNIX)
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                own_folder(path.parent)
                unfinished.unlink(missing_ok=True)
                listener.bind(str(unfinished))
                listener.listen()
                connection.connect(str(unfinished))
                os.replace(unfinished, path)
            except OSError as error:
                log.warning("%s: %s", path, error)
                connection.close()
                return None
            child = subprocess.Popen(
                [*command, str(keep_s)],
                stdin=listener.fileno(),
                stdout=supervise.own_stderr(),
                env=supervise.child_environment(time.monotonic()),
                start_new_session=True,
            )
        _started[child.pid] = child
        return cls(connection, child.pid, None)

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        if not self._answered:
            self._end()

    def measure(
        self, source: Path, target: Path, device: str, deadline: float, timeout_s: float
    ) -> dict[str, Any]:
        """The fields of a failure; none if the row is written."""
        run = os.environ.get(RUN_VARIABLE)
        order = {"cell": str(source), "row": str(target), "device": device, "run": int(run) if run else None}
        try:
            greeting = self._greeting or receive(self._connection, deadline)
            if greeting is not None:
                output = supervise.own_stderr()
                with open(os.devnull, "wb") as nowhere:
                    given = nowhere.fileno() if output == subprocess.DEVNULL else output
                    socket.send_fds(self._connection, [json.dumps(order).encode()], [given])
            answer = receive(self._connection, deadline) if greeting is not None else None
        except TimeoutError:
            return supervise.timed_out(timeout_s)
        except OSError:
            answer = None  # it died, and is asked below how
        if answer is None:
            self._end(DYING_S)
            return failure("crashed", "ProcessDied", self._how_it_died())
        self._answered = True
        if answer["ends"]:
            self._end(DYING_S)
        return {}

    def _end(self, grace_s: float = 0.0) -> None:
        """Wait for the worker to end by itself, then end its whole group, and come back when it is gone."""
        self._wait(grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is gone
            os.killpg(self._pid, signal.SIGKILL)
        self._wait(DYING_S)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._gone() and time.monotonic() < until:
            time.sleep(POLL_S)

    def _gone(self) -> bool:
        child = _started.get(self._pid)
        return is_gone(self._process) if child is None else child.poll() is not None

    def _how_it_died(self) -> str:
        seconds, child = time.monotonic() - self._since, _started.get(self._pid)
        if child is not None and child.returncode is not None:
            return supervise.how_it_died(child.returncode, seconds)
        return (
            f"the measuring process, which another cell had started, ended after {seconds:.1f} s of this one, before "
            "it wrote a row; how is told to its parent alone. Its messages are in the log."
        )


def receive(connection: socket.socket, deadline: float) -> dict[str, Any] | None:
    """The next message; None if the other side is gone. Errors: `TimeoutError` at the deadline."""
    text = b""
    while not text.endswith(b"\n"):
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        more = connection.recv(4096)
        if not more:
            return None
        text += more
    return json.loads(text)


def socket_path(device: str, command: Sequence[str]) -> Path:
    """Where the worker for cells on `device` listens that this process would start."""
    kept = {name: value for name, value in sorted(os.environ.items()) if name not in PASSING}
    decides = [str(PACKAGE), source_digest(), versions(), list(command), os.getcwd(), device, kept]
    name = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
    folder = f"fastcache-{os.getuid()}"
    path = Path(tempfile.gettempdir(), folder, name)
    return path if len(os.fsencode(path)) <= LONGEST_PATH else Path("/tmp", folder, name)


def own_folder(folder: Path) -> None:
    """Make the folder of the sockets, which nobody else may enter, and clear it of old names. Errors: `OSError`."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not this user's alone")
    for path in folder.iterdir():
        if path.lstat().st_mtime < time.time() - OLD_S:
            path.unlink(missing_ok=True)
