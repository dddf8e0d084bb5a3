"""Merging KV entries: against a loop in float64, over ragged batches with images; and the files it reads."""

from __future__ import annotations

import merge_oracle
import pytest
import torch

from fastcache.compression.merge import MergeLayout, make_plan, merge_layer
from fastcache.compression.merge_checkpoint import (
    check_shapes,
    read_checkpoint,
    tensor_name,
    write_checkpoint,
)
from fastcache.compression.mlp import MLP
from fastcache.compression.transform import ModelFit
from fastcache.errors import CheckpointError, ConfigError
from fastcache.models.config import RopeConfig
from fastcache.models.rope import rotary_table

LAYERS, HEADS, SIZE, FACTOR, WIDTH = 2, 3, 8, 4, 10
CPU = torch.device("cpu")
TABLE = rotary_table(RopeConfig(10_000.0), SIZE, 256, CPU)


def networks(kinds=("tk", "tv", "ik", "iv")):
    return merge_oracle.networks(FACTOR, SIZE, WIDTH, LAYERS, kinds)


def fit(ratio=1 - 1 / FACTOR, **changes) -> ModelFit:
    values = {"num_layers": LAYERS, "head_dim": SIZE, "dtype": torch.float64, "device": CPU, "cos_sin": TABLE}
    return ModelFit(**(values | changes), compression_ratio=ratio)


@pytest.mark.parametrize(
    "layout",
    [
        MergeLayout(FACTOR),
        MergeLayout(FACTOR, n_sink=3, recent=5, unrotated=True, base="mean"),
    ],
    ids=["original", "trained here"],
)
def test_every_entry_is_what_the_formula_says(layout):
    nets = networks()
    lengths, spans = [37, 12, 30], [((6, 9), (15, 6)), (), ((0, 30),)]
    torch.manual_seed(1)
    keys, values = torch.randn(2, 3, HEADS, 40, SIZE, dtype=torch.float64)
    for b, length in enumerate(lengths):
        keys[b, :, length:] = torch.nan  # padding may hold anything
    plan = make_plan(lengths, spans, layout, CPU)
    with torch.no_grad():
        for layer in range(LAYERS):
            plain = {
                name.removeprefix("compress_"): tuple(
                    part for i in (0, 3, 6) for part in nets[name][layer][i].parameters()
                )
                for name in nets
            }
            got = merge_layer(keys, values, plan, plain, layout, TABLE)
            for b, length in enumerate(lengths):
                image_of = {p: i for i, (s, n) in enumerate(spans[b]) for p in range(s, s + n)}
                assert plan.lengths[b] == (layout.kept(length, spans[b]) or length)
                for head in range(HEADS):
                    raw = keys[b, head, :length], values[b, head, :length]
                    want = merge_oracle.merged(*raw, image_of, layout, nets, layer)
                    for ours, theirs in zip(got, want, strict=True):
                        assert len(theirs) == plan.lengths[b]
                        # Rotary tables are float32, and turning is done in float32.
                        torch.testing.assert_close(ours[b, head, : len(theirs)], theirs, atol=2e-5, rtol=1e-4)


def test_all_layers_at_once_are_the_layers_one_by_one():
    layout = MergeLayout(FACTOR, n_sink=1, recent=2, unrotated=True, base="mean")
    nets = networks(("tk", "tv"))
    plain = [
        {
            kind: tuple(p for i in (0, 3, 6) for p in nets[f"compress_{kind}"][layer][i].parameters())
            for kind in ("tk", "tv")
        }
        for layer in range(LAYERS)
    ]
    stacked = {
        kind: tuple(torch.stack(parts) for parts in zip(*(net[kind] for net in plain), strict=True))
        for kind in ("tk", "tv")
    }
    torch.manual_seed(1)
    keys, values = torch.randn(2, LAYERS, 3, HEADS, 27, SIZE, dtype=torch.float64)
    plan = make_plan([27], [()], layout, CPU)  # of one sequence, for three
    together = merge_layer(keys, values, plan, stacked, layout, TABLE)
    for layer in range(LAYERS):
        alone = merge_layer(keys[layer], values[layer], plan, plain[layer], layout, TABLE)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[layer], theirs)


def test_what_is_left_of_a_context():
    assert MergeLayout(5).kept(1000) == 200
    assert MergeLayout(5).kept(1003) == 203
    assert MergeLayout(5, n_sink=4, recent=32).kept(512) == 4 + 95 + 1 + 32
    assert MergeLayout(5, n_sink=4).kept(8) == 0  # nothing fills a group
    assert MergeLayout(5).kept(24, ((7, 10),)) == 1 + 2 + 2 + 1 + 2


def test_the_originals_file_loads(tmp_path):
    state = networks().float().state_dict() | {
        f"attention.{i}.{part}": torch.zeros(1) for i in range(LAYERS) for part in ("weight", "bias")
    }
    file = tmp_path / "original.pth"
    torch.save({"epoch": 3, "model_state_dict": {"compressor": state}, "loss": 0.4}, file)
    checkpoint = read_checkpoint(str(file))
    assert len(checkpoint.unused) == 2 * LAYERS and checkpoint.layout is None
    bound = MLP(checkpoint=str(file)).bind(fit(images=True))
    assert bound.kept(40) == 10 and bound.describe()["unused"] == 2 * LAYERS
    assert bound.layout == MergeLayout(FACTOR)


def saved(tmp_path, nets=None, layout=None):
    file = tmp_path / "file.safetensors"
    state = networks(("tk", "tv")).state_dict() if nets is None else nets
    write_checkpoint(file, state, layout or MergeLayout(FACTOR, unrotated=True, base="mean"), {"steps": 1})
    return str(file)


def test_a_file_of_ours_comes_back_whole(tmp_path):
    checkpoint = read_checkpoint(saved(tmp_path))
    assert checkpoint.kinds == ("tk", "tv") and checkpoint.record == {"steps": 1}
    assert checkpoint.layout == MergeLayout(FACTOR, unrotated=True, base="mean")
    check_shapes(checkpoint, LAYERS, SIZE, FACTOR)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"ratio": 0.5}, CheckpointError, "merges groups of 4; compression_factor is 2"),
        ({"ratio": 0.7}, ConfigError, "whole groups"),
        ({"num_layers": 3}, CheckpointError, "compress_t[kv].2.0.bias"),
        ({"num_layers": 1}, CheckpointError, "model of 2 layers"),
        ({"head_dim": 16}, CheckpointError, r"has shape \(10, 32\).*need \(10, 64\)"),
        ({"images": True}, CheckpointError, "no networks for images"),
    ],
)
def test_a_file_for_something_else_is_refused(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        MLP(checkpoint=saved(tmp_path)).bind(fit(**changes))


def test_there_are_no_random_weights(tmp_path):
    with pytest.raises(ConfigError, match="needs the path"):
        MLP()
    with pytest.raises(CheckpointError, match="does not exist"):
        MLP(checkpoint=str(tmp_path / "none.pth")).bind(fit())
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors here")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        read_checkpoint(str(broken))
    strange = tmp_path / "strange.pth"
    torch.save({"model_state_dict": {"head.weight": torch.zeros(2)}}, strange)
    with pytest.raises(CheckpointError, match="holds 'head"):
        read_checkpoint(str(strange))
    torch.save({0: torch.zeros(2)}, strange)
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(str(strange))
    state = dict(networks(("tk", "tv")).state_dict())
    del state[tensor_name("tv", 1, 3, "weight")]
    with pytest.raises(CheckpointError, match=r"no compress_tv\.1\.3\.weight"):
        MLP(checkpoint=saved(tmp_path, state)).bind(fit())
    state[tensor_name("tk", 0, 0, "bias")] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match=r"compress_tk\.0\.0\.weight has shape"):
        MLP(checkpoint=saved(tmp_path, state)).bind(fit())


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"e7", b"\x80\x02h\x00"])
def test_a_damaged_pth_is_an_error_that_advises_nothing_dangerous(tmp_path, content):
    file = tmp_path / "damaged.pth"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read_checkpoint(str(file))
    assert "weights_only" not in str(caught.value)


def test_a_file_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    file = tmp_path / "evil.pth"
    torch.save({"compressor": Evil()}, file)
    with pytest.raises(CheckpointError, match="runs code"):
        read_checkpoint(str(file))
