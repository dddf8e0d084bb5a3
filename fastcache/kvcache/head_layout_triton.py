"""Where an entry of a head is, for Triton kernels: `head_layout.entry_rows` in their words."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pool_rows(
    layout,
    table,
    head,
    entry,
    inside,
    pages,
    LAYERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Rows of the pool for `entry` of `head` (counted over all layers): `head_layout.entry_rows`, int64."""
    HEADS: tl.constexpr = LAYERS * KV_HEADS
    kept_units = (tl.load(layout + head) + PAGE - 1) // PAGE
    first, rank = tl.load(layout + HEADS + head), tl.load(layout + 2 * HEADS + head)
    block = entry // PAGE
    grown = tl.load(layout + 3 * HEADS) + (block - kept_units) * HEADS + rank
    unit = tl.where(block < kept_units, first + block, grown)
    page = tl.load(table + unit // HEADS, mask=inside, other=0)
    place = unit % HEADS
    row = ((place // KV_HEADS).to(tl.int64) * pages + page) * KV_HEADS + place % KV_HEADS
    return row * PAGE + entry % PAGE
