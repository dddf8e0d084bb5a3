"""Policies on a GPU: mixed steps, compression and prefill beside decode steps, and decisions, with the tokens of one
step after the other."""

from __future__ import annotations

import random

import pytest
import torch
from arriving import arriving, greedy

from fastcache import LLM
from fastcache.engine.balance import BACKLOG, TIGHT, WITHIN
from fastcache.engine.policy import NOT_MEASURED
from fastcache.engine.stages import COMPRESS, DECODE, PREFILL, Turn
from fastcache.engine.tuner import TRIED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = [None, {"method": "snapkv", "compression_ratio": 0.5}]
PARTITION = {"enabled": True, "compress_ratio": 0.125, "main_ratio": 0.875}


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("qwen3", 8, 2, 64, 256, 3, False)


def engine(folder, method, **options) -> LLM:
    # float32 through the reference backend: token for token, whatever shares a step.
    options = {"dtype": "float32", "attention_backend": "torch-sdpa", "num_pages": 2000, **options}
    return LLM(folder, device="cuda", max_model_len=512, max_num_seqs=16, compression=method, **options)


def work_of(rng: random.Random, count: int) -> list[tuple[list[int], int]]:
    return [(rng.sample(range(256), rng.randint(130, 250)), rng.randint(1, 40)) for _ in range(count)]


@pytest.fixture(scope="module")
def wanted(folder):
    work = work_of(random.Random(0), 24)
    alone = {}
    for method in METHODS:
        llm = engine(folder, method)
        alone[str(method)] = [llm.generate([p], greedy(n))[0].token_ids for p, n in work]
    return work, alone


@pytest.mark.parametrize("policy", ["fcfs", "dynamic", "p1c1d8", "p2c2d3"])
@pytest.mark.parametrize("method", METHODS, ids=["full", "snapkv"])
def test_tokens_do_not_depend_on_the_policy(folder, wanted, policy, method):
    work, alone = wanted
    llm = engine(folder, method, policy=policy)
    done = arriving(llm, work, random.Random(1))
    assert [done[i] for i in range(len(work))] == alone[str(method)]


@pytest.mark.parametrize("partition", [None, PARTITION], ids=["main-stream", "side-stream"])
def test_compression_after_prefill_races_with_nothing(folder, partition):
    """Copies on the compression stream are held up, so that they end steps later than they were planned; pages are
    few, so that they change hands at once. Thousands of steps, cancellations in between."""
    rng, method = random.Random(2), METHODS[1]
    inline = engine(folder, method)
    steps = 0
    for _ in range(16):
        options = {} if partition is None else {"partition": partition}
        llm = engine(folder, method, policy="p2c2d8", num_pages=150, **options)
        deferred, copy = llm._runner.deferred, llm._runner.deferred.copy

        def late(work, seen, copy=copy):
            torch.cuda._sleep(rng.randint(0, 15_000_000))  # cycles: up to some 10 ms
            copy(work, seen)

        deferred.copy = late
        work = work_of(rng, 40)
        done = arriving(llm, work, rng, cancel=0.01)
        steps += llm.stats().decode_steps + llm.stats().prefill_steps
        assert llm.stats().compress_steps > 0
        numbers = sorted(done)
        outputs = inline.generate([work[i][0] for i in numbers], [greedy(work[i][1]) for i in numbers])
        assert [done[i] for i in numbers] == [o.token_ids for o in outputs]
    assert steps > 2000


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "binding"])
def test_a_tuned_engine_tries_its_places_and_keeps_its_books(folder, bound):
    llm = engine(folder, METHODS[1], tuning="all", partition={**PARTITION, "bound": bound})
    rng = random.Random(3)
    for each in range(8):
        llm.reset_stats()
        llm.explore(freely=each < 6)
        work = work_of(rng, 24)
        done = arriving(llm, work, rng)
        assert all(len(done[i]) == count for i, (_, count) in enumerate(work))
    report = llm.decisions()
    assert report["measured"] and set(report["costs"]["exposed"]) <= set(report["places"])
    assert ("inline" in report["places"]) == bound
    assert any(name.startswith("beside") for name in report["places"])
    llm.close()


@pytest.mark.parametrize("bound", [0.002, 0.05])
def test_a_bound_on_the_time_per_token_changes_no_token(folder, wanted, bound):
    """Once costs are known, prompts are cut into what a step of that time holds."""
    work, alone = wanted
    llm = engine(folder, None, tuning="all", tpot_bound_s=bound, max_num_batched_tokens=4096)
    for seed in range(3):
        llm.reset_stats()
        done = arriving(llm, work, random.Random(seed))
        assert [done[i] for i in range(len(work))] == alone["None"]
    assert llm.stats().mixed_steps > 0
    decided = [d for d in llm.decisions()["decisions"] if d["about"] == "balance"]
    assert {d["reason"] for d in decided} <= {NOT_MEASURED, TRIED, WITHIN, TIGHT, BACKLOG}
    llm.close()


def test_mixed_steps_through_flashinfer_give_the_tokens_of_pure_ones(tiny_model):
    pytest.importorskip("flashinfer")
    folder = tiny_model("qwen3", 8, 2, 128, 256, 3, False)
    options = {"dtype": "bfloat16", "attention_backend": "flashinfer", "enforce_eager": True}
    work = work_of(random.Random(4), 24)
    pure = arriving(engine(folder, None, **options), work, random.Random(5))
    llm = engine(folder, None, policy="dynamic", **options)
    mixed = arriving(llm, work, random.Random(5))
    assert llm.stats().mixed_steps > 0
    # bfloat16 rounds differently in steps of another size, and after one other token all that follow differ.
    same = sum(a == b for i in mixed for a, b in zip(mixed[i], pure[i], strict=True))
    assert same > 0.7 * sum(len(tokens) for tokens in mixed.values())


@pytest.mark.parametrize("partition", [None, {**PARTITION, "bound": True}], ids=["whole", "partition"])
@pytest.mark.parametrize("compression", [None, METHODS[1]], ids=["full", "compressed"])
def test_small_steps_in_pieces_give_the_tokens_of_eager_ones(tiny_model, compression, partition):
    """Real graphs between attentions; steps are timed by the device, none of them at no time at all."""
    pytest.importorskip("flashinfer")
    folder = tiny_model("qwen3", 8, 2, 128, 256, 3, False)
    options = {"dtype": "bfloat16", "attention_backend": "flashinfer", "tuning": "all"}
    options |= {"tpot_bound_s": 0.002, "max_num_batched_tokens": 4096}
    if partition is not None:
        options["partition"] = partition
    work = work_of(random.Random(4), 24)
    eager = engine(folder, compression, enforce_eager=True, **options)
    want = arriving(eager, work, random.Random(5))
    llm = engine(folder, compression, **options)
    assert llm._runner.small is not None and eager._runner.small is None
    got = arriving(llm, work, random.Random(5))
    stats = llm.stats()
    assert llm._runner.small._graphs and stats.mixed_steps > 0
    assert stats.mixed_time_s > 1e-5 * stats.mixed_steps
    # As above: another padding rounds differently, and after one other token all that follow differ. With compression
    # the first token is all that does not depend on which of nearly equal entries were kept.
    pairs = [(a, b) for i in got for a, b in zip(got[i], want[i], strict=True)]
    if compression is not None:
        pairs = [(got[i][0], want[i][0]) for i in got]
    assert sum(a == b for a, b in pairs) > 0.7 * len(pairs)
    llm.check_books()


class SideBySide:
    """Every prefill beside decode steps, on the first split there is."""

    deferred, cuts_prompts, by_age = False, True, False

    def __init__(self, split: str) -> None:
        self.split = split

    def turns(self, load):
        return Turn(PREFILL, max_tokens=400, split=self.split), Turn(COMPRESS), Turn(DECODE)


def side_by_side(folder, method, **options) -> LLM:
    partition = {**PARTITION, "bound": True}
    llm = engine(folder, method, tuning="all", partition=partition, max_num_batched_tokens=4096, **options)
    splits = llm._scheduler.tuner.limits.splits
    if not splits:
        pytest.skip("this device grants no disjoint split")
    llm._scheduler.policy = SideBySide(splits[0])
    return llm


@pytest.mark.parametrize("method", METHODS, ids=["full", "snapkv"])
def test_prefills_beside_decode_steps_race_with_nothing(folder, method):
    """They are held up, so that many decode steps run beside each; pages are few, so that they change hands at once."""
    rng, alone, steps, held, beside = random.Random(6), engine(folder, method), 0, 0, []
    for _ in range(8):
        llm = side_by_side(folder, method, num_pages=150)
        side, launch = llm._jobs._side, llm._runner.launch
        plan = side.backend.plan

        def late(batch, plan=plan):
            plan(batch)
            torch.cuda._sleep(rng.randint(0, 30_000_000))  # cycles: up to some 20 ms

        def noted(step, seeds, launch=launch):
            beside.append(step.split is not None)
            return launch(step, seeds)

        side.backend.plan, llm._runner.launch = late, noted
        work = work_of(rng, 40)
        done = arriving(llm, work, rng, cancel=0.01)
        stats = llm.stats()
        steps += stats.decode_steps + stats.prefill_steps
        held += sum(segment.steps for segment in stats.segments if segment.stream == "aside")
        numbers = sorted(done)
        outputs = alone.generate([work[i][0] for i in numbers], [greedy(work[i][1]) for i in numbers])
        assert [done[i] for i in numbers] == [o.token_ids for o in outputs]
        llm.close()
    assert steps > 1000 and held > 50 and sum(beside) > held


@pytest.mark.parametrize("compression", [None, METHODS[1]], ids=["full", "compressed"])
def test_prefills_beside_decode_graphs_give_the_tokens_of_steps_alone(tiny_model, compression):
    """Through flashinfer, with graphs of decode steps on their side."""
    pytest.importorskip("flashinfer")
    folder = tiny_model("qwen3", 8, 2, 128, 256, 3, False)
    options = {"dtype": "bfloat16", "attention_backend": "flashinfer"}
    work = work_of(random.Random(4), 24)
    want = arriving(engine(folder, compression, **options), work, random.Random(5))
    llm = side_by_side(folder, compression, **options)
    got = arriving(llm, work, random.Random(5))
    assert llm._runner.sides[llm._scheduler.policy.split] in {
        stream for stream, _ in llm._runner.graphs._graphs
    }
    pairs = [(a, b) for i in got for a, b in zip(got[i], want[i], strict=True)]
    if compression is not None:
        pairs = [(got[i][0], want[i][0]) for i in got]
    assert sum(a == b for a, b in pairs) > 0.7 * len(pairs)
    llm.close()


def test_a_warm_up_measures_both_sides_of_each_split(folder):
    """Eight requests decode all the while; eight at a time end beside them, and as many are prefilled together: fewer
    tokens say nothing about a side."""
    partition = {**PARTITION, "bound": True}
    options = {"partition": partition, "max_num_batched_tokens": 4096, "tpot_bound_s": 0.05}
    llm = engine(folder, None, tuning="all", **options)
    if not llm.decisions()["splits"]:
        pytest.skip("this device grants no disjoint split")
    prompts = [prompt for prompt, _ in work_of(random.Random(7), 56)]
    params = [greedy(60)] * 8 + [greedy(6)] * 48
    alone = [output.token_ids for output in engine(folder, None).generate(prompts, params)]
    llm.explore(freely=True)
    for _ in range(8):
        assert [output.token_ids for output in llm.generate(prompts, params)] == alone
    report = llm.decisions()
    costs = report["costs"]
    assert set(costs["beside"]) == set(costs["aside_s_per_token"]) == set(report["splits"])
    llm.close()
