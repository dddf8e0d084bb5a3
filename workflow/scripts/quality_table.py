"""All quality rows -> one table: each row checked against its schema, the results of every task in columns."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from make_table import as_csv, check_rows, judge, write


def read(sources: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of files with one row each (.json), or one per line (.jsonl)."""
    rows = []
    for source in sources:
        text = source.read_text(encoding="utf-8")
        lines = text.splitlines() if source.suffix == ".jsonl" else [text]
        rows += [json.loads(line) for line in lines if line.strip()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, nargs="*", default=[])
    parser.add_argument("--plan", type=Path)
    for option in ("--schema", "--rows", "--table", "--status"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args()
    rows = read(args.sources)
    check_rows(rows, yaml.safe_load(args.schema.read_text(encoding="utf-8")))
    plan = json.loads(args.plan.read_text(encoding="utf-8")) if args.plan else None
    planned = plan.get("quality", []) if plan else [row["cell_id"] for row in rows]
    allowed = plan["config"].get("expected_failures", []) if plan else []
    status = judge(rows, planned, [entry for entry in allowed if entry["cell"].startswith("quality-")])
    write(args.rows, "".join(json.dumps(row) + "\n" for row in rows))
    write(args.table, as_csv(rows))
    write(args.status, json.dumps(status, indent=1) + "\n")


if __name__ == "__main__":
    main()
