"""One training job: model and text in, trained, judged, written with its record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastcache.compression.merge import make_plan, merge_layer
from fastcache.compression.merge_checkpoint import MergeCheckpoint, read_checkpoint, write_checkpoint
from fastcache.compression.registry import create
from fastcache.config import CompressionConfig
from fastcache.engine.resolve import resolve_device
from fastcache.errors import ConfigError
from fastcache.models.config import load_model_config
from fastcache.models.loader import load_model
from fastcache.models.ops import Ops
from fastcache.tokenizer import load_tokenizer
from fastcache.training.frozen import Cache, FrozenModel, Teacher
from fastcache.training.judge import Compress, continuation_quality, eviction
from fastcache.training.shapes_compressor import ShapesCompressorTrainer, pictures_of
from fastcache.training.text import even_windows, read_material
from fastcache.training.trainer import TrainConfig, Trainer

log = logging.getLogger(__name__)

SAVED_DTYPE = torch.bfloat16
# Not cuDNN's attention: it makes a plan for each new length, and every step has one.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
RIVALS = ("streaming_llm", "random", "knorm", "keydiff", "snapkv")  # none needs training
QUERY_WINDOW = 64


class Job:
    """`text`: files to train on; none stands for albums of coloured shapes, on the model that is made for them.
    `source`: which code this is, for the record. Errors: `ModelFolderError`, `DatasetError`, `ConfigError`,
    `CheckpointError`.
    """

    def __init__(
        self,
        model: str,
        text: Sequence[Path],
        heldout: Path | None,
        output: Path,
        config: TrainConfig,
        device: str,
        dtype: str | None,
        source: Mapping[str, Any],
    ) -> None:
        if output.suffix != ".safetensors":
            raise ConfigError(f"output is {str(output)!r}; allowed is a name that ends in .safetensors.")
        self.output, self.config, self.source = output, config, source
        self.state_file = output.with_suffix(".state")
        self.device = resolve_device(device)
        name = dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        self.model_path, self.dtype = model, getattr(torch, name)
        shape = load_model_config(model, "auto")
        weights, self.weights = load_model(
            shape, model, "auto", self.dtype, self.device, shape.max_position_embeddings, 0, ops=Ops()
        )
        self.frozen = FrozenModel(weights)
        tokenizer, separator = load_tokenizer(model, required=True), min(shape.eos_token_ids, default=0)
        length = config.context + config.continuation
        self.corpora, self.heldout = read_material(text, heldout, tokenizer, separator, length)

    def run(
        self,
        contexts: Sequence[int],
        windows: int,
        stop_after_s: float | None = None,
        finish_within_s: float | None = None,
    ) -> dict[str, Any] | None:
        """Train, judge and write; returns the record, or None if `stop_after_s` came before the last step.

        finish_within_s: as many steps as fit, at most those of the configuration (see `Trainer.run`).
        """
        torch.backends.cuda.matmul.allow_tf32 = True
        model_id = f"{self.weights.sha256} {self.dtype}"
        with sdpa_kernel(ATTENTION):
            if self.corpora:
                trainer = Trainer(self.frozen, self.corpora, self.config, self.state_file, model_id)
            else:
                pictures = pictures_of(self.model_path)
                trainer = ShapesCompressorTrainer(
                    self.frozen, self.config, self.state_file, pictures, model_id
                )
            log.info("%d parameters", sum(p.numel() for p in trainer.networks.parameters.values()))
            if not trainer.run(stop_after_s=stop_after_s, finish_within_s=finish_within_s):
                return None
            return self._finish(trainer, contexts, windows)

    def _finish(self, trainer: Trainer, contexts: Sequence[int], windows: int) -> dict[str, Any]:
        """Write what was trained, then judge what was written; the state stays until that is done."""
        record = (
            trainer.record()
            | self.source
            | {
                "model": self.weights.to_dict() | {"source": Path(self.model_path).name},
                "dtype": str(self.dtype).removeprefix("torch."),
            }
        )
        trainer.save()
        tensors = trainer.networks.export(SAVED_DTYPE)
        write_checkpoint(self.output, tensors, self.config.layout, record)
        if self.heldout is not None:
            record["heldout"] = {
                "text": {self.heldout.name: self.heldout.sha256},
                "contexts": {str(n): self.judge(n, windows) for n in contexts},
            }
            write_checkpoint(self.output, tensors, self.config.layout, record)
        self.state_file.unlink(missing_ok=True)
        return record

    def judge(self, context: int, windows: int) -> dict[str, Any]:
        """The written file against methods that need no training, with equally many entries."""
        assert self.heldout is not None
        checkpoint = read_checkpoint(str(self.output))
        ids = even_windows(self.heldout, context + self.config.continuation, windows).to(self.device)
        kept = self.config.layout.kept(context)
        methods: dict[str, Compress] = {"mlp": self._merge(checkpoint)}
        for name in RIVALS:
            method = create(CompressionConfig(name))
            if method.applies_to(context, kept):
                methods[name] = eviction(method, kept)
        quality = continuation_quality(
            self.frozen, ids, context, methods, self.config.batch_size, min(QUERY_WINDOW, context)
        )
        for name, numbers in quality.items():
            log.info("context %d  %-14s %s", context, name, numbers)
        return quality

    def _merge(self, checkpoint: MergeCheckpoint) -> Compress:
        model, layout = self.frozen.model, self.config.layout
        nets = [checkpoint.nets(i, self.dtype, self.device) for i in range(model.config.num_layers)]

        def compress(teacher: Teacher) -> list[Cache]:
            def one(layer: int, keys: Tensor, values: Tensor) -> Cache:
                return merge_layer(keys, values, plan, nets[layer], layout, model.cos_sin)

            keys = teacher.caches[0][0]
            plan = make_plan([keys.shape[2]], [()], layout, self.device)
            return [one(layer, *cache) for layer, cache in enumerate(teacher.caches)]

        return compress
