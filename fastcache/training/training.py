"""What all trainers share: steps that are the same whenever they are done, a state to go on from, and the progress."""

from __future__ import annotations

import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache.config import StrictConfig
from fastcache.errors import CheckpointError

log = logging.getLogger(__name__)

LOG_EVERY = 20  # steps: reading a loss waits for the device
SAY_EVERY_S, SAVE_EVERY_S = 10, 60


class Training(ABC):
    """State of a run: parameters, optimiser, step. `state_file` holds it between starts; None keeps nothing.

    A subclass says what a step's loss is (`_loss`) and what else a state holds (`_more`, `_take`), and calls `_resume`
    once it is complete. config: has `steps`, and `rate(step)`, the learning rate of each. identity: what beside it a
    saved state must agree on to be continued, as for JSON.
    """

    def __init__(
        self,
        config: StrictConfig,
        identity: Mapping[str, Any],
        parameters: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
        state_file: Path | None,
    ) -> None:
        self.config, self.parameters, self.optimiser = config, parameters, optimiser
        self.identity = json.dumps(
            {"trainer": type(self).__name__, "config": config.to_dict(), **identity}, sort_keys=True
        )
        self.state_file = state_file
        self.device = next(iter(parameters.values())).device
        self.step, self.losses = 0, []

    def run(self, stop_after_s: float | None = None) -> bool:
        """Train to the last step; False if `stop_after_s` came first (the state is saved and can go on)."""
        deadline = None if stop_after_s is None else time.perf_counter() + stop_after_s
        return all(self._repeat(what, counts, one, deadline) for what, counts, one in self._work())

    def _work(self) -> Iterator[tuple[str, Callable[[], tuple[int, int]], Callable[[], None]]]:
        """What is done one by one: its name, how many are done and are to do, and what does one."""
        yield "step", lambda: (self.step, self.config.steps), self._one_step

    def _repeat(
        self,
        what: str,
        counts: Callable[[], tuple[int, int]],
        one: Callable[[], None],
        deadline: float | None,
    ) -> bool:
        began = said = saved = time.perf_counter()
        done, total = counts()
        first = done
        while done < total:
            one()
            now = time.perf_counter()
            over = self._is_over(now - began)
            done, total = counts()
            if now - said > SAY_EVERY_S or done == total:
                left = (now - began) / (done - first) * (total - done)
                log.info("%s %d of %d  %s  %.0f s left", what, done, total, self._latest(), left)
                said = now
            stop = deadline is not None and now > deadline and self.step < self.config.steps
            if stop or now - saved > SAVE_EVERY_S:
                self.save()
                saved = now
            if stop:
                return False
            if over:
                break
        return True

    def _is_over(self, elapsed: float) -> bool:
        """Whether a run ends before its last step."""
        return False

    def _one_step(self) -> None:
        loss, parts = self._loss()
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimiser.step()
        self.step += 1
        self._note(parts)

    @abstractmethod
    def _loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Of this step, and its parts, detached."""

    def _note(self, parts: dict[str, Tensor]) -> None:
        if self.step % LOG_EVERY == 0 or self.step in (1, self.config.steps):
            self.losses.append({"step": self.step} | {name: round(float(x), 5) for name, x in parts.items()})

    def _latest(self) -> str:
        """The last losses that were noted, for the log."""
        return "  ".join(f"{name} {x:.4f}" for name, x in self.losses[-1].items() if name != "step")

    def save(self) -> None:
        """Write the state in one piece."""
        if self.state_file is None:
            return
        state = {
            "identity": self.identity,
            "step": self.step,
            "losses": self.losses,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimiser": self.optimiser.state_dict(),
            "more": self._more(),
        }
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.state_file.with_name(self.state_file.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, self.state_file)

    def _resume(self) -> bool:
        """Go on from the state, if there is one. Errors: `CheckpointError` for that of another run."""
        if self.state_file is None or not self.state_file.is_file():
            return False
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        if state["identity"] != self.identity:
            raise CheckpointError(
                f"{self.state_file} is the state of a run with other settings, text or model. Delete it to start anew, "
                "or give this run another output."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.losses = state["step"], state["losses"]
        self._take(state["more"])
        log.info("continuing at step %d from %s", self.step, self.state_file)
        return True

    def _more(self) -> dict[str, Any]:
        """What else a state holds."""
        return {}

    def _take(self, more: Mapping[str, Any]) -> None:
        """It again: of a trainer that keeps nothing else, nothing."""
        assert not more

    def record(self) -> dict[str, Any]:
        """How the parameters came to be, for the file that holds them; of many losses some twenty."""
        return {
            "config": self.config.to_dict(),
            "losses": self.losses[:: max(1, len(self.losses) // 20)] + self.losses[-1:],
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }
