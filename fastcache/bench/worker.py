"""A process that measures one cell after another, for supervisors that come to its socket. Imports no torch by itself.

`python -m fastcache.bench.worker KEEP_S` gets a listening socket as its standard input, and with each connection a
cell: the file it is in, the file for its row, and the descriptor for everything it has to say. Each cell builds an
engine of its own and closes it; what is shared is what a process pays once: imports, the CUDA context, loaded kernels.

It ends when nobody came for KEEP_S seconds, when the run that it serves is gone, after a cell that is not `ok` (a
CUDA error stays with its process), when memory was not given back, after `MOST_CELLS`, and at once when its
supervisor ends in the middle of a cell. While it waits it holds a CUDA context and no token of a device: a run in
another checkout may measure there meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fastcache.bench.cellconfig import CellConfig
from fastcache.bench.provenance import git_commit
from fastcache.bench.row import write_json

# Of one process. torch has 32 streams of a priority and hands them out in turn; an engine captures its graphs on two of
# them, and one stays with compression. What leaks slowly has an end, too.
MOST_CELLS = 12
LEAK_BYTES = 2**30
ORDER_S = 30.0  # for a supervisor that has been greeted to say what it wants
LOOK_S = 0.5  # between two looks at the run while idle
OUTPUT = (1, 2)

Measure = Callable[[dict[str, Any], int], dict[str, Any]]


def measure(content: dict[str, Any], cells_before: int) -> dict[str, Any]:
    from fastcache.bench.cell import measure_cell

    return measure_cell(CellConfig.from_dict(content), cells_before=cells_before)


def serve(listener: socket.socket, keep_s: float, measure_one: Measure = measure) -> None:
    """Measure whatever comes until there is a reason to end (see the module)."""
    cells, first_free, last = 0, None, time.monotonic()
    run = process_of(os.getpid())  # until a cell says whose it is
    while time.monotonic() - last < keep_s and not is_gone(run):
        listener.settimeout(LOOK_S)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        with connection:
            order = greet(connection)
            if order is None:  # a supervisor that ended, or would not wait, before it said what it wants
                if not cells:
                    return  # the one that started this process
                continue
            run = process_of(order["run"] or os.getpid())
            status = measure_watched(connection, order, cells, measure_one)
            cells += 1
            free = clean_up(order["device"])
            first_free = free if first_free is None else first_free
            spent = status != "ok" or leaks(free, first_free) or cells == MOST_CELLS
            be_silent()
            with contextlib.suppress(OSError):  # its row is written: nobody has to be there any more
                send(connection, {"ends": spent})
            if spent:
                return
        last = time.monotonic()


def greet(connection: socket.socket) -> dict[str, Any] | None:
    """Say that it is this connection's turn and take its order; None if nobody is there."""
    connection.settimeout(ORDER_S)
    try:
        send(connection, {"pid": os.getpid()})
        content, descriptors, _, _ = socket.recv_fds(connection, 2**16, 1)
    except OSError:
        return None
    if not content or not descriptors:
        return None
    for descriptor in OUTPUT:
        os.dup2(descriptors[0], descriptor)
    os.close(descriptors[0])
    return json.loads(content)


def measure_watched(
    connection: socket.socket, order: dict[str, Any], cells: int, measure_one: Measure
) -> str | None:
    """Measure one cell and write its row; the process ends if the supervisor does meanwhile. Returns its status."""
    done = threading.Event()
    connection.settimeout(None)
    threading.Thread(target=end_with, args=(connection, done), daemon=True).start()
    start_afresh()
    content = json.loads(Path(order["cell"]).read_text(encoding="utf-8"))
    row = measure_one(content, cells)
    write_json(Path(order["row"]), row)
    done.set()
    return row.get("status")


def end_with(connection: socket.socket, done: threading.Event) -> None:
    """Wait until the other side is closed; if that is before `done`, end this process and all that it has started."""
    with contextlib.suppress(OSError):
        while connection.recv(1):
            pass
    if not done.is_set():
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)


def start_afresh() -> None:
    """What a cell finds is what it would find in a new process, as far as that shows in a row."""
    git_commit.cache_clear()  # tracked files may differ by now
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.manual_seed(torch.initial_seed())
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def clean_up(device: str) -> tuple[int, int] | None:
    """Give back what the cell left. (free bytes of the device, bytes that torch still holds); None without CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        gc.collect()
        return None
    index = torch.device(device).index if ":" in device else torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # a CUDA error of the cell, which its row tells
        torch.cuda.synchronize(index)
        torch._C._cuda_clearCublasWorkspaces()  # they would count in the next cell's peak
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(index)[0], torch.cuda.memory_reserved(index)
    return 0, LEAK_BYTES + 1


def leaks(now: tuple[int, int] | None, first: tuple[int, int] | None) -> bool:
    """Whether a further cell would find clearly less memory than a new process."""
    if now is None or first is None:
        return False
    return now[1] > LEAK_BYTES or now[0] < first[0] - LEAK_BYTES


def be_silent() -> None:
    """Let go of the cell's log. C libraries buffer their own output, which a process that ends would write."""
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in OUTPUT:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def process_of(pid: int) -> psutil.Process | None:
    """The process with that id, for `is_gone`; None if there is none."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def is_gone(process: psutil.Process | None) -> bool:
    """Whether it has ended, if only its parent has not noticed. True for none."""
    try:
        return process is None or not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def main(arguments: list[str], measure_one: Measure = measure) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    listener = socket.socket(fileno=os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    serve(listener, float(arguments[0]), measure_one)
    listener.close()
    os._exit(0)  # after a CUDA error an orderly end may hang


if __name__ == "__main__":
    main(sys.argv[1:])
