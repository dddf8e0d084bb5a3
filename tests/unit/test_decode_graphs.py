"""On which stream decode graphs are captured: the streams are stand-ins, no GPU is needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from fastcache.device.streams import CaptureWithoutStream
from fastcache.engine.cuda_graphs import DecodeGraphs


class Stream(str):
    """Named, and never waiting."""

    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch):
    """Capture a graph while `current` is the current stream; returns the streams captured on so far."""
    graphs: list[DecodeGraphs] = []
    streams: list[str | None] = []
    made = iter(map(Stream, ("side", "another side")))

    def graph(_: object, pool: object = None, stream: str | None = None) -> AbstractContextManager:
        streams.append(stream)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: Stream("default"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: next(made))
    graphs.append(DecodeGraphs(lambda *_: (torch.zeros(1), torch.zeros(1)), None, torch.zeros(5), 4))

    def capture(home: str | None, current: str, size: int) -> list[str | None]:
        graphs[0].move(home and Stream(home))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(current))
        graphs[0]._capture(size)
        return streams

    return capture


def test_every_size_is_captured_on_the_partitions_stream(captured) -> None:
    captured("main", "main", 1)
    assert captured("main", "main", 2) == ["main", "main"]


def test_without_a_partition_all_sizes_share_one_stream_of_their_own(captured) -> None:
    captured(None, "default", 1)
    assert captured(None, "default", 2) == ["side", "side"]


def test_after_a_change_of_split_graphs_are_captured_on_the_new_stream(captured) -> None:
    captured("main", "main", 1)
    assert captured("another main", "another main", 1) == ["main", "another main"]


@pytest.mark.parametrize(("home", "current"), [("main", "default"), ("main", "compress"), (None, "main")])
def test_a_step_away_from_its_stream_is_not_captured(captured, home: str | None, current: str) -> None:
    with pytest.raises(CaptureWithoutStream):
        captured(home, current, 1)
