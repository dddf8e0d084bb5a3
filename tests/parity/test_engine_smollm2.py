"""The engine on the real small model, against transformers: 64 greedy tokens, every way a batch can be cut."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastcache import LLM, SamplingParams

pytestmark = pytest.mark.slow

TEXTS = [  # 5 to about 120 tokens; pages of 16 are crossed in prompts and while decoding
    "Gravity is the force",
    "The three laws of motion were first stated by Isaac Newton in his book of 1687, and",
    "A list of the planets, from the innermost to the outermost: Mercury, Venus, Earth, Mars, " * 4,
]
GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def oracle(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    with torch.no_grad():
        tokens = [
            model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
    return model, prompts, tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 24}, {"num_pages": 15}, {"enable_prefix_caching": True}],
    ids=["batch", "chunked-prefill", "preemption", "prefix-caching"],
)
def test_greedy_tokens_equal_transformers(smollm2, oracle, options):
    _, prompts, want = oracle
    llm = LLM(smollm2, device="cpu", dtype="float32", **{"num_pages": 200, "max_num_seqs": 4, **options})
    params = GREEDY
    if "num_pages" in options:  # lengths the scheduler cannot know: it admits all three and runs out of pages
        params, llm._parts.eos = SamplingParams(max_tokens=64), frozenset()
    if "enable_prefix_caching" in options:
        llm.generate(prompts[2:], SamplingParams(max_tokens=1))
    outputs = llm.generate(prompts, params)
    assert [output.token_ids for output in outputs] == want
    llm.check_books()
    if "num_pages" in options:
        assert llm.stats().preemptions > 0
    if "enable_prefix_caching" in options:
        assert llm.stats().prefix_hit_tokens >= 64


@pytest.mark.parametrize("method", ["snapkv", "knorm", "streaming_llm"])
@torch.no_grad()
def test_decode_from_a_compressed_cache_equals_transformers(smollm2, oracle, method):
    """kvpress edits transformers' cache, transformers decodes from it; 32 tokens of ours are the same."""
    from kvpress_oracle import PRESSES, prefill

    model, prompts, _ = oracle
    prompt = (prompts[1] + prompts[0] + prompts[2]) * 3
    model.set_attn_implementation("eager")
    cache = prefill(model, prompt, PRESSES[method](0.6))
    kept = cache.layers[0].keys.shape[2]
    want = [model(torch.tensor([prompt])).logits[0, -1].argmax().item()]
    for position in range(len(prompt), len(prompt) + 31):
        positions = torch.tensor([[position]])
        out = model(torch.tensor([want[-1:]]), past_key_values=cache, position_ids=positions)
        want.append(out.logits[0, -1].argmax().item())
    llm = LLM(
        smollm2,
        device="cpu",
        num_pages=100,
        max_num_seqs=1,
        compression={"method": method, "compression_ratio": 0.6},
    )
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=32, ignore_eos=True))
    assert (output.metrics.kv_len_before, output.metrics.kv_len_after) == (len(prompt), kept)
    assert output.token_ids == want


def test_the_capital_of_france(smollm2):
    llm = LLM(smollm2, device="cpu", num_pages=64, max_num_seqs=1)
    chat = llm.tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    (output,) = llm.generate(
        [llm.tokenizer.encode(chat, add_special_tokens=False)], SamplingParams(max_tokens=16)
    )
    assert "Paris" in output.text and output.finish_reason == "stop"
