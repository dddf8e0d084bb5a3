"""The last words of `make reproduce`: a line per variant, and where the report is."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from findings import Row, by_variant, headline, percent, times

COLUMNS = ("variant", "ok", "tok/s", "speed-up", "TTFT", "TPOT", "KV kept", "agreement")


def table(rows: Sequence[Row]) -> str:
    lines = [COLUMNS]
    for v in by_variant(rows):
        speed = "-" if v["throughput"] is None else f"{v['throughput']:,.0f}"
        ratios = [times(v[name]) for name in ("speedup", "ttft", "tpot")]
        shares = [percent(v[name]) for name in ("kept", "agreement")]
        lines.append((v["variant"], f"{v['ok']}/{v['cells']}", speed, *ratios, *shares))
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--rows", "--report"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    sys.stdout.write(f"\n{table(rows)}\n\n{headline(rows)}\n\nReport: {args.report.resolve()}\n")


if __name__ == "__main__":
    main()
