"""The ELF reader: what a library needs and offers, against a library whose answer is known and against nm."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from native import compile_c

from fastcache.device import elf

SOURCE = """
#include <stdlib.h>
int offered(void) { return 1; }
static int hidden(void) { return 2; }
extern int wanted(int);
extern int maybe(void) __attribute__((weak));
int uses(void) { return abs(rand()) + hidden() + wanted(3) + (maybe ? maybe() : 0); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(SOURCE, tmp_path_factory.mktemp("elf") / "known.so", "-Wl,-soname,libknown.so.1")


def test_known_library(library: Path) -> None:
    symbols = elf.read(library)
    assert symbols.soname == "libknown.so.1"
    assert {"offered", "uses"} <= symbols.exported and "hidden" not in symbols.exported
    assert symbols.undefined == {"wanted"}, "weak and versioned names are not missing"
    assert any(name.startswith("libc.so") for name in symbols.needed)


def test_agrees_with_nm_on_torch() -> None:
    import torch

    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("binutils are not installed")
    path = Path(torch.__file__).parent / "lib" / "libc10.so"
    listed = subprocess.run(
        [nm, "-D", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines() if line.split()[-2] != "A"}
    assert elf.read(path).exported >= names


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF\x02\x01" + b"\0" * 20])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.so"
    path.write_bytes(content)
    with pytest.raises(elf.ElfError, match=r"broken\.so"):
        elf.read(path)


def test_a_cut_library_is_an_error_not_an_empty_answer(library: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.so"
    cut.write_bytes(library.read_bytes()[:2000])
    with pytest.raises(elf.ElfError, match=r"cut\.so"):
        elf.read(cut)
