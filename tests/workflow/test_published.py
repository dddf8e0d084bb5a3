"""Every folder of published rows: its page holds them, a report is made from them again, and its README quotes that."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, Workplace

FOLDERS = sorted(path.parent for path in ROOT.glob("results/published/*/rows.jsonl"))
# Their READMEs have numbers that no report has; tests/unit/test_published_*.py compute each from the rows.
COMPUTED = {"h100-llava", "h100-triad", "h100-triad-latency"}
NUMBER = re.compile(r"(?<![\w.,+-])\d+(?:,\d{3})*(?:\.\d+)?(?![\d-]|[.,]?\w)")


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def published(request, tmp_path_factory) -> tuple[Path, list[dict], str]:
    """(the folder, its rows, the page made from them)."""
    folder, place = request.param, Workplace(tmp_path_factory.mktemp("published"))
    place.configure()
    (place.folder / "results").mkdir()
    (place.folder / "results/published").symlink_to(folder.parent)
    done = place.snakemake("--config", f"recorded={folder.name}", "--", "recorded")
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    name = "serving.html" if "row_id" in rows[0] else "report.html"
    return folder, rows, (place.folder / "results/recorded" / folder.name / name).read_text(encoding="utf-8")


def test_a_report_is_made_from_published_rows(published):
    _, rows, page = published
    assert ("claims and our targets</h2>" if "row_id" in rows[0] else "<h2>Discussion</h2>") in page


def test_the_page_beside_published_rows_is_of_these_rows(published):
    folder, rows, page = published
    beside = folder / "report.html"
    if beside.is_file():
        text = beside.read_text(encoding="utf-8")
        assert origin(text) == origin(page)
        assert [r["cell_id"] for r in rows if r["cell_id"] in page and r["cell_id"] not in text] == []


def origin(page: str) -> set[str]:
    """Commits, and how many rows there are."""
    return set(re.findall(r"\b[0-9a-f]{40}(?:-dirty)?\b|\d+ of \d+ rows", page))


def test_each_number_of_a_readme_is_in_the_report_of_its_rows(published):
    folder, _, page = published
    readme = folder / "README.md"
    if readme.is_file() and folder.name not in COMPUTED:
        counted = [len(path.read_text().splitlines()) for path in folder.glob("*.jsonl")]
        assert not_in(f"{page} {counted}", readme.read_text(encoding="utf-8")) == []


def not_in(page: str, readme: str) -> list[str]:
    """Numbers of the prose and tables that are no rounding of one on the page; code, names and dates are none."""
    page = re.sub(r"<(script|style|svg).*?</\1>", " ", page, flags=re.DOTALL)
    there = {value(text) for text in NUMBER.findall(html.unescape(re.sub(r"<[^>]+>", " ", page)))}
    prose = re.sub(r"```.*?```|`[^`]*`", " ", readme, flags=re.DOTALL)

    def found(text: str) -> bool:
        digits = len(text.partition(".")[2])
        return any(round(number, digits) == value(text) for number in there)

    return [text for text in NUMBER.findall(prose) if not found(text)]


def value(text: str) -> float:
    return float(text.replace(",", ""))


def test_a_number_that_is_not_in_the_report_is_named():
    page = "<style>p {width: 7px}</style><td>2,705.2</td><td>1.02 times</td><td>80%</td><td>c1024-o128</td>"
    said = "| 2,705 | 1.02 times, 80 % |, with `--batch 64` on an H100 80GB at 1a671ac, 2026-11-30"
    assert not_in(page, said) == []
    assert not_in(page, said + "; 2,704 at 1.03, 7 and 64, 128.") == ["2,704", "1.03", "7", "64", "128"]
