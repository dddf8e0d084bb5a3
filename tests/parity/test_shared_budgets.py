"""Heads that share a budget (AdaKV per layer, KVzip over all), against kvpress's own kept sets.

kvpress masks what it evicts; the engine frees it. Both decode the same tokens.
"""

from __future__ import annotations

import pytest
import torch
from kvpress import AdaKVPress, KeyDiffPress, KnormPress, SnapKVPress
from test_head_budgets import MaskedOracle
from test_kvzip import Noting
from transformers import AutoModelForCausalLM, DynamicCache

from fastcache import LLM, SamplingParams
from fastcache.compression.adakv import adaptive_counts
from fastcache.compression.base import select
from fastcache.errors import UnsupportedCombination

PAGE, COUNT = 4, 24
SHAPES = [("llama", 6, 2), ("qwen3", 8, 2), ("llama", 4, 4)]
PRESSES = {"knorm": KnormPress, "keydiff": KeyDiffPress, "snapkv": SnapKVPress}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: "-".join(map(str, s)))
def case(request, tiny_model):
    arch, heads, kv_heads = request.param
    folder = tiny_model(arch, heads, kv_heads, 16, 48, 3, False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return folder, model, MaskedOracle(folder)


def random_prompts(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(256, generator=generator)[:n].tolist() for n in lengths]


@torch.no_grad()
def evicted(model, context, press):
    """Per layer, (kv_heads, N) bool: what the press masks."""
    with press(model):
        model.model(input_ids=torch.tensor([context]), past_key_values=DynamicCache())
    masks = []
    for layer in model.model.layers:
        _, heads, positions = layer.self_attn.masked_key_indices
        mask = torch.zeros(model.config.num_key_value_heads, len(context), dtype=bool)
        mask[heads, positions] = True
        masks.append(mask)
        layer.self_attn.masked_key_indices = None
    return masks


def masked_tokens(oracle, context, masks, question=()):
    oracle._gone = lambda keys, mask: mask
    return oracle.tokens(context, list(question), masks, COUNT)


def engine(folder, method, ratio, sharing, **options):
    compression = {"method": method, "compression_ratio": ratio, "head_budgets": sharing}
    options = {"device": "cpu", "page_size": PAGE, "num_pages": 300, "max_model_len": 400, **options}
    return LLM(folder, compression=compression, **options)


@pytest.mark.parametrize("method,ratio", [("knorm", 0.7), ("keydiff", 0.5), ("snapkv", 0.2)])
def test_adakv_decodes_from_the_sets_that_kvpress_keeps(case, method, ratio):
    folder, model, oracle = case
    prompts, params = (
        random_prompts([110, 133, 98], seed=8),
        SamplingParams(max_tokens=COUNT, ignore_eos=True),
    )
    llm = engine(folder, method, ratio, "adakv")
    outputs = llm.generate(prompts, params)
    llm.check_books()
    cut = engine(folder, method, ratio, "adakv", max_num_batched_tokens=70).generate(prompts, params)
    for prompt, output, other in zip(prompts, outputs, cut, strict=True):
        masks = evicted(model, prompt, AdaKVPress(PRESSES[method](ratio)))
        assert len({int(mask.sum()) for mask in masks}) == 1  # each layer loses the same
        assert output.token_ids == other.token_ids == masked_tokens(oracle, prompt, masks)


def test_kvzip_over_all_layers_and_heads(case):
    folder, model, oracle = case
    context, question = random_prompts([100, 7], seed=9)  # a length at which both round alike
    llm = engine(folder, "kvzip", 0.7, "global")
    params = SamplingParams(max_tokens=COUNT, ignore_eos=True)
    llm.add_request(context + question, params, context_len=len(context))
    outputs = []
    while llm.has_unfinished():
        outputs += llm.step()
    llm.check_books()
    masks = evicted(model, context, Noting(compression_ratio=0.7))
    assert outputs[0].token_ids == masked_tokens(oracle, context, masks, question)


def test_pages_are_freed(case):
    folder, _, _ = case
    prompt = random_prompts([200], seed=10)[0]
    equal = engine(folder, "knorm", 0.7, None).generate(
        [prompt], SamplingParams(max_tokens=30, ignore_eos=True)
    )
    shared = engine(folder, "knorm", 0.7, "adakv")
    output = shared.generate([prompt], SamplingParams(max_tokens=30, ignore_eos=True))[0]
    assert equal[0].metrics.pages_freed - output.metrics.pages_freed in (0, 1)  # room for uneven last units
    assert output.metrics.kv_len_after == 60
    shared.check_books()


def test_seats_change_hands(case):
    """More prompts than seats, twice the same lengths: what one sequence's heads got must not be read by the next."""
    folder, _, _ = case
    prompts = random_prompts([60, 50, 60, 50, 60, 40], seed=11)
    params = [SamplingParams(max_tokens=10 + 5 * i, ignore_eos=True) for i in range(6)]
    wide = [o.token_ids for o in engine(folder, "knorm", 0.6, "adakv").generate(prompts, params)]
    narrow = engine(folder, "knorm", 0.6, "adakv", max_num_seqs=2, num_pages=60)
    assert [o.token_ids for o in narrow.generate(prompts, params)] == wide
    narrow.check_books()


def test_counts_do_not_depend_on_padding():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 50, generator=generator)
    scores[1, :, 40:] = -torch.inf
    lengths, budgets = torch.tensor([50, 40]), torch.tensor([20, 8])
    counts = adaptive_counts(scores, lengths, budgets, 20, select)
    alone = adaptive_counts(scores[1:, :, :40], lengths[1:], budgets[1:], 8, select)
    assert counts.sum(1).tolist() == [60, 24] and torch.equal(counts[1:], alone)
    assert counts.min() >= 1


@pytest.mark.parametrize(
    "method,sharing,options", [("knorm", "global", {}), ("knorm", "adakv", {"policy": "p1c1d8"})]
)
def test_what_cannot_be_shared_is_refused(tiny_model, method, sharing, options):
    with pytest.raises(UnsupportedCombination, match="head_budgets"):
        engine(tiny_model("llama", 6, 2, 16, 48, 3, False), method, 0.5, sharing, **options)
