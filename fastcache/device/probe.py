"""The measurements behind the proof: a kernel that records on which SM each block ran, and when.

One block fills one SM (it claims most of the shared memory), spins for a given time and writes %smid and
%globaltimer. PTX promises neither that %smid is contiguous nor that it is physical, so the capacity and
independence measurements stand without it. Sources: PTX ISA, special registers; CUDA programming guide 4.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastcache.device.partition import Partition
from fastcache.device.streams import CaptureWithoutStream, plain_pair

SOURCE = r"""
extern "C" __global__ void probe(int* hits, long long* times, int microseconds) {
  unsigned sm;
  long long start, now;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  if (threadIdx.x == 0) { atomicAdd(hits + sm, 1); times[2 * blockIdx.x] = start; }
  do { asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); } while (now - start < microseconds * 1000LL);
  if (threadIdx.x == 0) times[2 * blockIdx.x + 1] = now;
}
"""
MOST_SMS = 1024
SHARED_BYTES = 200 * 1024
BLOCK_US = 2000
LONG_BLOCK_US = 20_000
SHORT_BLOCK_US = 50
SHORT_BLOCKS = 8


@dataclass(frozen=True)
class Sample:
    """One launch: SM ids seen, and first start to last end in microseconds."""

    ids: frozenset[int]
    wall_us: float
    start_us: float
    end_us: float


class Probe:
    """The compiled kernel on one device. Errors: RuntimeError from torch when it cannot be compiled."""

    def __init__(self, device: int) -> None:
        import torch

        self._torch = torch
        self.device = torch.device("cuda", device)
        optin = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        self._shared = min(SHARED_BYTES, optin)
        with torch.cuda.device(self.device):
            self._kernel = torch.cuda._compile_kernel(SOURCE, "probe")
            self._kernel.set_shared_memory_config(self._shared)

    def buffers(self, blocks: int) -> tuple[Any, Any]:
        """(hits, times) for a launch of `blocks` blocks, zeroed."""
        torch = self._torch
        hits = torch.zeros(MOST_SMS, dtype=torch.int32, device=self.device)
        times = torch.zeros(2 * blocks, dtype=torch.int64, device=self.device)
        torch.cuda.synchronize(self.device)
        return hits, times

    def launch(self, stream: Any, blocks: int, microseconds: int, buffers: tuple[Any, Any]) -> None:
        self._kernel(
            grid=(blocks, 1, 1),
            block=(32, 1, 1),
            args=[*buffers, microseconds],
            shared_mem=self._shared,
            stream=stream,
        )

    def read(self, buffers: tuple[Any, Any]) -> Sample:
        """Wait for everything and read one launch's buffers."""
        self._torch.cuda.synchronize(self.device)
        hits, times = buffers
        pairs = times.view(-1, 2).cpu()
        start, end = pairs[:, 0].min().item() / 1e3, pairs[:, 1].max().item() / 1e3
        return Sample(frozenset(hits.nonzero().flatten().tolist()), end - start, start, end)

    def measure(self, stream: Any, blocks: int, microseconds: int = BLOCK_US) -> Sample:
        buffers = self.buffers(blocks)
        self.launch(stream, blocks, microseconds, buffers)
        return self.read(buffers)

    def delay(self, long_stream: Any, long_blocks: int, short_stream: Any) -> float:
        """Microseconds from the first block of a full queue on one stream to the first of short work on another."""
        long, short = self.buffers(4 * long_blocks), self.buffers(SHORT_BLOCKS)
        self.launch(long_stream, 4 * long_blocks, LONG_BLOCK_US, long)
        self.launch(short_stream, SHORT_BLOCKS, SHORT_BLOCK_US, short)
        return self.read(short).start_us - self.read(long).start_us

    def plain_delay(self, total: int) -> float:
        """The control: the same two pieces of work on two plain streams of equal priority."""
        torch = self._torch
        return self.delay(torch.cuda.Stream(self.device), total, torch.cuda.Stream(self.device))

    def graph_ids(self, partition: Partition, stream: Any, blocks: int) -> tuple[frozenset[int], bool]:
        """SM ids of a graph captured on `stream` and replayed from the default stream, and whether the guard
        refused to capture without naming one."""
        torch = self._torch
        refused = False
        try:
            partition.capture(torch.cuda.CUDAGraph(), None)
        except CaptureWithoutStream:
            refused = True
        graph, buffers = torch.cuda.CUDAGraph(), self.buffers(blocks)
        with partition.capture(graph, stream):
            self.launch(torch.cuda.current_stream(), blocks, BLOCK_US, buffers)
        graph.replay()
        return self.read(buffers).ids, refused

    def unnamed_graph_ids(self, stream: Any, blocks: int) -> frozenset[int]:
        """The trap: the same capture inside `with torch.cuda.stream(stream)` without naming it."""
        torch = self._torch
        graph, buffers = torch.cuda.CUDAGraph(), self.buffers(blocks)
        with torch.cuda.stream(stream), torch.cuda.graph(graph):
            self.launch(torch.cuda.current_stream(), blocks, BLOCK_US, buffers)
        graph.replay()
        return self.read(buffers).ids


def whole_device(probe: Probe, total: int) -> tuple[Sample, Sample]:
    """A plain stream on the whole GPU: `total` blocks, and one more."""
    stream = plain_pair(probe.device.index)[0]
    probe.measure(stream, total)  # the first launch loads the module
    return probe.measure(stream, total), probe.measure(stream, total + 1)


def compute_errors(stream: Any, device: Any) -> dict[str, float]:
    """Relative error of a bf16 GEMM and of causal attention on `stream`, against the same on the default stream.

    Shapes: (2048, 4096) x (4096, 4096); q, k, v (1, 32, 1024, 128). Kernels with clusters or persistent grids
    are what a remainder partition might not host, so both must run there and agree.
    """
    import torch

    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    a, b = random(2048, 4096), random(4096, 4096)
    q, k, v = (random(1, 32, 1024, 128) for _ in range(3))

    def work() -> dict[str, Any]:
        attention = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return {"gemm": a @ b, "attention": attention}

    reference = work()
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        there = work()
    stream.synchronize()
    return {
        name: ((there[name].float() - value.float()).norm() / value.float().norm()).item()
        for name, value in reference.items()
    }
