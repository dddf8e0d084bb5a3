"""The `quality` section as cells, the numbers of their rows, and the texts and questions they are made of."""

from __future__ import annotations

import math

import pytest

from fastcache.bench.quality import metrics
from fastcache.bench.quality.cells import QualityCell, TaskConfig, expand_quality
from fastcache.bench.quality.retrieval import TASKS, item
from fastcache.bench.quality.texts import load_prose, windows
from fastcache.errors import ConfigError, DatasetError, UnknownName

CONFIG = {
    "models": {"a": {"path": "models/a"}, "b": {"load_format": "dummy"}},
    "engine": {"dtype": "float32", "kv_dtype": "fp8", "max_model_len": 4096},
    "quality": {
        "methods": ["knorm", {"name": "snapkv", "query_aware": True, "kv_dtype": "fp8"}],
        "ratios": [0.5, 0.8],
        "tasks": [
            {"name": "needles4", "context": 300, "samples": 2},
            {"name": "continuation", "context": 300},
        ],
    },
}


def encode(text: str) -> list[int]:
    return list(text.encode())


def changed(**section):
    return CONFIG | {"quality": CONFIG["quality"] | section}


def test_guard_rows_come_by_themselves_and_first():
    cells = expand_quality(CONFIG)
    assert [(cell.label, cell.compression_ratio) for cell in cells] == [
        ("full", None),
        ("full fp8", None),
        ("no context", None),
        *[(label, ratio) for ratio in (0.5, 0.8) for label in ("random", "knorm", "snapkv fp8 query-aware")],
    ]
    assert [cell.guard for cell in cells] == [True] * 4 + [False, False, True, False, False]
    assert {cell.model for cell in cells} == {"a"} and len({cell.id for cell in cells}) == 9
    assert cells[0].dtype == "float32" and cells[0].kv_dtype == "auto"
    assert all(QualityCell.from_dict(cell.to_dict()) == cell for cell in cells)


def test_a_method_may_have_ratios_of_its_own_and_a_checkpoint_is_called_by_its_name():
    trained = {"name": "mlp", "params": {"checkpoint": "some/where/smollm2-f5.safetensors"}, "ratios": [0.8]}
    cells = [cell for cell in expand_quality(changed(methods=["knorm", trained])) if not cell.guard]
    found = [(cell.label, cell.compression_ratio) for cell in cells]
    assert found == [("knorm", 0.5), ("knorm", 0.8), ("mlp smollm2-f5", 0.8)]


def test_a_method_named_twice_is_one_cell_and_no_section_is_no_cell():
    assert len(expand_quality(changed(methods=["random", "knorm", "knorm"], ratios=[0.5]))) == 5
    assert expand_quality({"models": {}}) == []


@pytest.mark.parametrize(
    ("section", "error", "says"),
    [
        ({"methods": ["snapvk"]}, UnknownName, "snapkv"),
        ({"method": ["snapkv"]}, UnknownName, "methods"),
        ({"methods": [{"name": "snapkv", "parms": {}}]}, UnknownName, "params"),
        ({"tasks": [{"name": "needels4"}]}, UnknownName, "needles4"),
        ({"tasks": []}, ConfigError, "at least one task"),
        ({"tasks": [{"name": "needle"}, {"name": "needle"}]}, ConfigError, "twice"),
        ({"tasks": [{"name": "needle", "output": 3}]}, ConfigError, "takes no `output`"),
        ({"ratios": [1.0]}, ConfigError, "between 0 and 1"),
        ({"methods": [{"name": "knorm", "ratios": [0.9]}]}, ConfigError, "those of quality.ratios"),
        ({"models": ["b"]}, ConfigError, "no `path`"),
        ({"models": ["c"]}, UnknownName, "Allowed: a, b"),
    ],
)
def test_what_cannot_be_is_said(section, error, says):
    with pytest.raises(error, match=says):
        expand_quality(changed(**section))


@pytest.mark.parametrize("task", TASKS)
def test_an_item_depends_on_seed_and_number_alone_and_has_its_answers(task):
    prose = load_prose(None)
    first, again = (item(task, 3, 1200, 7, prose, encode) for _ in range(2))
    assert first == again != item(task, 4, 1200, 7, prose, encode) != item(task, 3, 1200, 8, prose, encode)
    assert 700 < len(first.context) <= 1200
    for question in first.questions:
        answer = bytes(question.answer).decode().strip()
        assert answer in bytes(first.context).decode()
        assert answer not in bytes(question.prompt).decode()


@pytest.mark.parametrize(
    ("task", "says"), [("needles4", "too few to hide 4"), ("kv_lookup", "make it longer")]
)
def test_a_context_too_short_for_its_task_is_an_error(task, says):
    with pytest.raises(ConfigError, match=says):
        item(task, 0, 80, 0, load_prose(None), encode)


def test_prose_is_prose_and_windows_are_distinct(tmp_path):
    prose = load_prose(None)
    assert "pydoc_data.topics" in prose.source and len(prose.documents[0]) > 100_000
    taken = windows(prose, encode, 500, 8, seed=0)
    assert len({tuple(ids) for ids in taken}) == 8 and {len(ids) for ids in taken} == {500}
    file = tmp_path / "text.txt"
    file.write_text("One. Two.\n\f\nThree, and much more of it. Four.", encoding="utf-8")
    own = load_prose(str(file))
    assert own.documents == ("One. Two.", "Three, and much more of it. Four.")
    assert own.sentences[0] == ("One.", "Two.")
    with pytest.raises(DatasetError, match="fewer or shorter"):
        windows(own, encode, 500, 1, seed=0)
    with pytest.raises(DatasetError, match="cannot be read"):
        load_prose(str(tmp_path / "missing.txt"))


def test_retrieval_counts_contexts_not_questions():
    full = [[True, True], [True, False], [True, True], [False, True]]
    ours = [[True, False], [True, False], [False, False], [True, True]]
    nll = [[0.5, 1.5]] * 4
    got = metrics.retrieval(full, ours, nll, nll)
    assert (got["contexts"], got["questions"]) == (4, 8)
    assert got["accuracy_full"] == 6 / 8 and got["accuracy"] == 4 / 8
    assert got["loss"] == pytest.approx(2 / 8) and got["accuracy_of_solved"] == 3 / 6
    losses = [0.5, 0.0, 1.0, -0.5]
    spread = math.sqrt(sum((x - 0.25) ** 2 for x in losses) / 3 / 4)
    assert got["loss_se"] == pytest.approx(spread) and got["answer_nll"] == 1.0
    assert "75% of its 8 questions" in metrics.unusable("needles4", got)
    assert metrics.unusable("needles4", got | {"accuracy_full": 0.8}) is None


def test_greedy_outputs_are_compared_token_by_token():
    got = metrics.greedy([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 0, 4], [5, 6, 7, 8]])
    assert (got["identical"], got["first_difference"]) == (1, 3.0)
    assert (got["token_match"], got["prefix_match"]) == (0.875, 0.75)


def test_a_task_has_an_output_only_where_it_means_something():
    assert TaskConfig("greedy").output == 96 and TaskConfig("needle").output is None
