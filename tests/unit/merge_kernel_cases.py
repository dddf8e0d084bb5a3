"""What test_compression_kernels.py runs under Triton's interpreter: merging into pages, beside the reference."""

from __future__ import annotations

import kernel_cases  # noqa: F401  (prepares the interpreter)
import torch

from fastcache.compression import merge_triton
from fastcache.compression.merge import MergeLayout, make_plan, merge_layer
from fastcache.kvcache.pool import KVPool, KVShape
from fastcache.models.config import RopeConfig
from fastcache.models.rope import rotary_table

CPU, HEADS = torch.device("cpu"), 3


def networks(layout, size, width, kinds):
    """Half-precision weights of the size that keeps sums near one."""

    def one():
        shapes = ((width, layout.factor * size), (width, width), (size, width))
        return tuple(
            part.half()
            for rows, columns in shapes
            for part in (torch.randn(rows, columns) / columns**0.5, torch.randn(rows))
        )

    return {kind: one() for kind in kinds}


def merged(layout, size, width, dtype=torch.float16):
    """A ragged batch with images, a slice of a merged projection, against the reference in float32."""
    lengths, spans = [150, 61, 90], [((20, 31), (60, 13)), (), ((0, 90),)]
    projection = torch.randn(3, 160, 3 * HEADS, size).half()
    keys, values = (projection[:, :, i * HEADS :][:, :, :HEADS].transpose(1, 2) for i in (1, 2))
    table = rotary_table(RopeConfig(1e4), size, 200, CPU)
    nets = networks(layout, size, width, ("tk", "tv", "ik", "iv"))
    plan = make_plan(lengths, spans, layout, CPU)
    wide = {kind: tuple(part.float() for part in net) for kind, net in nets.items()}
    want = merge_layer(keys.float(), values.float(), plan, wide, layout, table)
    pool = KVPool(KVShape(1, HEADS, size, torch.float16, dtype), 60, 4, CPU)
    pages = -(-max(plan.lengths) // 4)
    fresh = torch.zeros(3, pages + 1, dtype=torch.int32)
    for row, count in enumerate(plan.lengths):
        own = -(-count // 4)
        fresh[row, :own] = 1 + row * pages + torch.randperm(own)
    merge_triton.merge_into_pages(
        keys, values, plan, nets, layout, table, (pool.keys[0], pool.values[0]), fresh
    )
    for got, expected in zip(pool.gather(0, fresh, max(plan.lengths)), want, strict=True):
        for row, count in enumerate(plan.lengths):
            error = (got[row, :, :count].float() - expected[row, :, :count]).abs().max()
            assert error < 5e-3 * expected[row].abs().max(), (layout, size, width, row, error)
    assert not pool.keys[0, 0].any() and not pool.keys[0, 3 * pages + 1 :].any()  # nobody's pages


if __name__ == "__main__":
    torch.manual_seed(0)
    merged(MergeLayout(5, n_sink=4, recent=7, unrotated=True, base="mean"), 32, 40)
    merged(MergeLayout(4), 48, 16)
