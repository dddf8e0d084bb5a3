"""All serving rows -> one table: each checked against its schema, failures counted as in make_table.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from make_table import as_csv, check_rows, judge, write

Row = dict[str, Any]
NESTED = ("pages_over_time", "device", "decisions")


def read_rows(sources: list[Path]) -> list[Row]:
    """From cells' own files ({"rows": [...]}), or from one file with a row per line."""
    rows = []
    for source in sources:
        text = source.read_text(encoding="utf-8")
        if source.suffix == ".jsonl":
            rows += [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows += json.loads(text)["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, nargs="+", required=True)
    parser.add_argument("--expected-failures", type=json.loads, default=[])
    for option in ("--schema", "--rows", "--table", "--status"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args()
    rows = read_rows(args.sources)
    check_rows(rows, yaml.safe_load(args.schema.read_text(encoding="utf-8")))
    named = [row | {"cell_id": row["row_id"]} for row in rows]  # a verdict per rate
    status = judge(named, [row["cell_id"] for row in named], args.expected_failures)
    write(args.rows, "".join(json.dumps(row) + "\n" for row in rows))
    write(args.table, as_csv([{k: v for k, v in row.items() if k not in NESTED} for row in rows]))
    write(args.status, json.dumps(status, indent=1) + "\n")


if __name__ == "__main__":
    main()
