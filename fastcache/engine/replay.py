"""A context repeated over its own cache: the scores of KVzip (arXiv:2505.23416).

The model is shown an instruction, then the context again, chunk by chunk, with the cache of the context before it. An
entry's score is the largest attention weight that any of these queries gives it; the softmax runs over the sinks, the
chunk's own entries and the repetition, as in the paper's code and in kvpress.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.errors import UnsupportedCombination
from fastcache.models.layers import Attend
from fastcache.models.llama import Llama
from fastcache.tokenizer import Tokenizer

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
OVERLAP = 8  # tokens of the chunk before that a later instruction quotes


@dataclass(frozen=True)
class ReplayPrompt:
    """Token ids around a repetition. `prefix`: how a chat begins; entries of it are not scored."""

    prefix: tuple[int, ...]
    first: tuple[int, ...]
    later: tuple[int, ...]
    suffix: tuple[int, ...]

    def length(self, chunk: int) -> int:
        """Most tokens one repetition of `chunk` context tokens takes."""
        return max(len(self.first), len(self.later) + OVERLAP) + len(self.suffix) + chunk

    def chunks(self, context: Many[int], size: int) -> list[tuple[int, int, list[int]]]:
        """(start, end, ids to feed) of each repetition."""
        begin = len(self.prefix) if tuple(context[: len(self.prefix)]) == self.prefix else 0
        found = []
        for start in range(begin, len(context), size):
            end = min(start + size, len(context))
            quote = context[max(begin, start - OVERLAP) : start]
            ask = self.first if start == begin else (*self.later, *quote)
            found.append((start, end, [*ask, *self.suffix, *context[start:end]]))
        return found


def replay_prompt(tokenizer: Tokenizer | None) -> ReplayPrompt:
    """The instruction as the model's chat template frames it. Errors: `UnsupportedCombination` without a tokenizer."""
    if tokenizer is None:
        raise UnsupportedCombination(
            "KVzip tells the model in words to repeat its context, and this model folder has no tokenizer; add its "
            "tokenizer files, or use another method."
        )

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    prefix, suffix = "", "\n"
    if tokenizer.chat_template is not None:
        context, mark = "dummy context", "\n#############"
        chat = [{"role": "user", "content": context + mark}]
        before, suffix = tokenizer.apply_chat_template(chat, enable_thinking=False).split(mark)
        prefix = before.split(context)[0]
    return ReplayPrompt(ids(prefix), ids(FIRST), ids(LATER), ids(suffix))


def attend_dense(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q: (T, H, d), the last T of S positions. keys, values: (Hk, S, d). Returns (T, H, d), causal."""
    t, heads, size = q.shape
    kv_heads, length = keys.shape[:2]
    # Queries that share a KV head lie side by side, so that keys and values are never repeated.
    grouped = q.view(t, kv_heads, -1, size).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, size)
    mask = torch.ones(t, length, dtype=torch.bool, device=q.device).tril(length - t)
    mask = mask.repeat(heads // kv_heads, 1)
    out = F.scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=mask)
    return out.view(kv_heads, -1, t, size).permute(2, 0, 1, 3).reshape(t, heads, size)


@torch.inference_mode()
def prefill_dense(model: Llama, context: Many[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (Hk, N, d) of each layer after a forward pass over one context."""
    cache = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append((k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()))
        return attend_dense(q, *cache[-1])

    ids = torch.tensor(context, device=model.embed.device)
    model(ids, torch.arange(len(context), device=ids.device), attend)
    return cache


@torch.inference_mode()
def replay_scores(
    model: Llama,
    context: Many[int],
    cache: Many[tuple[Tensor, Tensor]],
    prompt: ReplayPrompt,
    n_sink: int,
    chunk_size: int,
) -> Tensor:
    """(layers, kv_heads, N) float32: KVzip's score of every entry of one context; 0 in a chat's prefix.

    cache: keys and values (Hk, N, d) of each layer. Positions go on from N, so the model's rotary table must have
    `prompt.length(chunk_size)` more rows than the context.
    """
    kv_heads, length = cache[0][0].shape[:2]
    scores = cache[0][0].new_zeros((len(cache), kv_heads, length), dtype=torch.float32)
    for start, end, fed in prompt.chunks(context, chunk_size):
        ids = torch.tensor(fed, device=model.embed.device)
        positions = torch.arange(length, length + len(fed), device=ids.device)
        model(ids, positions, _scoring(cache, scores, min(n_sink, start), slice(start, end)))
    return scores


def _scoring(cache: Many[tuple[Tensor, Tensor]], scores: Tensor, sinks: int, chunk: slice) -> Attend:
    """Attention over the cache and the repetition, which notes the weights of the entries in `chunk`."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        keys, values = cache[layer]
        seen = torch.cat((keys[:, :sinks], keys[:, chunk], k), 1)
        scores[layer, :, chunk] = _largest_weights(q, seen)[:, sinks : sinks + chunk.stop - chunk.start]
        return attend_dense(q, torch.cat((keys, k), 1), torch.cat((values, v), 1))

    return attend


def _largest_weights(q: Tensor, keys: Tensor) -> Tensor:
    """q: (T, H, d), the queries of the last T of keys (Hk, S, d). Returns (Hk, S) float32, one KV head at a time:
    all at once would need H x T x S floats."""
    t, length = len(q), keys.shape[1]
    future = torch.ones(t, length, dtype=torch.bool, device=q.device).triu(length - t + 1)
    found = []
    for queries, head in zip(q.view(t, len(keys), -1, q.shape[2]).unbind(1), keys, strict=True):
        logits = queries.transpose(0, 1) @ head.T * q.shape[2] ** -0.5  # (G, T, S)
        weights = logits.masked_fill_(future, -torch.inf).softmax(-1, dtype=torch.float32)
        found.append(weights.amax((0, 1)))
    return torch.stack(found)
