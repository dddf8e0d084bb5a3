"""An engine under open-loop load: requests are added when they are due, and steps are made in between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastcache.bench.prompts import PlannedRequest
from fastcache.bench.serving.workload import Arrival
from fastcache.config import SamplingParams
from fastcache.results import RequestOutput
from fastcache.stats import EngineStats

LEAD_S = 0.05  # between saying "now" and the first arrival
WARM_PROMPTS, SHORT_PROMPT, SEQS_PER_STEP = 24, 32, 8
NAP_S = 0.002  # how late an arrival may be noticed while the engine has nothing to do


@dataclass(frozen=True)
class Recording:
    """What happened at one rate. Times of outputs are those of `time.perf_counter`, as are `start_s`, `end_s`.

    Requests that were not done in time are in `outputs` with the finish reason "cancelled".
    """

    start_s: float
    end_s: float
    outputs: list[RequestOutput]
    stats: EngineStats


def warm_up(llm: Any, arrivals: Sequence[Arrival], max_num_seqs: int) -> None:
    """Everything that a first time costs: whole prompts, each decode batch size on the way down from a full batch, and
    prompts that arrive while others decode.

    Beyond the first few, prompts are short: it is the number of sequences that is still new then. The last ones end
    one by one, since small batches have sizes of their own.
    """
    prompts, params = [], []
    for i in range(max_num_seqs):
        request = arrivals[i % len(arrivals)].request
        prompts.append(request.prompt if i < WARM_PROMPTS else _text(request)[:SHORT_PROMPT])
        tokens = 2 + i // SEQS_PER_STEP + max(0, i - max(0, max_num_seqs - SEQS_PER_STEP))
        params.append(SamplingParams(max_tokens=min(request.max_tokens, tokens), ignore_eos=True))
    llm.generate(prompts, params)
    for i in range(min(SEQS_PER_STEP, max_num_seqs)):
        request = arrivals[i % len(arrivals)].request
        few = min(request.max_tokens, 2 * SEQS_PER_STEP)
        llm.add_request(request.prompt, SamplingParams(max_tokens=few, ignore_eos=True))
        llm.step()
    while llm.has_unfinished():
        llm.step()


def _text(request: PlannedRequest) -> list[int]:
    """Its token ids without those that stand for pictures."""
    content = request.content or request.prompt_token_ids
    return [token for token, said in zip(request.prompt_token_ids, content, strict=True) if said >= 0]


def drive(llm: Any, arrivals: Sequence[Arrival], deadline_s: float) -> Recording:
    """Send `arrivals` at their times. What is not done `deadline_s` after the start is cancelled.

    A request's arrival is the scheduled one: if a step keeps it from being added in time, that is waiting, too.
    """
    llm.reset_stats()
    pending, outputs = deque(arrivals), []
    start = time.perf_counter() + LEAD_S
    live: set[str] = set()
    while pending or llm.has_unfinished():
        now = time.perf_counter() - start
        if now > deadline_s:
            break
        while pending and pending[0].time_s <= now:
            live.add(_add(llm, pending.popleft(), start))
        if llm.has_unfinished():
            done = llm.step()
            outputs += done
            live -= {output.request_id for output in done}
        elif pending:
            time.sleep(min(NAP_S, max(0.0, pending[0].time_s - now)))
    late = [*live, *(_add(llm, arrival, start) for arrival in pending)]
    outputs += [output for request_id in late if (output := llm.cancel(request_id)) is not None]
    end = time.perf_counter()
    while llm.has_unfinished():  # tokens of cancelled requests that are still on their way
        llm.step()
    return Recording(start, end, outputs, llm.stats())


def _add(llm: Any, arrival: Arrival, start_s: float) -> str:
    request = arrival.request
    params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
    return llm.add_request(request.prompt, params, arrival_s=start_s + arrival.time_s)
