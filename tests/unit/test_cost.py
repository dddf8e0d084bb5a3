"""What a method costs: the bound by hand, a measurement on the CPU, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastcache.cli import main
from fastcache.compression.cost import MethodCost, limit_seconds, load_costs, measure, save_costs
from fastcache.compression.cost_inputs import StepInputs, StepShape
from fastcache.compression.kvzap import KVzap
from fastcache.compression.mlp import MLP
from fastcache.compression.registry import create
from fastcache.compression.transform import ModelFit
from fastcache.config import CompressionConfig
from fastcache.device.ceilings import Ceilings
from fastcache.errors import ConfigError

SHAPE = StepShape(2, 4, 2, 16, torch.float32, context=100, sequences=3, ratio=0.25, page_size=4)
CEILINGS = Ceilings(copy_bytes_s=1e9, gemm_flop_s=1e30, dtype="float32")


SHAPE_OF_4 = replace(SHAPE, ratio=0.75)


def fit(shape):
    device = torch.device("cpu")
    table = shape.rotation(device).cos_sin
    return ModelFit(shape.num_layers, shape.head_dim, shape.dtype, device, table, 0.75, dummy_weights=True)


def method(name):
    return create(CompressionConfig(method=name))


def test_the_bound_counts_bytes_read_and_copied():
    entry, kept = 2 * 16 * 4, 3 * 75
    copies = 2 * 2 * entry * kept  # keys and values, read and written
    assert limit_seconds(method("streaming_llm"), SHAPE, CEILINGS) == pytest.approx(2 * copies / 1e9)
    assert limit_seconds(method("knorm"), SHAPE, CEILINGS) == pytest.approx(2 * (copies + 300 * entry) / 1e9)
    queries = 300 * 4 * 16 * 4
    mass = copies + 300 * entry + queries
    assert limit_seconds(method("h2o"), SHAPE, CEILINGS) == pytest.approx(2 * mass / 1e9)


def test_the_bound_of_a_mass_is_half_of_all_products():
    slow = Ceilings(copy_bytes_s=1e30, gemm_flop_s=1e9, dtype="float32")
    pairs = 3 * 100 * 100 / 2
    assert limit_seconds(method("h2o"), SHAPE, slow) == pytest.approx(2 * pairs * 4 * 2 * 16 / 1e9)


@pytest.mark.parametrize("name", ["streaming_llm", "snapkv", "h2o", "expected_attention"])
def test_a_measurement_explains_the_step_it_was_made_of(name):
    found = measure(method(name), SHAPE, torch.device("cpu"), CEILINGS)
    assert found.cost.seconds(SHAPE.num_tokens) == pytest.approx(found.step_seconds)
    assert found.cost.seconds_per_token >= 0 and found.cost.fixed_seconds >= 0
    assert found.cost.extra_bytes is None  # the CPU does not count it


def test_a_transform_reads_all_writes_what_it_makes_and_multiplies(tmp_path):
    merging = MLP(checkpoint="dummy").bind(fit(SHAPE))
    entry, kept = 2 * 16 * 4, 3 * 25
    moved = 2 * entry * (300 + kept)
    assert limit_seconds(merging, SHAPE_OF_4, CEILINGS) == pytest.approx(2 * moved / 1e9)
    slow = Ceilings(copy_bytes_s=1e30, gemm_flop_s=1e9, dtype="float32")
    products = 2 * 3 * 25 * 2 * (64 * 128 + 128 * 128 + 128 * 16)  # keys and values, groups, heads
    assert limit_seconds(merging, SHAPE_OF_4, slow) == pytest.approx(2 * products * 2 / 1e9)
    found = measure(merging, SHAPE_OF_4, torch.device("cpu"), CEILINGS)
    assert found.cost.seconds(SHAPE.num_tokens) == pytest.approx(found.step_seconds)


def test_a_method_that_does_more_than_watch_a_prefill_is_refused():
    with pytest.raises(ConfigError, match=r"kvzip.*replay_scores.*more than one prefill shows"):
        measure(method("kvzip"), SHAPE, torch.device("cpu"), CEILINGS)


def test_hidden_states_are_read_and_multiplied():
    scoring, device = KVzap(checkpoint="dummy"), torch.device("cpu")
    shape = replace(SHAPE, hidden_size=64, dummy_weights=True)
    rater = shape.rater(scoring, device)
    copies = 2 * 2 * (2 * 16 * 4) * 3 * 75
    moved = copies + 300 * 64 * 4
    assert limit_seconds(scoring, shape, CEILINGS, rater) == pytest.approx(2 * moved / 1e9)
    slow = Ceilings(copy_bytes_s=1e30, gemm_flop_s=1e9, dtype="float32")
    products = 300 * (64 * 8 + 8 * 2)
    assert limit_seconds(scoring, shape, slow, rater) == pytest.approx(2 * products * 2 / 1e9)
    for paged in (False, True):
        found = measure(scoring, replace(shape, paged=paged), device, CEILINGS)
        assert found.cost.seconds(SHAPE.num_tokens) == pytest.approx(found.step_seconds)


@pytest.mark.parametrize("name", ["streaming_llm", "knorm", "snapkv", "kvzap"])
def test_pages_give_what_the_step_s_own_tensors_give(name):
    """The two ways measure the same work: of the same content they leave the same pages."""
    kept = []
    for paged in (False, True):
        shape, device = replace(SHAPE, paged=paged, hidden_size=64, dummy_weights=True), torch.device("cpu")
        one = KVzap(checkpoint="dummy") if name == "kvzap" else method(name)
        inputs = StepInputs(one, shape, device, shape.rater(one, device))
        inputs.layer(1)
        pool = inputs._layers.pool
        kept.append([x[:, :, :75] for x in pool.gather(1, inputs._work.fresh, SHAPE.kept(method(name)))])
    assert kept[0][0].any() and all(torch.equal(*pair) for pair in zip(*kept, strict=True))


def test_pages_are_measured_with_the_same_bound():
    found = measure(method("snapkv"), replace(SHAPE, paged=True), torch.device("cpu"), CEILINGS)
    assert found.step_seconds > 0 and found.limit_seconds == limit_seconds(method("snapkv"), SHAPE, CEILINGS)


def test_what_only_a_prefill_shows_is_not_read_back_from_pages():
    with pytest.raises(ConfigError, match=r"h2o.*attention_mass, which pages do not hold.*without --paged"):
        measure(method("h2o"), replace(SHAPE, paged=True), torch.device("cpu"), CEILINGS)


def test_costs_survive_their_file(tmp_path):
    costs = {"knorm": MethodCost(1e-9, 2e-4, 5), "tova": MethodCost(2e-9, 0.0, None)}
    save_costs(tmp_path / "new" / "costs.json", costs, {"model": "m"})
    assert load_costs(tmp_path / "new" / "costs.json") == (costs, {"model": "m"})
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["costs.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"costs": {"knorm": {"seconds": 1}}}', '{"costs": [1]}'])
def test_a_file_that_holds_no_costs_is_refused(tmp_path, content):
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"holds no costs of methods .*fastcache cost --output"):
        load_costs(path)


def test_the_command_measures_dummy_networks(tmp_path, capsys):
    from tiny_llava import write_tiny_llava

    folder, path = write_tiny_llava(tmp_path / "llava", head_dim=16), tmp_path / "costs.json"
    arguments = (
        f"cost --model {folder} --methods mlp,kvzap,knorm --batch 2 --context 60 --factor 4 --output {path} "
        "--device cpu"
    ).split()
    assert main([*arguments, "--load-format", "dummy"]) == 2 and "checkpoint" in capsys.readouterr().err
    arguments += ["--compressor-path", "dummy"]
    assert main(arguments) == 2 and "load_format 'dummy'" in capsys.readouterr().err
    assert main([*arguments, "--load-format", "dummy"]) == 0
    measured = json.loads(path.read_text())["measured"]
    assert measured["mlp"]["share_of_prefill"] > 0 and measured["kvzap"]["share_of_prefill"] > 0
    assert main([*arguments[:4], "knorm", *arguments[5:]]) == 2


def test_the_command_prints_and_stores_what_it_measured(tiny_model, tmp_path, capsys):
    folder, path = tiny_model("llama", 4, 2, 16, 48, 3, False), tmp_path / "costs.json"
    arguments = (
        f"cost --model {folder} --methods knorm,tova --batch 2 --context 64 --factor 2 --output {path}"
    )
    assert main([*arguments.split(), "--device", "cpu"]) == 0
    assert not json.loads(path.read_text())["paged"]
    assert main([*arguments.split(), "--device", "cpu", "--paged"]) == 0
    printed = capsys.readouterr().out
    assert (
        "read back from pages" in printed and "knorm" in printed and "tova" in printed and "share" in printed
    )
    assert set(load_costs(path)[0]) == {"knorm", "tova"}
    stored = json.loads(path.read_text())
    assert stored["paged"] and stored["sequences_per_step"] == 2 and stored["prefill_seconds_per_token"] > 0
    assert stored["measured"]["tova"]["share_of_prefill"] > 0
