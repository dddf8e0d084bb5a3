"""The counted work: FLOPs against torch's own counter on a transformers model, bytes and entries by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from fastcache.bench.work import (
    kv_entries_read,
    last_parameters,
    layer_parameters,
    prefill_flops,
    step_bytes,
    utilisation,
)
from fastcache.device import ceilings
from fastcache.models.config import load_model_config
from fastcache.stats import EngineStats


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_prefill_flops_are_those_torch_counts(tiny_model, arch):
    folder = tiny_model(arch, 4, 2, 16, 48, 3)
    config, length = load_model_config(str(folder), "auto"), 70
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None] % config.vocab_size)
    by_module = counter.get_flop_counts()
    counts = {str(op): n for op, n in by_module["Global"].items()}
    attention = counts.pop("aten.bmm")  # whole squares, where causal attention needs half
    head = 2 * config.vocab_size * config.hidden_size * length  # for all tokens, where one is sampled
    # The rotary angles are a product, too, of one number per pair and position.
    rotary = 2 * (config.head_dim // 2) * length
    # Behind the last attention one token of the prompt goes on.
    last = f"layers.{config.num_layers - 1}"
    behind = sum(
        sum(by_op.values())
        for name, by_op in by_module.items()
        if name.endswith((f"{last}.mlp", f"{last}.self_attn.o_proj"))
    )
    idle = behind * (length - 1) / length
    assert behind == 2 * length * last_parameters(config)
    assert prefill_flops(config, 0, length) == sum(counts.values()) - head + (attention - rotary) / 2 - idle
    twice = prefill_flops(config, 0, 30) + prefill_flops(config, 30, length)
    assert twice - prefill_flops(config, 0, length) == behind / length


def request(**changes):
    values = {
        "prompt_tokens": 100,
        "output_tokens": 4,
        "cached_tokens": 0,
        "compressed": False,
        "kv_len_after": None,
    }
    return SimpleNamespace(**values | changes)


def test_decode_reads_what_is_left_and_one_more_each_step():
    assert kv_entries_read(request()) == 101 + 102 + 103
    assert kv_entries_read(request(compressed=True, kv_len_after=20)) == 21 + 22 + 23
    assert kv_entries_read(request(output_tokens=1)) == 0


def test_qwen3_8b_reads_its_known_bytes():
    config = load_model_config("qwen3-8b", "dummy")
    assert layer_parameters(config) == pytest.approx(6.95e9, rel=0.01)
    assert step_bytes(config, "bfloat16") == pytest.approx(15.3e9, rel=0.02)


def test_a_phase_without_time_has_no_share_and_recomputed_tokens_count():
    config = load_model_config("smollm2-135m", "dummy")
    facts, limits = {"dtype": "float32", "kv_bytes_per_token": 8}, ceilings.Ceilings(1.0, 1.0, "float32")
    one = [request(output_tokens=1)]
    assert utilisation(config, facts, one, EngineStats(), limits) == {"prefill_mfu": None, "decode_mbu": None}
    once, twice = (
        utilisation(config, facts, one, EngineStats(prefill_tokens=n, prefill_time_s=1.0), limits)
        for n in (100, 200)
    )
    assert (
        once["prefill_mfu"] == prefill_flops(config, 0, 100)
        and twice["prefill_mfu"] == 2 * once["prefill_mfu"]
    )


def test_the_ceilings_of_this_cpu_are_plausible():
    found = ceilings.measure("cpu")
    assert 1e8 < found.copy_bytes_s < 1e13 and 1e8 < found.gemm_flop_s < 1e15 and found.dtype == "float32"
    assert "TFLOP/s" in str(found)
