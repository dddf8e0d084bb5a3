"""Prose that quality tasks are made of: what every Python ships, or a file of the user's. Imports no torch.

A file is UTF-8 text; a form feed (as a line of its own) ends a document, an empty line a paragraph.
"""

from __future__ import annotations

import hashlib
import platform
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastcache.bench.prompts import prose
from fastcache.errors import DatasetError

# A paragraph of at least this many characters that is nearly all letters is prose; code, grammar and tables are not.
SHORTEST, LETTERS = 160, 0.94
SENTENCE_END = re.compile(r"(?<=[a-z0-9)][.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Prose:
    """`documents`: each a text of paragraphs separated by an empty line. `source`: where it comes from, in words."""

    documents: tuple[str, ...]
    source: str

    @cached_property
    def sentences(self) -> tuple[tuple[str, ...], ...]:
        """The sentences of each document, in order."""
        return tuple(
            tuple(s.strip() for s in SENTENCE_END.split(" ".join(text.split())) if s.strip())
            for text in self.documents
        )


def load_prose(path: str | None) -> Prose:
    """The file at `path`, or for None the prose paragraphs of Python's language reference. Errors: `DatasetError`."""
    if path is None:
        text = prose_of_python()
        source = f"the prose paragraphs of pydoc_data.topics, inside Python {platform.python_version()}"
        return Prose((text,), f"{source} ({_digest(text)})")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"quality.text: {path!r} cannot be read ({error}). Give a UTF-8 text file, or leave it out for the prose "
            "that ships with Python."
        ) from None
    documents = tuple(part.strip() for part in text.split("\f") if part.strip())
    if not documents:
        raise DatasetError(f"quality.text: {path!r} holds no text.")
    return Prose(documents, f"{len(documents)} documents of {Path(path).name} ({_digest(text)})")


def prose_of_python() -> str:
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", prose())]
    return "\n\n".join(part for part in paragraphs if _is_prose(part))


def _is_prose(paragraph: str) -> bool:
    letters = sum(char.isalpha() or char in " ,.'()-;:" for char in paragraph)
    return (
        len(paragraph) >= SHORTEST
        and paragraph[0].isupper()
        and paragraph.endswith(".")
        and letters >= LETTERS * len(paragraph)
    )


def _digest(text: str) -> str:
    return f"{len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def windows(
    prose: Prose, encode: Callable[[str], list[int]], length: int, count: int, seed: int
) -> list[list[int]]:
    """`count` passages of `length` token ids, each from its own document while there are enough long ones, else from
    distinct places. Errors: `DatasetError` if the text is too short."""
    encoded = [ids for ids in map(encode, prose.documents) if len(ids) >= length]
    rng = random.Random(f"{seed}/windows/{length}")
    if len(encoded) >= count:
        step = len(encoded) / count
        return [encoded[int(i * step)][:length] for i in range(count)]
    places = [
        (d, start)
        for d, ids in enumerate(encoded)
        for start in range(0, len(ids) - length + 1, length // 4 or 1)
    ]
    if len(places) < count:
        raise DatasetError(
            f"the prose has room for {len(places)} passages of {length} tokens and {count} were asked for; ask for "
            "fewer or shorter ones, or give a longer quality.text."
        )
    chosen = sorted(rng.sample(places, count))
    return [encoded[d][start : start + length] for d, start in chosen]
