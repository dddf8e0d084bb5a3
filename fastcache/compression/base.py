"""The contract of an eviction method: what it sees of a layer, how many entries stay, and which.

A method gives every cached entry of a layer an importance; `EvictionMethod.score` adds what is protected, and
`select` turns scores into kept positions. All of it is batched over sequences and KV heads, and nothing here
waits for the device.

Sizes: B sequences, H query heads, Hk KV heads, G = H / Hk queries per KV head (query head h reads KV head
h // G), T the padded length, d the head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fastcache.config import open_interval, require

# What a method may ask for; "query_stats" is query_mean, query_cov and inv_freq together, and "hidden_states" are
# seen as they pass (states.py): what stays of them is `ratings`.
NEEDS = (
    "keys",
    "values",
    "window_queries",
    "attention_mass",
    "query_stats",
    "replay_scores",
    "hidden_states",
)


@dataclass(frozen=True)
class LayerKV:
    """What a method sees of one layer: B sequences, left-aligned and padded to T entries.

    Entries at or beyond `lengths[b]` are padding of any content, NaN included. `keys` always has its shape;
    its content, and every other tensor, is only promised to a method that lists it in `needs`.
    """

    layer: int
    num_layers: int
    keys: Tensor  # (B, Hk, T, d), rotated, model dtype
    values: Tensor | None  # (B, Hk, T, d), model dtype
    lengths: Tensor  # (B,) int64, same device
    budgets: Tensor  # (B,) or (B, Hk) int64: entries to keep, at least 1 and at most `lengths`
    window_queries: Tensor | None = None  # (B, H, method.window, d), rotated: the last positions' queries
    attention_mass: Tensor | None = None  # (B, H, T) float32: causal softmax, summed over all queries
    query_mean: Tensor | None = None  # (B, H, d) float32: unrotated queries from position method.n_sink on
    query_cov: Tensor | None = None  # (B, H, d, d) float32: their covariance, divided by their count
    replay_scores: Tensor | None = None  # (B, Hk, T) float32: largest weight while the context is repeated
    ratings: Tensor | None = None  # (B, Hk, T) float32: what the method made of each token's hidden state
    inv_freq: Tensor | None = None  # (d / 2,) float32: rotary frequencies, given with query statistics

    @cached_property
    def positions(self) -> Tensor:
        """(T,) int64: 0, 1, ..., T - 1."""
        return torch.arange(self.keys.shape[2], device=self.keys.device)

    @cached_property
    def valid(self) -> Tensor:
        """(B, 1, T) bool: False on padding."""
        return self.positions < self.lengths[:, None, None]


@dataclass(frozen=True, kw_only=True)
class EvictionMethod(ABC):
    """One way to say which KV entries matter. Subclasses are frozen dataclasses; their fields are parameters.

    n_sink: first entries that always stay (attention sinks, StreamingLLM, arXiv:2309.17453). 0 by default,
        because that is how most papers define their method.
    window: last entries that always stay. A method with "window_queries" in `needs` gets their queries.

    What is protected never exceeds the budget: sinks stay first, then the most recent entries.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    window: ClassVar[int] = 0
    by_layer: ClassVar[bool] = False  # whether a layer's number has a say in what stays

    n_sink: int = 0

    def __post_init__(self) -> None:
        whole_number("n_sink", self.n_sink, minimum=0)

    @abstractmethod
    def importance(self, kv: LayerKV) -> Tensor:
        """(B, Hk, T) or (B, 1, T), any float dtype; higher stays. Padding may hold anything.

        Equal values are settled by `select`: the earlier position stays.
        """

    @property
    def min_budget(self) -> int:
        """The smallest budget at which this is still the method: all it protects, and at least one more
        entry where it protects nothing but sinks."""
        return self.n_sink + max(1, self.window)

    def applies_to(self, num_tokens: int, budget: int) -> bool:
        """Whether a prompt of `num_tokens` is compressed to `budget`. If not, the engine leaves it whole."""
        return self.min_budget <= budget < num_tokens

    def check(self, num_tokens: int, compression_ratio: float) -> None:
        """Raise `ConfigError`, naming the minimum, if `num_tokens` is too short a prompt for this ratio."""
        kept = budget(num_tokens, compression_ratio)
        require(
            self.applies_to(num_tokens, kept),
            f"{self.name} at compression_ratio {compression_ratio:g} keeps {kept} of {num_tokens} tokens; "
            f"it must keep at least {self.min_budget} ({self._minimum_in_words()}) and drop at least 1. "
            "Lower compression_ratio, use a longer prompt, or protect less.",
        )

    def _minimum_in_words(self) -> str:
        last = f"a window of {self.window}" if self.window else "one more entry"
        return f"n_sink {self.n_sink} and {last}"

    def protected_recent(self, budgets: Tensor) -> Tensor:
        """How many of the last entries stay, at most, for each of `budgets`; same shape, int64."""
        return torch.full_like(budgets, self.window)

    def score(
        self, kv: LayerKV, importance: Callable[[EvictionMethod, LayerKV], Tensor] | None = None
    ) -> Tensor:
        """(B, Hk, T) float32: the importance, +inf where protected, -inf on padding and for NaN.

        importance: a faster version of this method's own.
        """
        missing = [need for need in self.needs if not _given(kv, need)]
        assert not missing, f"{self.name} was not given {missing}"
        scores = (
            (self.importance(kv) if importance is None else importance(self, kv))
            .float()
            .expand(kv.keys.shape[:3])
        )
        scores = scores.masked_fill(scores.isnan() | ~kv.valid, -torch.inf)
        return scores.masked_fill(self._protected(kv), torch.inf)

    def _protected(self, kv: LayerKV) -> Tensor:
        """(B, 1 or Hk, T) bool: at most `budgets` entries, sinks before recent ones."""
        budgets = kv.budgets.reshape(len(kv.budgets), -1, 1)
        sinks = budgets.clamp(max=self.n_sink)
        recent = torch.minimum(self.protected_recent(budgets), budgets - sinks)
        last = kv.lengths[:, None, None]
        return (kv.positions < sinks) | ((kv.positions >= last - recent) & (kv.positions < last))


def budget(num_tokens: int, compression_ratio: float) -> int:
    """How many of `num_tokens` entries stay: the one rounding rule, max(1, int(n * (1 - r))).

    In floating point, as kvpress computes it, so that 1000 tokens at ratio 0.8 keep 199 and not 200. Errors:
    `ConfigError` for a ratio outside (0, 1).
    """
    open_interval("compression_ratio", compression_ratio)
    return max(1, int(num_tokens * (1 - compression_ratio)))


def select(scores: Tensor, lengths: Tensor, budgets: Tensor, max_budget: int | None = None) -> Tensor:
    """The kept positions of each sequence and KV head: the `budgets` highest scores among its `lengths`.

    scores: (B, Hk, T) float; entries beyond a sequence's length are ignored.
    lengths: (B,) int64. budgets: (B,) or (B, Hk) int64, at least 1, cut to the length.
    max_budget: the largest budget, as the host knows it; None asks the device and waits for it.
    Returns (B, Hk, max_budget) int64, ascending; -1 behind a sequence's own budget.

    Of equal scores the earlier position stays, on every device, so the same scores always keep the same set.
    """
    max_budget = int(budgets.max()) if max_budget is None else max_budget
    batch, heads, padded = scores.shape
    assert 1 <= max_budget <= padded, f"cannot keep {max_budget} of {padded} entries"
    positions = torch.arange(padded, device=scores.device)
    last = lengths[:, None, None]
    valid = positions < last
    scores = scores.masked_fill(~valid | scores.isnan(), -torch.inf)
    wanted = torch.minimum(budgets.reshape(batch, -1, 1), last).clamp(1, max_budget).expand(batch, heads, 1)

    cut = scores.topk(max_budget, dim=-1).values.gather(-1, wanted - 1)
    above = valid & (scores > cut)
    level = valid & (scores == cut)
    missing = wanted - above.sum(-1, keepdim=True)
    kept = above | (level & (level.cumsum(-1) <= missing))

    # Scatter each kept position to its rank; the dropped ones all land in one extra column that is cut off.
    rank = torch.where(kept, kept.cumsum(-1) - 1, max_budget)
    out = scores.new_full((batch, heads, max_budget + 1), -1, dtype=torch.int64)
    return out.scatter_(-1, rank, positions.expand_as(rank))[..., :max_budget]


def whole_number(name: str, value: object, minimum: int) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least `minimum`."""
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
        f"{name} is {value!r}; allowed is an integer of at least {minimum}.",
    )


def _given(kv: LayerKV, need: str) -> bool:
    if need == "query_stats":
        return kv.query_mean is not None and kv.query_cov is not None and kv.inv_freq is not None
    if need == "hidden_states":
        return kv.ratings is not None
    return getattr(kv, need) is not None
