"""Compression on the GPU against the torch reference: kernels, the two ways through the engine, and memory."""

from __future__ import annotations

import pytest
import torch

from fastcache import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def kernels():
    from fastcache.compression.kernels import kernels_for

    made = kernels_for(CUDA)
    assert made.name == "triton"
    return made


@pytest.mark.parametrize("longest", [5, 97, 1024, 3968, 20_000])
@pytest.mark.parametrize("values", [4, 1_000_000])
def test_select_keeps_the_reference_s_sets(longest, values):
    from fastcache.compression import base

    generator = torch.Generator("cuda").manual_seed(longest)
    scores = torch.randint(-values, values, (4, 8, longest), generator=generator, device=CUDA) / 7
    scores[0, 0, : longest // 3] = torch.inf
    scores[1, 1, : longest // 2] = -torch.inf
    scores[2, 2, ::3] = torch.nan
    lengths = torch.tensor([longest, longest // 2 + 1, longest, longest // 3 + 1], device=CUDA)
    budgets = torch.randint(1, longest + 1, (4, 8), generator=generator, device=CUDA)
    want = base.select(scores, lengths, budgets, longest)
    assert torch.equal(kernels().select(scores, lengths, budgets, longest), want)
    shared = scores[:, :1].expand(4, 8, longest)
    want = base.select(shared, lengths, budgets[:, 0], longest)
    assert torch.equal(kernels().select(shared, lengths, budgets[:, 0], longest), want)


def layer_of(method, dtype, lengths, ratio, heads=8, kv_heads=2, size=128):
    """A layer of one step: keys and values are slices of a merged projection, queries are rows of it."""
    from fastcache.compression.base import LayerKV, budget

    torch.manual_seed(0)
    longest = max(lengths)
    qkv = torch.randn(len(lengths) * longest, heads + 2 * kv_heads, size, device=CUDA)
    qkv[:, heads : heads + kv_heads] += torch.randn(kv_heads, size, device=CUDA)  # keys share a direction
    qkv = qkv.to(dtype).unflatten(0, (len(lengths), longest))
    keys, values = (qkv[:, :, heads + i * kv_heads :][:, :, :kv_heads].transpose(1, 2) for i in (0, 1))
    window = torch.stack([qkv[i, n - method.window : n, :heads] for i, n in enumerate(lengths)])
    return LayerKV(
        layer=1,
        num_layers=2,
        keys=keys,
        values=values,
        lengths=torch.tensor(lengths, device=CUDA),
        budgets=torch.tensor([budget(n, ratio) for n in lengths], device=CUDA),
        window_queries=window.transpose(1, 2) if method.window else None,
    )


FAST = ["keydiff", "snapkv", "tova"]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1024, 1024], [1500, 333, 900]])
def test_fast_scores_keep_the_reference_s_sets(name, dtype, lengths):
    """In float32 everything but what ties at the cut; in bfloat16 98 %, against the same numbers in float32."""
    from dataclasses import replace

    from fastcache.compression import base
    from fastcache.compression.registry import create
    from fastcache.config import CompressionConfig

    method = create(CompressionConfig(method=name))
    kv = layer_of(method, dtype, lengths, 0.8)
    wide = {
        n: getattr(kv, n).float() for n in ("keys", "values", "window_queries") if getattr(kv, n) is not None
    }
    scores = method.score(replace(kv, **wide))
    want = base.select(scores, kv.lengths, kv.budgets, int(kv.budgets.max()))
    fast = kernels().score(method, kv)
    got = base.select(fast, kv.lengths, kv.budgets, int(kv.budgets.max()))
    for row_scores, row_want, row_got in zip(
        scores.flatten(0, 1), want.flatten(0, 1), got.flatten(0, 1), strict=True
    ):
        one, other = set(row_got.tolist()) - {-1}, set(row_want.tolist()) - {-1}
        assert len(one) == len(other)
        assert len(one & other) >= 0.98 * len(other)
        cut = row_scores[sorted(other)].min()
        for position in one ^ other:
            assert (row_scores[position] - cut).abs() <= 1e-3 * cut.abs() + 1e-9


def watched(dtype, heads=8, kv_heads=2, size=128, lengths=(700, 1000, 64)):
    """Queries (3, H, T, d) and keys (3, Hk, T, d) as slices of one projection, lengths, and a rotary table."""
    from fastcache.models.config import RopeConfig
    from fastcache.models.rope import rotary_table

    torch.manual_seed(3)
    longest = max(lengths)
    qkv = torch.randn(3, longest, heads + 2 * kv_heads, size, device=CUDA)
    qkv += torch.randn(heads + 2 * kv_heads, size, device=CUDA)
    qkv = qkv.to(dtype).transpose(1, 2)
    table = rotary_table(RopeConfig(1e6), size, 2048, CUDA)
    return qkv[:, :heads], qkv[:, heads : heads + kv_heads], torch.tensor(lengths, device=CUDA), table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_mass_equals_the_reference(dtype):
    from fastcache.compression import observe

    queries, keys, lengths, _ = watched(dtype)
    want = observe.attention_mass(queries, keys, lengths)
    got = kernels().attention_mass(queries, keys, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.allclose(got[row, :, :length], want[row, :, :length], rtol=2e-3, atol=1e-4)
        assert torch.allclose(got[row, :, :length].sum(-1), lengths[row].float().expand(8), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_query_statistics_equal_the_reference(dtype):
    from fastcache.compression import observe

    queries, _, lengths, table = watched(dtype)
    want = observe.query_statistics(queries, lengths, table, 4)
    got = kernels().query_statistics(queries, lengths, table, 4)
    for one, other in zip(got, want, strict=True):
        assert ((one - other).norm() / other.norm()).item() < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("name", ["expected_attention", "expected_attention_eps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expected_attention_equals_the_reference(name, dtype):
    """In float32 up to rounding; with 16-bit keys a covariance rounded to their type keeps 98 % of the sets."""
    from dataclasses import replace

    from fastcache.compression import base, observe
    from fastcache.compression.registry import create
    from fastcache.config import CompressionConfig

    method = create(CompressionConfig(method=name))
    queries, _, lengths, table = watched(dtype, lengths=(1000, 1000, 1000))
    kv = layer_of(method, dtype, lengths.tolist(), 0.8)
    mean, cov = observe.query_statistics(queries, lengths, table, 4)
    frequencies = 1e6 ** -(torch.arange(64, device=CUDA) / 64)
    kv = replace(kv, values=kv.keys.flip(-1), query_mean=mean, query_cov=cov, inv_freq=frequencies)
    want = method.score(replace(kv, keys=kv.keys.float(), values=kv.values.float()))
    got = kernels().score(method, kv)
    sets = [
        base.select(x, kv.lengths, kv.budgets, int(kv.budgets.max())).flatten(0, 1).tolist()
        for x in (got, want)
    ]
    for one, other in zip(*sets, strict=True):
        assert len(set(one) & set(other)) >= 0.98 * len(other)


def test_flashinfer_s_softmax_statistics_are_those_of_the_kernel(folder):
    """h2o in bfloat16 takes them from the backend: the mass it gets adds up to the number of queries."""
    llm = LLM(
        folder,
        device="cuda",
        dtype="bfloat16",
        num_pages=300,
        max_model_len=512,
        compression={"method": "h2o", "compression_ratio": 0.5},
    )
    layers, seen = llm._runner.compressor.layers, []
    measure = layers.kernels.attention_mass

    def spy(queries, keys, lengths, lse):
        assert lse is not None
        seen.append((measure(queries, keys, lengths, lse), measure(queries, keys, lengths)))
        return seen[-1][0]

    object.__setattr__(layers.kernels, "attention_mass", spy)
    prompts = [[(7 * i + j) % 256 for i in range(300)] for j in range(3)]
    llm.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True))
    assert seen
    for got, want in seen:
        assert torch.allclose(got, want, rtol=2e-2, atol=1e-3)
        assert torch.allclose(got.sum(-1), torch.full_like(got[..., 0], 300), rtol=1e-2)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
def test_repack_writes_what_the_reference_writes(stored):
    from fastcache.compression.repack import repack_packed
    from fastcache.kvcache.pool import KVPool, KVShape

    shape = KVShape(2, 4, 128, torch.bfloat16, stored)
    fast, slow = (KVPool(shape, 40, 16, CUDA) for _ in range(2))
    qkv = torch.randn(500, 16, 128, device=CUDA, dtype=torch.bfloat16)
    k, v = qkv[:, 8:12], qkv[:, 12:]
    budgets = torch.tensor([61, 100, 32], device=CUDA)
    lengths = torch.tensor([150, 200, 100], device=CUDA)
    kept = kernels().select(torch.randn(3, 4, 200, device=CUDA), lengths, budgets, 100)
    starts = torch.tensor([0, 200, 400], device=CUDA)
    fresh = torch.zeros(3, 7, dtype=torch.int32, device=CUDA)
    fresh[0, :4], fresh[1], fresh[2, :2] = torch.arange(1, 5), torch.arange(5, 12), torch.arange(12, 14)
    repack_packed(slow, 1, k, v, starts, kept, fresh)
    kernels().repack(fast.keys[1], fast.values[1], k, v, starts, kept, fresh)
    for row, budget in enumerate(budgets.tolist()):
        for one, other in ((fast.keys, slow.keys), (fast.values, slow.values)):
            table = fresh[row].long()
            pages = [x[1].float()[table].transpose(0, 1).flatten(1, 2)[:, :budget] for x in (one, other)]
            assert torch.equal(*pages)


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("qwen3", 8, 2, 128, 256, 3, False)


def tokens(folder, method, **options):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randperm(256, generator=generator)[:n].tolist() for n in (90, 200, 140, 200)]
    llm = LLM(
        folder,
        device="cuda",
        dtype="float32",
        num_pages=600,
        max_model_len=1024,
        compression={"method": method, "compression_ratio": 0.3},
        **options,
    )
    outputs = llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    llm.check_books()
    return [o.token_ids for o in outputs]


@pytest.mark.parametrize("method", ["snapkv", "knorm", "keydiff", "tova", "streaming_llm", "random"])
def test_direct_compression_gives_the_tokens_of_compression_out_of_pages(folder, method):
    """With a prefix cache whole pages are written; in chunks of 130 the longer contexts are read back from them."""
    want = tokens(folder, method)
    assert tokens(folder, method, enable_prefix_caching=True) == want
    assert tokens(folder, method, max_num_batched_tokens=130) == want


WATCHING = ["expected_attention", "expected_attention_eps", "h2o", "observed_attention"]


@pytest.mark.parametrize("method", [*WATCHING, "snapkv"])
def test_a_small_step_compressed_at_once_gives_the_tokens_of_layer_by_layer(folder, method, monkeypatch):
    """In one part, in parts of two layers, and without waiting. What watches all queries has no way out of pages."""
    from fastcache.compression import layer
    from fastcache.engine import compressor

    want = tokens(folder, method)
    assert tokens(folder, method, enable_prefix_caching=True) == want
    with monkeypatch.context() as patch:
        patch.setattr(layer.LayerCompressor, "waiting", lambda self, work, step: 2)
        assert tokens(folder, method) == want
    monkeypatch.setattr(compressor, "SMALL_STEP", 0)
    assert tokens(folder, method) == want


def small_step(name, dtype, layers, lengths=(1536, 900, 1100, 800), heads=32, kv_heads=8, size=128):
    """A compressor, its work, and a step of `layers` layers of Qwen3-8B whose first row is somebody else's."""
    import numpy as np

    from fastcache.compression.layer import LayerCompressor
    from fastcache.compression.registry import create
    from fastcache.compression.work import Computed, Packed, Rotation, Work, page_tables
    from fastcache.config import CompressionConfig
    from fastcache.kvcache.pool import KVPool, KVShape
    from fastcache.models.config import RopeConfig
    from fastcache.models.rope import inverse_frequencies, rotary_table

    torch.manual_seed(5)
    rope, kept = RopeConfig(1e6), [n // 5 for n in lengths]
    rotation = Rotation(rotary_table(rope, size, 2048, CUDA), inverse_frequencies(rope, size).to(CUDA))
    numbers = iter(range(1, 200))
    fresh = page_tables([[next(numbers) for _ in range(-(-n // 16))] for n in kept])
    made = LayerCompressor(
        create(CompressionConfig(method=name)),
        KVPool(KVShape(layers, kv_heads, size, dtype), 200, 16, CUDA),
        layers,
        rotation,
    )
    empty = np.zeros((len(lengths), 1), np.int32)
    work = Work.of(empty, fresh, lengths, kept, None, CUDA, [None] * len(lengths))
    where = Packed.of(1 + np.cumsum([0, *lengths[:-1]]), np.array(lengths), CUDA)
    steps = []
    for _ in range(layers):
        qkv = torch.randn(1 + sum(lengths), heads + 2 * kv_heads, size, device=CUDA)
        qkv += torch.randn(heads + 2 * kv_heads, size, device=CUDA)
        steps.append(Computed(*qkv.to(dtype).split([heads, kv_heads, kv_heads], dim=1), None))
    return made, work, where, steps


@pytest.mark.parametrize("name", WATCHING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_at_once_keep_what_each_keeps_within_the_memory_allowed(name, dtype, monkeypatch):
    """As many layers as may wait. A covariance is summed in fewer parts then: what ties at the cut may differ."""
    from fastcache.compression import layer

    made, work, where, steps = small_step(name, dtype, 6)
    layers = min(made.waiting(work, steps[0]), len(steps))
    assert layers >= 2
    found, original = [], layer.LayerCompressor._kept

    def noting(self, *given):
        heads, kept = original(self, *given)
        found.append(kept)
        return heads, kept

    monkeypatch.setattr(layer.LayerCompressor, "_kept", noting)
    for number, step in enumerate(steps[:layers]):
        made.packed(number, work, where, step, None)
    alone = torch.cat(found).flatten(0, 1).tolist()
    stored = made.pool.keys.clone(), made.pool.values.clone()
    found.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made.packed_all(range(layers), work, where, steps[:layers], [])
    held = sum(x.nbytes for step in steps[:layers] for x in step.tensors)
    assert torch.cuda.max_memory_allocated() - before + held <= 1.1 * layer.WAITING_BYTES
    together = found[0].flatten(0, 1).tolist()
    differ = sum(len(set(one) - set(other)) for one, other in zip(alone, together, strict=True))
    assert differ <= (
        1e-3 * layers * 8 * int(work.budgets.sum()) if "query_stats" in made.method.needs else 0
    )
    if not differ:
        for one, other in zip(stored, (made.pool.keys, made.pool.values), strict=True):
            table = work.fresh[:, : int(work.budgets.min()) // 16].long()  # pages that every context fills
            assert torch.equal(one[:layers, table], other[:layers, table])


@pytest.mark.parametrize("method", ["snapkv", "knorm"])
def test_flashinfer_compresses_mixed_steps(folder, method):
    """bfloat16, so flashinfer attends: questions behind compressed contexts beside contexts that start."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 256, (300,), generator=generator).tolist() for _ in range(6)]

    def run(**options):
        llm = LLM(
            folder,
            device="cuda",
            dtype="bfloat16",
            num_pages=300,
            max_model_len=512,
            max_num_batched_tokens=700,
            compression={"method": method, "compression_ratio": 0.5},
            **options,
        )
        for prompt in prompts:
            llm.add_request(prompt, SamplingParams(max_tokens=4, ignore_eos=True), context_len=280)
        done = []
        while llm.has_unfinished():
            done += llm.step()
        llm.check_books()
        return {o.request_id: o.token_ids for o in done}

    fast, slow = run(), run(attention_backend="torch-sdpa")
    agree = sum(a == b for r in fast for a, b in zip(fast[r], slow[r], strict=True))
    assert agree >= 0.8 * 4 * len(prompts)


@pytest.mark.parametrize("name", [*FAST, "knorm", "random", "streaming_llm", "h2o", "expected_attention"])
def test_two_layers_of_qwen3_8b_are_measured_within_the_memory_allowed(name):
    """At 8 x 3968 tokens in a step, factor 5: at most 2 GiB beside the step's own tensors."""
    from fastcache.compression.cost import measure
    from fastcache.compression.cost_inputs import StepShape
    from fastcache.compression.registry import create
    from fastcache.config import CompressionConfig
    from fastcache.device.ceilings import Ceilings

    shape = StepShape(2, 32, 8, 128, torch.bfloat16, context=3968, sequences=8, ratio=0.8)
    method = create(CompressionConfig(method=name))
    found = measure(method, shape, CUDA, Ceilings(3e12, 7e14, "bfloat16"))
    assert found.step_seconds > 0 and found.cost.extra_bytes <= 2 * 2**30


def test_a_compressed_prefill_holds_little_beside_the_pool(folder):
    """No page of a whole context is owned, and a step's extra memory is a small multiple of its keys and values."""
    llm = LLM(
        folder,
        device="cuda",
        dtype="bfloat16",
        num_pages=600,
        max_model_len=1024,
        compression={"method": "snapkv", "compression_ratio": 0.8},
    )
    prompts = [list(range(256)) * 3 for _ in range(8)]
    llm.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True))
    assert llm.stats().peak_pages <= 8 * -(-154 // 16)
