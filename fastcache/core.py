"""The nouns of the engine: what a user asks for, what the engine remembers of it, what one step computes.

Two lengths, both named, run through everything here:
`num_tokens` is what was said (prompt plus sampled tokens); it drives positions.
`kv_len` is what is stored; it drives slots and attention. They differ after compression.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastcache.config import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One picture of a prompt: which of the prompt's tokens stand for it, and what the vision tower is given.

    `start`, `length`: its span in the expanded prompt, in tokens. `pixels`: (channels, height, width) uint8 on
    the host, resized and cropped. `digest`: sha256 of the pixels, which names the picture in the prefix cache.
    """

    start: int
    length: int
    pixels: Tensor
    digest: bytes

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it. Immutable.

    `context_len` is how many leading prompt tokens form the context that compression may shrink (None: all
    of them, 0: nothing). Tokens after it, such as a question, are appended to the compressed cache uncompressed.
    `images`: its pictures in the order of their spans; each of their tokens is a placeholder in the prompt.
    `timeout_s`: after that many seconds from its arrival the request is ended with what it has (None: never).
    `logprobs_from`: from this prompt position on, what the model says comes next is kept (None: nowhere).
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float
    context_len: int | None = None
    images: tuple[ImageInput, ...] = ()
    timeout_s: float | None = None
    logprobs_from: int | None = None

    @property
    def image_spans(self) -> tuple[tuple[int, int], ...]:
        """(start, length) of each picture in the expanded prompt, ascending."""
        return tuple((image.start, image.length) for image in self.images)

    @property
    def compress_at(self) -> int:
        """Number of leading tokens after whose prefill the cache is compressed."""
        return len(self.prompt_token_ids) if self.context_len is None else self.context_len


@dataclass(eq=False)
class Sequence:
    """The engine's mutable state for one request.

    Tokens whose values are still on the device count in `num_sampled` but are not in `output_ids` yet: the
    scheduler plans by counts, and the host learns values one step late.
    """

    request: Request
    output_ids: list[int] = field(default_factory=list)
    num_sampled: int = 0
    num_computed: int = 0  # logical tokens whose KV has been scheduled
    kv_len: int = 0
    pages: list[int] = field(default_factory=list)
    pages_version: int = 0  # changes whenever `pages` is replaced rather than extended
    seat: int = -1  # row in the runner's persistent per-sequence tensors; -1 while waiting
    decoding: bool = False  # prefill is over: what is left to compute is the newest sampled token
    finish_reason: str | None = None
    compressed: bool = False
    leave_whole: bool = False  # decided: compressing it would not pay
    to_compress: int = 0  # entries to keep of a stored context; decoding waits until that is done
    under_way: bool = False  # part of a compression or a prefill that runs beside other steps
    fresh: int = 0  # pages that a planned chunk compresses it into; among `pages` once that is on its way
    held: list[int] = field(default_factory=list)  # old pages that stay until the request ends
    ready_s: float = 0.0  # since when it is ready for its next stage
    cached_tokens: int = 0
    preemptions: int = 0
    kv_len_before: int | None = None
    kv_len_after: int | None = None
    pages_freed: int = 0
    image_embeddings: dict[int, Tensor] = field(
        default_factory=dict
    )  # of pictures begun: (length, hidden_size)
    logprobs: list[Tensor] = field(default_factory=list)  # per chunk: (rows, vocab) float32
    scheduled_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + self.num_sampled

    @property
    def known_tokens(self) -> list[int]:
        """Token ids the host knows: the prompt and every sampled token that has arrived."""
        return [*self.request.prompt_token_ids, *self.output_ids]

    @property
    def content(self) -> list[int]:
        """`known_tokens` with each picture's placeholders replaced by negative numbers made of its pixels.

        Equal contents are equal KV, which equal placeholders are not: the prefix cache compares these.
        """
        tokens = self.known_tokens
        for image in self.request.images:
            words = [
                -1 - (int.from_bytes(image.digest[i : i + 8], "big") >> 1)
                for i in range(0, len(image.digest), 8)
            ]
            tokens[image.start : image.end] = [words[i % len(words)] for i in range(image.length)]
        return tokens

    @property
    def exhausted(self) -> bool:
        """No further token may be sampled for it."""
        return self.num_sampled >= self.request.sampling.max_tokens

    def replace_pages(self, pages: list[int]) -> None:
        self.pages = pages
        self.pages_version += 1


@dataclass(frozen=True)
class Chunk:
    """One sequence's share of a step: `length` tokens from logical position `start`.

    `sample`: the chunk reaches the last known token, so a next token is drawn from its last row.
    `fresh_pages`: pages for the kept entries when the cache is compressed right after this chunk.
    `kept`: how many entries each KV head keeps then; 0 means no compression.
    `defer`: compression comes later; this chunk leaves behind what the method needs to see of it.
    `stored`: its entries go to the sequence's pages. Not so for a context that starts and is compressed within
    this step: only its kept entries are written, to the fresh pages, and it never owns others.
    """

    seq: Sequence
    start: int
    kv_start: int
    length: int
    sample: bool
    kept: int = 0
    fresh_pages: tuple[int, ...] = ()
    defer: bool = False
    stored: bool = True


@dataclass(frozen=True)
class Step:
    """What the scheduler wants computed in one forward pass. `decode`: every chunk is one new token.

    `decode_rows`: in a mixed step, how many chunks at the end are one new token each, behind the prefill chunks.
    `place`: where its contexts are compressed (engine/policy.py), None for the engine's fixed place.
    `split`: the SM split, by name, on one side of which it runs: prefill on the one, decode steps beside it on the
    other; None for the engine's own stream.
    """

    chunks: tuple[Chunk, ...]
    decode: bool
    decode_rows: int = 0
    place: str | None = None
    split: str | None = None

    @property
    def aside(self) -> bool:
        """Whether it is a prefill that other steps run beside."""
        return self.split is not None and not self.decode

    @property
    def prefill_tokens(self) -> int:
        return 0 if self.decode else self.num_tokens - self.decode_rows

    @property
    def decode_tokens(self) -> int:
        return len(self.chunks) if self.decode else self.decode_rows

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True)
class HostBatch:
    """One step's inputs as numpy arrays; T tokens of B sequences, packed without padding.

    token_ids: int64, those the host knows: (T,) of a prefill, (T - decode_rows,) of a mixed step, None of a
    decode step; the others are on the device. seats: (B,) int64.
    positions, slots: (T,) int64; slot -1 says that an entry is not stored. cu_seqlens_q: (B + 1,) int64.
    kv_lens: (B,) int64, new tokens included.
    page_table: (B, max_pages) int32. sample_rows: (S,) int64, rows whose next token is drawn;
    sample_seats: (S,) int64, the seats they belong to. layouts: with head budgets, where each sequence's heads
    have their entries (`kvcache.head_layout`), None for one that is not compressed; else empty.
    """

    decode: bool
    token_ids: np.ndarray | None
    seats: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    cu_seqlens_q: np.ndarray
    kv_lens: np.ndarray
    page_table: np.ndarray
    sample_rows: np.ndarray
    sample_seats: np.ndarray
    decode_rows: int = 0
    layouts: tuple[object, ...] = ()

    @property
    def num_seqs(self) -> int:
        return len(self.kv_lens)


@dataclass(frozen=True)
class ForwardBatch:
    """A `HostBatch` on the device: same names, same shapes, kv_lens and cu_seqlens_q as int64 tensors.

    `host` stays at hand so that `plan` needs no device synchronisation.
    """

    host: HostBatch
    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    kv_lens: Tensor
    page_table: Tensor
    sample_rows: Tensor
