"""Build the C++ library that lets an installed sgl_kernel load beside this torch, if it needs one.

The shim is made from the symbols the wheel lacks, and no others.

`shim_plan` decides from symbol tables; `build` compiles. The result is keyed by versions, library hashes, symbol
list and forwarder source, so a new torch or wheel never meets an old shim. A symbol that cannot be forwarded
correctly is refused with its reason (see `shim_symbols`), never replaced by a constant.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastcache.device import sgl_install, trial
from fastcache.device.shim_plan import ShimPlan, plan, torch_facts
from fastcache.errors import OutputPathError, UnsupportedCombination, UserError

NAME = "sgl_kernel_shim.so"
COMPILERS = ("c++", "g++", "clang++")
# Only the forwarders may be visible: anything else in a preloaded library meets the whole process.
HIDDEN = ("-fvisibility=hidden", "-fvisibility-inlines-hidden")
COMPILE_TIMEOUT_S = 120


class ShimError(UserError):
    """The shim is needed and cannot be built here."""


def cache_folder() -> Path:
    """Where shims and load trials are kept: $FASTCACHE_CACHE, else the user's cache folder."""
    if given := os.environ.get("FASTCACHE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastcache"


def compiler() -> str:
    """The C++ compiler: $CXX or the first of c++, g++, clang++. Errors: ShimError when there is none."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise ShimError(
        f"the sgl_kernel shim needs a C++ compiler and none was found (looked for {', '.join(wanted)}). "
        "Install g++, set CXX, or install the sgl_kernel that matches this torch."
    )


def build(shim_plan: ShimPlan, folder: Path | None = None) -> Path:
    """Compile the shim, or return the one already built under this key.

    Errors: UnsupportedCombination for a refused plan, ShimError when there is no compiler or it fails,
    OutputPathError when the folder cannot be written.
    """
    if shim_plan.status == "refused":
        raise UnsupportedCombination(f"no shim for sgl_kernel: {shim_plan.reason}")
    assert shim_plan.status == "needed", "only a needed shim is built"
    folder = (folder or cache_folder() / "shims") / shim_plan.key
    target = folder / NAME
    if target.is_file():
        return target
    command = compiler()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source = Path(work) / "shim.cpp"
            source.write_text(shim_plan.source())
            compile_shim(command, source, Path(work) / NAME)
            os.replace(Path(work) / NAME, target)
    except OSError as error:
        raise OutputPathError(
            f"the sgl_kernel shim cannot be built in {folder}: {error.strerror or error}. "
            "Set FASTCACHE_CACHE to a folder that can be written."
        ) from error
    return target


def compile_shim(command: str, source: Path, target: Path) -> None:
    """One compiler call: include and library paths come from torch; --as-needed keeps torch out of LD_PRELOAD."""
    line = [
        command,
        "-shared",
        "-fPIC",
        "-O2",
        "-std=c++17",
        *HIDDEN,
        str(source),
        "-o",
        str(target),
        *torch_flags(),
    ]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ShimError(f"{command} did not finish the shim in {COMPILE_TIMEOUT_S} s.") from error
    if done.returncode != 0:
        tail = " | ".join(done.stderr.strip().splitlines()[-3:]) or f"exit code {done.returncode}"
        raise ShimError(f"{command} could not compile the shim: {tail}")


def torch_flags() -> Sequence[str]:
    """Include folders, library folders and rpath of the installed torch, and the libraries the guide links."""
    libraries = torch_facts().libraries
    include = libraries.parent / "include"
    folders = [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", f"-L{libraries}"]
    links = ["-Wl,--as-needed", "-lc10", "-ltorch", "-ltorch_cpu", "-ldl", f"-Wl,-rpath,{libraries}"]
    return [*folders, *links]


def make(output: Path) -> dict:
    """Plan, build if needed, try it in a process of its own, and write the record to `output` (JSON).

    Beside the record lies `sgl_kernel_shim.so` for LD_PRELOAD, when one was built. Errors: as `build`, and
    ShimError when the built shim does not survive its trial.
    """
    install = sgl_install.find()
    shim_plan = plan(install, torch_facts(), capability=_capability())
    record = shim_plan.evidence() | {"shim": None, "key": None}
    if shim_plan.status != "not needed":
        library = build(shim_plan)
        assert install is not None and install.spatial is not None, (
            "a shim is only needed for an installed wheel"
        )
        if cause := trial.load_spatial(install.spatial, library):
            raise ShimError(f"the shim was built but sgl_kernel does not load with it: {cause}")
        record |= {"status": "built", "shim": NAME, "key": shim_plan.key}
    write_beside(output, json.dumps(record, indent=1) + "\n", library if record["shim"] else None)
    return record


def write_beside(output: Path, text: str, library: Path | None) -> None:
    """Write the record and a copy of the library into one folder, each by rename."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as work:
            if library is not None:
                shutil.copy2(library, Path(work) / NAME)
                os.replace(Path(work) / NAME, output.parent / NAME)
            (Path(work) / "record").write_text(text)
            os.replace(Path(work) / "record", output)
    except OSError as error:
        raise OutputPathError(f"{output} cannot be written: {error.strerror or error}.") from error


def _capability() -> tuple[int, int] | None:
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="SHIM.json", help="the record to write")


def run(args: argparse.Namespace) -> int:
    """`fastcache shim`: 0 when a shim was built or none is needed, 1 when sgl_kernel cannot be made to load."""
    try:
        record = make(args.output)
    except (ShimError, UnsupportedCombination) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"shim: {record['status']}: {record['reason']}\n")
    return 0
