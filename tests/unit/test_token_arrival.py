"""When tokens arrive while the host is held up in the launch of the next step."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from arriving import arriving
from served import serving, with_template

from fastcache import LLM, SamplingParams

LAYERS, LENGTH = 8, 16


class QueuedDevice:
    """A layer takes it a second, and so many of them can be queued: the host waits to launch another, as it does where
    CUDA's queue is full. Its clock stands for the host's."""

    def __init__(self, queue: int) -> None:
        self.queue, self.now_s, self.ends = queue, 0.0, [0.0]

    def launch_layer(self) -> None:
        if len(self.ends) > self.queue:
            self.now_s = max(self.now_s, self.ends[-self.queue])
        self.ends.append(max(self.now_s, self.ends[-1]) + 1.0)


class EndOfStep:
    """Behaves like an event that was recorded behind the layers launched so far."""

    def __init__(self, device: QueuedDevice) -> None:
        self.device, self.end_s = device, device.ends[-1]

    def query(self) -> bool:
        return self.device.now_s >= self.end_s

    def synchronize(self) -> None:
        self.device.now_s = max(self.device.now_s, self.end_s)


class AnyTime:
    """An event that has passed when it is asked for the n-th time, or waited for."""

    def __init__(self, n: int) -> None:
        self.n = n

    def query(self) -> bool:
        self.n -= 1
        return self.n < 0

    def synchronize(self) -> None:
        self.n = 0


def engine(folder: Path, **options: Any) -> LLM:
    """Computes a prompt of `LENGTH` per step."""
    return LLM(folder, **{"device": "cpu", "page_size": 4, "num_pages": 100} | options)


def told_by(event: Callable[[], Any], llm: LLM) -> LLM:
    """The engine computes at once, but learns so from an event, made behind each step."""
    pending = llm._runner._pending
    llm._runner._pending = lambda *args: dataclasses.replace(pending(*args), ready=event())
    return llm


def on(device: QueuedDevice, llm: LLM, monkeypatch) -> LLM:
    monkeypatch.setattr(time, "perf_counter", lambda: device.now_s)
    run = llm._runner.backend.run

    def layer(*args):
        device.launch_layer()
        return run(*args)

    llm._runner.backend.run = layer
    return told_by(lambda: EndOfStep(device), llm)


@pytest.fixture(scope="module")
def folder(tiny_model) -> Path:
    return tiny_model("llama", 4, 2, 16, 48, LAYERS, False)


PROMPTS = [[i + 40 * n for i in range(LENGTH)] for n in range(4)]
PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)
FULL = LAYERS // 4
# When the device has computed the steps of PROMPTS: a prompt each, then decode steps of all.
ENDS = [LAYERS * (i + 1) for i in range(len(PROMPTS) + PARAMS.max_tokens - 1)]


@pytest.mark.parametrize("queue", [FULL, LAYERS, 10 * LAYERS], ids=["full", "one-step", "never-full"])
def test_a_token_is_noticed_when_it_arrives_though_the_next_launch_is_under_way(folder, monkeypatch, queue):
    one_a_step = {"max_num_batched_tokens": LENGTH}
    alone = [output.token_ids for output in engine(folder, **one_a_step).generate(PROMPTS, PARAMS)]
    outputs = on(QueuedDevice(queue), engine(folder, **one_a_step), monkeypatch).generate(PROMPTS, PARAMS)
    assert [output.token_ids for output in outputs] == alone
    for first_s, output in zip(ENDS, outputs, strict=False):
        wanted = [first_s, *ENDS[len(PROMPTS) :]]
        times = output.metrics.token_times_s
        assert all(0 <= seen_s - end_s <= 1 for seen_s, end_s in zip(times, wanted, strict=True))


def test_whoever_waits_for_tokens_has_them_before_the_launch_is_over(folder, monkeypatch):
    device = QueuedDevice(FULL)
    llm, had = on(device, engine(folder, max_num_batched_tokens=LENGTH), monkeypatch), []

    def take():
        (new, llm.new_tokens) = (llm.new_tokens, {})
        had.extend((request_id, device.now_s) for request_id in new)

    llm.on_tokens = take
    ids = [llm.add_request(prompt, PARAMS) for prompt in PROMPTS]
    while llm.has_unfinished():
        llm.step()
        take()
    firsts = [next(had_s for request_id, had_s in had if request_id == each) for each in ids]
    assert len(had) == len(ids) * PARAMS.max_tokens
    assert all(0 <= had_s - end_s <= 1 for had_s, end_s in zip(firsts, ENDS, strict=False))


@pytest.mark.parametrize("policy", ["default", "dynamic", "p2c2d3"])
@pytest.mark.parametrize("take", [True, False], ids=["taken", "left"])
def test_tokens_do_not_depend_on_when_they_are_noticed(folder, policy, take):
    """Each is delivered once and in order, and nothing after a request's end."""
    rng = random.Random(6)
    options = {"policy": policy, "num_pages": 60, "max_num_seqs": 6, "max_num_batched_tokens": 64}
    options["compression"] = {"method": "knorm", "compression_ratio": 0.6}
    work = [(rng.sample(range(256), rng.randint(8, 70)), rng.randint(1, 12)) for _ in range(16)]
    alone = [
        engine(folder, **options).generate([p], SamplingParams(max_tokens=n, ignore_eos=True))[0].token_ids
        for p, n in work
    ]
    llm = told_by(lambda: AnyTime(rng.randrange(2 * LAYERS)), engine(folder, **options))
    delivered: dict[str, list[int]] = {}
    in_launches = 0

    def collect():
        (new, llm.new_tokens) = (llm.new_tokens, {})
        for request_id, tokens in new.items():
            delivered.setdefault(request_id, []).extend(tokens)

    def early():
        nonlocal in_launches
        in_launches += 1
        if take:
            collect()

    llm.on_tokens = early
    done = arriving(llm, work, random.Random(7), cancel=0.02, look=collect)
    assert in_launches > 5
    whole = [i for i, tokens in done.items() if len(tokens) == work[i][1]]
    assert len(whole) > len(work) // 2
    assert all(delivered[str(i)] == done[i] == alone[i] for i in whole)
    assert all(tokens == alone[int(i)][: len(tokens)] for i, tokens in delivered.items())


def test_a_request_that_stops_delivers_nothing_more(folder):
    prompt, whole = PROMPTS[0], SamplingParams(max_tokens=12, ignore_eos=True)
    tokens = engine(folder).generate([prompt], whole)[0].token_ids
    end = next(i for i in itertools.count(2) if tokens[i] not in tokens[:i])
    for n in range(0, 3 * LAYERS, 2):
        llm = told_by(lambda n=n: AnyTime(n), engine(folder))
        llm._parts.eos = frozenset({tokens[end]})
        llm.add_request(prompt, SamplingParams(max_tokens=12))
        delivered = []
        while llm.has_unfinished():
            llm.step()
            delivered += [token for new in llm.new_tokens.values() for token in new]
        assert delivered == tokens[: end + 1]
        llm.check_books()


def test_a_stream_gets_tokens_in_the_midst_of_steps(folder, tmp_path):
    model, rng = with_template(folder, tmp_path / "m"), random.Random(8)
    with serving(model) as server:
        body = {"prompt": "as it comes", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
        whole = server.post(**body).json()["choices"][0]["text"]
        told_by(lambda: AnyTime(rng.randrange(2 * LAYERS)), server.llm)
        published, on_tokens = [], server.llm.on_tokens
        server.llm.on_tokens = lambda: (published.append(dict(server.llm.new_tokens)), on_tokens())
        lines = server.post(**body, stream=True).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == whole
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert len(published) > 3 and all(published)
        server.idle()
