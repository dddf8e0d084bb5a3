"""Small steps in pieces: with graphs simulated on the CPU, the tokens of an engine that launches every kernel."""

from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcache import LLM, SamplingParams
from fastcache.engine import compressor, step_graphs
from fastcache.engine.compressor import InlineCompressor
from fastcache.engine.stages import Dynamic
from fastcache.engine.step_graphs import MOST_TOKENS, SIZES, SmallSteps, as_one, buffer_bytes, padded_tokens
from fastcache.models.config import load_model_config
from fastcache.models.ops import Ops


class StoringOps(Ops):
    """Stores while it rotates, as the fast kernels do."""

    stores_kv = True

    def qk_norm_rope(self, qkv, heads, norms, cos_sin, positions, place=None):
        q, k, v = super().qk_norm_rope(qkv, heads, norms, cos_sin, positions)
        if place is not None:
            slots, size = place.slots.clamp(min=0), place.keys.shape[2]
            place.keys[slots // size, :, slots % size] = k.to(place.keys.dtype)
            place.values[slots // size, :, slots % size] = v.to(place.values.dtype)
        return q, k, v


class MergedOps(StoringOps):
    """Leaves a token's rotated q, k and v behind each other, as the fast kernels do."""

    def qk_norm_rope(self, qkv, heads, norms, cos_sin, positions, place=None):
        computed = super().qk_norm_rope(qkv, heads, norms, cos_sin, positions, place)
        return torch.cat(computed, dim=1).split([each.shape[1] for each in computed], dim=1)


class SimulatedGraph:
    """What a CUDA graph does: the same operations on the same memory. Views need no repetition."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, out))
        return out


class NoStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def simulated(monkeypatch):
    """CUDA's part of `step_graphs`, on the CPU. Returns the sizes that were captured."""

    @contextmanager
    def capture(graph, stream, allowed, pool=None):
        with Recorder(graph):
            yield

    sizes, real = [], SmallSteps._capture
    monkeypatch.setattr(step_graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimulatedGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: NoStream())
    monkeypatch.setattr(step_graphs.CaptureStream, "beside", lambda self, current: NoStream())
    monkeypatch.setattr(SmallSteps, "_capture", lambda self, size: (sizes.append(size), real(self, size))[1])
    return sizes


class SlowStream:
    """A stream that does nothing before somebody waits for it."""

    def __init__(self):
        self.queue = []

    def catch_up(self):
        for work in self.queue:
            work()
        self.queue.clear()


@pytest.fixture
def beside(monkeypatch):
    """A compressor's stream that falls as far behind the main stream as it may."""
    slow, real = SlowStream(), InlineCompressor._compress

    def hand_over(producer, consumer, *tensors):
        if producer is slow:
            slow.catch_up()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: NoStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(compressor, "hand_over", hand_over)
    monkeypatch.setattr(InlineCompressor, "_compress", lambda *given: slow.queue.append(lambda: real(*given)))
    return slow


def engine(folder, compression, in_pieces, ops=StoringOps):
    llm = LLM(
        folder,
        device="cpu",
        dtype="float32",
        num_pages=300,
        max_num_seqs=8,
        max_model_len=512,
        max_num_batched_tokens=160,
        compression=compression,
        policy="dynamic",
    )
    llm._scheduler.policy = Dynamic(enough_tokens=1, patience_s=0.0, mixed_tokens=48)
    runner = llm._runner
    runner.model.ops = ops()
    for layer in runner.model.layers:
        layer.attention.ops = runner.model.ops
    if in_pieces:
        runner.small = SmallSteps(runner.model, runner._places)
    return llm


def tokens_of(llm):
    rng = random.Random(0)
    for _ in range(12):
        prompt = [rng.randrange(3, 250) for _ in range(rng.randint(1, 150))]
        llm.add_request(prompt, SamplingParams(max_tokens=rng.randint(4, 24), ignore_eos=True))
    done = {}
    while llm.has_unfinished():
        done.update((output.request_id, output.token_ids) for output in llm.step())
    llm.check_books()
    assert llm.stats().mixed_steps > 3
    return done


SNAPKV = {"method": "snapkv", "compression_ratio": 0.5, "params": {"window": 8}}
KEYDIFF = {"method": "keydiff", "compression_ratio": 0.5}
H2O = {"method": "h2o", "compression_ratio": 0.5}


@pytest.mark.parametrize(
    ("arch", "compression", "ops"),
    [
        ("llama", None, StoringOps),
        ("qwen3", None, MergedOps),
        ("llama", SNAPKV, MergedOps),
        ("qwen3", SNAPKV, StoringOps),
        ("qwen3", KEYDIFF, MergedOps),
        ("llama", H2O, MergedOps),
    ],
)
def test_small_steps_in_pieces_give_the_tokens_of_whole_ones(tiny_model, simulated, arch, compression, ops):
    folder = tiny_model(arch, 4, 2, 16, 64, 3, False)
    want = tokens_of(engine(folder, compression, False, ops))
    assert not simulated
    assert tokens_of(engine(folder, compression, True, ops)) == want
    assert simulated == list(reversed(SIZES))  # each size once, before the first small step


@pytest.mark.parametrize("compression", [SNAPKV, KEYDIFF], ids=["snapkv", "keydiff"])
def test_what_is_read_beside_the_next_layers_is_not_overwritten(tiny_model, simulated, beside, compression):
    """Out of pages too: `snapkv` reads the step's queries for them."""
    folder = tiny_model("qwen3", 4, 2, 16, 64, 3, False)
    want, tokens = tokens_of(engine(folder, compression, in_pieces=False)), []
    for in_pieces in (False, True):
        llm = engine(folder, compression, in_pieces)
        llm._runner.compressor.stream = beside
        tokens.append(tokens_of(llm))
    assert tokens == [want, want] and simulated


def test_steps_that_keep_nothing_copy_nothing(tiny_model, simulated, monkeypatch):
    """Copies are for contexts that start and end in the step, of layers that wait, and for what runs beside."""
    llm, asked, copied = engine(tiny_model("qwen3", 4, 2, 16, 64, 3, False), KEYDIFF, True), [], []
    real = SmallSteps.run

    def run(small, batch, attend, lasting):
        asked.append(lasting)
        late = llm._runner.compressor._late
        copied.append(bool(late) and any(each.where is not None for each in late))
        return real(small, batch, attend, lasting)

    monkeypatch.setattr(SmallSteps, "run", run)
    tokens_of(llm)
    assert asked == copied and 0 < sum(asked) < len(asked)


def test_a_merged_projection_is_kept_by_one_copy(tiny_model, simulated):
    folder, counts = tiny_model("qwen3", 4, 2, 16, 64, 3, False), []
    for ops in (MergedOps, StoringOps):
        small = engine(folder, None, True, ops)._runner.small
        with torch.inference_mode():
            pieces, _ = small._capture(64)
        calls = [call for piece in pieces for call in piece.calls]
        copied = [args[0] for function, args, *_ in calls if function is torch.ops.aten.copy_.default]
        counts.append(sum(to.untyped_storage().data_ptr() == small._qkv.data_ptr() for to in copied))
    assert counts == [3, 9]  # of three layers


def test_views_of_one_tensor_are_found_whatever_its_rows_hold_beside_them():
    rows = torch.randn(5, 9, 4)
    q, k, v = rows[:, 1:9].split([4, 2, 2], dim=1)
    assert torch.equal(as_one(q, k, v), rows[:, 1:9])
    for others in ((q, v, k), (q, k, v.clone()), (q.contiguous(), k, v), (q, k, rows[:, 2:4]), (q, k[1:], v)):
        assert as_one(*others) is None
    assert as_one(*torch.randn(3, 5, 2, 4)) is None


def test_steps_are_padded_to_whole_tiles():
    given = (1, 64, 65, 512, 513, 640, 641, 1025, MOST_TOKENS)
    assert [padded_tokens(n) for n in given] == [64, 64, 128, 512, 640, 640, 768, 1152, 1152]
    assert MOST_TOKENS == 1152 and len(SIZES) == 13


def test_the_buffers_take_what_is_kept_free_for_them(tiny_model):
    folder = tiny_model("qwen3", 4, 2, 16, 64, 2, False)
    llm = engine(folder, None, in_pieces=True)
    small = llm._runner.small
    held = small._qkv.nbytes + small._attended.nbytes
    assert held == buffer_bytes(load_model_config(str(folder), "auto"), torch.float32)
