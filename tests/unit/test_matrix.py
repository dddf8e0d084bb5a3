"""The matrix: axes to cells, the id, and what it refuses. Nothing here may load torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jsonschema
import pytest
import yaml
from conftest import ROOT
from rows import SMALL_MATRIX, failed_row, row, rows_of

from fastcache.bench.matrix import CellConfig, WorkloadConfig, expand
from fastcache.config import VARIANTS
from fastcache.errors import ConfigError, UnknownName

SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/row.schema.yaml").read_text())


def config(**changes):
    return {**SMALL_MATRIX, **changes}


def cell(**changes) -> CellConfig:
    values = {
        "model": "smollm2",
        "model_path": "models/x",
        "workload": {"name": "synthetic-long", "context": 64, "output": 8},
        "batch_size": 2,
        "variant": "compression-only",
        "method": "snapkv",
        "compression_factor": 5,
    }
    return CellConfig.from_dict({**values, **changes})


def test_every_variant_method_workload_and_batch_appears_once():
    cells = expand(SMALL_MATRIX).cells
    assert len(cells) == len({c.id for c in cells}) == 2 * 2 * (1 + 4 * 2)
    assert {c.variant for c in cells} == set(VARIANTS)


@pytest.mark.parametrize("variants", [["triad"], ["triad", "baseline"], ["baseline"]])
def test_one_baseline_per_model_workload_and_batch_and_before_what_needs_it(variants):
    cells = expand(config(variants=variants)).cells
    assert sum(c.variant == "baseline" for c in cells) == 4
    seen = set()
    for c in cells:
        seen.add(c.id)
        assert c.baseline_id in seen


def test_each_split_is_its_own_cell_for_green_context_variants_only():
    splits = [{"compress_ratio": 0.2, "main_ratio": 0.8}, {"compress_ratio": 0.4}]
    cells = expand(config(greenctx={"splits": splits, "main_stream": True}, methods=["knorm"])).cells
    greenctx = [c for c in cells if c.variant == "greenctx-only"]
    assert {(c.greenctx_compress_ratio, c.greenctx_main_ratio) for c in greenctx} == {(0.2, 0.8), (0.4, 0.6)}
    assert all(c.greenctx_main_stream for c in greenctx)
    assert all(c.greenctx_compress_ratio is None for c in cells if c.variant == "compression-only")


def test_nearer_batch_sizes_win():
    matrix = config(
        models={"smollm2": {"path": "x"}, "qwen3-8b": {"path": "y", "batch_sizes": [2]}},
        workloads=[{"name": "english-prose"}, {"name": "synthetic-long", "batch_sizes": [8]}],
        variants=["baseline"],
    )
    sizes = {}
    for c in expand(matrix).cells:
        sizes.setdefault((c.model, c.workload.name), set()).add(c.batch_size)
    assert sizes["smollm2", "english-prose"] == {1, 4}
    assert sizes["qwen3-8b", "english-prose"] == {2}
    assert sizes["qwen3-8b", "synthetic-long"] == {8}


def test_what_a_workload_says_for_itself_comes_first():
    matrix = config(
        models={"smollm2": {"path": "x", "num_pages": 7}, "qwen3-8b": {"path": "y"}},
        workloads=[
            {"name": "synthetic-long"},
            {
                "name": "synthetic-long",
                "context": 99,
                "models": ["smollm2"],
                "variants": ["compression-only"],
                "methods": ["knorm"],
                "compression_factors": [3],
                "engine": {"num_pages": 50},
                "measure": {"repeats": 1},
            },
        ],
        variants=["baseline"],
        batch_sizes=[2],
        engine={"num_pages": 9, "page_size": 32},
        measure={"repeats": 4, "seed": 6},
    )
    general, own = [], []
    for c in expand(matrix).cells:
        (own if c.workload.context == 99 else general).append(c)
    assert [(c.model, c.num_pages, c.repeats) for c in general] == [("smollm2", 7, 4), ("qwen3-8b", 9, 4)]
    assert [(c.method, c.compression_factor) for c in own] == [(None, None), ("knorm", 3)]
    for c in own:
        assert (c.model, c.num_pages, c.repeats, c.seed, c.page_size) == ("smollm2", 50, 1, 6, 32)
        assert c.baseline_id == own[0].id and "-p50-" in c.id


@pytest.mark.parametrize(
    "own, words",
    [
        ({"models": ["smolm2"]}, "Did you mean 'smollm2'"),
        ({"greenctx": {"splits": [{"compress": 0.1}]}}, "compress_ratio"),
        ({"engine": {"numpages": 3}}, "Did you mean 'num_pages'"),
        ({"measure": {"repeat": 3}}, "Did you mean 'repeats'"),
        ({"methods": ["snapk"]}, "Did you mean 'snapkv'"),
        ({"variant": ["triad"]}, "variant"),
    ],
)
def test_a_mistake_in_a_workloads_own_axes_is_named(own, words):
    with pytest.raises((ConfigError, UnknownName), match=words):
        expand(config(workloads=[{"name": "synthetic-long", **own}]))


def fitting(memory, **model):
    matrix = {
        "models": {"qwen3-32b": {"load_format": "dummy", "dtype": "bfloat16", "device": "cuda", **model}},
        "workloads": [{"name": "synthetic-long", "context": 3968, "output": 128}],
        "variants": ["baseline"],
        "batch_sizes": [16],
        "machine": {"memory_gib": memory},
    }
    try:
        return expand(matrix)
    except ConfigError as error:
        return str(error)


def test_what_cannot_fit_is_left_out_with_its_arithmetic():
    assert len(fitting(80, gpu_mem_util=0.94).cells) == 1 == len(fitting(None).cells)
    said = fitting(64)
    # 32.8e9 weights of two bytes; 64 layers x 8 heads x 128 x 2 x 2 bytes x 4096 tokens is one GiB.
    assert "does-not-fit: weights 61.0 + KV of one request 1.0 + activations 0.4 = 62.4 GiB" in said
    assert "of 64 GiB the share 0.9 is 57.6" in said
    assert "KV of one request 0.5" in fitting(64, kv_dtype="fp8")
    assert len(fitting(64, device="cpu").cells) == 1  # a host's memory is another matter
    assert "machine.memory_gib is 'much'" in fitting("much")


def test_a_folder_that_is_not_there_yet_is_not_judged():
    assert len(expand(config(machine={"memory_gib": 0.001})).excluded) == 0


def test_the_id_depends_on_every_field_and_on_nothing_else():
    base = cell()
    assert cell().id == base.id and cell(compression_factor=5.0).id == base.id
    different = {
        "model_path": "models/y",
        "workload": {"name": "synthetic-long", "context": 64, "output": 8, "num_batches": 2},
        "method_params": {"window": 8},
        "repeats": 4,
        "seed": 1,
        "page_size": 32,
        "num_pages": 9,
        "gpu_mem_util": 0.7,
    }
    ids = {cell(**{name: value}).id for name, value in different.items()}
    assert len(ids | {base.id}) == len(different) + 1


def test_a_cell_survives_json():
    for c in expand(SMALL_MATRIX).cells:
        assert CellConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c


def test_all_variants_share_the_baseline_and_it_is_its_own():
    ids = {
        c.baseline_id for c in expand(config(batch_sizes=[4], workloads=SMALL_MATRIX["workloads"][:1])).cells
    }
    assert len(ids) == 1
    assert cell().baseline().baseline_id == cell().baseline_id == cell().baseline().id


def test_impossible_cells_are_left_out_by_a_named_rule():
    matrix = config(
        models={"smollm2": {"load_format": "dummy"}},
        workloads=[
            {"name": "english-prose"},
            {"name": "synthetic-long", "context": 8, "output": 4096},
            {"name": "synthetic-long"},
        ],
    )
    expansion = expand(matrix)
    assert {c.workload for c in expansion.cells} == {WorkloadConfig("synthetic-long")}
    assert {e.rule for e in expansion.excluded} == {"text-needs-a-tokenizer", "no-room-for-a-prompt"}


def test_a_matrix_of_impossible_cells_only_says_why():
    with pytest.raises(ConfigError, match="text-needs-a-tokenizer"):
        expand(config(models={"smollm2": {"load_format": "dummy"}}, workloads=[{"name": "english-prose"}]))


@pytest.mark.parametrize(
    "changes, near",
    [
        ({"variantz": []}, "variants"),
        ({"engine": {"page_sise": 16}}, "page_size"),
        ({"measure": {"repeat": 1}}, "repeats"),
        ({"models": {"smollm2": {"pth": "x"}}}, "path"),
        ({"workloads": [{"name": "english-prose", "contxt": 3}]}, "context"),
        ({"variants": ["triat"]}, "triad"),
        ({"methods": ["snapkw"]}, "snapkv"),
        ({"workloads": [{"name": "english-pros"}]}, "english-prose"),
        ({"models": {"qwen3-8": {"load_format": "dummy"}}}, "qwen3-8b"),
        ({"greenctx": {"splits": [{"compress_ration": 0.2}]}}, "compress_ratio"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(changes, near):
    with pytest.raises(UnknownName) as caught:
        expand(config(**changes))
    assert caught.value.nearest == near and near in str(caught.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_sizes": [0]}, "positive integer"),
        ({"batch_sizes": ["4"]}, "positive integer"),
        ({"batch_sizes": [[4]]}, "positive integer"),
        ({"batch_sizes": 4}, "list"),
        ({"compression_factors": [1]}, "above 1"),
        ({"compression_factors": [0.5]}, "above 1"),
        ({"compression_factors": ["5"]}, "above 1"),
        ({"greenctx": {"splits": [{"compress_ratio": 0.6, "main_ratio": 0.6}]}}, "sum to"),
        ({"greenctx": {"bound": True, "main_stream": True}}, "bound and main_stream are both on"),
        ({"greenctx": {"splits": [{"compress_ratio": 1.5}]}}, "strictly between 0 and 1"),
        ({"greenctx": {"splits": [{"compress_ratio": "a"}]}}, "strictly between 0 and 1"),
        ({"models": {}}, "at least one model"),
        ({"models": {"smollm2": {}}}, "--smollm2"),
        ({"workloads": []}, "at least one"),
        ({"variants": []}, "at least one"),
        ({"workloads": [{"name": "heavy-trace"}]}, "--trace-conv"),
        ({"workloads": [{"name": "light-dataset"}]}, "--dataset-dir"),
        ({"workloads": [{"name": "english-prose", "token": "a"}]}, "synthetic-long"),
        ({"measure": {"timeout_s": 0}}, "seconds"),
        ({"measure": {"timeout_s": "soon"}}, "seconds"),
        ({"engine": {"gpu_mem_util": 1.0}}, "strictly between"),
        ({"measure": 3}, "mapping"),
    ],
)
def test_a_wrong_value_is_answered_with_what_is_allowed(changes, words):
    with pytest.raises(ConfigError) as caught:
        expand(config(**changes))
    assert words in str(caught.value)


def test_keys_of_others_are_let_through_only_when_announced():
    matrix = config(report={"title": "x"})
    assert expand(matrix, other_keys=("report",)).cells
    with pytest.raises(UnknownName):
        expand(matrix)


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "baseline"},
        {"method": None},
        {"greenctx_compress_ratio": 0.3},
        {"variant": "triad"},
        {"require_greenctx": True},
    ],
)
def test_a_cell_refuses_settings_that_do_not_apply_to_its_variant(changes):
    with pytest.raises(ConfigError):
        cell(**changes)


def test_a_thousand_cells_without_torch():
    program = (
        "import sys; from fastcache.bench.matrix import expand\n"
        "workloads = [{'name': 'synthetic-long', 'context': c} for c in range(1, 101)]\n"
        "models = {'qwen3-8b': {'load_format': 'dummy'}}\n"
        "print(len(expand({'models': models, 'workloads': workloads}).cells), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1000", "False"]


def test_rows_of_the_factory_obey_the_schema_and_the_schema_names_every_cell_parameter():
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for made in rows_of():
        validator.validate(made)
        assert CellConfig.from_dict(made["cell"]).id == made["cell_id"]
    for status in ("oom", "unsupported", "timeout", "crashed", "failed"):
        validator.validate(failed_row(cell(), status))


@pytest.mark.parametrize(
    "changes",
    [
        {"throughput_tok_s": None},
        {"status": "error"},
        {"error": {"type": "a", "message": "b"}},
        {"ttft_s": {"p50": 1}},
    ],
)
def test_the_schema_refuses_rows_that_contradict_themselves(changes):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(row(cell(), **changes), SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(failed_row(cell()) | {"throughput_tok_s": 0.0}, SCHEMA)


def test_every_field_of_the_schema_says_what_it_means():
    assert set(SCHEMA["required"]) == set(SCHEMA["properties"])
    assert all(entry.get("description") for entry in SCHEMA["properties"].values())


def test_a_cell_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        cell().batch_size = 3


def test_policies_are_an_axis_and_each_has_its_own_baseline():
    cells = expand(
        {**SMALL_MATRIX, "variants": ["compression-only", "triad"], "policies": ["default", "p1c1d8"]}
    )
    assert {c.policy for c in cells.cells if c.variant != "triad"} == {"default", "p1c1d8"}
    assert {c.policy for c in cells.cells if c.variant == "triad"} == {"default"}
    assert {e.rule for e in cells.excluded} == {"balances-itself"}
    by_id = {c.id: c for c in cells.cells}
    assert all(by_id[c.baseline_id].policy == c.policy for c in cells.cells)


def test_triad_is_compared_with_the_cells_of_the_compression_table():
    """Where both configs ran in one checkout, these are measured once."""
    table, triad = (
        {
            c.id: c
            for c in expand(yaml.safe_load((ROOT / f"config/{name}.yaml").read_text()), ("report",)).cells
        }
        for name in ("h100-compression", "triad")
    )
    assert set(table) <= set(triad)
    own = [c for c in triad.values() if c.variant == "triad"]
    asked = {(c.model, c.workload, c.batch_size) for c in own}
    assert {(c.model, c.workload, c.batch_size) for c in table.values()} <= asked
