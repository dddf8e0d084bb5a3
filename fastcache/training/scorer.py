"""The regression behind method `kvzap`: pairs are collected, then all layers' networks are fitted at once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.config import StrictConfig, positive_int, require
from fastcache.training.pairs import PairFile, Teacher
from fastcache.training.text import Corpus, random_windows
from fastcache.training.training import Training


@dataclass(frozen=True)
class ScorerConfig(StrictConfig):
    """What decides the result, besides model and text. Of each of `windows` texts, min_context to context tokens long,
    `tokens` are drawn; AdamW, the learning rate falls along a cosine, gradients are clipped at norm 1. All as in the
    paper (arXiv:2601.07891), whose networks are an eighth as wide as its models, but for the weight decay: it has 4,500
    windows, and fewer are learned by heart without.
    """

    hidden: int = 128
    windows: int = 800
    min_context: int = 750
    context: int = 1250
    tokens: int = 500
    epochs: int = 15
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "windows", "min_context", "context", "tokens", "epochs", "batch_size"):
            positive_int(name, getattr(self, name))
        require(
            self.tokens <= self.min_context <= self.context,
            f"tokens is {self.tokens}, min_context {self.min_context}, context {self.context}; allowed is tokens <= "
            "min_context <= context.",
        )
        require(
            self.batch_size <= self.pairs,
            f"batch_size is {self.batch_size}; allowed is up to windows x tokens, {self.pairs}.",
        )
        require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"learning_rate is {self.learning_rate!r}; allowed is a positive number.",
        )
        require(
            math.isfinite(self.weight_decay) and 0 <= self.weight_decay * self.learning_rate < 1,
            f"weight_decay is {self.weight_decay!r}; allowed is from 0 to below 1 / learning_rate.",
        )

    @property
    def pairs(self) -> int:
        return self.windows * self.tokens

    @property
    def steps(self) -> int:
        """Optimiser steps: what fills no batch at an epoch's end is left out of it."""
        return self.epochs * (self.pairs // self.batch_size)

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        return self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2


class ScorerTrainer(Training):
    """Pairs, then networks. They live in files beside `output` between starts.

    Inputs and targets are in units of their own mean and spread, which `export` folds into plain weights.
    """

    def __init__(
        self, teacher: Teacher, corpora: Sequence[Corpus], config: ScorerConfig, output: Path, model_id: str
    ) -> None:
        self.teacher, self.corpora = teacher, corpora
        shape = teacher.model.config
        sizes = (shape.num_layers, shape.hidden_size, shape.num_kv_heads)
        parameters = first_weights(sizes, config, teacher.model.cos_sin.device)
        optimiser = torch.optim.AdamW(
            parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        identity = {"text": [corpus.sha256 for corpus in corpora], "model": model_id}
        super().__init__(config, identity, parameters, optimiser, output.with_suffix(".state"))
        self.collected, self._sum = 0, 0.0
        self._order: Tensor | None = None  # of this epoch's pairs
        self.constants: dict[str, Tensor] = {}
        self._resume()
        layers, hidden_size, kv_heads = sizes
        self.pairs = PairFile(output, layers, config.pairs, hidden_size, kv_heads)

    def _work(self) -> Iterator[tuple[str, Callable[[], tuple[int, int]], Callable[[], None]]]:
        yield "window", lambda: (self.collected, self.config.windows), self._collect_one
        self._prepare()
        yield from super()._work()

    def _collect_one(self) -> None:
        config, place = self.config, self.collected
        draw = torch.Generator().manual_seed(seeded(config, f"window {place}"))
        spread = config.context - config.min_context + 1
        length = config.min_context + int(torch.randint(spread, (1,), generator=draw))
        (ids,) = random_windows(self.corpora, length, 1, f"{config.seed}/text {place}")
        rows = torch.randperm(length, generator=draw)[: config.tokens].sort().values
        hidden, scores = self.teacher.pairs(ids.tolist(), rows.to(self.device))
        here = slice(place * config.tokens, (place + 1) * config.tokens)
        self.pairs.hidden[:, here], self.pairs.scores[:, here] = hidden.cpu(), scores.cpu()
        self.collected += 1

    def _prepare(self) -> None:
        """Measure means and spreads; bring the pairs to the device if they take less than half of what is free."""
        hidden, scores = self.pairs.hidden, self.pairs.scores
        if self.device.type == "cuda" and 2 * hidden.numel() * 2 < torch.cuda.mem_get_info(self.device)[0]:
            hidden = hidden.to(self.device)
        self._data = hidden, scores.to(hidden.device)
        moments = [
            [(x.float().mean(0), x.float().std(0).clamp(min=1e-6)) for x in data] for data in self._data
        ]
        for name, layers in zip(("input", "target"), moments, strict=True):
            for part, each in zip(("mean", "spread"), zip(*layers, strict=True), strict=True):
                self.constants[f"{name}.{part}"] = torch.stack(each).to(self.device)

    def folded(self) -> tuple[Tensor, ...]:
        """Weights (layers, out, in) and biases (layers, out) from raw hidden states to the logarithm of a score."""
        mean, spread, target_mean, target_spread = self.constants.values()
        first, first_bias, last, last_bias = self.parameters.values()
        first = first / spread[:, None]
        first_bias = first_bias - (first @ mean[..., None])[..., 0]
        return first, first_bias, last * target_spread[..., None], last_bias * target_spread + target_mean

    def _loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        epoch, within = divmod(self.step, config.pairs // config.batch_size)
        if within == 0 or self._order is None:
            generator = torch.Generator().manual_seed(seeded(config, f"epoch {epoch}"))
            self._order = torch.randperm(config.pairs, generator=generator)
        rows = self._order[within * config.batch_size :][: config.batch_size].to(self._data[0].device)
        hidden, scores = (data[:, rows].to(self.device).float() for data in self._data)
        first, first_bias, last, last_bias = self.folded()
        inner = F.gelu(torch.baddbmm(first_bias[:, None], hidden, first.mT))
        error = torch.baddbmm(last_bias[:, None], inner, last.mT) - scores
        loss = (error / self.constants["target.spread"][:, None]).square().mean()
        return loss, {"loss": loss.detach()}

    def _note(self, parts: dict[str, Tensor]) -> None:
        """losses: mean of each epoch, in squared spreads."""
        self._sum = self._sum + parts["loss"]
        per_epoch = self.config.pairs // self.config.batch_size
        if self.step % per_epoch == 0:
            self.losses.append(round(float(self._sum) / per_epoch, 5))
            self._sum = 0.0

    def _latest(self) -> str:
        return f"loss {self.losses[-1]:.4f}" if self.losses else ""

    @torch.no_grad()
    def export(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Plain weights by checkpoint name, on the CPU. What rounding takes from a weight, times the mean of what it
        multiplies, goes to the bias: hidden states have means far larger than their spread."""
        first, first_bias, last, last_bias = self.folded()
        lost = first - first.to(dtype).float()
        first_bias = first_bias + (lost @ self.constants["input.mean"][..., None])[..., 0]
        tensors = zip(self.parameters, (first, first_bias, last, last_bias), strict=True)
        return {
            f"layers.{layer}.{name}": each.to(dtype).cpu().clone()
            for name, stacked in tensors
            for layer, each in enumerate(stacked)
        }

    def _more(self) -> dict[str, Any]:
        return {"collected": self.collected, "sum": float(self._sum)}

    def _take(self, more: Mapping[str, Any]) -> None:
        self.collected, self._sum = more["collected"], more["sum"]

    def record(self) -> dict[str, Any]:
        text = {corpus.name: corpus.sha256 for corpus in self.corpora}
        return super().record() | {"losses": self.losses, "text": text}


def seeded(config: ScorerConfig, what: str) -> int:
    return random.Random(f"{config.seed}/{what}").getrandbits(48)


def first_weights(
    sizes: tuple[int, int, int], config: ScorerConfig, device: torch.device
) -> dict[str, Tensor]:
    """sizes: layers, inputs, outputs. By the checkpoint's names, all layers stacked."""
    layers, inputs, outputs = sizes
    width = config.hidden
    generator = torch.Generator().manual_seed(seeded(config, "networks"))
    shapes = {
        "0.weight": (width, inputs),
        "0.bias": (width,),
        "2.weight": (outputs, width),
        "2.bias": (outputs,),
    }
    found = {}
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.0
        drawn = scale * torch.randn(layers, *shape, generator=generator)
        found[name] = drawn.to(device).requires_grad_()
    return found
