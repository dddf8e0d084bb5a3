"""Where sgl_kernel is installed and what its libraries need, read from files: nothing of it is imported."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from fastcache.device import elf
from fastcache.device.shim_symbols import OF_TORCH

PACKAGE = "sgl_kernel"
DISTRIBUTIONS = ("sglang-kernel", "sgl-kernel")
SPATIAL = "spatial_ops"
CUDA_LIBRARY = re.compile(r"lib(?:cudart|nvrtc|cublas|cublasLt)\.so\.(\d+)")


@dataclass(frozen=True)
class SglInstall:
    """An installed sgl_kernel. `complete` is False for the 90 KB subset that holds only the green-context op."""

    folder: Path
    version: str
    complete: bool

    @property
    def spatial(self) -> Path | None:
        """The library that holds the green-context op, or None."""
        return next(iter(sorted(self.folder.glob(f"{SPATIAL}*.so"))), None)

    def common(self, capability: tuple[int, int] | None) -> Path | None:
        """The library that `import sgl_kernel` loads first on this GPU (None: no GPU), or None if absent."""
        variant = "sm90" if capability == (9, 0) else "sm100"
        for folder in (self.folder / variant, self.folder):
            for path in sorted(folder.glob("common_ops*.so")):
                return path
        return None


@dataclass(frozen=True)
class LibraryFacts:
    """What one library needs and does not get from this torch."""

    path: Path
    sha256: str
    cuda_major: int | None
    missing: tuple[str, ...]


def find(search_path: list[str] | None = None) -> SglInstall | None:
    """The sgl_kernel that `import sgl_kernel` would take, found without importing it."""
    spec = PathFinder.find_spec(PACKAGE, search_path)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    return SglInstall(
        folder, _version(folder), spec.origin is not None and (folder / "__init__.py").is_file()
    )


def _version(folder: Path) -> str:
    written = folder / "version.py"
    if written.is_file() and (found := re.search(r"__version__\s*=\s*[\"']([^\"']+)", written.read_text())):
        return found[1]
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


@lru_cache(maxsize=2)
def torch_exports(library_folder: Path) -> frozenset[str]:
    """Every symbol that the libraries of a torch installation export."""
    names: set[str] = set()
    for path in sorted(library_folder.glob("lib*.so")):
        names |= elf.read(path).exported
    return frozenset(names)


def preloaded_exports(environment: str | None = None) -> frozenset[str]:
    """Symbols that libraries named in LD_PRELOAD already bring into this process (a shim, if one is there)."""
    value = os.environ.get("LD_PRELOAD", "") if environment is None else environment
    names: set[str] = set()
    for entry in re.split(r"[: ]+", value):
        if entry and Path(entry).is_file():
            names |= elf.read(entry).exported
    return frozenset(names)


def inspect(path: Path, exported: Collection[str]) -> LibraryFacts:
    """Undefined minus exported, for the torch symbols of one library. Errors: elf.ElfError."""
    symbols = elf.read(path)
    missing = sorted(name for name in symbols.undefined if OF_TORCH.search(name) and name not in exported)
    majors = {int(found[1]) for name in symbols.needed if (found := CUDA_LIBRARY.fullmatch(name))}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return LibraryFacts(path, digest, max(majors, default=None), tuple(missing))
