"""The Wikipedia articles inside gensim's wheel as plain text, for `quality.text`: 62 long ones, markup stripped.

    pip download --no-deps -d resources/wheels gensim==4.4.0
    python bench/wikipedia_text.py resources/wheels/gensim-4.4.0-*.whl resources/wikipedia.txt

The wheel's test data holds a slice of a dump of the English Wikipedia (CC BY-SA). Nothing is installed.
"""

from __future__ import annotations

import argparse
import bz2
import html
import re
import zipfile
from pathlib import Path

DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
LONG, PARAGRAPH = 11_000, 120  # characters
# In order: comments, footnotes, tables, pictures and categories, links, outer links, tags.
MARKUP = (
    (r"<!--.*?-->", ""),
    (r"<ref[^>/]*/>|<ref.*?</ref>", ""),
    (r"\{\|.*?\|\}", ""),
    (r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]", ""),
    (r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1"),
    (r"\[\[(?:File|Image|Category):[^\[\]]*\]\]", ""),
    (r"\[https?://\S+\s*([^\]]*)\]", r"\1"),
    (r"<[^>]+>|'{2,3}", ""),
)


def articles(dump: str) -> list[str]:
    """The text of every long article, paragraphs separated by an empty line."""
    found = []
    for page in re.findall(r"<page>(.*?)</page>", dump, re.DOTALL):
        text = re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL)
        if text and "<redirect" not in page and "<ns>0</ns>" in page:
            found.append(plain(html.unescape(text[1])))
    return [text for text in found if len(text) > LONG]


def plain(text: str) -> str:
    for _ in range(8):  # templates contain templates
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    for pattern, replacement in MARKUP:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n+", text))
    return "\n\n".join(p for p in paragraphs if len(p) >= PARAGRAPH and p[0] not in "*#:;|={!<[")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="gensim-4.4.0-*.whl, for any platform")
    parser.add_argument("output", type=Path, help="the text file, documents separated by form feeds")
    args = parser.parse_args()
    with zipfile.ZipFile(args.wheel) as wheel:
        dump = bz2.decompress(wheel.read(DUMP)).decode("utf-8")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n\f\n".join(articles(dump)), encoding="utf-8")


if __name__ == "__main__":
    main()
