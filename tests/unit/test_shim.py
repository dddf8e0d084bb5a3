"""The shim as built: it forwards on the installed torch, refuses with reasons, and a bad one harms only a child."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from native import DEF_NEW, DEF_OLD, compile_c, compile_cpp, stand_ins

from fastcache.device import sgl_install, shim, trial
from fastcache.device.shim_plan import TorchFacts, plan, torch_facts
from fastcache.device.shim_symbols import Forward
from fastcache.errors import OutputPathError, UnsupportedCombination

CHECK = "_ZN3c104cuda29c10_cuda_check_implementationEiPKcS2_"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def def_here() -> str:
    """The spelling of Library::_def that the installed torch exports."""
    exported = sgl_install.torch_exports(torch_facts().libraries)
    return DEF_NEW if DEF_NEW in exported else DEF_OLD


@pytest.fixture(scope="module")
def foreign() -> sgl_install.SglInstall:
    """A stand-in wheel whose spatial_ops was made for another torch than the installed one."""
    folder = stand_ins()["foreign"].parent
    (folder / "version.py").write_text('__version__ = "0.4.2"\n')
    return sgl_install.find([str(folder.parent)])


@pytest.fixture(scope="module")
def fitting() -> Path:
    """spatial_ops made for the installed torch."""
    return stand_ins()["fitting"]


@pytest.fixture
def cuda_torch() -> TorchFacts:
    """The installed torch, seen as a CUDA build: its libraries and tags are the real ones."""
    return replace(torch_facts(), cuda="13.0")


def test_an_install_is_found_without_importing_it(foreign: sgl_install.SglInstall) -> None:
    assert foreign.version == "0.4.2" and not foreign.complete
    assert foreign.spatial.name == "spatial_ops.abi3.so" and foreign.common((9, 0)) is None
    assert sgl_install.find([str(foreign.folder)]) is None


@pytest.mark.slow
def test_a_library_for_another_torch_loads_with_the_shim_and_not_without(
    foreign: sgl_install.SglInstall, cuda_torch: TorchFacts
) -> None:
    shim_plan = plan(foreign, cuda_torch)
    assert shim_plan.status == "needed" and len(shim_plan.forwards) == 1
    assert "undefined symbol" in trial.load_spatial(foreign.spatial)
    library = shim.build(shim_plan)
    assert trial.load_spatial(foreign.spatial, library) is None
    call = "print(torch.ops.sgl_kernel.create_greenctx_stream_by_value(100, 32, 0) == [1000, 2000, 104, 28] or 1/0)"
    assert trial.run(trial.LOAD_SPATIAL + call, [str(foreign.spatial), str(library)]) is None


@pytest.mark.slow
def test_the_shim_works_by_preload_too(
    foreign: sgl_install.SglInstall, cuda_torch: TorchFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = shim.build(plan(foreign, cuda_torch))
    monkeypatch.setenv("LD_PRELOAD", str(library))
    assert trial.load_spatial(foreign.spatial) is None
    assert plan(foreign, cuda_torch).forwards[0].missing in sgl_install.preloaded_exports()


def test_the_shim_exports_its_forwarders_and_needs_no_torch_library(
    foreign: sgl_install.SglInstall, cuda_torch: TorchFacts
) -> None:
    shim_plan = plan(foreign, cuda_torch)
    from fastcache.device import elf

    symbols = elf.read(shim.build(shim_plan))
    ours = {name for name in symbols.exported if sgl_install.OF_TORCH.search(name)}
    assert ours == {forward.missing for forward in shim_plan.forwards}
    assert not any("torch" in name or "c10" in name for name in symbols.needed)


def test_built_once_and_keyed_by_what_it_depends_on(
    foreign: sgl_install.SglInstall, cuda_torch: TorchFacts
) -> None:
    shim_plan = plan(foreign, cuda_torch)
    first = shim.build(shim_plan)
    stamp = first.stat().st_mtime_ns
    assert shim.build(shim_plan) == first and first.stat().st_mtime_ns == stamp
    keys = {
        shim_plan.key,
        replace(shim_plan, torch_version="2.99").key,
        replace(shim_plan, sgl_version="0.4.3").key,
        replace(shim_plan, forwards=()).key,
        replace(shim_plan, tags=(1, 0)).key,
        replace(shim_plan, libraries=(replace(shim_plan.libraries[0], sha256="0" * 64),)).key,
    }
    assert len(keys) == 6


@pytest.mark.slow
def test_a_library_for_this_torch_needs_none(fitting: Path, cuda_torch: TorchFacts) -> None:
    shim_plan = plan(sgl_install.find([str(fitting.parents[1])]), cuda_torch)
    assert shim_plan.status == "not needed" and "misses no symbol" in shim_plan.reason
    assert shim_plan.evidence()["libraries"][0]["missing"] == []


def test_a_cpu_torch_or_no_wheel_needs_none(foreign: sgl_install.SglInstall, cuda_torch: TorchFacts) -> None:
    assert "CPU build" in plan(foreign, replace(cuda_torch, cuda=None)).reason
    assert plan(None, cuda_torch).status == "not needed"


def test_a_symbol_that_cannot_be_forwarded_fails_by_name(tmp_path: Path, cuda_torch: TorchFacts) -> None:
    folder = tmp_path / "sgl_kernel"
    guard = "_ZNK3c107SymBool14guard_or_falseEPKcl_v9"
    compile_c(
        f'extern int f(void) __asm__("{guard}"); int g(void) {{ return f(); }}',
        folder / "spatial_ops.abi3.so",
    )
    shim_plan = plan(sgl_install.find([str(tmp_path)]), cuda_torch)
    assert shim_plan.status == "refused" and guard in shim_plan.refused
    with pytest.raises(UnsupportedCombination, match=f"cannot be forwarded: {guard}"):
        shim.build(shim_plan)


def test_another_cuda_major_is_refused_before_any_symbol(tmp_path: Path, cuda_torch: TorchFacts) -> None:
    folder = tmp_path / "sgl_kernel"
    cudart = compile_c(
        "int cudaFree(void) { return 0; }", tmp_path / "libcudart.so.12", "-Wl,-soname,libcudart.so.12"
    )
    compile_c(
        "extern int cudaFree(void); int g(void) { return cudaFree(); }",
        folder / "spatial_ops.so",
        str(cudart),
    )
    shim_plan = plan(sgl_install.find([str(tmp_path)]), cuda_torch)
    assert shim_plan.status == "refused" and "needs CUDA 12, this torch has 13.0" in shim_plan.reason


def test_no_compiler_is_one_sentence(
    foreign: sgl_install.SglInstall, cuda_torch: TorchFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(shim.ShimError, match=r"no-such-compiler.*Install g\+\+"):
        shim.build(plan(foreign, cuda_torch))


def test_a_failing_compiler_shows_its_last_words(
    foreign: sgl_install.SglInstall, cuda_torch: TorchFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'internal compiler error' >&2; exit 4\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(shim.ShimError, match="internal compiler error"):
        shim.build(plan(foreign, cuda_torch))


def test_a_folder_that_cannot_be_written(
    foreign: sgl_install.SglInstall, cuda_torch: TorchFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTCACHE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputPathError, match="FASTCACHE_CACHE"):
        shim.build(plan(foreign, cuda_torch))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_folder(
    foreign: sgl_install.SglInstall, cuda_torch: TorchFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    monkeypatch.setenv("FASTCACHE_CACHE", str(locked))
    with pytest.raises(OutputPathError, match="FASTCACHE_CACHE"):
        shim.build(plan(foreign, cuda_torch))


CALLER = r"""
#include <vector>
#include <stdexcept>
extern "C" void* define_op(void*, void*, void*, const std::vector<int>*, int) __asm__(SYMBOL);
extern "C" int call(int tag) {
  std::vector<int> tags;
  if (tag >= 0) tags.push_back(tag);
  int a, b, c;
  try {
    return define_op(&a, &b, &c, &tags, 1) == &a ? 0 : -1;
  } catch (const std::runtime_error&) {
    return -2;
  }
}
"""
TARGET = r"""
#include <vector>
static int seen = -3;
extern "C" void* defined(void* self, void*, void*, const std::vector<int>* tags, int mode) __asm__(SYMBOL);
void* defined(void* self, void*, void*, const std::vector<int>* tags, int mode) {
  seen = mode != 1 ? -4 : tags->empty() ? -1 : (*tags)[0];
  return self;
}
extern "C" int last() { return seen; }
"""
CALL = """
import ctypes, sys
torch = ctypes.CDLL(sys.argv[1]); ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL); wheel = ctypes.CDLL(sys.argv[3])
assert [wheel.call(tag) for tag in (-1, 0, 1)] == [0, 0, 0] and torch.last() == 5, torch.last()
assert wheel.call(-1) == 0 and torch.last() == -1
assert wheel.call(2) == -2 and wheel.call(3) == -2, "a tag without a counterpart must not be registered"
print("fastcache-trial: loaded")
"""


def test_forwarded_arguments_arrive_and_tags_are_renumbered(
    tmp_path: Path, foreign: sgl_install.SglInstall, cuda_torch: TorchFacts
) -> None:
    target = compile_cpp(
        TARGET, tmp_path / "libtorch_cpu.so", "-Wl,-soname,libtorch_cpu.so", f'-DSYMBOL="{DEF_NEW}"'
    )
    caller = compile_cpp(CALLER, tmp_path / "wheel.so", f'-DSYMBOL="{DEF_OLD}"')
    forwards = (Forward("FORWARD_DEF_SCHEMA", DEF_OLD, DEF_NEW),)
    library = shim.build(replace(plan(foreign, cuda_torch), forwards=forwards, tags=(0, 5, -1)))
    assert trial.run(CALL, [str(target), str(library), str(caller)]) is None


@pytest.mark.parametrize(("missing", "target"), [("ib", "jb"), ("jb", "jbPNS0_19CUDAErrorLogCaptureE")])
def test_the_error_check_keeps_its_arguments(
    tmp_path: Path, foreign: sgl_install.SglInstall, cuda_torch: TorchFacts, missing: str, target: str
) -> None:
    known = compile_c(
        'static long seen; void check(int e, const char* f, const char* n, unsigned l, _Bool d, void* p) __asm__("%s");'
        "void check(int e, const char* f, const char* n, unsigned l, _Bool d, void* p)"
        "{ seen = (e == 7 && *f == 'f' && *n == 'n' && l == 42 && d && !p); } long last(void) { return seen; }"
        % (CHECK + target),
        tmp_path / "libc10_cuda.so",
        "-Wl,-soname,libc10_cuda.so",
    )
    caller = compile_c(
        'void check(int, const char*, const char*, int, _Bool) __asm__("%s");'
        'void call(void) { check(7, "file", "name", 42, 1); }' % (CHECK + missing),
        tmp_path / "wheel.so",
    )
    forwards = (Forward("FORWARD_CUDA_CHECK", CHECK + missing, CHECK + target),)
    library = shim.build(replace(plan(foreign, cuda_torch), forwards=forwards))
    code = (
        "import ctypes, sys\ntorch = ctypes.CDLL(sys.argv[1]); ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)\n"
        "ctypes.CDLL(sys.argv[3]).call()\nassert torch.last() == 1\nprint('fastcache-trial: loaded')"
    )
    assert trial.run(code, [str(known), str(library), str(caller)]) is None


BAD = {
    "abort": (
        "#include <stdlib.h>\n__attribute__((constructor)) static void f(void) { abort(); }",
        "SIGABRT",
    ),
    "segfault": ("__attribute__((constructor)) static void f(void) { *(volatile int*)0 = 1; }", "SIGSEGV"),
    "exit 127": (
        "#include <unistd.h>\n__attribute__((constructor)) static void f(void) { _exit(127); }",
        "code 127",
    ),
    "silent exit": (
        "#include <unistd.h>\n__attribute__((constructor)) static void f(void) { _exit(0); }",
        "code 0",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_shim_ends_its_child_and_not_this_process(kind: str, tmp_path: Path, cache: Path) -> None:
    source, ending = BAD[kind]
    bad = compile_c(source, tmp_path / "bad.so")
    code = f"import ctypes, sys\nctypes.CDLL(sys.argv[1])\nprint({trial.LOADED!r})"
    assert ending in trial.run(code, [str(bad)])


def test_a_hanging_library_is_given_up(tmp_path: Path) -> None:
    bad = compile_c(
        "#include <unistd.h>\n__attribute__((constructor)) static void f(void) { pause(); }",
        tmp_path / "b.so",
    )
    cause = trial.run("import ctypes, sys\nctypes.CDLL(sys.argv[1])", [str(bad)], timeout_s=2)
    assert "did not finish in 2 s" in cause


@pytest.mark.slow
def test_a_shim_in_place_of_torchs_own_function_ends_only_its_child(
    tmp_path: Path, fitting: Path, def_here: str, cache: Path
) -> None:
    """Such a forwarder meets every registration in the process; the plan never makes one (see test_shim_symbols)."""
    bad = compile_c(
        f'#include <stdlib.h>\nvoid f(void) __asm__("{def_here}"); void f(void) {{ abort(); }}',
        tmp_path / "bad.so",
    )
    cause = trial.load_spatial(fitting, bad)
    assert "SIGABRT" in cause
    assert not (cache / "trials").exists(), "a failed trial is not remembered"


@pytest.mark.slow
def test_the_same_operator_from_a_second_path_ends_only_its_child(tmp_path: Path, fitting: Path) -> None:
    second = tmp_path / "two.so"
    second.write_bytes(fitting.read_bytes())
    code = "import torch\ntorch.ops.load_library(sys.argv[1])\n" + trial.LOAD_SPATIAL.replace(
        "argv[1:3]", "argv[2:4]"
    )
    cause = trial.run("import sys\n" + code, [str(fitting), str(second), ""])
    assert "SIGABRT" in cause and "same name and overload name multiple times" in cause


@pytest.mark.slow
def test_a_trial_that_succeeded_is_remembered(
    tmp_path: Path, fitting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "spatial_ops.so"
    library.write_bytes(fitting.read_bytes())
    assert trial.load_spatial(library) is None
    monkeypatch.setattr(trial, "run", lambda *_: "tried again")
    assert trial.load_spatial(library) is None
    library.write_bytes(library.read_bytes() + b"\0")
    assert trial.load_spatial(library) == "tried again"


def test_the_command_records_why_none_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "torch_facts", lambda: TorchFacts("2.13.0+cpu", None, tmp_path, {}))
    output = tmp_path / "out" / "shim.json"
    assert run(output) == 0
    record = json.loads(output.read_text())
    assert record["status"] == "not needed" and record["shim"] is None
    assert [path.name for path in output.parent.iterdir()] == ["shim.json"]


@pytest.mark.slow
def test_the_command_leaves_a_library_to_preload(
    tmp_path: Path, foreign: sgl_install.SglInstall, cuda_torch: TorchFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim, "torch_facts", lambda: cuda_torch)
    monkeypatch.setattr(sgl_install, "find", lambda *_: foreign)
    assert run(tmp_path / "shim.json") == 0
    record = json.loads((tmp_path / "shim.json").read_text())
    assert record["status"] == "built" and (tmp_path / record["shim"]).is_file()
    assert list(record["forwarded"]) == [plan(foreign, cuda_torch).forwards[0].missing]


def test_the_command_fails_with_the_list(
    tmp_path: Path, cuda_torch: TorchFacts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    name = "_ZN3c1013MessageLogger6streamB5cxx11Ev"
    compile_c(
        f'extern int f(void) __asm__("{name}_"); int g(void) {{ return f(); }}'.replace('_"', '"'),
        tmp_path / "sgl_kernel" / "spatial_ops.so",
    )
    torch_elsewhere = replace(cuda_torch, libraries=tmp_path)
    monkeypatch.setattr(shim, "torch_facts", lambda: torch_elsewhere)
    monkeypatch.setattr(sgl_install, "find", lambda *_: FIND([str(tmp_path)]))
    assert run(tmp_path / "shim.json") == 1
    assert "MessageLogger::stream" in capsys.readouterr().err and not (tmp_path / "shim.json").exists()


FIND = sgl_install.find


def run(output: Path) -> int:
    parser = argparse.ArgumentParser()
    shim.add_arguments(parser)
    return shim.run(parser.parse_args(["--output", str(output)]))
