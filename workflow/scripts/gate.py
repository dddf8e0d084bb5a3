"""The verdict: exit 0 only if every planned cell has a row, and each row is ok or was expected to fail that way."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def verdict(status: dict[str, Any]) -> tuple[bool, list[str]]:
    """(passed, what to say), from `status.json`."""
    lines = [
        f"{status['rows']} of {status['planned']} cells have a row, {status['counts'].get('ok', 0)} of them ok."
    ]
    lines += [f"MISSING {cell}: planned, but it has no row." for cell in status["missing"]]
    lines += [f"{r['status'].upper()} {r['cell_id']}: {r['message']}" for r in status["unexpected"]]
    lines += [f"expected {r['status']}: {r['cell_id']}" for r in status["expected"]]
    lines += [
        f"expected {r['status']} of '{r['cell']}' did not happen (ended {', '.join(r['ended'])}): "
        "remove it from expected_failures if that is now the rule."
        for r in status["unmet_expectations"]
    ]
    return not status["missing"] and not status["unexpected"], lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--status", type=Path, nargs="+", required=True, help="of each kind of cell")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    verdicts = [verdict(json.loads(path.read_text(encoding="utf-8"))) for path in args.status]
    passed, lines = all(ok for ok, _ in verdicts), [line for _, said in verdicts for line in said]
    sys.stdout.write("\n".join(lines) + "\n")
    if not passed:
        sys.stdout.write(
            "The report shows all of this. Fix the cause, or list the cells in expected_failures.\n"
        )
        return 1
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
