"""The engine in a thread of its own on a GPU: graphs are captured there, and answers are what a CPU would say."""

from __future__ import annotations

import threading

import pytest
import torch
from served import serving

from fastcache import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ENGINE = {
    "device": "cuda",
    "dtype": "bfloat16",
    "page_size": 16,
    "num_pages": 2_000,
    "max_num_seqs": 16,
    "policy": "dynamic",
    "compression": {"method": "knorm", "compression_factor": 2},
}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", 4, 2, 64, 256, 2, False)


def test_requests_at_once_are_answered_and_nothing_leaks(model):
    prompts = [[(7 * i + j) % 256 for j in range(20 + 9 * i)] for i in range(12)]
    answers: dict[int, list[int]] = {}
    with serving(model, ENGINE) as server:

        def ask(number: int) -> None:
            body = {"prompt": prompts[number], "max_tokens": 24, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            answers[number] = server.post(**body).json()["choices"][0]["token_ids"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.idle()
        server.llm.check_books()
    gaps = [gap for i, answer in answers.items() for gap in behind(model, prompts[i], answer)]
    assert len(gaps) == 24 * len(prompts)
    # A random token is behind by 3. In bfloat16 a near tie may go the other way, among tokens and among kept entries.
    assert sum(gap < 0.25 for gap in gaps) > 0.9 * len(gaps)


def behind(model, prompt: list[int], answer: list[int]) -> list[float]:
    """Per token, how far its log-probability is behind the best one's, as the CPU computes it in float32 from the same
    prompt, compressed alike, and the answer so far."""
    llm = LLM(model, **ENGINE | {"device": "cpu", "dtype": "float32"})
    one = SamplingParams(max_tokens=1)
    llm.add_request(prompt + answer[:-1], one, context_len=len(prompt), logprobs_from=len(prompt) - 1)
    done = []
    while llm.has_unfinished():
        done += llm.step()
    logprobs = done[0].logprobs
    llm.close()
    return (logprobs.amax(-1) - logprobs[range(len(answer)), answer]).tolist()
