"""One run of `train-scorer`: model and text in, networks fitted, judged on other text, written with their record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from fastcache.compression.base import budget
from fastcache.compression.kvzap import KVzapRater, read_scorer
from fastcache.compression.states import StateFit
from fastcache.compression.tensor_file import write_safetensors
from fastcache.engine.replay import replay_prompt
from fastcache.engine.resolve import resolve_device
from fastcache.errors import ConfigError
from fastcache.models.config import load_model_config
from fastcache.models.loader import load_model
from fastcache.tokenizer import load_tokenizer
from fastcache.training.job import ATTENTION
from fastcache.training.pairs import Teacher
from fastcache.training.scorer import ScorerConfig, ScorerTrainer
from fastcache.training.text import even_windows, read_material

log = logging.getLogger(__name__)

SAVED_DTYPE = torch.bfloat16
JUDGED_RATIOS = (0.5, 0.8)


class ScorerJob:
    """`source`: which code this is, for the record. Errors: `ModelFolderError`, `DatasetError`, `ConfigError`,
    `CheckpointError`."""

    def __init__(
        self,
        model: str,
        text: Sequence[Path],
        heldout: Path | None,
        output: Path,
        config: ScorerConfig,
        device: str,
        dtype: str | None,
        source: Mapping[str, Any],
    ) -> None:
        if output.suffix != ".safetensors":
            raise ConfigError(f"output is {str(output)!r}; allowed is a name that ends in .safetensors.")
        self.output, self.config = output, config
        self.device = resolve_device(device)
        name = dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        shape = load_model_config(model, "auto")
        tokenizer, separator = load_tokenizer(model, required=True), min(shape.eos_token_ids, default=0)
        self.corpora, self.heldout = read_material(text, heldout, tokenizer, separator, config.context)
        weights, info = load_model(
            shape, model, "auto", getattr(torch, name), self.device, shape.max_position_embeddings, 0
        )
        self.facts = {**source, "model": info.to_dict() | {"source": Path(model).name}, "dtype": name}
        self.teacher = Teacher(weights, replay_prompt(tokenizer), config.context)

    def run(self, judge_windows: int, stop_after_s: float | None = None) -> dict[str, Any] | None:
        """Train, judge and write; returns the record, or None if `stop_after_s` came before the last step."""
        model_id = f"{self.facts['model']['sha256']} {self.facts['dtype']}"
        trainer = ScorerTrainer(self.teacher, self.corpora, self.config, self.output, model_id)
        log.info("%d parameters", sum(p.numel() for p in trainer.parameters.values()))
        with sdpa_kernel(ATTENTION):
            if not trainer.run(stop_after_s):
                return None
            return self._finish(trainer, judge_windows)

    def _finish(self, trainer: ScorerTrainer, judge_windows: int) -> dict[str, Any]:
        """Write what was fitted, then judge what was written; the state stays until that is done."""
        trainer.save()
        record, tensors = trainer.record() | self.facts, trainer.export(SAVED_DTYPE)
        write_safetensors(self.output, tensors, {"record": record})
        if self.heldout is not None:
            record["heldout"] = self.judge(judge_windows)
            write_safetensors(self.output, tensors, {"record": record})
        trainer.state_file.unlink(missing_ok=True)
        trainer.pairs.remove()
        return record

    def judge(self, windows: int) -> dict[str, Any]:
        """The written file on text it never saw, beside KVzip itself."""
        model, length = self.teacher.model, self.config.context
        shape = model.config
        fit = StateFit(
            shape.num_layers, shape.hidden_size, shape.num_kv_heads, model.embed.dtype, self.device
        )
        rater = KVzapRater(str(self.output), read_scorer(str(self.output))[0], fit)
        told, true = [], []
        rows = torch.arange(length, device=self.device)
        for ids in even_windows(self.heldout, length, windows).tolist():
            hidden, scores = self.teacher.pairs(ids, rows)
            rated = [rater.rate(layer, states).cpu() for layer, states in enumerate(hidden)]
            told.append(torch.stack(rated).transpose(1, 2)), true.append(scores.cpu().transpose(1, 2))
        found = {"text": {self.heldout.name: self.heldout.sha256}, "windows": windows, "context": length}
        found |= agreement(torch.stack(told), torch.stack(true))
        log.info("held-out text: %s", found)
        return found


def agreement(told: Tensor, true: Tensor) -> dict[str, Any]:
    """How well `told` says what is `true`, both (windows, layers, Hk, N) logarithms of scores.

    r2: 1 - squared error / squared deviation from the head's own mean, averaged over layers and heads; r2_by_layer.
    r2_all: the same with one mean for all, as where heads compete. rank_correlation: Spearman's, within each window and
    head, averaged. overlap: by ratio, the share of a head's best entries, as many as stay, that `told` also chooses.
    """

    def r2(error: Tensor, deviation: Tensor, dims: tuple[int, ...]) -> Tensor:
        return 1 - error.square().sum(dims) / deviation.square().sum(dims)

    by_head = r2(told - true, true - true.mean((0, 3), keepdim=True), (0, 3))
    ranks = [x.argsort(-1).argsort(-1).double() for x in (told, true)]
    centred = [x - x.mean(-1, keepdim=True) for x in ranks]
    correlation = (centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))
    overlap = {}
    for ratio in JUDGED_RATIOS:
        kept = budget(true.shape[-1], ratio)
        chosen = [torch.zeros_like(x).scatter(-1, x.topk(kept).indices, 1.0) for x in (told, true)]
        overlap[str(ratio)] = round(float((chosen[0] * chosen[1]).sum(-1).mean()) / kept, 4)
    return {
        "r2": round(float(by_head.mean()), 4),
        "r2_by_layer": [round(float(x), 4) for x in by_head.mean(-1)],
        "r2_all": round(float(r2(told - true, true - true.mean(), (0, 1, 2, 3))), 4),
        "rank_correlation": round(float(correlation.mean()), 4),
        "overlap": overlap,
    }
