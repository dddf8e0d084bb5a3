"""flashinfer: paged decode, prefill with FA3 on Hopper and FA2 elsewhere (arXiv:2501.01005).

The only file that says "indptr". Prompts that start in this step attend their own packed keys and values;
chunks with stored entries before them read the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.attention.base import AttentionBackend, HeadShape, page_readers, split_mixed
from fastcache.core import ForwardBatch, HostBatch
from fastcache.errors import UnsupportedCombination
from fastcache.kvcache.pool import KVPool

# Layer, all of a step's q, k, v, and where the result goes: writes its own rows of it.
Part = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
Pages = tuple[np.ndarray, np.ndarray, np.ndarray]  # indptr, page numbers, entries in the last page

WORKSPACE_BYTES = 256 * 2**20
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
HOPPER = 9
# Queries that share a KV head form one tile of a matrix product. docs/performance.md has the step times of both.
TENSOR_CORES = True
ALL_ROWS = slice(None)


def unsupported(pool: KVPool, device: torch.device) -> str | None:
    """Why flashinfer cannot serve here, or None."""
    if device.type != "cuda":
        return "flashinfer needs a CUDA device"
    try:
        import flashinfer  # noqa: F401
    except ImportError as error:
        return f"flashinfer cannot be imported ({error}); pip install flashinfer-python"
    if pool.shape.dtype not in DTYPES:
        return f"flashinfer needs bfloat16 or float16, not {pool.shape.dtype}"
    if pool.shape.head_dim not in HEAD_DIMS:
        return f"flashinfer has no kernel for head size {pool.shape.head_dim}"
    return None


@dataclass
class _GraphDecode:
    """Decode of one batch size under a graph, which reads buffers that every plan fills anew."""

    wrapper: object
    last_page_len: Tensor
    planned: tuple[np.ndarray, np.ndarray] | None = None  # indptr and page numbers of the last plan
    part: Part | None = None  # what it planned


class FlashInfer(AttentionBackend):
    supports_graphs = True

    def __init__(self, pool: KVPool, heads: HeadShape) -> None:
        reason = unsupported(pool, pool.device)
        if reason is not None:
            raise UnsupportedCombination(f"attention backend 'flashinfer': {reason}.")
        super().__init__(pool, heads)
        import flashinfer

        self._lib = flashinfer
        prefill = "fa3" if torch.cuda.get_device_capability(pool.device)[0] == HOPPER else "fa2"
        self.name = f"flashinfer-{prefill}"
        # FA3 wants queries and entries of one type; FA2 reads 8-bit pages under 16-bit queries.
        from_pages = "fa2" if pool.shape.stored != pool.shape.dtype else prefill
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            self._workspace, "NHD", backend=prefill
        )
        self._paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, "HND", backend=from_pages
        )
        self._eager = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "HND", use_tensor_cores=TENSOR_CORES, backend="fa2"
        )
        self._entries = tuple(zip(pool.keys, pool.values, strict=True))  # pages by layer
        self._parts: tuple[Part, ...] = ()  # of the step that is planned
        self._graph: dict[int, _GraphDecode] = {}
        self._planned = torch.cuda.Event()

    def plan(self, batch: ForwardBatch) -> None:
        # A plan writes its schedule to a pinned buffer: the copies of the step before must have left it. A mixed
        # step plans two wrappers, each with a buffer of its own.
        self._planned.synchronize()
        host = batch.host
        if host.decode:
            self._parts = (self._plan_decode(self._eager, self._pages(host.kv_lens, host.page_table)),)
        elif not host.decode_rows:
            self._parts = self._plan_prefill(host)
        else:
            first, rest = split_mixed(host)
            pages, rows = self._pages(rest.kv_lens, rest.page_table), slice(len(first.positions), None)
            self._parts = (*self._plan_prefill(first), self._plan_decode(self._eager, pages, rows))
        self._planned.record()

    def plan_graph(self, host: HostBatch) -> None:
        size, pages = host.num_seqs, self._pages(host.kv_lens, host.page_table)
        if size not in self._graph:
            self._graph[size] = self._graph_decode(size)
        decode, (indptr, indices, last) = self._graph[size], pages
        if decode.planned is not None and all(map(np.array_equal, decode.planned, (indptr, indices))):
            # A schedule is made of whole pages, and those are the last step's: only what is in them has changed.
            decode.last_page_len.copy_(_pinned(last), non_blocking=True)
        else:
            self._planned.synchronize()
            decode.part = self._plan_decode(decode.wrapper, pages)
            self._planned.record()
            decode.planned = (indptr, indices)
        self._parts = (decode.part,)

    def _graph_decode(self, size: int) -> _GraphDecode:
        def buffer(length: int) -> Tensor:
            return torch.zeros(length, dtype=torch.int32, device=self.pool.device)

        last_page_len = buffer(size)
        wrapper = self._lib.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=TENSOR_CORES,
            backend="fa2",
            paged_kv_indptr_buffer=buffer(size + 1),
            # Padded rows all read the scratch page, so a step can name more pages than the pool has.
            paged_kv_indices_buffer=buffer(self.pool.num_pages + size),
            paged_kv_last_page_len_buffer=last_page_len,
        )
        return _GraphDecode(wrapper, last_page_len)

    def _pages(self, kv_lens: np.ndarray, page_table: np.ndarray) -> Pages:
        """Flattened over sequences."""
        counts = -(-kv_lens // self.pool.page_size)
        indptr = np.concatenate(([0], np.cumsum(counts)))
        indices = page_table[np.arange(page_table.shape[1]) < counts[:, None]]
        last = kv_lens - (counts - 1) * self.pool.page_size
        return indptr, indices, last

    def _on_device(self, pages: Pages) -> tuple[Tensor, Tensor, Tensor]:
        """As a plan takes them: page numbers on the device, the rest where it can be read without waiting."""
        indptr, indices, last = map(_pinned, pages)
        return indptr, indices.to(self.pool.device, non_blocking=True), last

    def _plan_decode(self, wrapper: object, pages: Pages, rows: slice = ALL_ROWS) -> Part:
        h = self.heads
        wrapper.plan(
            *self._on_device(pages),
            h.num_heads,
            h.kv_heads,
            h.head_dim,
            self.pool.page_size,
            q_data_type=self.pool.shape.dtype,
            kv_data_type=self.pool.shape.stored,
            sm_scale=self.scale,
        )
        return lambda layer, q, k, v, out: self._read(wrapper, layer, q[rows], out[rows])

    def _plan_prefill(self, host: HostBatch) -> tuple[Part, ...]:
        h, dtype = self.heads, self.pool.shape.dtype
        shape, options = (h.num_heads, h.kv_heads, h.head_dim), {"causal": True, "sm_scale": self.scale}
        options["q_data_type"] = dtype
        b, readers = host.num_seqs, page_readers(host)
        t = int(host.cu_seqlens_q[readers])
        parts: list[Part] = []
        if readers < b:
            cu_seqlens = _pinned(host.cu_seqlens_q[readers:] - t)
            self._ragged.plan(cu_seqlens, cu_seqlens, *shape, kv_data_type=dtype, **options)
            own = slice(t, int(host.cu_seqlens_q[b]))
            parts.append(lambda layer, q, k, v, out: self._attend(q, k, v, out, own))
        if readers:
            cu_seqlens = _pinned(host.cu_seqlens_q[: readers + 1])
            pages = self._on_device(self._pages(host.kv_lens[:readers], host.page_table[:readers]))
            options["kv_data_type"] = self.pool.shape.stored
            self._paged.plan(cu_seqlens, *pages, *shape, self.pool.page_size, **options)
            parts.append(lambda layer, q, k, v, out: self._read(self._paged, layer, q[:t], out[:t]))
        return tuple(parts)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: slice) -> None:
        q, k, v, out = q[rows], k[rows], v[rows], out[rows]
        if not self.keep_lse:
            self._ragged.run(q, k, v, out=out)
            return
        _, lse = self._ragged.run(q, k, v, out=out, return_lse=True)
        self.lse = F.pad(lse, (0, 0, rows.start, 0))

    def _read(self, wrapper: object, layer: int, q: Tensor, out: Tensor) -> None:
        wrapper.run(q, self._entries[layer], out=out)

    def _write(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        for part in self._parts:
            part(layer, q, k, v, out)


def _pinned(numbers: np.ndarray) -> Tensor:
    """int32, from where the device copies without waiting."""
    return torch.from_numpy(numbers.astype(np.int32)).pin_memory()
