"""The loss of a merging compressor: what the model says over the merged cache against the full one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.compression.merge import make_plan, merge_layer
from fastcache.compression.transform import Spans
from fastcache.training.frozen import Cache, FrozenModel
from fastcache.training.networks import MergeNetworks


def merged_caches(
    frozen: FrozenModel, networks: MergeNetworks, caches: list[Cache], spans: Spans = ()
) -> list[Cache]:
    """Each layer's cache with its groups merged, differentiable in the networks' parameters. All layers at once:
    one by one, launching their small operations takes a GPU's host longer than the model itself. spans: of pictures."""
    keys, values = (torch.stack(each) for each in zip(*caches, strict=True))
    plan = make_plan([keys.shape[-2]], [spans], networks.layout, keys.device)
    merged = merge_layer(keys, values, plan, networks.fold(), networks.layout, frozen.model.cos_sin)
    return list(zip(*merged, strict=True))


def distillation_loss(
    frozen: FrozenModel, networks: MergeNetworks, ids: Tensor, context: int, hidden_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Self-supervised: KL(full cache || merged cache) of the next token, and how far hidden states moved.

    ids: (B, N + C) windows of text, N = `context`. The hidden term is the squared distance relative to the
    squared norm, averaged over continuation tokens and layers. Returns the loss and its parts, detached.
    """
    teacher = frozen.teacher(ids, context)
    caches = merged_caches(frozen, networks, teacher.caches)
    hidden, logits = frozen.student(ids[:, context:], context, caches)
    return divergence((teacher.hidden, teacher.logits), (hidden, logits), hidden_weight)


Outcome = tuple[list[Tensor], Tensor]  # hidden states of each layer (rows, n), logits (rows, vocab)


def divergence(full: Outcome, ours: Outcome, hidden_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """KL of the next token plus the weighted hidden term, and both parts, detached; means over rows."""
    (full_hidden, full_logits), (hidden, logits) = full, ours
    kl = F.kl_div(
        logits.float().log_softmax(-1),
        full_logits.float().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    moved = torch.stack(
        [
            ((ours.float() - theirs.float()).square().sum(-1) / theirs.float().square().sum(-1)).mean()
            for ours, theirs in zip(hidden, full_hidden, strict=True)
        ]
    ).mean()
    return kl + hidden_weight * moved, {"kl": kl.detach(), "hidden": moved.detach()}
