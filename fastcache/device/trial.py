"""Try to load a library in a process of its own first: a bad one kills its process without an exception.

Three ways are known, each ends the process: an undefined name in a preloaded shim (exit 127), a forwarder that
takes the place of a function torch exports (abort), and the same operator registered from a second path (abort).
A trial that succeeded is remembered under the hash of what was loaded, so it costs seconds once per environment.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

OPERATOR = "create_greenctx_stream_by_value"
TIMEOUT_S = 180
LOADED = "fastcache-trial: loaded"
TELLING = re.compile(r"([\w.]+(Error|Exception)\b.*:)|what\(\):|terminate called|.*symbol lookup error")

LOAD_SPATIAL = f"""
import ctypes, sys, torch
library, shim = sys.argv[1:3]
if shim:
    ctypes.CDLL(shim, mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(library)
torch.ops.sgl_kernel.{OPERATOR}
print({LOADED!r})
"""
LOAD_PACKAGE = f"""
import torch, sgl_kernel, sgl_kernel.spatial as spatial
if spatial._spatial_import_error is not None:
    raise spatial._spatial_import_error
torch.ops.sgl_kernel.{OPERATOR}
print({LOADED!r})
"""


def load_spatial(library: Path, shim: Path | None = None) -> str | None:
    """Load the green-context operator in a child process. Returns None, or why it cannot be loaded."""
    arguments = [str(library), str(shim or "")]
    return _remembered(LOAD_SPATIAL, arguments, [library, *([shim] if shim else [])])


def load_package(folder: Path, libraries: Sequence[Path]) -> str | None:
    """`import sgl_kernel` in a child process. Returns None, or why it cannot be imported."""
    return _remembered(LOAD_PACKAGE, [str(folder)], libraries)


def _remembered(code: str, arguments: Sequence[str], files: Sequence[Path]) -> str | None:
    from fastcache.device.shim import cache_folder
    from fastcache.device.shim_plan import torch_facts

    parts = [code, *arguments, sys.executable, torch_facts().version, os.environ.get("LD_PRELOAD", "")]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in files:
        digest.update(path.read_bytes())
    mark = cache_folder() / "trials" / digest.hexdigest()[:16]
    if mark.is_file():
        return None
    cause = run(code, arguments)
    if cause is None:
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError:
            pass  # A cache that cannot be written only means that the next process tries again.
    return cause


def run(code: str, arguments: Sequence[str], timeout_s: float = TIMEOUT_S) -> str | None:
    """Run Python `code` in a child process that must print LOADED. Returns None, or one line of cause."""
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the trial process did not finish in {timeout_s:g} s"
    if done.returncode == 0 and LOADED in done.stdout:
        return None
    return f"the trial process {_ending(done.returncode)}: {_last_words(done.stderr)}"


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _last_words(text: str) -> str:
    """The lines that name a cause: exceptions, C++ terminations, the loader's own complaints."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if TELLING.match(line)]
    return " | ".join(dict.fromkeys(telling)) or (lines or ["no output"])[-1]
