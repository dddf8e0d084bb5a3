"""Snakemake's lock survives a kill -9 of its holder. This tells a dead holder's lock from a living one's.

Snakemake keeps no note of who holds a lock, so a run leaves one: its host and process. Only if that very
process is known to be gone from this very host is the lock removed; in any other case it stays, and
`snakemake --unlock` is the user's decision.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import psutil

HOLDER = Path(".snakemake/holder.json")
LOCKS = Path(".snakemake/locks")


def remember() -> None:
    """Called when jobs are about to start, so never by a dry run."""
    me = psutil.Process()
    HOLDER.write_text(json.dumps({"host": socket.gethostname(), "pid": me.pid, "since": me.create_time()}))


def forget() -> None:
    HOLDER.unlink(missing_ok=True)


def clear_if_dead() -> bool:
    """Remove the locks that a dead run of this host left in this directory; whether there were any."""
    try:
        holder = json.loads(HOLDER.read_text())
    except (OSError, json.JSONDecodeError):
        return False
    if holder["host"] != socket.gethostname() or _alive(holder["pid"], holder["since"]):
        return False
    stale = [path for path in LOCKS.glob("*") if path.is_file()]
    for path in stale:
        path.unlink(missing_ok=True)
    forget()
    return bool(stale)


def _alive(pid: int, since: float) -> bool:
    """A process id can be used again, a start time not."""
    try:
        return pid != os.getpid() and abs(psutil.Process(pid).create_time() - since) < 1
    except psutil.NoSuchProcess:
        return False
