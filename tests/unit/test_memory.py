"""What the pool leaves free for a step that compresses."""

from __future__ import annotations

import torch

from fastcache.compression.layer import WAITING_BYTES
from fastcache.engine.compressor import SMALL_STEP
from fastcache.engine.memory import COMPRESSION_COPIES, with_compression
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
