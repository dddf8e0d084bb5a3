"""kvpress on transformers, as the oracle of what a method keeps, and the same layers as our methods see them.

One prefill serves all methods: `Recorder` runs in kvpress's own hook behind every attention layer, asks each
press what it would keep of the full cache, and leaves the cache whole for the next one. What our side needs
(rotated queries, their statistics, the attention mass) is recomputed here from the layer's input, so the
methods are compared without our engine.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from kvpress import (
    BasePress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from fastcache.compression.base import EvictionMethod, LayerKV, budget, select

RATIOS = (0.2, 0.5, 0.8, 0.9)

# Our name -> the press it must equal. None: no press keeps the same set, and the reason.
PRESSES: dict[str, Callable[[float], BasePress] | None] = {
    "expected_attention": lambda ratio: ExpectedAttentionPress(ratio),
    "expected_attention_eps": lambda ratio: ExpectedAttentionPress(ratio, epsilon=1e-2),
    "h2o": None,  # kvpress has only the normalised relative; the definition is tested by hand
    "keydiff": lambda ratio: KeyDiffPress(ratio),
    "knorm": lambda ratio: KnormPress(ratio),
    "kvzap": None,  # has trained weights; test_kvzap.py gives the press and the engine the same
    "kvzip": None,  # scores the whole model at once; test_kvzip.py has its own oracle
    "observed_attention": lambda ratio: ObservedAttentionPress(ratio),
    "random": None,  # no random generator is shared; the counts are compared
    "snapkv": lambda ratio: SnapKVPress(ratio),
    "streaming_llm": lambda ratio: StreamingLLMPress(ratio),
    "tova": lambda ratio: TOVAPress(ratio),
}
COMPARED = [name for name, press in PRESSES.items() if press]
NEED_ATTENTION = {"observed_attention"}


@dataclass
class RecordedLayer:
    """One attention layer after a prefill of one sequence, and what each (name, ratio) press keeps of it."""

    keys: Tensor  # (Hk, N, d)
    values: Tensor  # (Hk, N, d)
    unrotated_queries: Tensor  # (H, N, d)
    queries: Tensor  # (H, N, d)
    inv_freq: Tensor  # (d / 2,)
    kept: dict[tuple[str, float], Tensor] = field(default_factory=dict)  # (Hk, n_kept) ascending

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    @functools.cached_property
    def attention_mass(self) -> Tensor:
        """(H, N): causal softmax attention, summed over the queries."""
        keys = self.keys.repeat_interleave(len(self.queries) // len(self.keys), dim=0)
        logits = self.queries @ keys.transpose(-1, -2) / keys.shape[-1] ** 0.5
        future = torch.ones(self.length, self.length).triu(1).bool()
        return logits.masked_fill(future, -torch.inf).softmax(-1).sum(-2)

    def query_statistics(self, n_sink: int) -> tuple[Tensor, Tensor]:
        """(H, d) and (H, d, d): mean and covariance of the unrotated queries from position n_sink on."""
        queries = self.unrotated_queries[:, n_sink:]
        centred = queries - queries.mean(1, keepdim=True)
        return queries.mean(1), centred.transpose(-1, -2) @ centred / queries.shape[1]


@dataclass
class Recorder(BasePress):
    """A press that removes nothing and writes down what all `PRESSES` would keep, at all `RATIOS`."""

    layers: list[RecordedLayer] = field(default_factory=list)

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        record = _record(module, hidden_states, keys, values, kwargs["position_embeddings"])
        for name, ratio in itertools.product(COMPARED, RATIOS):
            weights = attentions if name in NEED_ATTENTION else None
            kept, _ = PRESSES[name](ratio).compress(module, hidden_states, keys, values, weights, kwargs)
            record.kept[name, ratio] = kept_positions(keys[0], kept[0])
        self.layers.append(record)
        return keys, values


def load_model(folder):
    """float32 and eager, because one of the presses reads the attention weights."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def record_prefill(model, token_ids: list[int]) -> list[RecordedLayer]:
    """Prefill one sequence; one record per layer."""
    recorder = Recorder()
    prefill(model, token_ids, recorder)
    return recorder.layers


@torch.no_grad()
def prefill(model, token_ids: list[int], press: BasePress) -> DynamicCache:
    """Prefill one sequence under a press, as its users do; returns the compressed cache."""
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=torch.tensor([token_ids]), past_key_values=cache)
    return cache


def kept_positions(full: Tensor, kept: Tensor) -> Tensor:
    """(Hk, n) ascending: where each kept key (Hk, n, d) stands in the full cache (Hk, N, d), bit by bit."""
    codes, order = _row_codes(full).sort(-1)
    assert (codes.diff(dim=-1) != 0).all(), "two keys of one head are equal"
    found = torch.searchsorted(codes, _row_codes(kept))
    return order.gather(-1, found).sort(-1).values


def _row_codes(rows: Tensor) -> Tensor:
    """(..., n, d) float32 -> (..., n) int64: a hash of the bits of each row's first eight numbers."""
    bits = rows[..., :8].contiguous().view(torch.int32).long()
    factors = torch.randint(-(2**62), 2**62, (8,), generator=torch.Generator().manual_seed(0))
    return (bits * factors).sum(-1)


def _record(module, hidden_states, keys, values, position_embeddings) -> RecordedLayer:
    queries = module.q_proj(hidden_states)[0].unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
    if hasattr(module, "q_norm"):
        queries = module.q_norm(queries)
    cos, sin = (table[0] for table in position_embeddings)
    first, second = queries.chunk(2, dim=-1)
    rotated = queries * cos + torch.cat([-second, first], dim=-1) * sin
    return RecordedLayer(keys[0], values[0], queries, rotated, module.rotary_emb.inv_freq)


def layer_kv(records: list[RecordedLayer], method: EvictionMethod, budgets: list[int]) -> LayerKV:
    """The same layer of several prefills as one batch, padded with NaN, with what `method` needs."""
    longest = max(record.length for record in records)

    def padded(tensors: list[Tensor]) -> Tensor:
        out = torch.full((len(tensors), tensors[0].shape[0], longest, *tensors[0].shape[2:]), torch.nan)
        for row, tensor in zip(out, tensors, strict=True):
            row[:, : tensor.shape[1]] = tensor
        return out

    fields = {}
    if "window_queries" in method.needs:
        fields["window_queries"] = torch.stack([r.queries[:, -method.window :] for r in records])
    if "attention_mass" in method.needs:
        fields["attention_mass"] = padded([r.attention_mass for r in records])
    if "replay_scores" in method.needs:  # any scores do: batches are compared with single prompts
        fields["replay_scores"] = padded(
            [r.attention_mass.unflatten(0, (len(r.keys), -1)).amax(1) for r in records]
        )
    if "hidden_states" in method.needs:  # likewise
        fields["ratings"] = padded([r.keys[..., 0] for r in records])
    if "query_stats" in method.needs:
        mean, cov = zip(*(r.query_statistics(method.n_sink) for r in records), strict=True)
        fields |= {"query_mean": torch.stack(mean), "query_cov": torch.stack(cov)}
        fields["inv_freq"] = records[0].inv_freq
    return LayerKV(
        layer=0,
        num_layers=1,
        keys=padded([r.keys for r in records]),
        values=padded([r.values for r in records]),
        lengths=torch.tensor([r.length for r in records]),
        budgets=torch.tensor(budgets),
        **fields,
    )


def keep(method: EvictionMethod, kv: LayerKV) -> tuple[Tensor, Tensor]:
    """Our scores (B, Hk, T) and kept positions (B, Hk, n)."""
    scores = method.score(kv)
    return scores, select(scores, kv.lengths, kv.budgets)


def differences(method: EvictionMethod, record: RecordedLayer, ratio: float) -> list[str]:
    """Where our kept sets of one layer differ from kvpress's at one ratio; empty if nowhere.

    With a budget below what it protects, kvpress keeps any part of that, because all of it ties at the top; so
    there both sides are only held to keeping nothing else.
    """
    kept, theirs = budget(record.length, ratio), record.kept[method.name, ratio]
    scores, ours = keep(method, layer_kv([record], method, [kept]))
    if kept < method.n_sink + method.window:
        both = torch.cat([ours[0], theirs])
        free = (both >= method.n_sink) & (both < record.length - method.window)
        return [f"unprotected {sorted(set(both[free].tolist()))}"] if free.any() else []
    return swaps(ours[0], theirs, scores[0])


def swaps(ours: Tensor, theirs: Tensor, scores: Tensor, tolerance: float = 4e-6) -> list[str]:
    """Differences between two kept sets (Hk, n) that rounding does not explain, one line per head.

    Entries may change places at the cut only where their scores (Hk, N) are equal to a relative `tolerance`: the
    order in which a machine adds up float32 products decides no more than that.
    """
    wrong = []
    for head, (one, other, row) in enumerate(zip(ours.tolist(), theirs.tolist(), scores, strict=True)):
        extra, lost = sorted(set(one) - set(other)), sorted(set(other) - set(one))
        if not extra and not lost:
            continue
        gap = (row[lost].max() - row[extra].min()).abs() if len(extra) == len(lost) else torch.inf
        if not gap <= tolerance * row[[*extra, *lost]].abs().max():
            wrong.append(f"head {head}: only ours {extra}, only kvpress {lost}, gap {gap}")
    return wrong
