"""The GPU engine against its references: kernels, backends, graphs, and the books over many schedules."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fastcache import LLM, SamplingParams
from fastcache.engine.sampler import sample, sampling_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("qwen3", 8, 2, 128, 256, 3, False)


def relative_error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("rows,size", [(1, 256), (7, 4096), (130, 5120), (33, 576)])
def test_norms_match_the_reference(rows, size):
    from fastcache.models.ops import Ops
    from fastcache.models.ops_triton import TritonOps

    x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    assert relative_error(TritonOps().rms_norm(x, w, 1e-6), Ops().rms_norm(x, w, 1e-6)) < 5e-3


@pytest.mark.parametrize("rows,size", [(1, 256), (64, 4096), (130, 576)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_added_to_the_residual_match_the_reference(rows, size, bias):
    from fastcache.models.ops import Ops
    from fastcache.models.ops_triton import TritonOps

    x, w, b, r = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((rows, 2 * size), (size, 2 * size), (size,), (rows, size))
    )
    args = (x, w, b if bias else None)
    want = Ops().project_add(*(None if a is None else a.double() for a in args), r.double())
    assert relative_error(TritonOps().project_add(*args, r.clone()), want) < 5e-3


@pytest.mark.parametrize("rows", [33, 40, 64])
@pytest.mark.parametrize("columns,depth", [(24576, 4096), (8448, 12288)])
def test_products_of_few_rows_match_float64(rows, columns, depth):
    """Shapes for which an H100 has a kernel of ours; replayed, as a graph of the engine is."""
    from fastcache.models.ops_triton import TritonOps
    from fastcache.models.product_triton import takes

    x, w = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((rows, depth), (columns, depth))
    )
    if torch.cuda.get_device_properties(0).multi_processor_count == 132:
        assert takes(x, w)
    want = x.double() @ w.double().t()
    assert relative_error(TritonOps().project(x, w, None), want) < 5e-3
    other = torch.randn_like(x)
    graph, place = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        out = TritonOps().project(place, w, None)
    place.copy_(other)
    graph.replay()
    assert relative_error(out, other.double() @ w.double().t()) < 5e-3


@pytest.mark.parametrize("rows,size", [(1, 256), (64, 151936), (3, 49152), (7, 32001)])
def test_argmax_is_the_first_of_the_largest(rows, size):
    from fastcache.models.ops_triton import TritonOps

    logits = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
    logits[0, [5, size // 2, size - 1]] = 9.0
    assert TritonOps().argmax(logits)[0] == 5
    want = logits.float().cpu().numpy().argmax(-1)  # numpy promises the first
    assert TritonOps().argmax(logits).tolist() == want.tolist()


@pytest.mark.parametrize("rows,size", [(1, 256), (9, 12288), (130, 1536)])
def test_silu_mul_matches_the_reference(rows, size):
    from fastcache.models.ops import Ops
    from fastcache.models.ops_triton import TritonOps

    x = torch.randn(rows, 2 * size, device="cuda", dtype=torch.bfloat16)
    assert relative_error(TritonOps().silu_mul(x), Ops().silu_mul(x)) < 5e-3


@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (64, 8, 128)])
@pytest.mark.parametrize("norm", [True, False])
def test_norm_and_rotation_match_the_reference(heads, norm):
    from fastcache.models.config import RopeConfig
    from fastcache.models.ops import Ops
    from fastcache.models.ops_triton import TritonOps
    from fastcache.models.rope import rotary_table

    h, hk, d = heads
    qkv = torch.randn(77, (h + 2 * hk) * d, device="cuda", dtype=torch.bfloat16)
    weights = (torch.randn(d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    norms = (*weights, 1e-6)
    table = rotary_table(RopeConfig(1e6), d, 4096, torch.device("cuda"))
    positions = torch.randint(0, 4096, (77,), device="cuda")
    args = (heads, norms if norm else None, table, positions)
    want = Ops().qk_norm_rope(qkv.clone(), *args)
    got = TritonOps().qk_norm_rope(qkv.clone(), *args)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("norm", [True, False])
def test_rotation_stores_what_a_write_would(norm, stored):
    """q, k, v as without a place, and the pool as `KVPool.write` leaves it, tokens without a slot left out."""
    from fastcache.kvcache.pool import KVPool, KVShape
    from fastcache.models.config import RopeConfig
    from fastcache.models.ops_triton import TritonOps
    from fastcache.models.rope import rotary_table

    heads = (9, 3, 64)
    shape = KVShape(2, 3, 64, torch.bfloat16, stored)
    fused, apart = (KVPool(shape, 20, 16, torch.device("cuda")) for _ in range(2))
    qkv = torch.randn(40, 15 * 64, device="cuda", dtype=torch.bfloat16)
    weights = (torch.randn(64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = rotary_table(RopeConfig(1e6), 64, 4096, torch.device("cuda"))
    positions = torch.randint(0, 4096, (40,), device="cuda")
    args = (heads, (*weights, 1e-6) if norm else None, table, positions)
    slots = torch.randperm(304, device="cuda")[:40] + 16
    slots[::7] = -1
    want = TritonOps().qk_norm_rope(qkv.clone(), *args)
    got = TritonOps().qk_norm_rope(qkv.clone(), *args, fused.place(1, slots))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    apart.write(1, want[1], want[2], slots)
    assert torch.equal(fused.keys[:, 1:].view(torch.uint8), apart.keys[:, 1:].view(torch.uint8))
    assert torch.equal(fused.values[:, 1:].view(torch.uint8), apart.values[:, 1:].view(torch.uint8))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
def test_kv_write_matches_the_reference(stored):
    from fastcache.kvcache.pool import KVPool, KVShape

    shape = KVShape(2, 3, 64, torch.bfloat16, stored)
    fast, slow = (KVPool(shape, 20, 16, torch.device("cuda")) for _ in range(2))
    slow._write_fast = None
    # Wide enough that some values are beyond the largest of e4m3.
    k, v = (200 * torch.randn(40, 3, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    slots = torch.randperm(320, device="cuda")[:40]
    for pool in (fast, slow):
        pool.write(1, k, v, slots)
    for got, want in ((fast.keys, slow.keys), (fast.values, slow.values)):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def run(folder, prompts, count, **options):
    llm = LLM(folder, device="cuda", dtype="bfloat16", num_pages=600, max_model_len=1024, **options)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=count, ignore_eos=True))
    llm.check_books()
    return llm, [o.token_ids for o in outputs]


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (1, 15, 16, 17, 100, 333)]


def base_2_lse(q, k):
    """Of one head of a prompt that attends itself: (T,) from (T, d)."""
    logits = q @ k.T * q.shape[1] ** -0.5
    return logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -torch.inf).logsumexp(-1) / math.log(2)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_flashinfer_attends_like_the_reference(folder, kv_dtype):
    """Same q, k, v through both backends, prefill from scratch, chunked prefill, decode, and all of them in a step;
    into a new tensor, and into rows of a larger one, of which it writes no others."""
    from fastcache.attention.select import select_backend
    from fastcache.core import Chunk, Request, Sequence, Step
    from fastcache.engine.batch import BatchBuilder, to_device

    llm = LLM(folder, device="cuda", dtype="bfloat16", num_pages=300, max_model_len=1024, kv_dtype=kv_dtype)
    pool, heads = llm._runner.pool, llm._runner.backend.heads
    device = torch.device("cuda")
    fast, slow = (select_backend(n, pool, heads, device) for n in ("flashinfer", "torch-sdpa"))
    pages = iter(range(1, 300))
    for kv_starts, lengths, riders in (
        ([0, 0, 0], [5, 16, 130], 0),
        ([7, 16, 33], [9, 64, 3], 0),
        ([7, 0, 33], [9, 64, 1], 1),
        ([40, 0, 0, 63, 200], [70, 9, 140, 1, 1], 2),
        ([40, 63, 200], [70, 1, 1], 2),
        ([0, 63, 200], [70, 1, 1], 2),
        ([20, 63, 200], [1, 1, 1], 0),
    ):
        chunks = []
        for seat, (start, length) in enumerate(zip(kv_starts, lengths, strict=True)):
            seq = Sequence(Request(str(seat), (1,) * (start + length), SamplingParams(), 0.0), seat=seat)
            seq.pages = [next(pages) for _ in range(-(-(start + length) // pool.page_size))]
            chunks.append(Chunk(seq, start, start, length, sample=True))
        decode = all(n == 1 for n in lengths)
        step = Step(tuple(chunks), decode, decode_rows=riders)
        host = BatchBuilder(5, 64, pool.page_size).build(step)
        batch = to_device(host, torch.zeros(5, dtype=torch.int64, device=device))
        total = sum(lengths)
        for stored in (pool.keys, pool.values):
            stored.copy_(torch.randn(stored.shape, device=device))
        parts = [heads.num_heads, heads.kv_heads, heads.kv_heads]
        qkv = torch.randn(total, sum(parts), heads.head_dim, device=device, dtype=torch.bfloat16)
        q, k, v = qkv.split(parts, dim=1)
        pool.write(1, k, v, batch.slot_mapping)
        slow.plan(batch)
        want = slow.run(1, q, k, v)
        fast.plan(batch)
        fast.keep_lse = False
        got, room = fast.run(1, q, k, v), q.new_full((total + 8, *q.shape[1:]), torch.nan)
        assert relative_error(got, want) < 1e-2
        for keep_lse in (False, True):
            fast.keep_lse, out = keep_lse, room[:total].fill_(torch.nan)
            assert fast.run(1, q, k, v, out) is out and relative_error(out, got) < 1e-3
            assert room[total:].isnan().all()
        if 0 in kv_starts:
            own = max(i for i, start in enumerate(kv_starts) if start == 0)
            rows = slice(sum(lengths[:own]), sum(lengths[: own + 1]))
            want_lse = base_2_lse(q[rows, 0].float(), k[rows, 0].float())
            assert torch.allclose(fast.lse[rows, 0], want_lse, atol=2e-2)
        if decode:
            fast.plan_graph(host)
            assert relative_error(fast.run(1, q, k, v), want) < 1e-2


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_graph_replay_gives_the_tokens_of_eager(folder, prompts, kv_dtype):
    graph, tokens = run(folder, prompts, 40, kv_dtype=kv_dtype)
    eager, want = run(folder, prompts, 40, enforce_eager=True, kv_dtype=kv_dtype)
    assert graph._runner.graphs is not None and eager._runner.graphs is None
    assert tokens == want


def test_float32_on_the_gpu_equals_the_cpu(tiny_model, prompts):
    folder = tiny_model("llama", 4, 2, 64, 128, 2, False)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    results = [
        LLM(folder, device=device, dtype="float32", num_pages=400, max_model_len=1024).generate(
            prompts, params
        )
        for device in ("cpu", "cuda")
    ]
    assert [o.token_ids for o in results[0]] == [o.token_ids for o in results[1]]


@pytest.mark.parametrize("compression", [None, {"method": "snapkv", "compression_ratio": 0.5}])
def test_random_schedules_balance_the_books(folder, compression):
    rng = random.Random(0)
    for _ in range(100):
        llm_options = {
            "num_pages": rng.choice([60, 90]),
            "max_num_seqs": rng.choice([4, 16]),
            "max_num_batched_tokens": rng.choice([64, 256]),
            "max_model_len": 512,
            "enforce_eager": rng.random() < 0.9,
        }
        llm = LLM(folder, device="cuda", dtype="bfloat16", compression=compression, **llm_options)
        wanted = {}
        for _ in range(rng.randint(3, 12)):
            prompt = rng.choices(range(256), k=rng.randint(1, 300))
            params = SamplingParams(max_tokens=rng.randint(1, 30), ignore_eos=rng.random() < 0.7)
            wanted[llm.add_request(prompt, params)] = params.max_tokens
            for _ in range(rng.randint(0, 3)):
                for output in llm.step():
                    assert len(output.token_ids) <= wanted.pop(output.request_id)
        while llm.has_unfinished():
            for output in llm.step():
                assert len(output.token_ids) <= wanted.pop(output.request_id)
        assert not wanted
        llm.check_books()


def test_drawing_tokens_waits_for_nothing():
    """A step beside another one must be launched at once, whatever its stream still has to do."""
    params = [SamplingParams(temperature=0.7, top_k=5, top_p=0.9), SamplingParams()]
    logits = torch.randn(2, 261, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = sample(logits, sampling_batch(params, [1, 2], [0, 0], logits.device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = sample(logits.cpu(), sampling_batch(params, [1, 2], [0, 0], torch.device("cpu")))
    assert tokens.tolist() == want.tolist()


def test_logprobs_are_read_before_their_memory_is_used_again(folder):
    """The stream where outputs are put together is held up, while steps go on on the engine's own."""
    rng = random.Random(2)
    texts = [[rng.choices(range(256), k=count) for _ in range(24)] for count in (100, 150)]
    options = {"device": "cuda", "dtype": "float32", "attention_backend": "torch-sdpa"}
    options |= {"max_model_len": 512, "max_num_seqs": 2, "num_pages": 100}
    want = LLM(folder, **options).score(*texts)
    llm = LLM(folder, partition={"enabled": True}, **options)
    assert llm._runner.stream != torch.cuda.default_stream()
    torch.cuda._sleep(500_000_000)  # cycles: some 300 ms
    for got, expected in zip(llm.score(*texts), want, strict=True):
        torch.testing.assert_close(got.logprobs, expected.logprobs, atol=1e-3, rtol=0)


def test_two_thousand_requests_do_not_grow_memory(folder):
    llm = LLM(folder, device="cuda", dtype="bfloat16", num_pages=2000, max_model_len=512, max_num_seqs=64)
    rng = random.Random(1)

    def wave(count):
        prompts = [rng.choices(range(256), k=rng.randint(1, 200)) for _ in range(count)]
        llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    for count in range(1, 65):  # every padded batch size once: a graph and its buffers stay
        wave(count)
    before = wave(200)
    after = max(wave(400) for _ in range(4))
    assert after - before < 4 * 2**20
    llm.check_books()


def test_a_run_goes_on_over_changes_of_split(folder, prompts):
    """Same tokens, and nothing lost once every split has its contexts and graphs."""
    options = {"enabled": True, "compress_ratio": 0.25, "main_ratio": 0.75, "main_stream": True}
    llm, want = run(folder, prompts, 60, partition=options)
    ids = [llm.add_request(p, SamplingParams(max_tokens=60, ignore_eos=True)) for p in prompts]
    done, free = {}, []
    for compress in [0.125, 0.25, 0.5] * 1000:
        if not llm.has_unfinished():
            break
        llm.use_split(compress, 1 - compress)
        free.append(torch.cuda.mem_get_info()[0])
        done.update((output.request_id, output.token_ids) for output in llm.step())
    assert [done[each] for each in ids] == want
    assert min(free[len(free) // 2 :]) == free[len(free) // 2]
    llm.check_books()
