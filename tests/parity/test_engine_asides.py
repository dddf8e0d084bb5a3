"""Prefills beside decode steps give every request the tokens it gets alone, however late they end."""

from __future__ import annotations

import random

import pytest
import torch
from arriving import arriving as all_arriving
from arriving import greedy

from fastcache import LLM, SamplingParams
from fastcache.attention.torch_sdpa import TorchSDPA
from fastcache.core import HostBatch, Step
from fastcache.engine import build, observed, side_by_side
from fastcache.engine.asides import MOST_UNDER_WAY
from fastcache.engine.build import side_runner
from fastcache.engine.pending import PendingTokens
from fastcache.engine.runner import Runner
from fastcache.engine.stages import COMPRESS, DECODE, PREFILL, Dynamic, Turn
from fastcache.engine.tuner import TRIED
from fastcache.engine.tuning import Split

METHODS = [None, ("snapkv", 0.1), ("knorm", 0.6)]
SPLIT = "3+1"


class SideBySide(Dynamic):
    """Every prefill beside the decode steps."""

    def turns(self, load):
        return Turn(PREFILL, max_tokens=self.mixed_tokens, split=SPLIT), Turn(COMPRESS), Turn(DECODE)


class Late(PendingTokens):
    """A step that is computed when it is received, as if the device had taken until then: whoever was given its pages
    meanwhile would be found out. asked: how often it is not complete yet."""

    def __init__(self, side: Runner, step: Step, host: HostBatch, seeds: dict[str, int], asked: int) -> None:
        super().__init__(step, None, None, 0.0)
        self.side, self.host, self.seeds, self.asked = side, host, seeds, asked

    def done(self) -> bool:
        self.asked -= 1
        return self.asked < 0

    def wait(self) -> list[int]:
        if self.tokens is None:
            self.tokens, self.asked = self._computed().tokens, 0
        return super().wait()

    def seconds(self) -> float:
        return 0.001

    def _computed(self) -> PendingTokens:
        builder = self.side.builder
        self.side.builder = self
        try:
            return self.side.launch(self.step, self.seeds)
        finally:
            self.side.builder = builder

    def build(self, step: Step) -> HostBatch:
        return self.host


def engine(folder, method, **options) -> LLM:
    compression = None if method is None else {"method": method[0], "compression_ratio": method[1]}
    options = {"device": "cpu", "page_size": 4, "num_pages": 300, "max_num_seqs": 8, **options}
    return LLM(folder, compression=compression, **options)


def with_a_side(folder, method, rng=None, tokens=4096, **options) -> LLM:
    """An engine as a device with a split has it. rng: how late prefills end; None: before the next step."""
    llm = engine(folder, method, policy="dynamic", **options)
    runner = llm._runner
    runner.sides = {SPLIT: None}
    side = side_runner(runner, TorchSDPA(runner.pool, runner.backend.heads), {SPLIT: None})
    llm._scheduler.policy = SideBySide(mixed_tokens=tokens)
    llm._jobs._side = side
    if rng is not None:
        llm._jobs._side = LateRunner(side, rng)
    return llm


class LateRunner:
    def __init__(self, side: Runner, rng: random.Random) -> None:
        self.side, self.rng, self.launched = side, rng, 0

    def launch(self, step: Step, seeds: dict[str, int], behind: Runner) -> Late:
        self.launched += 1
        return Late(self.side, step, self.side.builder.build(step), dict(seeds), self.rng.randint(0, 9))


def arriving(llm: LLM, work, rng: random.Random, cancel: float = 0.0) -> dict[int, list[int]]:
    def look() -> None:
        llm._scheduler.allocator.check()
        assert len(llm._scheduler.asides.steps) <= MOST_UNDER_WAY

    return all_arriving(llm, work, rng, cancel, look)


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("qwen3", 4, 2, 16, 48, 3, False)


@pytest.fixture(scope="module")
def wanted(folder):
    """No token twice in a prompt: equal tokens would have equal key norms, and ties prove nothing."""
    rng = random.Random(3)
    work = [(rng.sample(range(256), rng.randint(12, 140)), rng.randint(1, 30)) for _ in range(24)]
    return work, {
        m: [engine(folder, m).generate([p], greedy(n))[0].token_ids for p, n in work] for m in METHODS
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m[0] if m else "full")
@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
@pytest.mark.parametrize("tokens", [4096, 70], ids=["whole", "cut"])
def test_tokens_do_not_depend_on_what_runs_beside(folder, wanted, method, late, tokens):
    work, alone = wanted
    llm = with_a_side(folder, method, random.Random(1) if late else None, tokens)
    done = arriving(llm, work, random.Random(2))
    assert [done[i] for i in range(len(work))] == alone[method]
    stats = llm.stats()
    assert stats.prefill_steps > 0 and stats.mixed_steps == 0 and stats.decode_tokens > 0
    assert {s.stage for s in stats.segments if s.stream == "aside"} == {"prefill"}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m[0] if m else "full")
@pytest.mark.parametrize("prefix", [False, True], ids=["own", "shared"])
def test_pages_that_change_hands_race_with_nothing(folder, wanted, method, prefix):
    """Few pages, prefills that end late, requests cancelled and preempted in between."""
    work, alone = wanted
    rng, steps = random.Random(4), 0
    for _ in range(5):
        options = {"num_pages": 80, "max_num_batched_tokens": 160, "enable_prefix_caching": prefix}
        llm = with_a_side(folder, method, rng, **options)
        done = arriving(llm, work, rng, cancel=0.01)
        stats = llm.stats()
        steps += stats.decode_steps + stats.prefill_steps
        assert llm._jobs._side.launched == stats.prefill_steps
        assert all(tokens == alone[method][i][: len(tokens)] for i, tokens in done.items())
        assert sum(len(tokens) == work[i][1] for i, tokens in done.items()) > len(work) // 2
    assert steps > 600


@pytest.mark.parametrize("pages", [24, 25])
def test_pages_that_run_out_again_are_waited_for_again(folder, pages):
    """Decoding sequences want the last pages while a prompt is cut so small that most of its chunks need none: when
    what was under way has been received, the next chunk is launched before pages are found wanting again."""
    prompts = [list(range(8)), list(range(10, 18)), list(range(100, 140))]
    counts = [SamplingParams(max_tokens=count) for count in (40, 40, 4)]
    alone = [o.token_ids for o in engine(folder, None).generate(prompts, counts)]
    llm, done = with_a_side(folder, None, tokens=1, num_pages=pages), {}
    for number, (prompt, params) in enumerate(zip(prompts, counts, strict=True)):
        llm.add_request(prompt, params, str(number))
        for _ in range(20 * (number == 1)):
            llm.step()
    while llm.has_unfinished():
        done.update((o.request_id, o.token_ids) for o in llm.step())
    assert [done[str(number)] for number in range(3)] == alone
    llm.check_books()


def test_sequences_whose_prefill_is_under_way_wait_for_it(folder, wanted):
    """They neither decode nor are prefilled again; with nothing else to do they are waited for."""
    llm = with_a_side(folder, None, random.Random(5))
    llm.add_request(wanted[0][0][0], greedy(3))
    llm._jobs._side.rng = random.Random(1)  # some steps late
    assert llm.step() == [] and len(llm._scheduler.asides.steps) in (0, 1)
    while llm.has_unfinished():
        llm.step()
    assert llm.stats().prefill_steps == 1 and llm.stats().decode_steps == 2


def test_decode_steps_run_on_the_other_side_while_a_prefill_is_under_way(folder, wanted):
    llm, seen = with_a_side(folder, ("knorm", 0.6), random.Random(6)), []
    launch = llm._runner.launch
    llm._runner.launch = lambda step, seeds: (
        seen.append((step.split, bool(llm._scheduler.asides.steps))) or launch(step, seeds)
    )
    arriving(llm, wanted[0], random.Random(7))
    assert {(split is not None) == beside for split, beside in seen} == {True}
    assert {split for split, _ in seen} == {None, SPLIT}


def test_only_prefills_like_it_join_one_that_is_under_way(folder, wanted):
    llm = with_a_side(folder, None, random.Random(8))
    arriving(llm, wanted[0][:4], random.Random(9))
    asides = llm._scheduler.asides
    asides.steps.append(Step((), False, split=SPLIT))
    assert asides.admit(Turn(PREFILL, split=SPLIT)) and not asides.admit(Turn(PREFILL))
    assert not asides.admit(Turn(PREFILL, split="1+3"))
    asides.steps.append(Step((), False, split=SPLIT))
    assert not asides.admit(Turn(PREFILL, split=SPLIT))
    asides.steps.clear()
    assert asides.admit(Turn(PREFILL)) and asides.split is None


def test_a_prompt_s_first_token_is_the_seat_s_newest(folder):
    llm = engine(folder, None)
    llm._runner.adopt([2, 5], [17, 19])
    assert llm._runner.last_tokens[[2, 5]].tolist() == [17, 19]
    assert torch.count_nonzero(llm._runner.last_tokens) == 2


@pytest.mark.parametrize("bound", [None, 0.05], ids=["throughput", "bound"])
def test_a_warm_up_tries_a_split_and_changes_no_token(folder, wanted, monkeypatch, bound):
    """An engine as it is built on a device with a split; here both sides are the CPU. What is compressed is decided,
    too, so tokens are compared without."""
    monkeypatch.setattr(build, "prefill_splits", lambda *_: {SPLIT: Split(None, None)})
    monkeypatch.setattr(side_by_side, "LEAST_TOKENS", 1)
    monkeypatch.setattr(observed, "LEAST_TOKENS", 1)
    work, alone = wanted
    llm = engine(folder, None, tuning="all", tpot_bound_s=bound, num_pages=600)
    llm.explore(freely=True)
    for _ in range(3):
        outputs = llm.generate([p for p, _ in work], [greedy(n) for _, n in work])
        assert [output.token_ids for output in outputs] == alone[None]
    report = llm.decisions()
    assert report["splits"] == [SPLIT] and set(report["costs"]["beside"]) == {SPLIT}
    tried = {d["choice"] for d in report["decisions"] if d["reason"] == TRIED}
    assert f"side by side, {SPLIT}" in tried
    llm.close()
