"""What a step delivered, and the engine's load: all that a server needs to see between two steps."""

from __future__ import annotations

import pytest

from fastcache import LLM, SamplingParams

PROMPTS = [[5, 6, 7, 8, 9], [20, 21, 22], list(range(30, 60))]


@pytest.fixture(scope="module")
def llm(tiny_model):
    return LLM(tiny_model("llama", 4, 2, 16, 48, 2, False), device="cpu", page_size=4, num_pages=40)


def test_the_new_tokens_of_all_steps_are_the_outputs(llm):
    ids = [
        llm.add_request(p, SamplingParams(max_tokens=n + 1, ignore_eos=True)) for n, p in enumerate(PROMPTS)
    ]
    seen, outputs = {}, {}
    while llm.has_unfinished():
        for output in llm.step():
            outputs[output.request_id] = output.token_ids
        for request_id, tokens in llm.new_tokens.items():
            seen.setdefault(request_id, []).extend(tokens)
    assert seen == outputs and set(seen) == set(ids)
    assert [len(seen[i]) for i in ids] == [1, 2, 3]


def test_a_cancelled_request_delivers_nothing_more_and_owns_no_page(llm):
    first = llm.add_request(PROMPTS[0], SamplingParams(max_tokens=9, ignore_eos=True))
    second = llm.add_request(PROMPTS[1], SamplingParams(max_tokens=9, ignore_eos=True))
    assert llm.load().waiting == 2
    llm.step()
    assert set(llm.new_tokens) == {first, second} and llm.load().running == 2
    used = llm.load().pages_used
    llm.cancel(first)
    assert llm.load().pages_used < used
    llm.step()
    assert set(llm.new_tokens) == {second}
    llm.cancel(second)
    while llm.has_unfinished():
        llm.step()
    llm.check_books()
    assert llm.load() == type(llm.load())(0, 0, 0, 39)
