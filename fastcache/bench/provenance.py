"""Which source measured a row: its commit, and a digest of what can change a number. Imports no torch.

The digest covers every source file of the package except those in `UNMEASURED`, which only choose cells,
arrange finished rows or talk to the user: editing those, a plot or a page measures nothing again.
"""

from __future__ import annotations

import hashlib
import subprocess
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SOURCE_SUFFIXES = (".py", ".cu", ".cuh", ".cc", ".cpp", ".h")
UNMEASURED = (
    "cli*.py",
    "bench/axes.py",
    "bench/compare.py",
    "bench/estimate.py",
    "bench/fits.py",
    "bench/matrix.py",
    "bench/provenance.py",
    "bench/quality/cells.py",
    "bench/resume.py",
    "bench/supervise.py",
    "bench/table.py",
    "bench/warm.py",
    "device/doctor*.py",
    "models/fetch.py",
    "models/gguf*.py",
    "training/*.py",
    "serving/*.py",
)


@cache
def source_digest(package: Path = PACKAGE) -> str:
    """16 hex digits over the paths and contents of the measured source."""
    total = hashlib.sha256()
    for file in measured_files(package):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{file.relative_to(package).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]


def measured_files(package: Path = PACKAGE) -> list[Path]:
    """Sorted files whose content decides numbers."""

    def counts(file: Path) -> bool:
        name = file.relative_to(package).as_posix()
        return file.suffix in SOURCE_SUFFIXES and not any(fnmatch(name, pattern) for pattern in UNMEASURED)

    return sorted(file for file in package.rglob("*") if file.is_file() and counts(file))


@cache
def git_commit(package: Path = PACKAGE) -> str | None:
    """The checkout's commit, with "-dirty" if a tracked file of the package differs; None outside one.

    An installed copy may lie inside someone else's repository, so the package must be tracked there.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return commit + "-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git, no repository, or not ours: a fact, not a failure
    return done.stdout.strip()
