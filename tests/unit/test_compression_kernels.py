"""The Triton kernels on a CPU: under Triton's interpreter the same sets and numbers as the reference, and compiled
for a GPU that need not be there.

The interpreter must be chosen before Triton is imported, so the cases run in a process of their own. How fast the
kernels are, and 16-bit arithmetic, is for tests/gpu.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
CASES = ("kernel_cases.py", "ragged_kernel_cases.py", "paged_kernel_cases.py", "merge_kernel_cases.py")


@pytest.mark.parametrize("cases", CASES)
def test_kernels_equal_the_reference(cases):
    run_alone(cases, TRITON_INTERPRET="1")


def test_kernels_compile_for_an_h100(tmp_path):
    run_alone("compile_cases.py", TRITON_CACHE_DIR=str(tmp_path))


def run_alone(cases, **variables):
    run = subprocess.run(
        [sys.executable, FOLDER / cases], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
