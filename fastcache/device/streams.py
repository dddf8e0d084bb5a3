"""Streams: plain pairs, handing work from one to another, and capturing graphs on the one that was meant.

Streams of green contexts are non-blocking: nothing orders them against the default stream or each other, so
every hand-over needs an event. `None` stands for "no streams here" (CPU), and every helper accepts it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

MAIN_PRIORITY = -1
LOWEST_PRIORITY = 0


class CaptureWithoutStream(RuntimeError):
    """A CUDA graph was about to be captured on a stream that is not the partition's."""


def plain_pair(device: int) -> tuple[Any, Any]:
    """(main, compress) without any partition: both on the whole GPU, compression at the lowest priority."""
    import torch

    where = torch.device("cuda", device)
    return torch.cuda.Stream(where, MAIN_PRIORITY), torch.cuda.Stream(where, LOWEST_PRIORITY)


def hand_over(producer: Any, consumer: Any, *tensors: Any) -> None:
    """Make `consumer` wait for all work queued on `producer`, and keep `tensors` alive for it.

    Both are torch streams; None (CPU) does nothing. The tensors are those that cross: without record_stream
    the caching allocator may hand their memory out again while `consumer` still reads it.
    """
    if producer is None or consumer is None or producer == consumer:
        return
    consumer.wait_stream(producer)
    for tensor in tensors:
        tensor.record_stream(consumer)


def capture_stream_check(stream: Any, allowed: tuple[Any, ...]) -> Any:
    """Return `stream` if a graph may be captured on it. Errors: CaptureWithoutStream.

    torch captures on a stream of its own when none is named, even inside `with torch.cuda.stream(...)`, and each
    kernel keeps the SMs of the stream it was captured on: the partition would be lost without a word.
    """
    if stream is None:
        raise CaptureWithoutStream(
            "a CUDA graph was to be captured without naming a stream; torch would use one of its own and the "
            "graph would leave the partition. Pass the partition's main or compress stream."
        )
    if all(stream != each for each in allowed if each is not None):
        raise CaptureWithoutStream(
            f"a CUDA graph was to be captured on {stream}, which is not a stream of this partition."
        )
    return stream


class CaptureStream:
    """Where graphs are captured of what runs on `home`, a partition's main stream, or None for the default stream:
    there, or, as nothing can be captured on the default stream, on a stream of our own beside it."""

    def __init__(self, home: Any = None) -> None:
        self.home = home
        self._side: Any = None

    def beside(self, current: Any) -> Any:
        """The stream for a capture of work that runs on `current` otherwise. Errors: CaptureWithoutStream."""
        import torch

        if self.home is not None:
            return capture_stream_check(current, (self.home,))
        capture_stream_check(current, (torch.cuda.default_stream(),))
        if self._side is None:
            self._side = torch.cuda.Stream()
        return self._side


def capture(graph: Any, stream: Any, allowed: tuple[Any, ...], pool: Any = None) -> AbstractContextManager:
    """`torch.cuda.graph` on a checked stream. Warm the work up on that stream first: a cuBLAS workspace born
    inside a capture belongs to the graph's pool and dangles when the graph is gone."""
    import torch

    return torch.cuda.graph(graph, pool=pool, stream=capture_stream_check(stream, allowed))
