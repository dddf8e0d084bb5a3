"""`base.select` as one Triton program per sequence and KV head: the row stays in registers, nothing is sorted.

The cut, which is the lowest score that still stays, is found bit by bit in the integers that float32 scores map to
in the same order: 32 counts over the row. What ties at the cut stays from the left, as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.compression import base

# The longest row that one program holds: 64 scores in each of 512 threads.
MAX_LENGTH = 32_768


@triton.jit(do_not_specialize=["score_batch", "score_head", "budget_batch", "budget_head", "max_budget"])
def _select_kernel(
    scores_ptr,
    lengths_ptr,
    budgets_ptr,
    out_ptr,
    heads,
    score_batch,
    score_head,
    score_entry,
    budget_batch,
    budget_head,
    max_budget,
    BLOCK: tl.constexpr,
):
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    position = tl.arange(0, BLOCK)
    length = tl.load(lengths_ptr + batch)
    wanted = tl.load(budgets_ptr + batch * budget_batch + head * budget_head)
    wanted = tl.maximum(tl.minimum(tl.minimum(wanted, length), max_budget), 1).to(tl.int32)
    valid = position < length
    row = scores_ptr + batch.to(tl.int64) * score_batch + head.to(tl.int64) * score_head
    score = tl.load(row + position.to(tl.int64) * score_entry, mask=valid, other=0.0)
    score = tl.where(score != score, float("-inf"), score)
    score = tl.where(score == 0.0, 0.0, score)  # minus zero ties with zero
    bits = score.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(valid, order, -2147483648)  # below minus infinity

    enough = tl.sum((order >= 0).to(tl.int32), axis=0) >= wanted
    cut = tl.where(enough, 0, -2147483648)
    for i in range(31):
        higher = cut + (1 << (30 - i))
        cut = tl.where(tl.sum((order >= higher).to(tl.int32), axis=0) >= wanted, higher, cut)
    above = order > cut
    level = ((order == cut) & valid).to(tl.int32)
    missing = wanted - tl.sum(above.to(tl.int32), axis=0)
    kept = above | ((level > 0) & (tl.cumsum(level, axis=0) <= missing))
    rank = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    out = out_ptr + tl.program_id(0).to(tl.int64) * max_budget
    tl.store(out + rank, position.to(tl.int64), mask=kept)
    tl.store(
        out + position,
        tl.full((BLOCK,), -1, tl.int64),
        mask=(position >= wanted) & (position < max_budget),
    )


def select(scores: Tensor, lengths: Tensor, budgets: Tensor, max_budget: int | None = None) -> Tensor:
    """As `base.select`, for float32 scores of any strides; rows beyond `MAX_LENGTH` take the reference's way."""
    batch, heads, padded = scores.shape
    if padded > MAX_LENGTH:
        return base.select(scores, lengths, budgets, max_budget)
    max_budget = int(budgets.max()) if max_budget is None else max_budget
    assert 1 <= max_budget <= padded, f"cannot keep {max_budget} of {padded} entries"
    budgets = budgets.reshape(batch, -1).expand(batch, heads)
    out = torch.empty((batch, heads, max_budget), dtype=torch.int64, device=scores.device)
    block = triton.next_power_of_2(padded)
    _select_kernel[(batch * heads,)](
        scores.float(),
        lengths,
        budgets,
        out,
        heads,
        *scores.stride(),
        *budgets.stride(),
        max_budget,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
    return out
