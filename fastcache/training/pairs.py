"""What a scorer learns from: hidden states as each layer's attention reads them, and the logarithm of KVzip's score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastcache.compression.kvzip import KVzip
from fastcache.config import require
from fastcache.engine.replay import ReplayPrompt, prefill_dense, replay_scores
from fastcache.models.llama import Llama

# A softmax weight in float32 may be 0, and a text's best entries have 1: what is smaller than this is all the same.
SMALLEST = 1e-9


class Teacher:
    """The frozen model and KVzip (arXiv:2505.23416) with its defaults."""

    def __init__(self, model: Llama, prompt: ReplayPrompt, longest: int) -> None:
        self.model, self.prompt, self.method = model, prompt, KVzip()
        need = longest + prompt.length(min(longest, self.method.chunk_size))
        require(
            need <= len(model.cos_sin),
            f"context is {longest}, and with its repetition a text takes {need} positions; the model has "
            f"{len(model.cos_sin)}. Lower context.",
        )

    @torch.inference_mode()
    def pairs(self, ids: Sequence[int], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens at `rows` (R,) of one text: hidden states (layers, R, n) in the model's dtype, and the natural
        logarithm of their entries' scores (layers, R, Hk) float32."""
        seen: list[Tensor] = []
        hooks = [
            layer.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][rows]))
            for layer in self.model.layers
        ]
        try:
            cache = prefill_dense(self.model, ids)
        finally:
            for hook in hooks:
                hook.remove()
        sinks, chunk = self.method.n_sink, self.method.chunk_size
        scores = replay_scores(self.model, ids, cache, self.prompt, sinks, chunk)[..., rows]
        return torch.stack(seen), scores.clamp(min=SMALLEST).log().transpose(1, 2)


class PairFile:
    """`count` pairs in two files beside the output, filled window by window; a run that was cut finds them again."""

    def __init__(self, output: Path, layers: int, count: int, hidden_size: int, kv_heads: int) -> None:
        self._files = [output.with_suffix(suffix) for suffix in (".hidden", ".scores")]
        output.parent.mkdir(parents=True, exist_ok=True)
        self.hidden, self.scores = (
            torch.from_file(str(file), shared=True, size=layers * count * size, dtype=dtype).view(
                layers, count, size
            )
            for file, size, dtype in zip(
                self._files, (hidden_size, kv_heads), (torch.bfloat16, torch.float32), strict=True
            )
        )

    def remove(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)
