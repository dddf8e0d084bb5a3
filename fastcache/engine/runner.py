"""One forward pass: batch in, sampled tokens out. Tokens stay on the device and feed the next step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcache.attention.base import AttentionBackend
from fastcache.core import Step
from fastcache.engine.batch import BatchBuilder
from fastcache.engine.compressor import InlineCompressor
from fastcache.engine.sampler import sample, sampling_batch
from fastcache.kvcache.pool import KVPool
from fastcache.models.llama import Llama


@dataclass(frozen=True)
class PendingTokens:
    """A launched step. `wait` blocks until its tokens are on the host."""

    step: Step
    tokens: Tensor  # (S,) int64 on the host, valid after `ready`
    ready: torch.cuda.Event | None
    launched_s: float

    def wait(self) -> list[int]:
        if self.ready is not None:
            self.ready.synchronize()
        return self.tokens.tolist()


class Runner:
    """Owns what a step needs on the device: model, pool, backend, and each seat's newest token."""

    def __init__(
        self,
        model: Llama,
        pool: KVPool,
        backend: AttentionBackend,
        builder: BatchBuilder,
        max_num_seqs: int,
        compressor: InlineCompressor | None,
    ) -> None:
        self.model, self.pool, self.backend = model, pool, backend
        self.builder, self.compressor = builder, compressor
        self.device = pool.device
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def launch(self, step: Step, seeds: dict[str, int]) -> PendingTokens:
        """Run `step` and return without waiting for the device. seeds: request id -> seed of its draws."""
        launched_s = time.perf_counter()
        batch = self.builder.build(step, self.last_tokens)
        compressing = self.compressor is not None and self.compressor.begin(step, batch)
        self.backend.plan(batch)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.pool.write(layer, k, v, batch.slot_mapping)
            out = self.backend.run(layer, q, k, v)
            if compressing:
                self.compressor.layer(layer, q)
            return out

        hidden = self.model(batch.input_ids, batch.positions, attend)
        logits = self.model.logits(hidden[batch.sample_rows])
        return self._sample(step, logits, seeds, launched_s)

    def _sample(self, step: Step, logits: Tensor, seeds: dict[str, int], launched_s: float) -> PendingTokens:
        seqs = [chunk.seq for chunk in step.chunks if chunk.sample]
        params = sampling_batch(
            [seq.request.sampling for seq in seqs],
            [seeds[seq.request.request_id] for seq in seqs],
            [seq.num_sampled for seq in seqs],
            self.device,
        )
        tokens = sample(logits, params)
        seats = torch.tensor([seq.seat for seq in seqs], dtype=torch.int64).to(self.device, non_blocking=True)
        self.last_tokens[seats] = tokens
        if self.device.type != "cuda":
            return PendingTokens(step, tokens, None, launched_s)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return PendingTokens(step, host, ready, launched_s)
