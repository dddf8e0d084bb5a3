"""Every stage policy gives every request the tokens it gets alone; only when they come differs."""

from __future__ import annotations

import dataclasses
import random
import time
from functools import partial
from itertools import pairwise

import pytest
import torch

from fastcache import LLM, SamplingParams
from fastcache.engine.policy import NOT_MEASURED
from fastcache.engine.stages import Dynamic
from fastcache.errors import ConfigError, QueueFull, UnsupportedCombination

POLICIES = ["fcfs", "dynamic", "p1c1d8", "p2c2d3", "p4c4d8"]
METHODS = [None, ("snapkv", 0.1), ("knorm", 0.6)]


def greedy(count: int, **more) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **more)


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    """No token twice in a prompt: equal tokens would have equal key norms, and ties prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(256, generator=generator)[:n].tolist() for n in lengths]


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("qwen3", 4, 2, 16, 48, 3, False)


def engine(folder, method, **options) -> LLM:
    compression = None if method is None else {"method": method[0], "compression_ratio": method[1]}
    options = {"device": "cpu", "page_size": 4, "num_pages": 300, "max_num_seqs": 8, **options}
    return LLM(folder, compression=compression, **options)


def arriving(llm: LLM, prompts, counts, every: int = 3) -> list[list[int]]:
    """Requests come in while others run: one after `every` steps."""
    done, ids = {}, []
    for prompt, count in zip(prompts, counts, strict=True):
        ids.append(llm.add_request(prompt, greedy(count)))
        for _ in range(every):
            done.update((o.request_id, o) for o in llm.step())
    while llm.has_unfinished():
        done.update((o.request_id, o) for o in llm.step())
    llm.check_books()
    return [done[i].token_ids for i in ids]


@pytest.fixture(scope="module")
def wanted(folder):
    prompts = prompts_of([90, 30, 133, 75, 12, 101, 80, 99], seed=3)
    counts = [20, 9, 1, 30, 14, 2, 17, 25]
    alone = {}
    for method in METHODS:
        llm = engine(folder, method)
        alone[method] = [
            llm.generate([p], greedy(n))[0].token_ids for p, n in zip(prompts, counts, strict=True)
        ]
    return prompts, counts, alone


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m[0] if m else "full")
def test_tokens_do_not_depend_on_the_policy(folder, wanted, policy, method):
    prompts, counts, alone = wanted
    llm = engine(folder, method, policy=policy)
    assert arriving(llm, prompts, counts) == alone[method]
    tight = engine(folder, method, policy=policy, num_pages=70, max_num_batched_tokens=96)
    assert arriving(tight, prompts, counts, every=1) == alone[method]


def test_dynamic_computes_prompts_and_tokens_in_one_step(folder, wanted):
    prompts, counts, alone = wanted
    llm = engine(folder, None, policy="dynamic")
    assert arriving(llm, prompts, counts) == alone[None]
    stats = llm.stats()
    assert stats.mixed_steps > 0 and stats.mixed_decode_tokens > 0 and stats.mixed_time_s > 0
    assert stats.prefill_tokens == sum(map(len, prompts))
    assert stats.decode_tokens == sum(counts) - len(counts)


class Filling(Dynamic):
    """Mixed steps that are filled with whatever prompts are there."""

    def turns(self, load):
        return tuple(turn._replace(cut=turn.together) for turn in super().turns(load))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m[0] if m else "full")
def test_any_prompt_may_be_cut_to_fill_a_mixed_step(folder, wanted, method):
    prompts, counts, alone = wanted
    llm = engine(folder, method, policy="dynamic")
    llm._scheduler.policy = Filling(enough_tokens=1, mixed_tokens=70)
    steps, launch = [], llm._runner.launch
    llm._runner.launch = lambda step, seeds: steps.append(step) or launch(step, seeds)
    assert arriving(llm, prompts, counts, every=1) == alone[method]
    mixed = [step for step in steps if step.decode_rows]
    assert all(step.num_tokens - step.decode_rows <= 70 for step in mixed)
    assert any(c.start > 0 and d.start == 0 and not d.sample for s in mixed for c, d in pairwise(s.chunks))


def test_static_batches_are_never_exceeded(folder, wanted):
    prompts, counts, _ = wanted
    llm = engine(folder, ("knorm", 0.6), policy="p2c1d3")
    steps, jobs = [], []
    launch, compress = llm._runner.launch, llm._runner.compress
    llm._runner.launch = lambda step, seeds: steps.append(step) or launch(step, seeds)
    llm._runner.compress = lambda job: jobs.append(job) or compress(job)
    arriving(llm, prompts, counts, every=0)
    assert max(len(s.chunks) for s in steps if s.decode) == 3
    assert max(len(s.chunks) for s in steps if not s.decode) == 2
    assert {len(job.seqs) for job in jobs} == {1}
    assert llm.stats().compress_steps == len(jobs) and llm.stats().compress_time_s > 0


def test_old_pages_stay_until_the_end_without_immediate_release(folder, wanted):
    prompts, counts, alone = wanted
    peaks = {}
    for release in (True, False):
        llm = engine(folder, ("knorm", 0.6), immediate_release=release)
        assert arriving(llm, prompts, counts) == alone["knorm", 0.6]
        peaks[release] = llm.stats().peak_pages
        held = max(sample.held for sample in llm.stats().kv)
        assert (held == 0) == release
    assert peaks[True] < peaks[False]


def test_pages_are_accounted_by_stage(folder, wanted):
    prompts, counts, _ = wanted
    llm = engine(folder, ("knorm", 0.6), policy="p1c1d8", immediate_release=False)
    for prompt, count in zip(prompts, counts, strict=True):
        llm.add_request(prompt, greedy(count))
    while llm.has_unfinished():
        llm.step()
        used = llm._scheduler.allocator.used
        llm._scheduler._account.sample(llm.stats().kv, time.perf_counter(), llm._scheduler.running, 0)
        kv = llm.stats().kv[-1]
        assert kv.before + kv.compressed + kv.whole + kv.held == used
    assert len(llm.stats().kv) <= 256


def test_a_request_that_is_too_late_ends_with_what_it_has(folder):
    llm = engine(folder, None, max_num_seqs=1)
    prompts = prompts_of([20, 30, 40], seed=5)
    running = llm.add_request(prompts[0], greedy(500), timeout_s=3600)
    waiting = llm.add_request(prompts[1], greedy(5), timeout_s=3600)
    for _ in range(4):
        llm.step()
    for _, _, seq in llm._scheduler.deadlines._heap:
        assert seq.request.timeout_s == 3600
    llm._scheduler.deadlines._heap = [(0.0, n, seq) for _, n, seq in llm._scheduler.deadlines._heap]
    third = llm.add_request(prompts[2], greedy(3))
    done = {o.request_id: o for o in llm.step()}
    assert {running, waiting} == set(done)
    assert all(o.finish_reason == "timeout" for o in done.values())
    assert len(done[running].token_ids) > 0 and done[waiting].token_ids == []
    assert done[waiting].metrics.first_token_s is None
    assert llm.stats().timeouts == 2
    while llm.has_unfinished():
        done.update((o.request_id, o) for o in llm.step())
    assert len(done[third].token_ids) == 3
    llm.check_books()


def test_a_full_queue_refuses(folder):
    llm = engine(folder, None, max_waiting=2)
    for _ in range(2):
        llm.add_request([1, 2, 3], greedy(2))
    with pytest.raises(QueueFull, match="max_waiting is 2"):
        llm.add_request([1, 2, 3], greedy(2))
    while llm.has_unfinished():
        llm.step()
    llm.add_request([1, 2, 3], greedy(2))


def test_a_method_that_must_see_the_prefill_cannot_come_after_it(folder):
    with pytest.raises(UnsupportedCombination, match="needs attention_mass"):
        engine(folder, ("observed_attention", 0.5), policy="p1c1d8")


class Late:
    """A launched compression whose copies are made only when it is waited for, or polled often enough: an event
    on a slow stream."""

    def __init__(self, copies: list, polls: int) -> None:
        self._copies, self._polls = copies, polls

    def query(self) -> bool:
        self._polls -= 1
        if self._polls <= 0:
            self.synchronize()
        return not self._copies

    def synchronize(self) -> None:
        while self._copies:
            self._copies.pop()()


def slow_stream(llm: LLM, rng: random.Random) -> None:
    """Make every compression of `llm` late by up to 12 steps."""
    deferred, copy, launch = llm._runner.deferred, llm._runner.deferred.copy, llm._runner.compress
    planned = []
    deferred.copy = lambda work, seen: planned.append(torch.inference_mode()(partial(copy, work, seen)))

    def compress(job):
        launched = launch(job)
        return dataclasses.replace(launched, ready=Late([planned.pop()], rng.randint(1, 12)))

    llm._runner.compress = compress


@pytest.mark.parametrize("policy", ["p1c1d8", "p2c2d3"])
def test_compression_that_comes_late_changes_no_token(folder, policy):
    """Copies are made many steps after they were planned: whoever wrote the old or the fresh pages meanwhile, or
    read them too early, would change tokens. Thousands of steps, with cancellations in between."""
    rng = random.Random(0)
    method = ("snapkv", 0.1)
    inline = engine(folder, method, num_pages=2000)
    steps = 0
    for _ in range(15):
        llm = engine(folder, method, policy=policy, num_pages=rng.choice([90, 150]), max_num_seqs=8)
        slow_stream(llm, rng)
        prompts = prompts_of([rng.randint(70, 130) for _ in range(16)], seed=rng.randint(0, 999))
        counts = [rng.randint(1, 40) for _ in prompts]
        wanted = dict(enumerate(zip(prompts, counts, strict=True)))
        done = {}
        todo = list(wanted)
        while todo or llm.has_unfinished():
            if todo and rng.random() < 0.5:
                number = todo.pop()
                llm.add_request(wanted[number][0], greedy(wanted[number][1]), str(number))
            done.update((int(o.request_id), o.token_ids) for o in llm.step())
            llm._scheduler.allocator.check()
            steps += 1
            if rng.random() < 0.01 and llm._live:
                victim = rng.choice(list(llm._live))
                llm.cancel(victim)
                wanted.pop(int(victim))
        llm.check_books()
        outputs = inline.generate([p for p, _ in wanted.values()], [greedy(n) for _, n in wanted.values()])
        assert [done[number] for number in wanted] == [o.token_ids for o in outputs]
    assert steps > 2000


@pytest.mark.parametrize("tuning", ["compression", "all"])
def test_a_tuned_engine_decides_from_what_it_measured(folder, wanted, tuning):
    """Whatever it decides, each request has the tokens of the cache it says it had."""
    prompts, counts, alone = wanted
    method = ("knorm", 0.6)
    llm = engine(folder, method, tuning=tuning, max_num_seqs=4)
    for _ in range(6):
        llm.reset_stats()
        for prompt, count in zip(prompts, counts, strict=True):
            llm.add_request(prompt, greedy(count))
        done = []
        while llm.has_unfinished():
            done += llm.step()
        llm.check_books()
        for output in done:
            number = prompts.index(list(output.prompt_token_ids))
            assert output.token_ids == alone[method if output.metrics.compressed else None][number]
    report = llm.decisions()
    assert report["costs"]["exposed"]["inline"] > 0 and report["costs"]["decode_fixed_s"] is not None
    decided = [d for d in report["decisions"] if d["about"] == "compression"]
    assert (
        sum(d["count"] for d in decided) >= len(prompts) - 1
    )  # the shortest may be too short for the method
    assert all(d["reason"] != NOT_MEASURED for d in decided)
    assert any(d["about"] == "balance" for d in report["decisions"]) == (tuning == "all")
    assert report["steps"]["decode"]["measured_s"] > 0
    assert (llm.stats().mixed_steps == 0) or tuning == "all"


def test_a_tuned_engine_leaves_whole_what_would_not_pay(folder):
    llm = engine(folder, ("knorm", 0.6), tuning="all")
    prompts = prompts_of([100] * 6, seed=9)
    for _ in range(5):
        llm.reset_stats()
        llm.generate(prompts, greedy(1))
    # One token each: no decode step was ever seen, so the fixed choice stands and says so.
    reasons = {d["reason"] for d in llm.decisions()["decisions"] if d["about"] == "compression"}
    assert reasons == {NOT_MEASURED}
    llm.generate(prompts, greedy(60))
    llm.reset_stats()
    outputs = llm.generate(prompts, greedy(1))
    assert not any(o.metrics.compressed for o in outputs)
    assert llm.stats().left_whole == 6


@pytest.mark.parametrize("bound", [None, 0.05])
def test_a_tuned_engine_without_a_method_balances_all_the_same(folder, wanted, bound):
    """There is no place to compress at, but prompts and tokens may share steps."""
    prompts, counts, alone = wanted
    llm = engine(folder, None, tuning="all", tpot_bound_s=bound, max_num_seqs=4)
    for _ in range(3):
        llm.reset_stats()
        assert arriving(llm, prompts, counts) == alone[None]
    report = llm.decisions()
    assert report["places"] == [] and report["costs"]["prefill_s_per_token"] > 0
    assert report["measured"] and {d["about"] for d in report["decisions"]} == {"balance"}


def test_tuning_and_a_policy_of_ones_own_exclude_each_other(folder):
    with pytest.raises(ConfigError, match="takes no policy"):
        engine(folder, ("knorm", 0.6), tuning="all", policy="dynamic")
