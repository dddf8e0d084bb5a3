"""`LLM.score` against transformers: log-probabilities of given tokens after a full and after a compressed context."""

from __future__ import annotations

import pytest
import torch
from kvpress_oracle import PRESSES, prefill
from transformers import AutoModelForCausalLM

from fastcache import LLM
from fastcache.errors import ConfigError

RATIO = 0.6


def tokens(count: int, seed: int) -> list[int]:
    return torch.randperm(256, generator=torch.Generator().manual_seed(seed))[:count].tolist()


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("llama", 6, 2, 16, 64, 3)


@pytest.fixture(scope="module")
def oracle(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def expected(model, prompt: list[int], continuation: list[int], context: int, method: str | None):
    """transformers' log-probabilities, from a cache that kvpress edited after `context` tokens."""
    if method is None:
        logits = model(torch.tensor([prompt + continuation[:-1]])).logits[0, len(prompt) - 1 :]
        return logits.float().log_softmax(-1)
    cache = prefill(model, prompt[:context], PRESSES[method](RATIO))
    rest = prompt[context:] + continuation[:-1]
    positions = torch.arange(context, context + len(rest))[None]
    logits = model(torch.tensor([rest]), past_key_values=cache, position_ids=positions).logits[0]
    return logits[-len(continuation) :].float().log_softmax(-1)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 40}, {"enable_prefix_caching": True}, {"num_pages": 50, "page_size": 4}],
    ids=["batch", "chunked", "prefix-caching", "one-at-a-time"],
)
@pytest.mark.parametrize("method", [None, "knorm", "streaming_llm"])
def test_rows_equal_transformers(folder, oracle, method, options):
    cases = [
        (tokens(140, 1), tokens(9, 2), 120),
        (tokens(60, 3), tokens(1, 4), 59),
        (tokens(140, 1), tokens(5, 5), 120),
    ]
    compression = None if method is None else {"method": method, "compression_ratio": RATIO}
    llm = LLM(
        folder, device="cpu", **{"num_pages": 200, "max_num_seqs": 4, "compression": compression, **options}
    )
    outputs = llm.score(*zip(*cases, strict=True))
    for output, (prompt, continuation, context) in zip(outputs, cases, strict=True):
        want = expected(oracle, prompt, continuation, context, method)
        assert output.logprobs.shape == want.shape
        torch.testing.assert_close(output.logprobs, want, atol=2e-4, rtol=0)
        assert output.metrics.compressed == (method is not None)
    llm.check_books()
    if "enable_prefix_caching" in options:  # the same context again: nothing of it is computed twice
        again = llm.score(*zip(*cases[:1], strict=True))
        assert again[0].metrics.cached_tokens > 0
        torch.testing.assert_close(again[0].logprobs, outputs[0].logprobs, atol=2e-4, rtol=0)


def test_a_context_of_nothing_leaves_the_prompt_whole(folder, oracle):
    """One engine gives the compressed and the full answer: the pair that quality cells compare."""
    prompt, continuation = tokens(140, 1), tokens(9, 2)
    llm = LLM(
        folder,
        device="cpu",
        num_pages=200,
        max_num_seqs=2,
        enable_prefix_caching=True,
        compression={"method": "knorm", "compression_ratio": RATIO},
    )
    whole, shrunk = llm.score([prompt] * 2, [continuation] * 2, [0, 120])
    assert (whole.metrics.compressed, shrunk.metrics.compressed) == (False, True)
    for output, method in ((whole, None), (shrunk, "knorm")):
        want = expected(oracle, prompt, continuation, 120, method)
        torch.testing.assert_close(output.logprobs, want, atol=2e-4, rtol=0)
    llm.check_books()


def test_what_score_refuses(folder):
    llm = LLM(folder, device="cpu", num_pages=50, max_num_seqs=2)
    with pytest.raises(ConfigError, match="give one each"):
        llm.score([[1]], [[1], [2]])
    with pytest.raises(ConfigError, match="a continuation is empty"):
        llm.score([[1]], [[]])
    assert not llm.has_unfinished()
