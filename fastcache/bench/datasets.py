"""Prompts and lengths that come from the user's files: prompt sets, and request traces. Imports no torch.

Prompt sets are the common shapes found in the wild: a text under one of `TEXT_KEYS`, or a list of turns under
`conversations` ({from, value}) or `messages` ({role, content}), of which the first user turn is the prompt.
Traces are those of the Azure LLM inference data set: CSV with TIMESTAMP, ContextTokens, GeneratedTokens.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache.errors import DatasetError

TEXT_KEYS = ("prompt", "text", "question", "query", "instruction", "input")
USER_ROLES = ("human", "user")
SUFFIXES = (".json", ".jsonl", ".csv")
TRACE_COLUMNS = ("ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace: prompt and output lengths in tokens, and when it came, as it is written."""

    context: int
    output: int
    timestamp: str | None = None


def read_prompts(folder: str) -> list[str]:
    """Every distinct prompt text in the folder's files, in file order. Errors: `DatasetError` saying why."""
    files = _files(Path(folder))
    records, prompts = 0, {}
    for file in files:
        for record in _records(file):
            records += 1
            text = _text(record)
            if text:
                prompts[text] = None
    if not prompts:
        raise DatasetError(
            f"{folder}: {len(files)} file(s) with {records} record(s), none of which has a text under "
            f"{', '.join(TEXT_KEYS)}, conversations or messages."
        )
    return list(prompts)


def read_trace(path: str) -> list[TraceRow]:
    """Rows of a trace in file order. Errors: `DatasetError` naming the file, the line and the column."""
    rows = []
    for number, record in enumerate(_csv(Path(path)), start=2):
        try:
            row = TraceRow(*(int(record[name]) for name in TRACE_COLUMNS), record.get("TIMESTAMP"))
        except KeyError as missing:
            have = ", ".join(str(name) for name in record)
            raise DatasetError(
                f"{path} has no column {missing.args[0]}; a trace needs TIMESTAMP, "
                f"{', '.join(TRACE_COLUMNS)}. It has: {have}."
            ) from None
        except (TypeError, ValueError):
            values = [record[name] for name in TRACE_COLUMNS]
            raise DatasetError(
                f"{path}, line {number}: {values} are not two whole numbers of tokens."
            ) from None
        if row.context >= 1 and row.output >= 1:
            rows.append(row)
    if not rows:
        raise DatasetError(f"{path} has no row with at least one context token and one generated token.")
    return rows


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise DatasetError(f"dataset folder {str(place)!r} does not exist.")
    files = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DatasetError(f"{place} holds no file ending in {', '.join(SUFFIXES)}.")
    return files


def _records(file: Path) -> Iterator[Any]:
    suffix = file.suffix.lower()
    if suffix == ".csv":
        yield from _csv(file)
    elif suffix == ".jsonl":
        for number, line in enumerate(_read(file).splitlines(), start=1):
            if line.strip():
                yield _json(line, f"{file}, line {number}")
    elif suffix == ".json":
        content = _json(_read(file), str(file))
        if isinstance(content, Mapping):  # one record, or a list of them under some key
            lists = [value for value in content.values() if isinstance(value, list)]
            yield from [content] if _text(content) or not lists else max(lists, key=len)
        else:
            yield from content if isinstance(content, list) else [content]
    else:
        raise DatasetError(f"{file}: a prompt set ends in {', '.join(SUFFIXES)}.")


def _csv(file: Path) -> Iterator[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            yield from csv.DictReader(lines)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{file} cannot be read as CSV: {error}") from None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} cannot be read: {error}") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where} is not JSON: {error}") from None


def _text(record: Any) -> str | None:
    if isinstance(record, str):
        return record.strip() or None
    if not isinstance(record, Mapping):
        return None
    for key in TEXT_KEYS:
        if isinstance(record.get(key), str) and record[key].strip():
            return record[key].strip()
    for turns in (record.get("conversations"), record.get("messages")):
        if isinstance(turns, list):
            return _first_user_turn(turns)
    return None


def _first_user_turn(turns: list[Any]) -> str | None:
    for turn in turns:
        if isinstance(turn, Mapping) and turn.get("from", turn.get("role")) in USER_ROLES:
            value = turn.get("value", turn.get("content"))
            if isinstance(value, str) and value.strip():
                return value.strip()
    return None
