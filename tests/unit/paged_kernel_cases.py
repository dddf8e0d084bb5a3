"""What test_compression_kernels.py runs under the interpreter: contexts compressed out of their pages.

Triton's way (keys gathered, kept entries copied from page to page) against torch's, for methods of every need, and
against the same contexts compressed out of a step's packed keys and values. Methods that watch all queries have no
other way than that one: there layers at once against layer by layer.
"""

from __future__ import annotations

import dataclasses

import kernel_cases  # makes the interpreter take a loop's bound from newer numpy
import numpy as np
import torch

from fastcache.compression import (
    expected_attention_triton,
    kernels,
    observe,
    observe_triton,
    repack,
    repack_heads_triton,
    repack_triton,
)
from fastcache.compression import layer as by_layer
from fastcache.compression.layer import LayerCompressor
from fastcache.compression.registry import create
from fastcache.compression.work import Computed, Packed, Rotation, Work, page_tables
from fastcache.config import CompressionConfig
from fastcache.kvcache import gather_triton, pool
from fastcache.kvcache.head_layout import HeadLayout, HeadRows, upload_layouts
from fastcache.kvcache.pool import KVPool, KVShape
from fastcache.models.config import RopeConfig
from fastcache.models.rope import inverse_frequencies, rotary_table

CPU, LAYERS, PAGE = torch.device("cpu"), 2, 4
# What each needs: nothing, keys, keys and window queries (of 8 and of 1), replay scores; values too, below.
METHODS = {"streaming_llm": {}, "knorm": {}, "keydiff": {}, "snapkv": {"window": 8}, "tova": {}, "kvzip": {}}
# The shortest is one longer than snapkv's window; others end on a page, and one entry behind it.
LENGTHS, KEPT = [9, 40, 37, 33], [8, 11, 8, 20]


def filled(kv_heads, size, pages=120, dtype=torch.float32, stored=None):
    made = KVPool(KVShape(LAYERS, kv_heads, size, dtype, stored), pages, PAGE, CPU)
    for x in (made.keys, made.values):
        x.copy_(torch.randn(x.shape))
    return made


def twin(of):
    made = KVPool(of.shape, of.num_pages, of.page_size, CPU)
    made.keys.copy_(of.keys)
    made.values.copy_(of.values)
    return made


def tables(counts, seed=0):
    """Page tables of sequences that own `counts` pages, no page twice, in no order."""
    numbers = iter((1 + np.random.default_rng(seed).permutation(sum(counts))).tolist())
    return page_tables([[next(numbers) for _ in range(count)] for count in counts])


def equal(one, other):
    """Whatever two pools hold beyond the scratch page, bit by bit."""
    pairs = ((one.keys, other.keys), (one.values, other.values))
    return all(torch.equal(a[:, 1:].view(torch.uint8), b[:, 1:].view(torch.uint8)) for a, b in pairs)


def gather():
    for stored, dtype, size in ((torch.float32, torch.float32, 24), (torch.float16, torch.float32, 16)):
        made = filled(3, size, dtype=dtype, stored=stored)
        table = torch.from_numpy(tables([30, 2, 17]))
        for length in (1, 68, 117):
            for pages in (made.keys[1], made.values[0]):
                want = pool.gather_pages(pages, table, length, dtype)
                assert torch.equal(gather_triton.gather_pages(pages, table, length, dtype), want)


def repack_between_pages():
    for size, stored in ((24, torch.float32), (16, torch.float16), (16, torch.float8_e4m3fn)):
        slow = filled(3, size, stored=stored)
        fast, counts = twin(slow), [30, 2, 17, 8, 2, 1]
        every = torch.from_numpy(tables(counts))
        table, fresh = every[:3], every[3:, :8].contiguous()
        kept = torch.full((3, 3, 29), -1)
        for row, (length, budget) in enumerate(((118, 29), (7, 5), (66, 3))):
            for head in range(3):
                kept[row, head, :budget] = torch.randperm(length)[:budget].sort().values
        repack.repack_pages(slow, 1, table, kept, fresh)
        repack_triton.repack_pages(fast, 1, table, kept, fresh)
        assert equal(slow, fast)
        read = pool.gather_pages(slow.keys[1], table, 118, torch.float32)
        moved = pool.gather_pages(slow.keys[1], fresh, 29, torch.float32)
        assert torch.equal(moved[0, 2], read[0, 2, kept[0, 2]])


def repack_ragged_between_pages():
    rng, slow = np.random.default_rng(1), filled(2, 16)
    fast, layouts = twin(slow), [HeadLayout(rng.integers(1, n, (LAYERS, 2)), PAGE) for n in (60, 5, 30)]
    every = torch.from_numpy(tables([18, 9, 12] + [layout.pages(0) for layout in layouts]))
    table, fresh, packed = every[:3], every[3:], upload_layouts(layouts, CPU)
    for layer in range(LAYERS):
        counts = np.stack([layout.kept[layer] for layout in layouts])
        kept = torch.full((3, 2, int(counts.max())), -1)
        for row, head in np.ndindex(3, 2):
            chosen = np.sort(rng.permutation((70, 33, 45)[row])[: counts[row, head]])
            kept[row, head, : len(chosen)] = torch.from_numpy(chosen)
        heads = HeadRows(packed, layer, 2)
        repack.repack_heads_pages(slow, heads, table, kept, fresh)
        repack_heads_triton.repack_heads_pages(fast, heads, table, kept, fresh)
    assert equal(slow, fast)


def compressors(method, stored):
    """The same pool twice, and who compresses it by torch and by Triton."""
    slow, fast = stored, twin(stored)
    fast._gather = gather_triton.gather_pages
    made = [LayerCompressor(method, each, LAYERS, None) for each in (slow, fast)]
    made[1].kernels = kernels.triton_kernels()
    return made


def compress(method, group, kv_heads=2, size=16):
    owned = [-(-n // PAGE) for n in LENGTHS]
    every = tables(owned + [-(-n // PAGE) for n in KEPT])
    fresh = every[len(owned) :, : max(-(-n // PAGE) for n in KEPT)]
    work = Work.of(every[: len(owned)], fresh, LENGTHS, KEPT, None, CPU, [None] * len(owned))
    slow, fast = compressors(method, filled(kv_heads, size))
    queries = torch.randn(len(owned), kv_heads * group, method.window, size)
    replayed = torch.rand(len(owned), kv_heads, max(LENGTHS))
    if "replay_scores" not in method.needs:
        at_once(method, work, queries, slow.pool)
    for layer in range(LAYERS):
        before = fast.pool.gather(layer, work.table, max(LENGTHS))
        for each in (slow, fast):
            each.stored(layer, work, queries, replayed)
        assert equal(slow.pool, fast.pool), method.name
        if "replay_scores" not in method.needs:
            assert equal(packed(method, work, layer, before, queries, fast), fast.pool), method.name


def at_once(method, work, queries, stored):
    """All layers in one launch, or one in each of several, are what they are when told one by one."""
    want = LayerCompressor(method, twin(stored), LAYERS, None)
    for layer in range(LAYERS):
        want.stored(layer, work, queries)
    of_all = [queries.transpose(1, 2)] * LAYERS if method.window else []
    whole, of_one = by_layer.BYTES_AT_ONCE, len(LENGTHS) * max(LENGTHS) * stored.shape.layer_bytes // 2
    for by_layer.BYTES_AT_ONCE in (of_one, whole):
        for each in compressors(method, twin(stored)):
            each.stored_all(work, of_all)
            assert equal(want.pool, each.pool), method.name
    starts = np.cumsum([0, *LENGTHS[:-1]])
    where, steps = Packed.of(starts, np.array(LENGTHS), CPU), []
    for layer in range(LAYERS):
        pair = stored.gather(layer, work.table, max(LENGTHS))
        k, v = (torch.cat([x[row, :, :n].transpose(0, 1) for row, n in enumerate(LENGTHS)]) for x in pair)
        steps.append(Computed(queries, k, v, None))
    one, *many = (each for _ in range(2) for each in compressors(method, twin(stored)))
    for layer, step in enumerate(steps):
        one.packed(layer, work, where, step, queries)
    for each in many:
        each.packed_all(range(LAYERS), work, where, steps, of_all)
        for row, budget in enumerate(KEPT):  # the rest of a last page is nobody's
            page, used = int(work.fresh[row, (budget - 1) // PAGE]), (budget - 1) % PAGE + 1
            for x, y in ((each.pool.keys, one.pool.keys), (each.pool.values, one.pool.values)):
                x[:, page, :, used:] = y[:, page, :, used:]
        assert equal(one.pool, each.pool), method.name


def packed(method, work, layer, stored, queries, fast):
    """A pool in which the same contexts were compressed out of packed keys and values."""
    k, v = (torch.cat([x[row, :, :n].transpose(0, 1) for row, n in enumerate(LENGTHS)]) for x in stored)
    starts = np.cumsum([0, *LENGTHS[:-1]])
    other = twin(fast.pool)
    for x in (other.keys, other.values):  # what it must bring there itself
        x[layer, work.fresh[work.fresh > 0].long()] = 0
    written = LayerCompressor(method, other, LAYERS, None)
    written.kernels = fast.kernels
    where = Packed.of(starts, np.array(LENGTHS), CPU)
    written.packed(layer, work, where, Computed(queries, k, v, None), queries)
    for row, budget in enumerate(KEPT):  # the rest of a last page is nobody's
        page, used = int(work.fresh[row, (budget - 1) // PAGE]), (budget - 1) % PAGE + 1
        for x, y in ((other.keys, fast.pool.keys), (other.values, fast.pool.values)):
            x[layer, page, :, used:] = y[layer, page, :, used:]
    return other


def watching(name, lengths, given, heads=6, kv_heads=2, size=16):
    """All layers of a step at once, or in parts, keep the sets that each keeps alone. given: softmax statistics."""
    rope, before, kept = RopeConfig(1e4), 3, [n // 3 + 5 for n in lengths]  # rows of others come first
    rotation = Rotation(rotary_table(rope, size, 200, CPU), inverse_frequencies(rope, size))
    method, rows = create(CompressionConfig(method=name)), before + sum(lengths)
    fresh = tables([-(-n // PAGE) for n in kept])
    work = Work.of(
        np.zeros((len(lengths), 1), np.int32), fresh, lengths, kept, None, CPU, [None] * len(lengths)
    )
    where = Packed.of(before + np.cumsum([0, *lengths[:-1]]), np.array(lengths), CPU)
    steps = []
    for _ in range(LAYERS):
        q, k, v = torch.randn(rows, heads + 2 * kv_heads, size).split([heads, kv_heads, kv_heads], dim=1)
        lse = torch.rand(rows, heads) if given else None  # whatever it is, a layer must get its own
        steps.append(Computed(q, k, v, lse))
    for fast in (False, True):
        one, whole, apart = (
            LayerCompressor(
                method, KVPool(KVShape(LAYERS, kv_heads, size, q.dtype), 60, PAGE, CPU), LAYERS, rotation
            )
            for _ in range(3)
        )
        for each in (one, whole, apart):
            each.kernels = kernels.triton_kernels() if fast else kernels.TORCH
        for layer, step in enumerate(steps):
            one.packed(layer, work, where, step, None)
            apart.packed_all(range(layer, layer + 1), work, where, [step], [])
        whole.packed_all(range(LAYERS), work, where, steps, [])
        for each in (whole, apart):
            for row, budget in enumerate(kept):
                for x, y in ((each.pool.keys, one.pool.keys), (each.pool.values, one.pool.values)):
                    read = [
                        z[:, work.fresh[row].long()].transpose(1, 2).flatten(2, 3)[:, :, :budget]
                        for z in (x, y)
                    ]
                    assert read[1].any() and torch.equal(*read), (name, fast)


def as_many_wait_as_memory_allows():
    """What a layer computes, what is read of it in a row and padded, and what the method makes of it."""
    lengths, heads, kv_heads, size = [40, 30], 6, 2, 16
    stored = KVPool(KVShape(LAYERS, kv_heads, size, torch.float32), 30, PAGE, CPU)
    work = Work.of(*np.zeros((2, 2, 1), np.int32), lengths, [9, 9], None, CPU, [None, None])
    step = Computed(torch.empty(70, heads, size), *torch.empty(2, 70, kv_heads, size), torch.empty(70, heads))
    _, cov = observe.query_statistics(
        torch.zeros(2, heads, 40, size), work.lengths, torch.zeros(40, 2, size // 2), 4
    )
    extra = {
        "knorm": 0,
        "expected_attention": 2 * cov.nbytes,
        "h2o": 2 * torch.empty(2, heads, 40, 40).nbytes,
    }
    for name, bytes_more in extra.items():
        made = LayerCompressor(create(CompressionConfig(method=name)), stored, LAYERS, None)
        read = (step.k, step.v) if name == "knorm" else step.tensors
        each = (
            sum(x.nbytes for x in step.tensors) + sum(x.nbytes + 80 * x[0].nbytes for x in read) + bytes_more
        )
        whole = by_layer.WAITING_BYTES
        for by_layer.WAITING_BYTES, count in ((5 * each, 5), (5 * each - 1, 4), (each // 2, 1)):
            assert made.waiting(work, step) == count, name
        by_layer.WAITING_BYTES = whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueNorm(kernel_cases.base.EvictionMethod):
    """No method in the registry that can be read back from pages needs values; this one does."""

    name = "value_norm"
    needs = frozenset({"values"})

    def importance(self, kv):
        return kv.values.norm(dim=-1)


if __name__ == "__main__":
    torch.manual_seed(0)
    gather()
    repack_between_pages()
    repack_ragged_between_pages()
    for number, (name, params) in enumerate(METHODS.items()):
        compress(create(CompressionConfig(method=name, params=params)), (1, 3, 4)[number % 3])
    for group in (1, 3):
        compress(create(CompressionConfig(method="snapkv", params={"window": 8})), group)
    compress(ValueNorm(), 1)
    expected_attention_triton.PROGRAMS = observe_triton.PROGRAMS = (
        24  # two to a head, or one where layers merge
    )
    watching("expected_attention", [33, 33], given=False)
    watching("expected_attention_eps", [40, 31], given=False)
    watching("h2o", [40, 31], given=True)
    watching("observed_attention", [33, 33], given=False)
    as_many_wait_as_memory_allows()
