"""The report's table of questions about pictures, and its examples: read from the rows, wrong answers marked."""

from __future__ import annotations

import quality_findings
import render_report
from conftest import ROOT
from findings import percent


def row(label, ratio, given, accuracy, picture="iVBORw0KGgo="):
    kind = {"questions": 6, "accuracy": accuracy, "accuracy_se": 0.05}
    example = {
        "picture": picture,
        "number": 2,
        "of": 3,
        "question": "where is the red circle",
        "answer": "b 4",
        "full": "b 4",
        "given": given,
    }
    shapes = {
        "contexts": 2,
        "questions": 12,
        "accuracy": accuracy,
        "accuracy_se": 0.04,
        "skipped": None,
        "kinds": {"where": kind} if label == "full" else {"where": kind, "count": kind},
        "examples": [example],
    }
    return {
        "cell_id": label,
        "model": "m",
        "label": label,
        "method": label,
        "guard": label == "full",
        "status": "ok",
        "compression_ratio": ratio,
        "cell": {"tasks": [{"name": "needle"}, {"name": "shapes", "pictures": 3}], "method_params": {}},
        "kv_dtype": "auto",
        "head_budgets": None,
        "kept": 0.2,
        "kv_bytes_share": 0.2,
        "kv_bytes_per_token": 10,
        "tasks": {"shapes": shapes},
    }


def test_every_method_is_in_the_table_and_a_wrong_answer_is_marked():
    rows = [row("full", None, "b 4", 0.9), row("snapkv", 0.8, "c 1", 0.625), row("knorm", 0.8, "", 0.1)]
    other = row("mlp", 0.8, "a 1", 0.7, picture="bm9uZQ==")  # asked something else: no example of it
    found = quality_findings.points([*rows, other])
    assert [point["score"] for point in found] == [0.9, 0.625, 0.1, 0.7]
    quality = {
        "rows": [*rows, other],
        "tasks": ["shapes"],
        "texts": [],
        "dtypes": ["float32"],
        "models": ["m"],
        "best": quality_findings.best_per_budget(found),
        "apart": quality_findings.APART,
        "pictures": quality_findings.pictures([*rows, other]),
        "score": found[0]["score_name"],
        "skipped": [],
        "svg": "",
        "csv": "data:,",
    }
    page = (
        render_report.templates(ROOT / "report")
        .get_template("sections/quality.html.j2")
        .render(quality=quality)
    )
    assert "Each context is 3 pictures" in page and "2 contexts, 12 questions" in page
    assert '<td class="wrong">c 1</td>' in page and "<td>b 4</td>" in page and "(nothing)" in page
    assert ">a 1</td>" not in page
    assert f"{percent(0.625)} ± {percent(0.05)}" in page and '<td class="n">-</td>' in page
    assert page.count("<img ") == 1 and 'src="data:image/png;base64,iVBORw0KGgo="' in page
    assert "questions about pictures answered" in page
    assert "Perplexity" not in page and "text:" not in page  # of tasks that this run has not
    assert page.count("<td>none</td>") == 1 and "The best guard is" in page
