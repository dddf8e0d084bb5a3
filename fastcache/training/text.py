"""Text to train and to judge on, from what installed wheels ship, and windows of tokens out of text files.

    python -m fastcache.training.text --output FOLDER --wikipedia gensim.whl --packages torch numpy

writes `wikipedia.txt` and `docstrings.txt` to train on and `heldout.txt` to judge on: every fifth article, never
trained on. Documents are separated by a line with a form feed. `pydoc_data.topics` is left out on purpose: the
workload english-prose reads it.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import hashlib
import importlib.util
import inspect
import io
import random
import re
import sysconfig
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from fastcache.errors import DatasetError
from fastcache.tokenizer import Tokenizer

SEPARATOR = "\n\f\n"
HELD_OUT_EVERY = 5
MIN_ARTICLE, MIN_DOCSTRING = 2000, 300  # characters; shorter ones are redirects and one-liners
_MARKUP = (
    (re.compile(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>|<gallery.*?</gallery>", re.S), ""),
    (re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]"), ""),
    (re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]"), r"\1"),
    (re.compile(r"\[(?:https?|ftp)://\S+\s*([^\]]*)\]"), r"\1"),
    (re.compile(r"</?[a-zA-Z][^>]*>|'{2,}|&nbsp;"), ""),
    (re.compile(r"^[*#:;]+\s*", re.M), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
)


@dataclass(frozen=True)
class Corpus:
    """One text file as token ids, documents one after another. `sha256` is of the file."""

    name: str
    ids: Tensor  # (n,) int64, CPU
    sha256: str


def read_corpus(path: Path, encode: Callable[[str], list[int]], separator_id: int) -> Corpus:
    """Errors: `DatasetError` if the file is missing, not UTF-8 or empty."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"text file {path} cannot be read as UTF-8 ({error}).") from None
    ids: list[int] = []
    for document in text.split(SEPARATOR):
        ids += encode(document)
        ids.append(separator_id)
    if len(ids) < 2:
        raise DatasetError(f"text file {path} is empty; give one with running text.")
    return Corpus(path.name, torch.tensor(ids), hashlib.sha256(raw).hexdigest())


def read_material(
    text: Sequence[Path], heldout: Path | None, tokenizer: Tokenizer, separator_id: int, length: int
) -> tuple[list[Corpus], Corpus | None]:
    """What is trained on, files of at least `length` tokens each, and what is judged on, if anything.

    Errors: `DatasetError`.
    """

    def read(path: Path) -> Corpus:
        return read_corpus(path, lambda t: tokenizer.encode(t, add_special_tokens=False), separator_id)

    corpora = [read(path) for path in text]
    for one in corpora:
        require_length(one, length)
    judged = read(heldout) if heldout is not None else None
    if judged is not None and judged.sha256 in {one.sha256 for one in corpora}:
        raise DatasetError(f"{heldout} is also trained on; give held-out text of other documents.")
    return corpora, judged


def random_windows(corpora: Sequence[Corpus], length: int, count: int, seed: str) -> Tensor:
    """(count, length) int64: each from a corpus drawn evenly, at a place drawn evenly; the same for a seed."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = rng.choice(corpora).ids
        start = rng.randrange(len(ids) - length + 1)
        rows.append(ids[start : start + length])
    return torch.stack(rows)


def even_windows(corpus: Corpus, length: int, count: int) -> Tensor:
    """(count, length) int64: windows that do not overlap, spread over the corpus."""
    places = len(corpus.ids) // length
    require_length(corpus, length * count)
    return torch.stack([corpus.ids[(i * places // count) * length :][:length] for i in range(count)])


def require_length(corpus: Corpus, tokens: int) -> None:
    if len(corpus.ids) < tokens:
        raise DatasetError(
            f"{corpus.name} has {len(corpus.ids)} tokens and {tokens} are asked for; give more text or shorter windows."
        )


# -- making the files ------------------------------------------------------------------------------------------


def articles(pages: Path) -> Iterator[str]:
    """Plain text of the articles in a MediaWiki export, without markup, in the file's order.

    pages: .xml.bz2, or a wheel that holds one, as gensim's does among its test data. Errors: `DatasetError`.
    """
    try:
        with _export(pages) as compressed, bz2.open(compressed) as stream:
            for _, element in ET.iterparse(stream):
                if element.tag.endswith("}text") and element.text:
                    text = plain(element.text)
                    if len(text) >= MIN_ARTICLE:
                        yield text
                    element.clear()
    except (OSError, EOFError, ET.ParseError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{pages} holds no readable MediaWiki export in bz2 ({error}).") from None


def _export(pages: Path) -> IO[bytes]:
    if pages.suffix != ".whl":
        return pages.open("rb")
    with zipfile.ZipFile(pages) as wheel:
        exports = [info for info in wheel.infolist() if fnmatch(info.filename, "*/*articles*.xml*.bz2")]
        if not exports:
            raise DatasetError(
                f"{pages} holds no *articles*.xml*.bz2; give gensim's wheel, or an export itself."
            )
        return io.BytesIO(wheel.read(max(exports, key=lambda info: info.file_size)))


def plain(markup: str) -> str:
    """Wiki markup as running text: templates, tables, references and files out, links as their words."""
    for opening, closing in ((r"\{\{", r"\}\}"), (r"\{\|", r"\|\}")):
        innermost = re.compile(rf"{opening}(?:(?!{opening}|{closing}).)*{closing}", re.S)
        count = 1
        while count:
            markup, count = innermost.subn("", markup)
    for pattern, replacement in _MARKUP:
        markup = pattern.sub(replacement, markup)
    return markup.strip()


def docstrings(packages: Sequence[str]) -> Iterator[str]:
    """One document per module of the standard library and of `packages`: its longer docstrings, once each."""
    seen: set[str] = set()
    for root in (Path(sysconfig.get_path("stdlib")), *map(_folder, packages)):
        for file in sorted(root.rglob("*.py")):
            if {"site-packages", "test", "tests"} & set(file.relative_to(root).parts):
                continue
            found = [doc for doc in _docstrings(file) if len(doc) >= MIN_DOCSTRING and doc not in seen]
            seen.update(found)
            if found:
                yield "\n\n".join(found)


def _docstrings(file: Path) -> list[str]:
    try:
        module = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []  # test inputs of the standard library that are wrong on purpose
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = (ast.get_docstring(node) for node in ast.walk(module) if isinstance(node, kinds))
    return [inspect.cleandoc(text) for text in found if text]


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DatasetError(f"package {package!r} is not installed; leave it out of --packages or install it.")
    return Path(spec.origin).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--wikipedia", type=Path, required=True, help="an export, .xml.bz2, or a .whl with one"
    )
    parser.add_argument(
        "--packages", nargs="*", default=[], help="installed packages whose docstrings are read"
    )
    args = parser.parse_args()
    found = list(articles(args.wikipedia))
    parts = {
        "heldout.txt": found[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY],
        "wikipedia.txt": [a for i, a in enumerate(found) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1],
        "docstrings.txt": list(docstrings(args.packages)),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, documents in parts.items():
        (args.output / name).write_text(SEPARATOR.join(documents), encoding="utf-8")


if __name__ == "__main__":
    main()
