"""Attention that writes where it is told to: what it returns otherwise, in those rows and in no others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcache import SamplingParams
from fastcache.attention.base import HeadShape
from fastcache.attention.ragged import RaggedAttention
from fastcache.attention.torch_sdpa import TorchSDPA
from fastcache.core import Chunk, Request, Sequence, Step
from fastcache.engine.batch import BatchBuilder, to_device
from fastcache.kvcache.head_layout import HeadLayout, LayoutTable
from fastcache.kvcache.pool import KVPool, KVShape

CPU, PAGE, HEADS = torch.device("cpu"), 4, HeadShape(4, 2, 16)
# Stored entries and new tokens of each sequence, and how many of the last ones decode.
STEPS = {
    "prefill": ([0, 0], [9, 5], 0),
    "continued": ([6, 3], [4, 7], 0),
    "both": ([6, 0], [4, 7], 0),
    "mixed": ([6, 0, 11, 3], [4, 7, 1, 1], 2),
}


def batch_of(kv_starts, lengths, decode_rows, layout_of=None):
    pages, chunks = iter(range(1, 60)), []
    for seat, (start, length) in enumerate(zip(kv_starts, lengths, strict=True)):
        seq = Sequence(Request(str(seat), (1,) * (start + length), SamplingParams(), 0.0), seat=seat)
        seq.pages = [next(pages) for _ in range(-(-(start + length) // PAGE) + 2)]
        chunks.append(Chunk(seq, start, start, length, sample=True))
    builder = BatchBuilder(4, 16, PAGE, layout_of)
    step = Step(tuple(chunks), decode=False, decode_rows=decode_rows)
    return to_device(builder.build(step), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["plain", "no layouts", "some layouts", "layouts"])
def test_attention_writes_where_it_is_told_to(step, kind):
    pool = KVPool(KVShape(1, HEADS.kv_heads, HEADS.head_dim, torch.float32), 60, PAGE, CPU)
    for tensor in (pool.keys, pool.values):
        tensor.normal_()
    backend = TorchSDPA(pool, HEADS)
    layout = HeadLayout(np.array([[3, 2]]), PAGE)
    ragged = {"no layouts": (), "some layouts": (0,), "layouts": (0, 1, 2, 3)}.get(kind, ())
    if kind != "plain":
        backend = RaggedAttention(backend, LayoutTable(pool, 4))
    starts = STEPS[step][0]
    which = [seat for seat in ragged if seat < len(starts) and starts[seat] >= layout.longest]
    batch = batch_of(*STEPS[step], lambda seq: layout if seq.seat in which else None)
    total = len(batch.input_ids)
    q, k, v = torch.randn(total, 8, 16).split([4, 2, 2], dim=1)
    backend.plan(batch)
    backend.store(0, k, v, batch.slot_mapping)
    want = backend.run(0, q, k, v)
    assert want.is_contiguous() and want.shape == q.shape
    room = torch.full((total + 3, *q.shape[1:]), torch.nan)
    out = room[1 : total + 1]
    assert backend.run(0, q, k, v, out) is out
    assert torch.equal(out, want)
    assert room[0].isnan().all() and room[total + 1 :].isnan().all()
