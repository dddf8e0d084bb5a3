"""Small steps in pieces: with graphs simulated on the CPU, the tokens of an engine that launches every kernel."""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcache import LLM, SamplingParams
from fastcache.engine import step_graphs
from fastcache.engine.stages import Dynamic
from fastcache.engine.step_graphs import MOST_TOKENS, SIZE_STEP, SmallSteps, buffer_bytes, padded_tokens
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


def engine(folder, compression, in_pieces):
    llm = LLM(
        folder,
        device="cpu",
        dtype="float32",
        num_pages=300,
        max_num_seqs=8,
        max_model_len=512,
        max_num_batched_tokens=128,
        compression=compression,
        policy="dynamic",
    )
    llm._scheduler.policy = Dynamic(enough_tokens=1, patience_s=0.0, mixed_tokens=48)
    runner = llm._runner
    runner.model.ops = StoringOps()
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


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "compression",
    [
        None,
        {"method": "snapkv", "compression_ratio": 0.5, "params": {"window": 8}},
        {"method": "keydiff", "compression_ratio": 0.5},
    ],
    ids=["whole", "snapkv", "keydiff"],
)
def test_small_steps_in_pieces_give_the_tokens_of_whole_ones(tiny_model, simulated, arch, compression):
    folder = tiny_model(arch, 4, 2, 16, 64, 2, False)
    want = tokens_of(engine(folder, compression, in_pieces=False))
    assert not simulated
    assert tokens_of(engine(folder, compression, in_pieces=True)) == want
    assert simulated == list(range(MOST_TOKENS, 0, -SIZE_STEP))  # each size once, before the first small step


def test_steps_are_padded_to_whole_tiles():
    assert [padded_tokens(n) for n in (1, SIZE_STEP, SIZE_STEP + 1, MOST_TOKENS)] == [
        64,
        64,
        128,
        MOST_TOKENS,
    ]


def test_the_buffers_take_what_is_kept_free_for_them(tiny_model):
    folder = tiny_model("qwen3", 4, 2, 16, 64, 2, False)
    llm = engine(folder, None, in_pieces=True)
    small = llm._runner.small
    held = sum(each.nbytes for each in (*small._qkv, small._attended))
    assert held == buffer_bytes(load_model_config(str(folder), "auto"), torch.float32)
