"""The queues that the scheduler keeps are those that a look at every sequence finds, at every step."""

from __future__ import annotations

import pytest
import torch

from fastcache import LLM, SamplingParams
from fastcache.engine.queues import Queues
from fastcache.engine.stages import Load, Queue


def looked_at(now_s, running, waiting, enough, blocked, at_once) -> Load:
    """As `Queues.load`, from nothing but the sequences."""
    early = [seq for seq in running if seq.to_compress or not seq.decoding]
    compress = [seq for seq in early if seq.to_compress and not seq.under_way]
    prefill = [seq for seq in early if not seq.to_compress]
    decode = [seq for seq in running if seq not in early and not seq.exhausted]
    tokens, ready = sum(seq.num_tokens - seq.num_computed for seq in prefill), list(prefill)
    for seq in waiting:
        if tokens < enough:
            tokens += seq.num_tokens
            ready.append(seq)
    return Load(
        now_s,
        Queue(len(prefill) + len(waiting), min((seq.ready_s for seq in ready), default=now_s)),
        Queue(len(compress), min((seq.ready_s for seq in compress), default=0.0)),
        Queue(len(decode), min((seq.ready_s for seq in decode), default=0.0)),
        min(tokens, enough),
        blocked,
        at_once,
    )


@pytest.fixture
def compared(monkeypatch):
    """Every load that a policy is told, with the one that was looked for."""
    loads, kept = [], Queues.load

    def load(self, now_s, running, *rest):
        told = kept(self, now_s, running, *rest)
        loads.append((told, looked_at(now_s, running, *rest)))
        ready = [seq for seq in running if seq.decoding and not seq.to_compress and not seq.exhausted]
        assert self.decoding(running) == ready
        return told

    monkeypatch.setattr(Queues, "load", load)
    return loads


POOLS = {
    "fcfs": {"policy": "fcfs", "max_num_batched_tokens": 64},
    "deferred": {"policy": "p2c2d8", "max_num_batched_tokens": 64},
    "riding": {"policy": "dynamic", "max_num_batched_tokens": 32},
    "tight": {"num_pages": 30, "max_num_seqs": 5},
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=list(POOLS))
def test_the_queues_are_those_of_a_look_at_every_sequence(tiny_model, compared, pool):
    folder = tiny_model("llama", 4, 2, 16, 48, 3, False)
    options = {"device": "cpu", "page_size": 4, "num_pages": 200, "max_num_seqs": 8} | pool
    llm = LLM(folder, **options, compression={"method": "knorm", "compression_ratio": 0.6})
    llm._parts.eos = frozenset()  # so that no room is kept for whole outputs, and a tight pool preempts
    generator = torch.Generator().manual_seed(4)
    for turn in range(4):
        for length in (60, 50, 70, 40, 8):
            prompt = torch.randint(0, 256, (length,), generator=generator).tolist()
            llm.add_request(prompt, SamplingParams(max_tokens=(1, 7, 40)[(turn + length) % 3]))
        for _ in range(5):
            llm.step()
        llm.cancel(next(iter(llm._live)))
    while llm.has_unfinished():
        llm.step()
    llm.check_books()
    assert llm.stats().preemptions > 0 or "num_pages" not in pool
    by_age = pool.get("policy") == "fcfs"
    for told, found in compared:
        same = found if by_age else found._replace(decode=found.decode._replace(since_s=told.decode.since_s))
        assert told == same
    assert any(found.decode.pending and found.prefill.pending for _, found in compared)
