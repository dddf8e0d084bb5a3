"""Random schedules: whatever arrives in whatever order on whatever pool, every page comes back and every
request gets the tokens it gets alone."""

from __future__ import annotations

import random

import pytest

from fastcache import LLM, SamplingParams

# Two-letter prompts share prefixes but tie every norm, so the method here must not depend on scores.
COMPRESSIONS = [None, {"method": "streaming_llm", "compression_ratio": 0.5}]


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=["full", "streaming_llm"])
@pytest.mark.parametrize("prefix", [False, True], ids=["plain", "prefix"])
def test_random_schedules_balance_the_books(tiny_model, compression, prefix):
    folder = tiny_model("llama", 2, 1, 8, 16, 1, False)
    alone = LLM(folder, device="cpu", page_size=4, num_pages=100, compression=compression)
    alone._parts.eos = frozenset()
    expected: dict[tuple, list[int]] = {}
    rng = random.Random(0)
    for _ in range(12):
        llm = LLM(
            folder,
            device="cpu",
            page_size=4,
            num_pages=rng.choice([24, 30, 50]),
            max_num_seqs=rng.choice([2, 4, 8]),
            max_num_batched_tokens=rng.choice([5, 16, 64]),
            enable_prefix_caching=prefix,
            compression=compression,
        )
        llm._parts.eos = frozenset()
        want, got = {}, {}
        for _ in range(rng.randint(3, 10)):
            prompt = tuple(rng.choices(range(2), k=rng.randint(1, 40)))
            count = rng.randint(1, 20)
            request = llm.add_request(prompt, SamplingParams(max_tokens=count, ignore_eos=rng.random() < 0.5))
            want[request] = (prompt, count)
            for _ in range(rng.randint(0, 3)):
                got.update((o.request_id, o.token_ids) for o in llm.step())
                llm._scheduler.allocator.check()
            if rng.random() < 0.1 and request not in got:
                llm.cancel(request)
                del want[request]
        while llm.has_unfinished():
            got.update((o.request_id, o.token_ids) for o in llm.step())
            llm._scheduler.allocator.check()
        llm.check_books()
        for request, key in want.items():
            if key not in expected:
                params = SamplingParams(max_tokens=key[1], ignore_eos=True)
                expected[key] = alone.generate([list(key[0])], params)[0].token_ids
            assert got[request] == expected[key]
