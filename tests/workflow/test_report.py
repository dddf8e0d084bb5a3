"""The page: self-contained, whole, and every number in it read from the rows."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import plotting
import pytest
import render_report
import reproduction
from conftest import ROOT
from make_table import judge
from rows import SMALL_MATRIX, failed_row, row, rows_of

from fastcache.bench.matrix import expand
from fastcache.bench.table import enrich

PER_CELL = ("throughput", "latency", "kv_memory", "agreement")
SCRIPTS = ROOT / "workflow/scripts"
FIGURES = ("throughput", "latency", "kv_memory", "agreement", "timeline", "decisions", "sm_ratio", "pools")


def script(name: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def draw(folder: Path) -> None:
    (folder / "figures").mkdir(exist_ok=True)
    for name in FIGURES:
        figure = folder / "figures" / name
        script(
            f"plot_{name}.py",
            "--rows",
            folder / "rows.jsonl",
            "--svg",
            f"{figure}.svg",
            "--csv",
            f"{figure}.csv",
        )


def draw_here(folder: Path) -> None:
    """The same without a process per figure."""
    (folder / "figures").mkdir(exist_ok=True)
    for name in FIGURES:
        figure = importlib.import_module(f"plot_{name}")
        files = (folder / "figures" / f"{name}.{kind}" for kind in ("svg", "csv"))
        rows = plotting.read_rows(folder / "rows.jsonl")
        plotting.write_figure(name, *figure.draw(plotting.frame(rows)), *files)


def render_here(rows: list[dict], figures: Path) -> str:
    """The page of `rows` around figures that are there already."""
    status = judge(rows, [r["cell_id"] for r in rows], [])
    filled = render_report.context(enrich(rows), status, {"config": {}, "excluded": []}, figures)
    return render_report.templates(ROOT / "report").get_template("report.html.j2").render(filled)


def build(folder: Path, rows: list[dict]) -> str:
    """Table, figures and page of `rows`, by the scripts the rules call."""
    source = folder / "published.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    outputs = (
        "--rows",
        folder / "rows.jsonl",
        "--table",
        folder / "table.csv",
        "--status",
        folder / "status.json",
    )
    script(
        "make_table.py", "--source", source, "--schema", ROOT / "workflow/schemas/row.schema.yaml", *outputs
    )
    draw(folder)
    inputs = (
        "--rows",
        folder / "rows.jsonl",
        "--status",
        folder / "status.json",
        "--figures",
        folder / "figures",
    )
    script("render_report.py", *inputs, "--templates", ROOT / "report", "--output", folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def measured() -> list[dict]:
    """Two cells without numbers among many with."""
    cells = expand(SMALL_MATRIX).cells
    return [failed_row(c) if i in (3, 9) else row(c) for i, c in enumerate(cells)]


@pytest.fixture(scope="module")
def page(tmp_path_factory, measured) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("page")
    return folder, build(folder, measured)


class Addresses(HTMLParser):
    """Every place from which a browser would load something, and all ids."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset", "poster", "action"):
                self.loaded.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_nothing_is_loaded_from_anywhere(page):
    parsed = Addresses()
    parsed.feed(page[1])
    assert parsed.loaded and all(address.startswith(("#", "data:")) for address in parsed.loaded)
    assert not re.search(r"@import|url\((?!#)", page[1])
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket)\b", page[1])
    drawn = [n for n in FIGURES if (page[0] / f"figures/{n}.csv").read_text(encoding="utf-8").strip()]
    assert "<link" in page[1] and parsed.tags.count("svg") == len(drawn) >= len(FIGURES) - 2


def test_ids_are_unique_and_links_lead_somewhere(page):
    parsed = Addresses()
    parsed.feed(page[1])
    assert len(parsed.ids) == len(set(parsed.ids))
    targets = {address[1:] for address in parsed.loaded if address.startswith("#")}
    assert targets <= set(parsed.ids)


def test_no_machine_path_and_no_hole_in_the_page(page):
    assert str(ROOT) not in page[1] and str(page[0]) not in page[1]
    assert not re.search(r"\bNone\b|\bnan\b|Undefined|\{\{|\{%", page[1])


def test_every_row_is_in_the_table_and_failures_are_named(page, measured):
    for r in measured:
        assert page[1].count(f"<code>{r['cell_id']}</code>") == (1 if r["status"] == "ok" else 2)
    assert "2 of 36 cells failed (2 oom)" in page[1]
    assert page[1].count("the KV pool is too small") == 2


def test_the_numbers_are_those_of_the_rows(page, measured):
    shown = [r for r in enrich(measured) if r["status"] == "ok"]
    body = re.search(r'<div id="rows".*?</table>', page[1], re.DOTALL)[0]
    for r in shown:
        assert f'<td class="n" data-v="{r["throughput_tok_s"]}">{r["throughput_tok_s"]:,.1f}</td>' in body
        if r["speedup_vs_baseline"] is not None:
            assert f'data-v="{r["speedup_vs_baseline"]}"' in body


def test_figures_are_the_same_bytes_when_drawn_again(page, tmp_path):
    folder = page[0]
    (tmp_path / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    draw_here(tmp_path)  # in this process, where those of the page were drawn in four others
    for name in FIGURES:
        for kind in ("svg", "csv"):
            file = f"figures/{name}.{kind}"
            assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file


def test_each_figure_has_the_numbers_behind_it(page, measured):
    for name in PER_CELL:
        lines = (page[0] / f"figures/{name}.csv").read_text().splitlines()
        cells = [r for r in measured if name != "agreement" or r["variant"] != "baseline"]
        assert len(lines) == 1 + len(cells)
        assert all(any(r["cell_id"] in line for line in lines) for r in cells)


def test_figures_of_the_engine_show_what_rows_carry(tmp_path):
    cells = expand(SMALL_MATRIX | {"variants": ["greenctx-only", "triad"], "batch_sizes": [4]}).cells
    samples = {"time_s": [0.0, 0.5], "before": [9, 1], "compressed": [0, 4], "whole": [0, 0], "held": [0, 2]}
    steps = {
        "stage": ["prefill", "decode", "compress"],
        "stream": ["main", "main", "compress"],
        "start_s": [0.0, 0.2, 0.1],
        "end_s": [0.2, 0.5, 0.3],
        "steps": [1, 9, 1],
    }
    times = {"count": 4, "predicted_s": 0.02, "measured_s": 0.021}
    decisions = {
        "decisions": [],
        "measured": True,
        "costs": {},
        "places": ["inline"],
        "steps": {"decode": times},
    }
    rows = [
        row(
            cell,
            kv_timeline=samples | {"running": [1, 1], "waiting": [3, 0]},
            step_timeline=steps if cell.greenctx else None,
            decisions=decisions if cell.tuning != "off" else None,
            granted_sms={"main": 116, "compress": 16} if cell.greenctx else None,
        )
        for cell in cells
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    draw_here(tmp_path)
    lines = {name: (tmp_path / f"figures/{name}.csv").read_text().splitlines() for name in FIGURES}
    assert (
        len(lines["timeline"]) == 1 + 2 * 3 + 3 * 2
    )  # two samples of each variant, three runs of steps of two
    assert sum("decode step ms,5.0,5.25" in line for line in lines["decisions"]) == sum(
        r["decisions"] is not None for r in rows
    )
    assert len(lines["sm_ratio"]) == 1 + sum(r["greenctx"] for r in rows)


def test_cells_that_were_never_measured_are_counted_and_listed_but_did_not_fail(page, measured):
    planned = {r["cell_id"]: r["cell"] for r in measured}
    rows = [r | {"process_cells_before": i} for i, r in enumerate(measured) if r["status"] == "ok"]
    lost = rows.pop()
    status = judge(rows, list(planned), [])
    plan = {"config": {}, "excluded": [], "cells": planned}
    filled = render_report.context(enrich(rows), status, plan, page[0] / "figures")
    text = render_report.templates(ROOT / "report").get_template("report.html.j2").render(filled)
    assert f"Of {len(planned)} planned cells, {len(planned) - len(rows)} have no row" in text
    assert "failed unexpectedly" not in text and text.count(f"<code>{lost['cell_id']}</code>") == 1
    assert f"{len(rows)} of {len(planned)} cells measured" in text
    theirs = [sum(c["variant"] == lost["variant"] for c in cells) for cells in (rows, planned.values())]
    assert "{} of {}</td>".format(*theirs) in text
    assert "in a process that cells share" in text and "one process per cell" not in text


def test_a_cell_without_a_number_is_named_in_the_figure(page):
    assert (page[0] / "figures/throughput.svg").read_text().count(">oom<") == 3  # a baseline's in two columns


def test_dummy_weights_are_said_loudly(page):
    config = SMALL_MATRIX | {"models": {"smollm2": {"load_format": "dummy"}}, "batch_sizes": [1]}
    config |= {"workloads": [{"name": "synthetic-long", "context": 64, "output": 8}]}
    dummy = {"kind": "dummy", "sha256": None}
    text = render_here([row(cell, weights=dummy) for cell in expand(config).cells], page[0] / "figures")
    assert "<b>Dummy weights.</b>" in text and "seeded random (dummy) weights" in text
    assert "says nothing about quality" in text
    assert "<b>Dummy weights.</b>" not in page[1]


def test_a_run_in_which_nothing_succeeded_still_has_figures_and_a_report(tmp_path):
    rows = [failed_row(cell) for cell in expand(SMALL_MATRIX).cells]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    draw_here(tmp_path)
    text = render_here(rows, tmp_path / "figures")
    assert "nothing to conclude" in text and "36 of 36 cells failed" in text


def test_rows_of_two_commits_are_called_out(page):
    rows = rows_of({**SMALL_MATRIX, "batch_sizes": [1], "methods": ["snapkv"]})
    assert "more than one commit" not in render_here(rows, page[0] / "figures")
    rows[0]["git_commit"] = "2" * 40
    assert "more than one commit" in render_here(rows, page[0] / "figures")


def test_a_row_that_breaks_the_schema_reaches_no_figure(tmp_path, measured):
    broken = [{**measured[0], "throughput_tok_s": -1}]
    with pytest.raises(AssertionError, match=r"breaks the schema 'A measured cell' at throughput_tok_s"):
        build(tmp_path, broken)


def test_published_rows_become_the_same_report_again(workplace, succeed, page, measured):
    published = workplace.folder / "results/published/example"
    published.mkdir(parents=True)
    (published / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in measured))
    succeed(workplace.snakemake("recorded", "--config", "recorded=example"))
    assert workplace.measured() == []
    rebuilt = workplace.folder / "results/recorded/example"
    assert (rebuilt / "report.html").read_text() == page[1]
    assert (rebuilt / "table.csv").read_bytes() == (page[0] / "table.csv").read_bytes()


def test_recorded_without_a_name_means_all_and_an_unknown_name_is_named(workplace, succeed):
    for name in ("one", "two"):
        (workplace.folder / "results/published" / name).mkdir(parents=True)
        (workplace.folder / "results/published" / name / "rows.jsonl").touch()
    planned = succeed(workplace.snakemake("recorded", "--dry-run"))
    assert "results/recorded/one/report.html" in planned and "results/recorded/two/report.html" in planned
    done = workplace.snakemake("recorded", "--config", "recorded=three")
    assert done.returncode != 0 and "results/published/three/rows.jsonl" in done.stdout
    assert "Traceback" not in done.stdout


CAPTIONS = {
    "throughput": "whiskers the slowest and the fastest",
    "latency": "up to the 99th percentile",
    "kv_memory": "KV entries per head of a request",
    "agreement": "the bar is the method",
    "timeline": "by the stage of the sequences",
    "decisions": "as the engine predicted and measured",
    "sm_ratio": "against the SMs granted",
    "pools": "over KV pools of several sizes",
    "quality": "guard rows dotted and grey",
    "page": "one self-contained page",
    "workflow": "one row per cell",
}


def test_snakemakes_own_report_has_captions_categories_and_labels(workplace, succeed):
    captions = {path.stem for path in (ROOT / "workflow/report").glob("*.rst")}
    assert set(CAPTIONS) == captions - {"serving"}  # a page of its own, which this run does not make
    succeed(workplace.snakemake())
    succeed(workplace.snakemake("--report", "own.html"))
    own = re.sub(r"\s+", " ", (workplace.folder / "own.html").read_text().replace("\\n", " "))
    for caption in CAPTIONS.values():
        assert caption in own
    for label in ("Figures", "Report", "tokens per second", "equal output tokens"):
        assert label in own


def test_the_appendix_says_whether_the_rows_are_one_experiment(page, measured):
    folder, text = page
    assert "All rows come from one commit" in text and "No cell was measured more than once" in text
    assert "<h3>Configuration</h3>" not in render_here(measured, folder / "figures")  # none is known there
    other = [dict(r) for r in measured]
    other[2] |= {"device": other[2]["device"] | {"host_memory_bytes": 1}}
    assert "All rows come from one commit" in render_here(other, folder / "figures")
    other[0] |= {"git_commit": "2" * 40 + "-dirty", "device": other[0]["device"] | {"name": "Other CPU"}}
    other[1] = other[1] | {"clocks": {"sm_mhz": {"min": 1200.0, "median": 1500.0, "max": 1980.0}}}
    text = render_here(other, folder / "figures")
    assert (
        "These rows are not one experiment" in text
        and "one commit (" in text
        and "one device or host (" in text
    )
    assert "uncommitted changes" in text and "SM clock 1,200 to 1,980 MHz" in text


def test_a_cell_measured_again_shows_its_drift(tmp_path, measured):
    history = tmp_path / "results" / "history.jsonl"
    now = next(r for r in measured if r["status"] == "ok")
    for moment, speed in (("2026-01-01T00:00:00+00:00", 2.0), (now["started_at"], 1.0)):
        earlier = now | {"started_at": moment, "throughput_tok_s": speed * now["throughput_tok_s"]}
        reproduction.remember(earlier, history)
    reproduction.remember(now | {"status": "oom", "throughput_tok_s": None, "started_at": "x"}, history)
    (drift,) = reproduction.drifts(measured, reproduction.recall(history))
    assert drift == {"cell_id": now["cell_id"], "times": 2, "change": -0.5, "same_source": True}
    assert reproduction.recall(tmp_path / "nothing") == [] == reproduction.drifts(measured, [])


def test_a_panel_says_in_which_settings_its_cells_differ_from_others():
    pools = [
        {"name": "synthetic-long", "engine": {"num_pages": n}, "measure": {"repeats": 1}}
        for n in (5120, None)
    ]
    rows = rows_of({"models": {"smollm2": {"path": "x"}}, "workloads": pools, "batch_sizes": [4]})
    panels = set(plotting.frame(rows)["panel"])
    assert panels == {
        "synthetic-long, 3072 + 512 tokens, 5,120 pages",
        "synthetic-long, 3072 + 512 tokens",
    }
    assert set(plotting.frame(rows[:1])["panel"]) == {"synthetic-long, 3072 + 512 tokens"}


def test_captions_of_the_page_exist_for_each_figure():
    rules = re.findall(r"rule plot_(\w+)", (ROOT / "workflow/rules/figures.smk").read_text())
    captions = {p.name.split(".")[0] for p in (ROOT / "report/captions").glob("[a-z]*")}
    captions = {name for name in captions if not name.startswith("serving")}
    assert set(rules) == set(FIGURES) and captions == {*FIGURES, "quality"}


def test_cells_with_and_without_pictures_are_told_apart(page):
    with_images = {"name": "synthetic-long", "context": 2048, "output": 8, "images": 1}
    without = {"name": "synthetic-long", "context": 2048, "output": 8}
    config = SMALL_MATRIX | {"workloads": [with_images, without], "batch_sizes": [1], "methods": ["snapkv"]}
    rows = rows_of(config)
    panels = set(plotting.frame(rows)["panel"])
    assert len(panels) == 2 and any("with 1 image, 2048" in panel for panel in panels)
    assert "synthetic-long with 1 image</td>" in render_here(rows, page[0] / "figures")


def test_the_ceilings_are_numbers_with_units(page):
    said = re.search(r"copy ([\d.,]+)( to [\d.,]+)? GB/s, read and written, matrix product [\d.,]+", page[1])
    rows = [json.loads(line) for line in (page[0] / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    least = min(row["ceiling_copy_bytes_s"] for row in rows if row["ceiling_copy_bytes_s"])
    assert said and abs(float(said[1].replace(",", "")) - least / 1e9) <= 0.01 * least / 1e9


def test_notes_that_differ_in_numbers_alone_are_one_with_their_range():
    said = (
        ["noisy: 9.5% of 3", "on qwen3-8b"],
        ["noisy: 14% of 1,000", "on qwen3-32b"],
        ["noisy: 14% of 40"],
    )
    found = render_report.notes([{"notes": notes} for notes in said])
    assert found == [("noisy: 9.5 to 14% of 3 to 1,000", 3), ("on qwen3-8b", 1), ("on qwen3-32b", 1)]
    assert render_report.notes([]) == []
