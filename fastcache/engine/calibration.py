"""Head budgets from KVzip: what share of plain texts each (layer, KV head) keeps when all share one budget."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np

from fastcache.compression.kvzip import KVzip, global_keep
from fastcache.config import require
from fastcache.engine.replay import ReplayPrompt, prefill_dense, replay_scores
from fastcache.models.llama import Llama


def head_shares(
    model: Llama, prompt: ReplayPrompt, contexts: Many[Many[int]], ratios: Many[float], max_positions: int
) -> np.ndarray:
    """(ratios, layers, kv_heads) float64: the share each head keeps, averaged over the contexts.

    The selection is KVzip's own, over all layers and heads (arXiv:2505.23416), with its defaults. Errors:
    `ConfigError` for a context whose repetition has no positions left.
    """
    method, found = KVzip(), []
    for context in contexts:
        need = len(context) + prompt.length(min(len(context), method.chunk_size))
        require(
            method.n_sink < len(context) and need <= max_positions,
            f"a text of {len(context)} tokens and its repetition take {need} positions; allowed is more than "
            f"{method.n_sink} tokens, and at most {max_positions} positions.",
        )
        cache = prefill_dense(model, context)
        scores = replay_scores(model, context, cache, prompt, method.n_sink, method.chunk_size)
        kept = [global_keep(scores, ratio, method.n_sink).double().mean(-1) for ratio in ratios]
        found.append([shares.cpu().numpy() for shares in kept])
    return np.mean(found, axis=0)
