"""Quality task shapes through the engine: rows by their schema, and the published model knows what it sees."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jsonschema
import pytest
import yaml
from PIL import Image

from fastcache.bench.quality.cells import QualityCell, TaskConfig, expand_quality
from fastcache.bench.quality.measure import measure_quality
from fastcache.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results/published/shapes-model"
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/quality.schema.yaml").read_text())


def cell(**changes) -> QualityCell:
    values = {"model": "shapes", "model_path": str(PUBLISHED / "model"), "method": "full", "device": "cpu"}
    tasks = ({"name": "shapes", "samples": 6},)
    return QualityCell.from_dict({**values, "tasks": tasks, "dtype": "float32", "num_pages": 400, **changes})


def measured(**changes) -> dict:
    row = measure_quality(cell(**changes))
    assert row["status"] == "ok", row["error"]
    jsonschema.Draft202012Validator(SCHEMA).validate(row)
    return row


def test_the_published_model_knows_its_pictures_and_without_them_nothing():
    seeing, blind = measured(), measured(method="no_context")
    full, none = (row["tasks"]["shapes"] for row in (seeing, blind))
    assert full["accuracy"] == full["accuracy_full"] >= 0.8 and full["skipped"] is None
    assert none["accuracy"] <= 0.5 and none["accuracy_full"] == full["accuracy"]
    assert none["kinds"]["where"]["accuracy"] <= 0.2
    assert sum(kind["questions"] for kind in full["kinds"].values()) == full["questions"] == 36
    first = full["examples"][0]
    assert Image.open(io.BytesIO(base64.b64decode(first["picture"]))).size == (80, 80)
    right = sum(one["given"] == one["answer"] for one in full["examples"])
    assert right >= 4 and all(one["given"] == one["full"] for one in full["examples"])
    assert [one["picture"] for one in none["examples"]] == [one["picture"] for one in full["examples"]]


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("mlp", {"checkpoint": str(PUBLISHED / "f5.safetensors")}),
        ("snapkv", {"window": 8}),
        ("streaming_llm", {}),
    ],
)
def test_every_method_compresses_every_context(method, params):
    row = measured(
        method=method, method_params=params, compression_ratio=0.8, tasks=({"name": "shapes", "samples": 1},)
    )
    # What the merging networks leave over: a first token, and two words about the picture.
    assert row["uncompressed_requests"] == 0 and row["kept"] == pytest.approx(0.2, abs=0.03)
    assert row["label"] == {"mlp": "mlp f5", "snapkv": "snapkv window=8"}.get(method, method)


def test_a_model_that_reads_text_alone_is_a_row_that_says_so(tiny_model):
    folder = tiny_model("llama", 6, 2, 16, 64, 3, max_positions=2048)
    row = measure_quality(cell(model_path=str(folder)))
    assert row["status"] == "unsupported" and "train-shapes" in row["error"]["message"]


def test_pictures_belong_to_shapes_and_a_method_may_name_its_ratios():
    assert TaskConfig("shapes").pictures == 1 and TaskConfig("needle").pictures is None
    with pytest.raises(ConfigError, match="takes no `pictures`"):
        TaskConfig("needle", pictures=2)
    with pytest.raises(ConfigError, match="takes no `output`"):
        TaskConfig("shapes", output=2)
    section = {
        "tasks": [{"name": "shapes"}],
        "ratios": [0.5, 0.8],
        "methods": ["knorm", {"name": "mlp", "params": {"checkpoint": "f5"}, "ratios": [0.8]}],
    }
    cells = expand_quality({"models": {"shapes": {"path": "x"}}, "quality": section})
    assert [(c.label, c.compression_ratio) for c in cells if not c.guard] == [
        ("knorm", 0.5),
        ("knorm", 0.8),
        ("mlp f5", 0.8),
    ]
