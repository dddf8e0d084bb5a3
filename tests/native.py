"""Small native libraries that tests compile: the fake driver, a stand-in for sgl_kernel's op, broken shims."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FAKE_DRIVER = HERE / "fake_libcuda" / "fake_libcuda.c"
# The operator of sgl_kernel's spatial_ops with its schema and rounding, without a GPU.
STAND_IN = r"""
#include <torch/library.h>
#include <vector>
static std::vector<int64_t> create(int64_t a, int64_t b, int64_t device) {
  if (a <= 0 || b <= 0) throw std::runtime_error("SM counts must be positive");
  if (a + b > 132) throw std::runtime_error("Not enough SMs available for the requested configuration");
  int64_t granted = (a + 7) / 8 * 8;
  return {1000 + device, 2000 + device, granted, a + b - granted};
}
TORCH_LIBRARY_FRAGMENT(sgl_kernel, m) {
  m.def("create_greenctx_stream_by_value(int smA, int smB, int device) -> int[]");
  m.impl("create_greenctx_stream_by_value", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(create));
}
// An empty Python module, without Python's headers: head, init, index, copy, then name, doc, size and five tables.
struct ModuleDef { void *head[2], *init, *index, *copy; const char *name, *doc; long size; void* tables[5]; };
static ModuleDef definition = {{(void*)1, nullptr}, nullptr, nullptr, nullptr, "spatial_ops", nullptr, -1, {}};
extern "C" void* PyModule_Create2(ModuleDef*, int);
extern "C" __attribute__((visibility("default"))) void* PyInit_spatial_ops() {
  return PyModule_Create2(&definition, 3);
}
"""
DEF_NEW = (
    "_ZNR5torch7Library4_defEON3c1014FunctionSchemaEPNS1_12OperatorNameERKSt6vectorINS_10headeronly3TagESaIS8_EE"
    "NS_17_RegisterOrVerifyE"
)
DEF_OLD = (
    "_ZNR5torch7Library4_defEON3c1014FunctionSchemaEPNS1_12OperatorNameERKSt6vectorIN2at3TagESaIS8_EE"
    "NS_17_RegisterOrVerifyE"
)


def tool(*names: str) -> str:
    """The first of `names` on PATH, or skip the test."""
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.skip(f"needs one of {', '.join(names)} to compile a test library")


def compile_c(source: str | Path, target: Path, *flags: str) -> Path:
    """One C file (text or path) to a shared library."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, str):
        text, source = source, target.with_suffix(".c")
        source.write_text(text)
    _run(
        [
            tool("cc", "gcc", "clang"),
            "-shared",
            "-fPIC",
            "-Wall",
            str(source),
            "-o",
            str(target),
            *flags,
            "-ldl",
        ]
    )
    return target


def compile_cpp(text: str, target: Path, *flags: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = target.with_suffix(".cpp")
    source.write_text(text)
    _run(
        [tool("c++", "g++"), "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(target), *flags, "-ldl"]
    )
    return target


def fake_driver(folder: Path) -> Path:
    """Compile the fake driver into `folder`; put the folder on LD_LIBRARY_PATH of a child process."""
    return compile_c(FAKE_DRIVER, folder / "libcuda.so.1", "-Wextra", "-Wl,-soname,libcuda.so.1")


@cache
def stand_ins() -> dict[str, Path]:
    """`spatial_ops` for the installed torch ("fitting") and for one that spells Library::_def otherwise ("foreign").
    Compiled once a session, about eight seconds; copy before changing."""
    from fastcache.device import sgl_install
    from fastcache.device.shim_plan import torch_facts

    libraries = torch_facts().libraries
    here = DEF_NEW if DEF_NEW in sgl_install.torch_exports(libraries) else DEF_OLD
    folder = Path(tempfile.mkdtemp(prefix="stand-in-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, compiled = folder / "op.cpp", folder / "op.o"
    source.write_text(STAND_IN)
    includes = [
        libraries.parent / "include",
        libraries.parent / "include" / "torch" / "csrc" / "api" / "include",
    ]
    cxx = tool("c++", "g++")
    flags = [f"-I{include}" for include in includes]
    _run([cxx, "-std=c++20", "-O0", "-fPIC", "-c", str(source), "-o", str(compiled), *flags])
    made = {}
    for name in ("fitting", "foreign"):
        if name == "foreign":
            # Renaming an undefined symbol before linking makes a library that expects another torch.
            other = DEF_OLD if here == DEF_NEW else DEF_NEW
            _run([tool("objcopy"), f"--redefine-sym={here}={other}", str(compiled)])
        made[name] = folder / name / "sgl_kernel" / "spatial_ops.abi3.so"
        made[name].parent.mkdir(parents=True)
        links = [f"-L{libraries}", "-ltorch_cpu", "-lc10"]
        _run([cxx, "-shared", str(compiled), "-o", str(made[name]), *links])
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
