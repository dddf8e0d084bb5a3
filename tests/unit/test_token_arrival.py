"""When tokens arrive while the host is held up in the launch of the next step."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

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


def engine(folder: Path) -> LLM:
    """Computes a prompt per step."""
    return LLM(folder, device="cpu", page_size=4, num_pages=100, max_num_batched_tokens=LENGTH)


def on(device: QueuedDevice, llm: LLM, monkeypatch) -> LLM:
    """The engine computes at once, but learns so no earlier than `device` would tell it."""
    monkeypatch.setattr(time, "perf_counter", lambda: device.now_s)
    run, pending = llm._runner.backend.run, llm._runner._pending

    def layer(*args):
        device.launch_layer()
        return run(*args)

    llm._runner.backend.run = layer
    llm._runner._pending = lambda *args: dataclasses.replace(pending(*args), ready=EndOfStep(device))
    return llm


@pytest.fixture(scope="module")
def folder(tiny_model) -> Path:
    return tiny_model("llama", 4, 2, 16, 48, LAYERS, False)


PROMPTS = [[i + 40 * n for i in range(LENGTH)] for n in range(4)]
PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.mark.parametrize("queue", [LAYERS // 4, LAYERS, 10 * LAYERS], ids=["full", "one-step", "never-full"])
def test_a_token_is_noticed_when_it_arrives_though_the_next_launch_is_under_way(folder, monkeypatch, queue):
    alone = [output.token_ids for output in engine(folder).generate(PROMPTS, PARAMS)]
    outputs = on(QueuedDevice(queue), engine(folder), monkeypatch).generate(PROMPTS, PARAMS)
    assert [output.token_ids for output in outputs] == alone
    steps = [LAYERS * (i + 1) for i in range(len(PROMPTS) + PARAMS.max_tokens - 1)]
    for step_s, output in zip(steps, outputs, strict=False):
        times = output.metrics.token_times_s
        wanted = [step_s, *steps[len(PROMPTS) :]]
        assert all(0 <= seen_s - end_s <= 1 for seen_s, end_s in zip(times, wanted, strict=True))
