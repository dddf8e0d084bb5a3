"""The engine in a thread of its own on a GPU: graphs are captured there, and answers are those of the main thread."""

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
            body = {"prompt": prompts[number], "max_tokens": 24, "temperature": 0, "return_token_ids": True}
            answers[number] = server.post(**body).json()["choices"][0]["token_ids"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.idle()
        server.llm.check_books()
    llm = LLM(model, **ENGINE)
    alone = [llm.generate([prompt], SamplingParams(max_tokens=24))[0].token_ids for prompt in prompts]
    llm.close()
    # bfloat16 sums differ with the batch, so a near tie may go the other way; in a quarter of them, at most.
    assert sum(answers[i] == alone[i] for i in range(len(prompts))) >= len(prompts) - 3
