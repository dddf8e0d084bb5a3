"""Runs of the real Snakefile in a folder of their own, with cells that measure nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FAKE_CELL = f"{sys.executable} {Path(__file__).with_name('fake_cell.py')}"
MATRIX: dict[str, Any] = {
    "models": {"smollm2": {"load_format": "dummy"}},
    "workloads": [{"name": "synthetic-long", "context": 96, "output": 8}],
    "variants": ["baseline", "compression-only"],
    "methods": ["knorm"],
    "compression_factors": [4],
    "batch_sizes": [1],
    "measure": {"repeats": 2, "timeout_s": 20},
}


@dataclass
class Workplace:
    """A working directory, the config in it, and the checkout whose Snakefile runs there."""

    folder: Path
    checkout: Path = ROOT

    def configure(self, **changes: Any) -> None:
        (self.folder / "config.yaml").write_text(yaml.safe_dump(MATRIX | changes), encoding="utf-8")

    def command(self, *arguments: str) -> list[str]:
        snakefile = ["--snakefile", str(self.checkout / "Snakefile"), "--configfile", "config.yaml"]
        return [sys.executable, "-m", "snakemake", *snakefile, "--cores", "2", *arguments]

    def environment(self, faults: Mapping[str, str]) -> dict[str, str]:
        return os.environ | {
            "FASTCACHE_CELL_COMMAND": FAKE_CELL,
            "FAKE_FAULTS": json.dumps(dict(faults)),
            "PYTHONPATH": os.pathsep.join((str(self.checkout), str(ROOT / "tests"))),
        }

    def snakemake(
        self, *arguments: str, faults: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Standard error is part of `stdout`, as a person sees it."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(faults or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )

    def rows(self) -> dict[str, dict[str, Any]]:
        lines = (self.folder / "results/rows.jsonl").read_text(encoding="utf-8").splitlines()
        return {row["cell_id"]: row for row in map(json.loads, lines)}

    def measured(self) -> list[str]:
        """Cells started since the last call."""
        note = self.folder / "measured.txt"
        cells = note.read_text(encoding="utf-8").split() if note.exists() else []
        note.unlink(missing_ok=True)
        return sorted(cells)


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    place = Workplace(tmp_path)
    place.configure()
    return place


@pytest.fixture
def succeed() -> Callable[[subprocess.CompletedProcess[str]], str]:
    def check(done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 0, done.stdout
        return done.stdout

    return check
