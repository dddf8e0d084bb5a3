"""The training loop of a merging compressor: deterministic from its seed, resumable, one file at the end."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastcache.compression.merge import MergeLayout
from fastcache.config import StrictConfig, positive_int, require
from fastcache.errors import CheckpointError
from fastcache.training.distil import distillation_loss
from fastcache.training.frozen import FrozenModel
from fastcache.training.networks import TEXT, MergeNetworks
from fastcache.training.text import Corpus, random_windows

log = logging.getLogger(__name__)

CALIBRATION_WINDOWS = 8
WARM_UP = 20  # steps
LOG_EVERY = 20  # steps
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


class Trainer:
    """State of a run: networks, optimiser, step. `state_file` holds it between starts. `config.steps` becomes what a
    run with a time limit found room for; that many without a limit give the same networks. `kinds`: the networks'."""

    kinds: ClassVar[tuple[str, ...]] = TEXT

    def __init__(
        self, frozen: FrozenModel, corpora: Sequence[Corpus], config: TrainConfig, state_file: Path | None
    ) -> None:
        self.frozen, self.corpora, self.config, self.state_file = frozen, corpora, config, state_file
        text = [corpus.sha256 for corpus in corpora]
        # What a saved state must agree on to be continued.
        self.identity = json.dumps({"config": config.to_dict(), "text": text}, sort_keys=True)
        shape = frozen.model.config
        self.device = frozen.model.cos_sin.device
        self.networks = MergeNetworks(
            shape.num_layers,
            shape.head_dim,
            config.hidden,
            config.layout,
            config.seed,
            self.device,
            self.kinds,
        )
        self.optimiser = torch.optim.Adam(self.networks.parameters.values(), lr=config.learning_rate)
        self.step, self.losses = 0, []
        if state_file is not None and state_file.is_file():
            self._resume(state_file)
        else:
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

    def run(
        self, save_every: int = 500, stop_after_s: float | None = None, finish_within_s: float | None = None
    ) -> bool:
        """Train to the last step; False if `stop_after_s` came first (the state is saved and can go on).

        finish_within_s: where `STAY` of this time comes before `STAY` of the steps, there are fewer steps; and a run
        that nevertheless takes longer ends there.
        """
        started, first = time.perf_counter(), self.step
        while self.step < self.config.steps:
            self._one_step()
            elapsed = time.perf_counter() - started
            if finish_within_s is not None:
                self._shorten(elapsed / finish_within_s)
            if self.step % LOG_EVERY == 0 or self.step == self.config.steps:
                left = elapsed / (self.step - first) * (self.config.steps - self.step)
                parts = "  ".join(f"{name} {value:.4f}" for name, value in self.losses[-1].items())
                log.info("step %d of %d  %s  %.0f s left", self.step, self.config.steps, parts, left)
            stop = stop_after_s is not None and elapsed > stop_after_s and self.step < self.config.steps
            if stop or self.step % save_every == 0:
                self.save()
            if stop:
                return False
            if finish_within_s is not None and elapsed > finish_within_s:
                break
        return True

    def _shorten(self, share: float) -> None:
        """share: of the time that is gone."""
        if share >= STAY and self.step < round(STAY * self.config.steps):
            self.config = dataclasses.replace(self.config, steps=round(self.step / STAY))
            log.info("%.0f %% of the time is gone: %d steps in all", 100 * share, self.config.steps)

    def _loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Of this step, and its parts."""
        config = self.config
        spread = config.context - config.min_context + 1
        # The context length of a step is drawn like its windows: from the seed and the step's number alone.
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        context = config.min_context + int(torch.randint(spread, (1,), generator=draw))
        ids = self._windows(f"step {self.step}", context + config.continuation, config.batch_size)
        return distillation_loss(self.frozen, self.networks, ids, context, config.hidden_weight)

    def _one_step(self) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.rate(self.step)
        loss, parts = self._loss()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.networks.parameters.values(), 1.0)
        self.optimiser.step()
        self.step += 1
        # Reading a loss waits for the device.
        if self.step % LOG_EVERY == 0 or self.step in (1, self.config.steps):
            self.losses.append({name: round(float(value), 5) for name, value in parts.items()})

    def save(self) -> None:
        """Write the state in one piece."""
        if self.state_file is None:
            return
        state = {
            "identity": self.identity,
            "step": self.step,
            "steps": self.config.steps,
            "losses": self.losses,
            "parameters": {name: p.detach() for name, p in self.networks.parameters.items()},
            "constants": self.networks.constants,
            "optimiser": self.optimiser.state_dict(),
        }
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.state_file.with_name(self.state_file.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, self.state_file)

    def _resume(self, file: Path) -> None:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["identity"] != self.identity:
            raise CheckpointError(
                f"{file} is the state of a run with other settings or other text. Delete it to start anew, or give "
                "this run another output."
            )
        with torch.no_grad():
            for name, parameter in self.networks.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.networks.constants = {name: t.to(self.device) for name, t in state["constants"].items()}
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.losses = state["step"], state["losses"]
        self.config = dataclasses.replace(self.config, steps=state["steps"])
        log.info("continuing at step %d from %s", self.step, file)

    def record(self) -> dict[str, Any]:
        """How the networks came to be, for the file that holds them."""
        return {
            "config": self.config.to_dict(),
            "steps": self.step,
            "losses": self.losses[:: max(1, len(self.losses) // 20)] + self.losses[-1:],
            "text": {corpus.name: corpus.sha256 for corpus in self.corpora},
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }
