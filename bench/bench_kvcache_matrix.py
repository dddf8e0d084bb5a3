"""The matrix benchmark under the name its users know: the same as `fastcache bench`."""

from __future__ import annotations

import sys

try:
    from fastcache.cli import main
except ModuleNotFoundError as missing:
    if missing.name != "fastcache":
        raise
    raise SystemExit(
        "error: the package fastcache is not installed in this Python. Run `make reproduce` once and use "
        ".venv/bin/python, or `pip install -e .` here."
    ) from None

if __name__ == "__main__":
    raise SystemExit(main(["bench", *sys.argv[1:]], prog="bench_kvcache_matrix.py"))
