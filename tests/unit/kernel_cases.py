"""What test_compression_kernels.py runs under Triton's interpreter, in a process of its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from compression_cases import random_layer
from triton.runtime import interpreter

from fastcache.compression import (
    base,
    expected_attention_triton,
    keydiff_triton,
    observe,
    observe_triton,
    repack_triton,
    select_triton,
    window_triton,
)
from fastcache.compression.registry import create
from fastcache.compression.repack import repack_packed
from fastcache.config import CompressionConfig
from fastcache.kvcache.pool import KVPool, KVShape
from fastcache.models.argmax_triton import argmax
from fastcache.models.config import RopeConfig
from fastcache.models.product_triton import product, whole_turns
from fastcache.models.rope import rotary_table

patch_tensor = interpreter._patch_lang_tensor


def patch_with_index(tensor, scope):
    """A loop's bound is an array of one number here, which newer numpy does not take for an index."""
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patch_with_index


def select():
    for longest, values in ((37, 3), (300, 1000)):
        scores = torch.randint(-values, values, (3, 4, longest)).float() / 7
        scores[0, 0, :5], scores[1, 1, 3:9], scores[2, 2, :7] = torch.nan, torch.inf, -torch.inf
        scores[0, 1, 1] = -0.0
        lengths = torch.tensor([longest, longest // 2, longest - 3])
        budgets = torch.tensor([[3, 5, 7, longest // 2], [1, 2, longest // 4, 9], [longest, 4, 4, 4]])
        for some, kept in ((scores, budgets), (scores[:, :1].expand_as(scores), budgets[:, 0])):
            assert torch.equal(select_triton.select(some, lengths, kept), base.select(some, lengths, kept))


def fast_scores(names, fast, tolerance):
    for name in names:
        method = create(CompressionConfig(method=name))
        for heads, kv_heads, size in ((4, 4, 32), (6, 2, 24)):
            kv = random_layer(method, [130, 90, 75], [80, 70, 66], heads, kv_heads, size)
            want, got = method.score(kv), method.score(kv, fast[name])
            finite = want.isfinite()
            assert torch.equal(finite, got.isfinite()), name
            error = (want - got)[finite].abs().max() / want[finite].abs().max()
            assert error < tolerance, (name, error)


def window():
    fast_scores(("snapkv", "tova"), {"snapkv": window_triton.snapkv, "tova": window_triton.tova}, 1e-5)


def keydiff():
    fast_scores(("keydiff",), {"keydiff": keydiff_triton.keydiff}, 1e-5)


def expected():
    names = ("expected_attention", "expected_attention_eps")
    fast_scores(names, dict.fromkeys(names, expected_attention_triton.expected_attention), 1e-5)
    half_precision(names)


def half_precision(names):
    """16-bit keys: the covariance is rounded to their type, and 98 % of what the reference keeps stays. The interpreter
    multiplies no bfloat16."""
    for name in names:
        method = create(CompressionConfig(method=name))
        kv = random_layer(method, [400, 333], [80, 66], 6, 2, 32)
        kv = replace(kv, keys=kv.keys.half(), values=kv.values.half())
        want = base.select(method.score(kv), kv.lengths, kv.budgets).flatten(0, 1).tolist()
        fast = method.score(kv, expected_attention_triton.expected_attention)
        got = base.select(fast, kv.lengths, kv.budgets).flatten(0, 1).tolist()
        for one, other in zip(got, want, strict=True):
            assert len(set(one) & set(other)) >= 0.98 * len(set(other)), name


def observe_all():
    for heads, kv_heads, size in ((4, 2, 16), (6, 2, 24)):
        lengths = torch.tensor([45, 70, 33])
        qkv = torch.randn(3, 70, heads + 2 * kv_heads, size).transpose(1, 2)
        queries, keys = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
        want = observe.attention_mass(queries, keys, lengths)
        got = observe_triton.attention_mass(queries, keys, lengths)
        valid = (torch.arange(70) < lengths[:, None])[:, None].expand_as(want)
        assert torch.allclose(got[valid], want[valid], rtol=1e-4, atol=1e-5)
        table = rotary_table(RopeConfig(1e4), size, 200, torch.device("cpu"))
        want = observe.query_statistics(queries, lengths, table, 4)
        got = observe_triton.query_statistics(queries, lengths, table, 4)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


def repack():
    fast, slow = (KVPool(KVShape(1, 2, 24, torch.float32), 30, 4, torch.device("cpu")) for _ in "ab")
    qkv = torch.randn(60, 8, 24)
    k, v = qkv[:, 4:6], qkv[:, 6:8]
    kept = base.select(torch.randn(2, 2, 30), torch.tensor([30, 25]), torch.tensor([[9, 7], [5, 5]]))
    starts, fresh = torch.tensor([3, 33]), torch.tensor([[1, 2, 3], [4, 5, 0]], dtype=torch.int32)
    repack_packed(slow, 0, k, v, starts, kept, fresh)
    repack_triton.repack_packed(fast.keys[0], fast.values[0], k, v, starts, kept, fresh)
    for row, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        count, table = int((kept[row, head] >= 0).sum()), fresh[row].long()
        for one, other in ((fast.keys, slow.keys), (fast.values, slow.values)):
            entries = [x[0][table, head].flatten(0, 1)[:count] for x in (one, other)]
            assert torch.equal(*entries)


def first_of_the_largest():
    for rows, size in ((2, 5), (3, 2049), (2, 70_000)):
        logits = torch.randint(-50, 50, (rows, size)).float()  # many are equal
        assert argmax(logits).tolist() == logits.numpy().argmax(-1).tolist()
    assert argmax(torch.full((1, 9), -torch.inf)).tolist() == [0]


def few_rows():
    """Products with the edges of their tiles: fewer rows than a tile."""
    for rows, columns in ((64, 64), (37, 192)):
        x, weight = torch.randn(rows, 256).half(), (torch.randn(columns, 256) / 16).half()
        want = x.float() @ weight.float().t()
        assert torch.allclose(product(x, weight).float(), want, atol=5e-3)


def whole_turns_alone():
    """132 processors: 384 blocks nearly fill three turns; 64 and 96 leave many idle in one."""
    assert [whole_turns(n, 132) for n in (24576, 4096, 6144, 4100)] == [True, False, False, False]


if __name__ == "__main__":
    torch.manual_seed(0)
    expected_attention_triton.PROGRAMS = observe_triton.PROGRAMS = 40  # two or three to a head
    for case in (
        select,
        window,
        keydiff,
        expected,
        observe_all,
        repack,
        first_of_the_largest,
        few_rows,
        whole_turns_alone,
    ):
        case()
