"""Qwen3 (Qwen team 2025): Llama's layer with a norm over each query and key head before the rotation."""

from __future__ import annotations

from fastcache.models.llama import Llama


class Qwen3(Llama):
    qk_norm = True
