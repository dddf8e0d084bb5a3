"""An fp8 KV pool against transformers whose cache is rounded through e4m3."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fastcache import LLM, SamplingParams
from fastcache.errors import UnknownName


def rounded(x):
    """Through e4m3, the type with 3 bits of mantissa; clamped, because its cast may give NaN beyond 448."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


class RoundedCache(DynamicCache):
    """Stores rounded entries. A prompt attends its own exact ones; a decoded token reads its own back rounded."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        stored = super().update(rounded(key_states), rounded(value_states), layer_idx, *args, **kwargs)
        prompt = stored[0].shape[2] == key_states.shape[2]
        return (key_states, value_states) if prompt else stored


def greedy(model, prompt, count, cache):
    tokens, ids, position = [], torch.tensor([prompt]), torch.arange(len(prompt))[None]
    while len(tokens) < count:
        logits = model(ids, past_key_values=cache, position_ids=position).logits
        tokens.append(logits[0, -1].argmax().item())
        ids, position = torch.tensor([[tokens[-1]]]), position[:, -1:] + 1
    return tokens


def keep_ends(cache, sinks, kept):
    for layer in cache.layers:
        for name in ("keys", "values"):
            x = getattr(layer, name)
            setattr(layer, name, torch.cat((x[:, :, :sinks], x[:, :, x.shape[2] - kept + sinks :]), 2))


@pytest.fixture(scope="module", params=[("llama", 4, 2, 16), ("qwen3", 8, 2, 16)], ids=lambda p: p[0])
def case(request, tiny_model):
    arch, heads, kv_heads, size = request.param
    folder = tiny_model(arch, heads, kv_heads, size, 48, 3, False)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randperm(256, generator=generator)[:n].tolist() for n in (70, 5, 41)]
    return folder, prompts, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def run(folder, prompts, **options):
    llm = LLM(folder, device="cpu", page_size=4, num_pages=200, max_num_seqs=4, **options)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    llm.check_books()
    return llm, [output.token_ids for output in outputs]


@torch.no_grad()
def test_decoding_reads_what_e4m3_left_of_the_cache(case):
    folder, prompts, model = case
    llm, got = run(folder, prompts, kv_dtype="fp8")
    assert got == [greedy(model, prompt, 20, RoundedCache()) for prompt in prompts]
    assert got != run(folder, prompts)[1]  # the rounding is visible, so the test can fail
    assert llm.describe()["kv_dtype"] == "float8_e4m3fn"


@torch.no_grad()
def test_evicting_and_then_rounding_equals_the_same_edit_of_the_oracle(case):
    folder, prompts, model = case
    compression = {"method": "streaming_llm", "compression_ratio": 0.5}
    _, got = run(folder, [prompts[0]], kv_dtype="fp8", compression=compression)
    cache, prompt = RoundedCache(), prompts[0]
    first = model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1].argmax().item()
    keep_ends(cache, 4, 35)
    ids, position, want = torch.tensor([[first]]), torch.tensor([[len(prompt)]]), [first]
    while len(want) < 20:
        want.append(model(ids, past_key_values=cache, position_ids=position).logits[0, -1].argmax().item())
        ids, position = torch.tensor([[want[-1]]]), position + 1
    assert got[0] == want


def test_a_page_takes_a_quarter_of_float32(case):
    folder, prompts, _ = case
    plain, small = run(folder, prompts)[0], run(folder, prompts, kv_dtype="fp8")[0]
    assert small.describe()["kv_bytes_per_token"] * 4 == plain.describe()["kv_bytes_per_token"]
    assert small.stats().peak_kv_bytes * 4 == plain.stats().peak_kv_bytes


def test_what_is_too_large_for_e4m3_becomes_its_largest_value():
    from fastcache.kvcache.pool import KVPool, KVShape

    pool = KVPool(KVShape(1, 2, 8, torch.float32, torch.float8_e4m3fn), 3, 4, torch.device("cpu"))
    new = torch.tensor([1e9, -1e9, 448.0, 0.3, 0.0, 1.0, -2.5, 460.0]).expand(1, 2, 8)
    pool.write(0, new, -new, torch.tensor([5]))
    keys, values = pool.gather(0, torch.tensor([[1]]), 2)
    assert torch.equal(keys[0, :, 1], rounded(new)[0]) and torch.equal(values[0, :, 1], rounded(-new)[0])
    assert keys.abs().max() == 448


def test_every_byte_is_widened_as_torch_does_it():
    from fastcache.kvcache.pool import widened

    stored = torch.arange(256, dtype=torch.uint8).view(16, 16).t().view(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(widened(stored, dtype).nan_to_num(1e9), stored.to(dtype).nan_to_num(1e9))


def test_another_kv_dtype_is_answered_with_the_allowed_ones(case):
    with pytest.raises(UnknownName, match="fp8"):
        LLM(case[0], device="cpu", kv_dtype="int3")
