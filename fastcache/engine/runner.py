"""One forward pass: batch in, sampled tokens out. Tokens stay on the device and feed the next step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from fastcache.attention.base import AttentionBackend
from fastcache.core import ForwardBatch, Sequence, Step
from fastcache.device.streams import hand_over
from fastcache.device.timing import Span
from fastcache.engine.batch import BatchBuilder, to_device, upload
from fastcache.engine.compress_stage import CompressionJob
from fastcache.engine.compressor import InlineCompressor
from fastcache.engine.cuda_graphs import DecodeGraphs
from fastcache.engine.deferred import DeferredCompressor, LaunchedJob
from fastcache.engine.images import PictureEmbedder
from fastcache.engine.pending import PendingTokens
from fastcache.engine.sampler import sample, sampling_batch
from fastcache.engine.states import StateRatings
from fastcache.engine.step_graphs import MOST_TOKENS, SmallSteps
from fastcache.errors import DeviceOutOfMemory
from fastcache.kvcache.pool import KVPool
from fastcache.models.layers import Attend, Places
from fastcache.models.llama import Llama


class Runner:
    """Owns what a step needs on the device: model, pool, backend, and each seat's newest token.

    One seat more than the scheduler hands out: the padded rows of a replayed graph sit there.
    """

    def __init__(
        self,
        model: Llama,
        pool: KVPool,
        backend: AttentionBackend,
        builder: BatchBuilder,
        max_num_seqs: int,
        compressor: InlineCompressor | None,
        use_graphs: bool,
        stream: torch.cuda.Stream | None = None,
        pictures: PictureEmbedder | None = None,
        places: Mapping[str, torch.cuda.Stream | None] | None = None,
        deferred: DeferredCompressor | None = None,
        states: StateRatings | None = None,
        small_steps: bool = False,
        sides: Mapping[str, torch.cuda.Stream | None] | None = None,
    ) -> None:
        self.model, self.pool, self.backend, self.builder = model, pool, backend, builder
        self.compressor, self.deferred, self.pictures, self.states = compressor, deferred, pictures, states
        self.device = pool.device
        self.places = places or {}  # streams by the names that a step's `place` may have
        self.sides = sides or {}  # streams by the names that a step's `split` may have
        self._home = self._stream = stream  # None: the device's default stream
        self._ready: torch.cuda.Event | None = None  # of the newest step
        # Called in each layer that is launched, and never in a graph's capture, where no event may be asked.
        self.on_layer: Callable[[], object] = lambda: None
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self.graphs = self.small = None
        if use_graphs and backend.supports_graphs:
            self.graphs = DecodeGraphs(self.decode, backend, self.last_tokens, max_num_seqs, stream)
            if small_steps and self._places(self.last_tokens) is not None:
                self.small = SmallSteps(model, self._places, stream)

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """Where the newest step runs; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return self._stream or torch.cuda.default_stream(self.device)

    def use_streams(self, main: torch.cuda.Stream, compress: torch.cuda.Stream) -> None:
        """Run the steps from here on on another partition's streams, in order behind those before."""
        self._home = main
        self._move(main)
        for each in (self.compressor, self.deferred):
            if each is not None:
                each.stream = compress

    def _move(self, stream: torch.cuda.Stream | None) -> None:
        """Steps run on `stream` from here on, in order behind those before."""
        if stream == self._stream:
            return
        before, self._stream = self.stream, stream
        hand_over(before, self.stream)
        for each in (self.graphs, self.small):
            if each is not None:
                each.move(stream)

    @torch.inference_mode()
    def launch(self, step: Step, seeds: dict[str, int], behind: Runner | None = None) -> PendingTokens:
        """Run `step` and return without waiting for the device. seeds: request id -> seed of its draws. `behind`: not
        before all that this one was given so far.

        Errors: `DeviceOutOfMemory`, after which the engine is to be closed.
        """
        launched_s = time.perf_counter()
        self._move(self._home if step.split is None else self.sides[step.split])
        if behind is not None:
            hand_over(behind.stream, self.stream)
        with self._on_device(f"a step of {step.num_tokens} tokens"):
            return self._launch(step, seeds, launched_s, self._since())

    @torch.inference_mode()
    def compress(self, job: CompressionJob) -> LaunchedJob:
        """Start a compression of its own, behind all steps launched so far. Errors: `DeviceOutOfMemory`."""
        with self._on_device(f"a compression of {job.num_tokens} tokens"):
            return self.deferred.launch(job)

    @torch.inference_mode()
    def adopt(self, seats: list[int], tokens: list[int]) -> None:
        """`tokens`, which another runner sampled, are the newest of these seats: the next step starts from them."""
        if not seats:
            return
        with self._on_device(f"{len(tokens)} tokens"):
            where, values = upload([np.asarray(seats), np.asarray(tokens)], self.device)
            self.last_tokens[where] = values

    def forget(self, seq: Sequence) -> None:
        """`seq` has ended: drop what was kept for it; its output is put together on the caller's stream."""
        if seq.logprobs and self.stream is not None:
            hand_over(self.stream, torch.cuda.current_stream(self.device), *seq.logprobs)
        if self.deferred is not None:
            self.deferred.forget(seq)

    @contextmanager
    def _on_device(self, what: str) -> Iterator[None]:
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                yield
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory(
                f"the device ran out of memory in {what} ({error}). Lower "
                "gpu_memory_utilization, which leaves a step more room beside the KV pool, or max_num_batched_tokens."
            ) from error

    def _since(self) -> torch.cuda.Event | None:
        """The end of the step before, or now if that is over; None without events."""
        if self.device.type != "cuda" or (self._ready is not None and not self._ready.query()):
            return self._ready
        now = torch.cuda.Event(enable_timing=True)  # the device is idle: it passes here at once
        now.record()
        return now

    def _launch(
        self, step: Step, seeds: dict[str, int], launched_s: float, since: torch.cuda.Event | None
    ) -> PendingTokens:
        host = self.builder.build(step)
        if step.place is not None:
            self.compressor.stream = self.places[step.place]
        if host.decode and self.graphs is not None:
            logits, likeliest = self.graphs.run(host)
        else:
            logits, likeliest = self._forward(step, to_device(host, self.last_tokens)), None
        tokens = self._sample(step, logits, likeliest, host.sample_seats, seeds)
        return self._pending(step, tokens, launched_s, since)

    def _forward(self, step: Step, batch: ForwardBatch) -> Tensor:
        watching = [
            each for each in (self.compressor, self.deferred) if each and each.begin(step, batch.host)
        ]
        self.backend.plan(batch)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
            self.on_layer()
            out = self.backend.run(layer, q, k, v, out)
            for each in watching:
                each.layer(layer, q, k, v, self.backend.lse)
            return out

        embeddings = None if self.pictures is None else self.pictures.embeddings(step, batch.input_ids)
        asked = any(chunk.seq.request.logprobs_from is not None for chunk in step.chunks)
        rated = self.states is not None and not step.decode
        if self.small is not None and step.num_tokens <= MOST_TOKENS and embeddings is None and not rated:
            lasting = any(each.reads_later for each in watching)
            hidden, every = self.small.run(batch, attend, lasting), True
        else:
            with self.states.watching(step, batch) if rated else nullcontext():
                hidden, every = self._eagerly(batch, attend, embeddings, asked), asked
        for each in watching:
            each.finish()
        if asked:
            self._keep_logprobs(step, batch, hidden)
        return self.model.logits(hidden[batch.sample_rows] if every else hidden)

    def _eagerly(self, batch: ForwardBatch, attend: Attend, embeddings: Tensor | None, every: bool) -> Tensor:
        """Final hidden states, launched kernel by kernel: of the sampled rows, or (T, hidden_size) of `every` one."""
        stores = bool((batch.host.slots >= 0).any())
        places = self._places(batch.slot_mapping) if stores else None

        def store_and_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if stores and places is None:
                self.backend.store(layer, k, v, batch.slot_mapping)
            return attend(layer, q, k, v)

        rows = None if every else batch.sample_rows
        return self.model(batch.input_ids, batch.positions, store_and_attend, embeddings, places, rows=rows)

    def _keep_logprobs(self, step: Step, batch: ForwardBatch, hidden: Tensor) -> None:
        """What the model says comes after each prompt token, for requests that ask. hidden: (T, hidden_size)."""
        for chunk, row in zip(step.chunks, batch.host.cu_seqlens_q[:-1].tolist(), strict=True):
            wanted = chunk.seq.request.logprobs_from
            if wanted is None:
                continue
            first, stop = max(wanted - chunk.start, 0), min(chunk.length, chunk.seq.prompt_len - chunk.start)
            if first < stop:
                logits = self.model.logits(hidden[row + first : row + stop])
                chunk.seq.logprobs.append(logits.float().log_softmax(-1))

    def decode(self, seats: Tensor, positions: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a decode step that a graph captures; `plan` has been called.

        Returns logits (B, vocab) and the likeliest tokens (B,), which are each seat's newest from here on.
        """

        places = self._places(slots)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if places is None:
                self.backend.store(layer, k, v, slots)
            return self.backend.run(layer, q, k, v)

        logits = self.model.logits(self.model(self.last_tokens[seats], positions, attend, places=places))
        tokens = self.model.ops.argmax(logits)
        self.last_tokens[seats] = tokens
        return logits, tokens

    def _places(self, slots: Tensor) -> Places | None:
        """For a model whose rotation stores keys and values, where; None if `attend` is to store them."""
        if not self.model.ops.stores_kv or self.backend.place(0, slots) is None:
            return None
        return lambda layer: self.backend.place(layer, slots)

    def _sample(
        self, step: Step, logits: Tensor, likeliest: Tensor | None, seats: np.ndarray, seeds: dict[str, int]
    ) -> Tensor:
        """Tokens (S,) on the device. likeliest: those of greedy decoding, already put into their seats, if known."""
        seqs = [chunk.seq for chunk in step.chunks if chunk.sample]
        params = sampling_batch(
            [seq.request.sampling for seq in seqs],
            [seeds[seq.request.request_id] for seq in seqs],
            [seq.num_sampled for seq in seqs],
            self.device,
        )
        if params is None and likeliest is not None:
            return likeliest
        tokens = sample(logits, params)
        self.last_tokens[upload([seats], self.device)[0]] = tokens
        return tokens

    def _pending(
        self, step: Step, tokens: Tensor, launched_s: float, since: torch.cuda.Event | None
    ) -> PendingTokens:
        if self.device.type != "cuda":
            return PendingTokens(step, tokens, None, launched_s, self._spans(step))
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        self._ready = torch.cuda.Event(enable_timing=True)
        self._ready.record()
        beside = None if step.decode or self.compressor is None else self.compressor.beside
        return PendingTokens(step, host, self._ready, launched_s, self._spans(step), since, beside)

    def _spans(self, step: Step) -> tuple[Span, ...]:
        return () if step.decode or self.compressor is None else tuple(self.compressor.spans)
