"""Requests that come in while others run: the load under which whatever shares a device must not change a token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fastcache import LLM, SamplingParams


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True)


def arriving(
    llm: LLM,
    work: Sequence[tuple[list[int], int]],
    rng: random.Random,
    cancel: float = 0.0,
    look: Callable[[], object] = lambda: None,
) -> dict[int, list[int]]:
    """Tokens by place in `work`, pairs of a prompt and how many tokens are wanted. `cancel`: how often, per step, a
    running request is cancelled, which then has none. `look`: called after each step."""
    done, todo = {}, list(enumerate(work))
    while todo or llm.has_unfinished():
        if todo and rng.random() < 0.4:
            number, (prompt, count) = todo.pop()
            llm.add_request(prompt, greedy(count), str(number))
        done.update((int(o.request_id), o.token_ids) for o in llm.step())
        look()
        if llm._live and rng.random() < cancel:
            llm.cancel(rng.choice(list(llm._live)))
    llm.check_books()
    return done
