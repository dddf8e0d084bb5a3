"""Training of a merging compressor on text."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastcache.compression.merge import MergeLayout
from fastcache.config import StrictConfig, positive_int, require
from fastcache.training.distil import distillation_loss
from fastcache.training.frozen import FrozenModel
from fastcache.training.networks import TEXT, MergeNetworks
from fastcache.training.text import Corpus, random_windows
from fastcache.training.training import Training

log = logging.getLogger(__name__)

CALIBRATION_WINDOWS = 8
WARM_UP = 20  # steps
STAY = 0.6  # share of the steps before the learning rate falls


@dataclass(frozen=True)
class TrainConfig(StrictConfig):
    """What decides the result, besides model and text. Lengths in tokens; each step draws its context length
    evenly from [min_context, context]. The learning rate warms up over `WARM_UP` steps, stays, and falls linearly to a
    hundredth over the last steps (Hu et al. 2024, arXiv:2404.06395): so a run may learn late how many steps it has.
    Adam, gradients clipped at norm 1.
    """

    factor: int = 5
    steps: int = 2000
    hidden: int = 128
    n_sink: int = 4
    recent: int = 0
    min_context: int = 256
    context: int = 768
    continuation: int = 128
    batch_size: int = 16
    learning_rate: float = 1e-3
    hidden_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "hidden", "min_context", "context", "continuation", "batch_size"):
            positive_int(name, getattr(self, name))
        require(
            self.n_sink + self.recent + self.factor <= self.min_context <= self.context,
            f"min_context is {self.min_context}; allowed is {self.n_sink + self.recent + self.factor} (one group) to "
            f"context, {self.context}.",
        )
        require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0 and self.hidden_weight >= 0,
            f"learning_rate is {self.learning_rate!r}, hidden_weight {self.hidden_weight!r}; allowed is a positive "
            "number, and one of at least 0.",
        )

    @property
    def layout(self) -> MergeLayout:
        return MergeLayout(self.factor, self.n_sink, self.recent, unrotated=True, base="mean")

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        stay = round(STAY * self.steps)
        fallen = max(0, step - stay) / max(1, self.steps - stay)
        return self.learning_rate * min(1.0, (step + 1) / WARM_UP) * (1 - 0.99 * fallen)


class Trainer(Training):
    """Of a merging compressor. `config.steps` becomes what a run with a time limit found room for; that many without a
    limit give the same networks. `kinds`: the networks'."""

    kinds: ClassVar[tuple[str, ...]] = TEXT

    def __init__(
        self,
        frozen: FrozenModel,
        corpora: Sequence[Corpus],
        config: TrainConfig,
        state_file: Path | None,
        model_id: str = "",
    ) -> None:
        self.frozen, self.corpora = frozen, corpora
        shape = frozen.model.config
        self.networks = MergeNetworks(
            shape.num_layers,
            shape.head_dim,
            config.hidden,
            config.layout,
            config.seed,
            frozen.model.cos_sin.device,
            self.kinds,
        )
        parameters = self.networks.parameters
        optimiser = torch.optim.Adam(parameters.values(), lr=config.learning_rate)
        identity = {"text": [corpus.sha256 for corpus in corpora], "model": model_id}
        super().__init__(config, identity, parameters, optimiser, state_file)
        if not self._resume():
            self._calibrate()

    def _calibrate(self) -> None:
        ids = self._windows("calibration", self.config.context, CALIBRATION_WINDOWS)
        caches = self.frozen.teacher(ids, self.config.context).caches
        self.networks.normalise(caches, self.frozen.model.cos_sin)

    def _windows(self, what: str, length: int, count: int) -> Tensor:
        windows = random_windows(self.corpora, length, count, f"{self.config.seed}/{what}")
        if self.device.type != "cuda":
            return windows
        return windows.pin_memory().to(self.device, non_blocking=True)  # else each step waits for the last

    def run(self, stop_after_s: float | None = None, finish_within_s: float | None = None) -> bool:
        """finish_within_s: where `STAY` of this time comes before `STAY` of the steps, there are fewer steps; and a run
        that nevertheless takes longer ends there."""
        self._finish_within_s = finish_within_s
        return super().run(stop_after_s)

    def _is_over(self, elapsed: float) -> bool:
        if self._finish_within_s is None:
            return False
        share = elapsed / self._finish_within_s
        if share >= STAY and self.step < round(STAY * self.config.steps):
            self.config = dataclasses.replace(self.config, steps=round(self.step / STAY))
            log.info("%.0f %% of the time is gone: %d steps in all", 100 * share, self.config.steps)
        return share > 1

    def _loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        spread = config.context - config.min_context + 1
        # The context length of a step is drawn like its windows: from the seed and the step's number alone.
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        context = config.min_context + int(torch.randint(spread, (1,), generator=draw))
        ids = self._windows(f"step {self.step}", context + config.continuation, config.batch_size)
        return distillation_loss(self.frozen, self.networks, ids, context, config.hidden_weight)

    def _more(self) -> dict[str, Any]:
        return {"steps": self.config.steps, "constants": self.networks.constants}

    def _take(self, more: Mapping[str, Any]) -> None:
        self.networks.constants = {name: t.to(self.device) for name, t in more["constants"].items()}
        self.config = dataclasses.replace(self.config, steps=more["steps"])

    def record(self) -> dict[str, Any]:
        text = {corpus.name: corpus.sha256 for corpus in self.corpora}
        return super().record() | {"steps": self.step, "text": text}
