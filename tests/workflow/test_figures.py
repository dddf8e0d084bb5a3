"""Figures and the table of comparisons where cells are many: lines instead of panels, folds, pools of several sizes."""

from __future__ import annotations

import compact
import findings
import plot_agreement
import plot_decisions
import plot_kv_memory
import plot_latency
import plot_pools
import plot_sm_ratio
import plot_throughput
import plotting
import pytest
import render_report
from conftest import ROOT
from rows import SMALL_MATRIX, failed_row, row, rows_of

from fastcache.bench.matrix import expand
from fastcache.bench.table import enrich

POOLS = [2048, 3072, 4096, None]
SWEEP = SMALL_MATRIX | {
    "workloads": [
        {
            "name": "synthetic-long",
            "context": 512,
            "output": 64,
            "engine": {"num_pages": pages} if pages else {},
        }
        for pages in POOLS
    ],
    "batch_sizes": [4],
    "methods": ["snapkv"],
    "variants": ["baseline", "compression-only"],
}


def sweep() -> list[dict]:
    cells = expand(SWEEP).cells
    return enrich([row(cell, num_pages=cell.num_pages or 5120) for cell in cells])


def words(figure) -> list[str]:
    texts = [text.get_text() for ax in figure.axes for text in (*ax.texts, *ax.get_yticklabels())]
    return [text.strip() for text in texts]


def test_many_requests_of_one_batch_size_get_a_line_per_cell():
    cells = expand(SWEEP).cells
    rows = enrich([failed_row(cells[-1], "oom"), *(row(cell) for cell in cells[:-1])])
    frame = plotting.frame(rows)
    assert compact.fits(frame)
    figure, points = plot_throughput.draw(frame)
    said = words(figure)
    assert len(figure.axes) == 1 and len(points) == len(rows)
    assert [text for text in said if text.endswith("batch 4")] == [
        f"{p}, batch 4" for p in dict.fromkeys(frame["panel"])
    ]
    for each in rows:
        if each["status"] == "ok":
            number = f"{each['throughput_tok_s']:,.0f}"
            gain = f"   {each['speedup_vs_baseline']:.2f}\N{MULTIPLICATION SIGN}" if each["method"] else ""
            assert number + gain in said
    assert said.count("oom") == 1 and said.count("snapkv \N{MULTIPLICATION SIGN}5") == len(cells) // 2


@pytest.mark.parametrize("figure", [plot_latency, plot_kv_memory, plot_agreement])
def test_other_figures_do_likewise(figure):
    rows = sweep()
    both = rows + [r | {"cell_id": f"{r['cell_id']}-b", "variant": "triad"} for r in rows if r["method"]]
    drawn, points = figure.draw(plotting.frame(both))
    assert len(drawn.axes) == 2
    assert len(points) == len(both) - (4 if figure is plot_agreement else 0)


def test_a_figure_of_few_cells_or_of_several_batch_sizes_keeps_its_panels():
    rows = rows_of(SMALL_MATRIX)
    assert (
        not compact.fits(plotting.frame(rows)) and len(plot_throughput.draw(plotting.frame(rows))[0].axes) > 1
    )
    assert not compact.fits(plotting.frame(sweep()[: compact.MOST]))


@pytest.mark.parametrize("columns", [2, 3, 4, 7])
def test_columns_beyond_the_page_go_to_the_next_line(columns):
    figure, axes = plotting.grid(["a", "b"], [str(i) for i in range(columns)])
    assert axes.shape == (2, columns)
    assert figure.get_size_inches()[0] <= 3.9 * plotting.BESIDE + 0.01
    heights = [[round(ax.get_subplotspec().rowspan.start) for ax in line] for line in axes]
    assert max(heights[0]) < min(heights[1]) and len(set(heights[0])) == -(-columns // plotting.BESIDE)
    plotting.plt.close(figure)


def test_a_panel_alone_takes_less_of_the_page_and_its_legend_fits():
    one = expand(SMALL_MATRIX | {"methods": ["snapkv"], "workloads": SMALL_MATRIX["workloads"][:1]}).cells
    figure, _ = plot_throughput.draw(plotting.frame(enrich([row(cell) for cell in one])))
    pair, _ = plot_latency.draw(plotting.frame(enrich([row(cell) for cell in one])))
    assert len(figure.axes) == 1 and len(pair.axes) == 2
    assert figure.get_size_inches()[0] == pytest.approx(0.6 * pair.get_size_inches()[0], rel=0.01)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and len(figure.legends[0].get_texts()) == 5
    for drawn in (figure, pair):
        plotting.plt.close(drawn)


@pytest.mark.parametrize(
    ("points", "look"), [("338.4", ' style="--share: 0.603"'), ("561.6", ""), ("842.4", "")]
)
def test_a_narrow_figure_is_not_blown_up_to_the_width_of_the_page(tmp_path, points, look):
    (tmp_path / "a.svg").write_text(f'<?xml?>\n<svg xmlns:x="y" width="{points}pt" height="9pt">\n</svg>')
    svg = render_report.inline_svg(tmp_path / "a.svg", "a", "words")
    assert svg.startswith(f'<svg role="img" aria-label="words"{look} xmlns')
    assert "var(--share, 1)" in (ROOT / "report/style.css").read_text()


def test_marks_at_the_top_of_a_scale_from_zero_are_not_cut_off():
    """Values that hardly differ: the margin that is a share of their range would be less than a mark is high."""
    rows = rows_of(SMALL_MATRIX)
    alike = enrich(
        [r | {"peak_kv_bytes": 2**20 * 500, "throughput_tok_s": 300.0 + i / 99} for i, r in enumerate(rows)]
    )
    memory, sms = (draw(plotting.frame(alike))[0] for draw in (plot_kv_memory.draw, plot_sm_ratio.draw))
    for ax, most in ((memory.axes[1], 500), (sms.axes[0], 300)):
        assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] >= 1.04 * most
    plotting.plt.close("all")


def test_pools_show_where_compression_pays():
    rows = sweep()
    figure, points = plot_pools.draw(plotting.frame(rows))
    assert set(points["num_pages"]) == {2048, 3072, 4096, 5120} and len(points) == len(rows)
    assert points["pool_gib"].max() == pytest.approx(5120 * 16 * 46_080 / 2**30)
    right = figure.axes[1]
    (line,) = (line for line in right.lines if len(line.get_xdata()) == 4)
    gains = [r["speedup_vs_baseline"] for r in rows if r["method"]]
    assert list(line.get_ydata()) == pytest.approx(gains)
    assert {text.get_text() for text in right.texts} == {f"{gain:.2f}" for gain in gains}


def test_pools_of_too_few_sizes_are_no_figure():
    rows = [r for r in sweep() if r["cell"]["num_pages"] != 2048 and r["cell"]["num_pages"] is not None]
    assert plot_pools.draw(plotting.frame(rows))[1].empty
    assert plot_pools.draw(plotting.frame(rows_of(SMALL_MATRIX)))[1].empty
    older = [r | {"kv_bytes_per_token": None} for r in sweep()]
    assert plot_pools.draw(plotting.frame(older))[1].empty


def test_what_says_nothing_is_left_out():
    dummy = [r | {"weights": {"kind": "dummy", "sha256": None}} for r in sweep()]
    assert plot_agreement.draw(plotting.frame(dummy))[1].empty
    figure, points = plot_decisions.draw(plotting.frame(dummy))  # nothing decided: no empty axes for it
    assert len(figure.axes) == 1 and set(points["what"]) == {"TPOT ms"}


def test_a_line_per_comparison():
    rows = sweep()
    pairs = findings.comparisons(rows)
    lines = findings.by_requests(rows, pairs)
    assert [line["requests"].rpartition(", ")[2] for line in lines] == [
        "2,048 pages",
        "3,072 pages",
        "4,096 pages",
        "512 + 64 tokens",
    ]
    first = next(r for r in rows if r["method"])
    assert lines[0]["throughput"][1] == first["throughput_tok_s"] and lines[0]["running"] == [4, 4]
    assert lines[0]["speedup"] == pytest.approx(lines[0]["throughput"][1] / lines[0]["throughput"][0])
    assert findings.by_requests(rows, pairs * findings.MOST_LINES) == []
    assert first["peak_kv_bytes"] > 10 * 2**20 and lines[0]["kv_digits"] == 0
    pairs[0].row["peak_kv_bytes"] = 400_000
    assert {line["kv_digits"] for line in findings.by_requests(rows, pairs)} == {2}


def test_the_numbers_behind_lines_are_those_behind_panels():
    rows = sweep()
    of_lines = plot_latency.draw(plotting.frame(rows))[1]
    of_panels = plot_latency.draw(plotting.frame(rows[:4]))[1]
    assert list(of_lines.columns) == list(of_panels.columns)
    assert of_lines["ttft_p50_s"].tolist()[:4] == of_panels["ttft_p50_s"].tolist()
