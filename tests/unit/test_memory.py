"""What the pool leaves free for a step that compresses."""

from __future__ import annotations

import pytest
import torch

from fastcache.compression.layer import WAITING_BYTES
from fastcache.config import EngineConfig
from fastcache.engine import memory
from fastcache.engine.compressor import SMALL_STEP
from fastcache.engine.memory import COMPRESSION_COPIES, pool_room, with_compression
from fastcache.kvcache.pool import KVShape

QWEN3_8B = KVShape(36, 8, 128, torch.bfloat16)


def test_a_large_step_has_room_for_the_layers_of_a_small_one():
    tokens, per_token = 32_768, 118_000
    want = tokens * (per_token + COMPRESSION_COPIES * QWEN3_8B.layer_bytes)
    assert with_compression(tokens * per_token, tokens, QWEN3_8B) == want
    assert want > SMALL_STEP * per_token + WAITING_BYTES


def test_where_steps_are_small_the_layers_that_wait_are_counted():
    for tokens in (SMALL_STEP // 4, SMALL_STEP):
        assert with_compression(tokens * 118_000, tokens, QWEN3_8B) == tokens * 118_000 + WAITING_BYTES
    grown = with_compression(2 * SMALL_STEP * 118_000, 2 * SMALL_STEP, QWEN3_8B)
    assert grown == max(
        2 * SMALL_STEP * (118_000 + COMPRESSION_COPIES * QWEN3_8B.layer_bytes),
        SMALL_STEP * 118_000 + WAITING_BYTES,
    )


@pytest.mark.parametrize(("free_gib", "asides"), [(60, True), (20, False)])
def test_prefills_beside_decode_steps_have_memory_where_it_is_a_small_share(monkeypatch, free_gib, asides):
    """Activations of 4,096 tokens, layers that wait to be compressed, an attention workspace: 2.2 GiB."""
    monkeypatch.setattr(memory, "_peak_activation_bytes", lambda *_: 32_768 * 118_000)
    monkeypatch.setattr(memory, "_free_bytes", lambda *_: free_gib * 2**30)
    config = EngineConfig("qwen3-8b", max_num_seqs=512, compression={"method": "snapkv"})
    given = (config, QWEN3_8B, None, 32_768, 4096, torch.device("cuda"))
    without, room = pool_room(*given), pool_room(*given, asides=True)
    assert not without.asides and room.asides == asides
    taken = (without.pages - room.pages) * QWEN3_8B.slot_bytes * config.page_size
    want = 4_096 * 118_000 + WAITING_BYTES + memory.WORKSPACE_BYTES
    assert taken == pytest.approx(want if asides else 0, abs=2 * QWEN3_8B.slot_bytes * config.page_size)


def test_a_pool_that_is_not_short_of_memory_loses_nothing_to_prefills_beside_decode_steps(monkeypatch):
    monkeypatch.setattr(memory, "_peak_activation_bytes", lambda *_: 32_768 * 118_000)
    monkeypatch.setattr(memory, "_free_bytes", lambda *_: 20 * 2**30)
    config = EngineConfig("qwen3-8b", max_num_seqs=8, compression={"method": "snapkv"})
    room = pool_room(config, QWEN3_8B, None, 32_768, 4096, torch.device("cuda"), asides=True)
    assert (
        room.asides
        and room.pages == pool_room(config, QWEN3_8B, None, 32_768, 4096, torch.device("cuda")).pages
    )
