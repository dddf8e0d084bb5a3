"""All rows -> one table: each row checked against its schema, speed-ups and agreement filled in, failures counted."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from fastcache.bench.table import enrich

Row = dict[str, Any]
LEFT_OUT_OF_CSV = ("cell", "output_sample", "versions")  # nested and long: they are in rows.jsonl


def read_rows(source: Path, planned: Sequence[str] | None) -> list[Row]:
    """Rows in the plan's order, from a folder with a file per cell or from a file with a row per line."""
    if source.is_dir():
        files = [source / f"{cell}.json" for cell in planned or ()]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    with source.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def with_all_fields(rows: Iterable[Row], schema: Mapping[str, Any]) -> list[Row]:
    """Rows published before a field existed have it as null: not measured."""
    return [dict.fromkeys(schema["required"]) | row for row in rows]


def check_rows(rows: Iterable[Row], schema: Mapping[str, Any]) -> None:
    """Errors: SystemExit with the row and the field; a row that breaks the schema must not reach a figure."""
    checker = jsonschema.Draft202012Validator(schema)
    for row in rows:
        error = jsonschema.exceptions.best_match(checker.iter_errors(row))
        if error is not None:
            where = ".".join(str(part) for part in error.absolute_path) or "the row"
            name = row.get("row_id") or row.get("cell_id")
            sys.exit(f"row {name!r} breaks the schema {schema['title']!r} at {where}: {error.message}")


def judge(
    rows: Sequence[Row], planned: Sequence[str], allowed: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Counts, and who failed as expected, who failed otherwise, and which expectation did not come true."""
    failed = [
        {"cell_id": row["cell_id"], "status": row["status"], "message": row["error"]["message"]}
        for row in rows
        if row["status"] != "ok"
    ]
    expected = [f for f in failed if any(_meets(f, a) for a in allowed)]
    unmet = [a for a in allowed if not any(_meets(f, a) for f in failed)]
    found = {row["cell_id"] for row in rows}
    return {
        "planned": len(planned),
        "rows": len(rows),
        "counts": dict(Counter(row["status"] for row in rows)),
        "missing": [cell for cell in planned if cell not in found],
        "expected": expected,
        "unexpected": [f for f in failed if f not in expected],
        "unmet_expectations": [dict(a) | {"ended": _endings(rows, a["cell"])} for a in unmet],
    }


def _meets(failed: Mapping[str, str], allowed: Mapping[str, str]) -> bool:
    return failed["status"] == allowed["status"] and fnmatchcase(failed["cell_id"], allowed["cell"])


def _endings(rows: Sequence[Row], pattern: str) -> list[str]:
    return sorted({row["status"] for row in rows if fnmatchcase(row["cell_id"], pattern)})


def as_csv(rows: Sequence[Row]) -> str:
    """A column per field, nested ones by dotted names; rows that lack a nested field leave it empty."""
    flat = [dict(_flatten(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flatten(row: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in row.items():
        if prefix + name in LEFT_OUT_OF_CSV:
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield prefix + name, " | ".join(str(item) for item in value)
        else:
            yield prefix + name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--source", type=Path, required=True, help="a folder of rows, or a file with one per line"
    )
    parser.add_argument(
        "--plan", type=Path, help="which cells there should be; without it, those that are there"
    )
    for option in ("--schema", "--rows", "--table", "--status"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args()
    plan = json.loads(args.plan.read_text(encoding="utf-8")) if args.plan else None
    schema = yaml.safe_load(args.schema.read_text(encoding="utf-8"))
    rows = read_rows(args.source, list(plan["cells"]) if plan else None)
    rows = enrich(rows if args.source.is_dir() else with_all_fields(rows, schema))
    check_rows(rows, schema)
    planned = list(plan["cells"]) if plan else [row["cell_id"] for row in rows]
    status = judge(rows, planned, plan["config"].get("expected_failures", []) if plan else [])
    write(args.rows, "".join(json.dumps(row) + "\n" for row in rows))
    write(args.table, as_csv(rows))
    write(args.status, json.dumps(status, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    main()
