"""Networks that merge the KV of pictures as well as of text, trained on albums of coloured shapes.

The same loss as on text: what the frozen model says over the merged cache against the full one. Here it says it while
it reads a question and its answer, several of them over each context.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastcache.compression.transform import Spans
from fastcache.errors import ModelFolderError
from fastcache.models.config import read_json
from fastcache.models.llava import Llava
from fastcache.training.distil import divergence, merged_caches
from fastcache.training.frozen import Cache, FrozenModel
from fastcache.training.networks import IMAGES, TEXT
from fastcache.training.shapes_data import Batch, batch, normalise
from fastcache.training.shapes_model import IMAGE_ID, PAD_ID, vocabulary
from fastcache.training.trainer import CALIBRATION_WINDOWS, TrainConfig, Trainer

ASKED = 6  # questions over each context


class ShapesCompressorTrainer(Trainer):
    """`config`'s lengths do not apply: contexts have one to `pictures` pictures in turn, `batch_size` contexts a step.

    Errors: `ModelFolderError` for a model without the words of `fastcache train-shapes`.
    """

    kinds: ClassVar[tuple[str, ...]] = TEXT + IMAGES

    def __init__(
        self,
        frozen: FrozenModel,
        config: TrainConfig,
        state_file: Path | None,
        pictures: int,
        model_id: str = "",
    ) -> None:
        check_model(frozen)
        self.pictures = pictures
        self.side = round(frozen.model.config.vision.tokens_per_image**0.5)
        super().__init__(frozen, [], config, state_file, model_id)

    def _calibrate(self) -> None:
        caches, spans, _ = self._context("calibration", CALIBRATION_WINDOWS, self.pictures)
        self.networks.normalise(caches, self.frozen.model.cos_sin, spans)

    def _loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        frozen, pictures = self.frozen, 1 + self.step % self.pictures
        caches, spans, made = self._context(f"step {self.step}", self.config.batch_size, pictures)
        merged = merged_caches(frozen, self.networks, caches, spans)
        slots, length = made.slots.flatten(0, 1), made.context.shape[1]
        with torch.no_grad():
            full = frozen.student(slots, length, _repeated(caches, ASKED))
        ours = frozen.student(slots, length, _repeated(merged, ASKED))
        said = (slots != PAD_ID).flatten()  # padding says nothing
        rows = [([h[said] for h in hidden], logits[said]) for hidden, logits in (full, ours)]
        return divergence(*rows, self.config.hidden_weight)

    def _context(self, seed: str, albums: int, pictures: int) -> tuple[list[Cache], Spans, Batch]:
        """The caches of as many contexts, where the pictures are in each, and what is asked."""
        seed = f"compressor/{self.config.seed}/{seed}"
        made = batch("train", seed, albums, pictures, ASKED, self.side).to(self.device)
        with torch.no_grad():
            embedded = self.frozen.model.embed_pictures(normalise(made.pixels))
        length, each = made.context.shape[1], self.side**2
        caches = self.frozen.teacher(made.context, length, pictures=embedded).caches
        starts = (made.context[0] == IMAGE_ID).nonzero().flatten()[::each].tolist()
        return caches, tuple((start, each) for start in starts), made

    def record(self) -> dict[str, Any]:
        return super().record() | {"pictures": "fastcache.shapes, split train"}


def check_model(frozen: FrozenModel) -> None:
    config = frozen.model.config
    known = isinstance(frozen.model, Llava) and config.vision.image_token_id == IMAGE_ID
    if not known or config.vocab_size < len(vocabulary()) or config.vision.class_token:
        raise ModelFolderError(
            "networks are trained on shapes for the model that `fastcache train-shapes` makes, and this folder holds "
            "another. Give that folder, or train on text (--text)."
        )


def _repeated(caches: list[Cache], count: int) -> list[Cache]:
    """Each context's cache once for each of its questions."""
    return [(k.repeat_interleave(count, 0), v.repeat_interleave(count, 0)) for k, v in caches]


def pictures_of(model: str) -> int:
    """The most pictures in a prompt that the model of this folder was trained on. Errors: `ModelFolderError`."""
    record = Path(model) / "training.json"
    if not record.is_file():
        raise ModelFolderError(
            f"{model} has no training.json, so it is no model of `fastcache train-shapes`. Give one, or train on text "
            "(--text)."
        )
    return int(read_json(record)["config"]["most_pictures"])
