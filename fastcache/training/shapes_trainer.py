"""Training of the shapes model, from random weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.config import StrictConfig, positive_int, require
from fastcache.engine.resolve import resolve_device
from fastcache.shapes.scene import GRID
from fastcache.training.shapes_data import NAMES, SLOT, Batch, batch, normalise, packing
from fastcache.training.shapes_judge import accuracy
from fastcache.training.shapes_model import PAD_ID, ShapesModelConfig, build, encode, load, save
from fastcache.training.training import Training

NAMING_SCALE = 8.0  # of a patch's likeness to a word, before the softmax


@dataclass(frozen=True)
class ShapesTrainConfig(StrictConfig):
    """What decides the result. A step has albums of up to `most_pictures` pictures, `pictures_per_step` in all,
    and `questions_per_picture` questions for each picture. Three stages, from the easy to the whole:

    - `align_steps`: tower and projector learn to name what each patch shows, in the language model's words.
    - `coarse_steps`: the language model learns to answer, over one token for each cell of the grid: the mean of the
      cell's patches. Albums start with one picture and grow. The tower rests.
    - the rest of `steps`: all of it, over every patch; naming goes on with weight `align_weight`.

    The learning rate warms up over 50 steps and falls to a fiftieth along a cosine; AdamW, gradients clipped at norm 1.
    """

    model: ShapesModelConfig = field(default_factory=ShapesModelConfig)
    steps: int = 2200
    align_steps: int = 400
    coarse_steps: int = 1500
    align_weight: float = 0.3
    pictures_per_step: int = 24
    most_pictures: int = 1
    questions_per_picture: int = 6
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "pictures_per_step", "most_pictures", "questions_per_picture"):
            positive_int(name, getattr(self, name))
        require(
            min(self.align_steps, self.coarse_steps) >= 0
            and self.align_steps + self.coarse_steps < self.steps,
            f"align_steps is {self.align_steps}, coarse_steps {self.coarse_steps}; allowed are numbers of at least 0 "
            f"with a sum below steps, {self.steps}.",
        )
        numbers = (self.learning_rate, self.weight_decay, self.align_weight)
        require(
            all(math.isfinite(x) and x >= 0 for x in numbers) and self.learning_rate > 0,
            f"learning_rate, weight_decay, align_weight are {numbers}; allowed are numbers of at least 0.",
        )

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * cosine)


class ShapesTrainer(Training):
    """Of the whole model. `start`: the folder of an earlier run whose weights are the first ones, in place of random
    ones. Errors: `CheckpointError`, `ModelFolderError`."""

    def __init__(
        self, config: ShapesTrainConfig, state_file: Path | None, device: str, start: Path | None = None
    ) -> None:
        self.model = build(config.model, config.seed)
        self.start = load(self.model, start) if start is not None else None
        self.model.to(resolve_device(device)).train()
        parameters = dict(self.model.named_parameters())
        optimiser = torch.optim.AdamW(
            parameters.values(), config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        super().__init__(config, {"start": self.start}, parameters, optimiser, state_file)
        self.names = torch.tensor([token for part in NAMES for token in part], device=self.device)
        (self.picture_id,) = encode("picture")
        self._resume()

    def _loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self.device.type, torch.bfloat16):
            losses = self._losses()
        weight = self.config.align_weight if "answers" in losses else 1.0
        loss = sum(value if name == "answers" else weight * value for name, value in losses.items())
        return loss, {name: value.detach() for name, value in losses.items()}

    def _losses(self) -> dict[str, Tensor]:
        """Of this step's stage."""
        config = self.config
        after = self.step - config.align_steps
        coarse = 0 <= after < config.coarse_steps
        most = config.most_pictures
        if coarse:  # albums grow, one picture in the first part of this stage
            most = 1 + after * most // config.coarse_steps
        pictures = 1 + self.step % most
        albums, asked = self._albums(pictures), pictures * config.questions_per_picture
        seed, tokens = f"{config.seed}/{self.step}", GRID * GRID if coarse else None
        made = batch("train", seed, albums, pictures, asked, self.side, tokens).to(self.device)
        with torch.set_grad_enabled(not coarse):
            features = self._features(made.pixels)
        losses = {} if coarse else {"naming": self._naming(features, made.patches)}
        if after >= 0:
            wanted = made.targets >= 0
            first, hidden = self._read(self._cells(features) if coarse else features, made)
            logits = self.model.lm_head(hidden[wanted])
            losses["answers"] = F.cross_entropy(logits.float(), made.targets[wanted])
            if config.most_pictures > 1:
                losses["numbering"] = self._numbering(first, made)
        return losses

    def _numbering(self, first: Tensor, made: Batch) -> Tensor:
        """How well each patch, and each word of a question, says which picture it is of or about: by the number's word,
        after the first layer. first: (B, L, width)."""
        context = made.context.shape[1]
        images = made.context == self.model.config.image_token_id
        # The number stands before its picture, and is the third word of a question.
        markers = torch.where(made.context.roll(1, 1) == self.picture_id, made.context, 0)
        owner = markers.gather(
            1, (torch.arange(context, device=markers.device) * (markers > 0)).cummax(1).values
        )
        numbers = made.slots[:, :, 2:3].expand_as(made.slots)
        said = (made.slots != PAD_ID) & (torch.arange(SLOT, device=markers.device) >= 2)
        states = torch.cat((first[:, :context][images], first[:, context:].unflatten(1, (-1, SLOT))[said]))
        logits = self.model.lm_head(self.model.model.language_model.norm(states)).float()
        return F.cross_entropy(logits, torch.cat((owner[images], numbers[said])))

    def _albums(self, pictures: int) -> int:
        return max(1, self.config.pictures_per_step // pictures)

    def _cells(self, features: Tensor) -> Tensor:
        """(pictures, patches, width) -> (pictures, cells, width): the mean of each cell's patches."""
        square = features.transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.avg_pool2d(square, self.side // GRID).flatten(2).transpose(1, 2)

    @property
    def side(self) -> int:
        return round(self.config.model.image_tokens**0.5)

    def _features(self, pixels: Tensor) -> Tensor:
        """(pictures, tokens, width), as the language model gets them."""
        inner = self.model.model
        states = inner.vision_tower(normalise(pixels), output_hidden_states=True).hidden_states
        return inner.multi_modal_projector(states[-1][:, 1:])

    def _naming(self, features: Tensor, patches: Tensor) -> Tensor:
        """How well each patch's embedding is told apart by those of the words for what it shows. Patches of things and
        of nothing count alike, though there are fewer of the first."""
        words = self.model.get_input_embeddings()(self.names)
        parts = (NAMING_SCALE * F.linear(features, words)).float().split([len(part) for part in NAMES], -1)
        things = patches[..., 0] > 0
        losses = [
            F.cross_entropy(p.flatten(0, 1), patches[..., i].flatten(), reduction="none")
            for i, p in enumerate(parts)
        ]
        all_of_them = torch.stack(losses).mean(0).view(things.shape)
        return (all_of_them[things].mean() + all_of_them[~things].mean()) / 2

    def _read(self, features: Tensor, made: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states: after the first layer, (B, L, width), and of the slots after the last, (B, Q, SLOT, width)."""
        context, inner = made.context.shape[1], self.model.model
        ids = torch.cat((made.context, made.slots.flatten(1)), 1)
        x = self.model.get_input_embeddings()(ids).to(features.dtype)
        images = ids == self.model.config.image_token_id
        x = x.masked_scatter(images[..., None], features)
        visible, positions = packing(context, made.slots.shape[1], ids.device)
        bias = torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill(~visible, -torch.inf)
        read = inner.language_model(
            inputs_embeds=x,
            attention_mask=bias.expand(len(ids), -1, -1, -1),
            position_ids=positions,
            use_cache=False,
            output_hidden_states=True,
        )
        return read.hidden_states[1], read.last_hidden_state[:, context:].unflatten(1, (-1, SLOT))

    def answers(self, made: Batch) -> Tensor:
        """(B, Q, SLOT, vocab): what comes after each place of each question."""
        return self.model.lm_head(self._read(self._features(made.pixels), made)[1])

    def finish(self, folder: Path) -> dict[str, Any]:
        """Write the model, judge what was written, and write how it came to be; returns that record."""
        folder.mkdir(parents=True, exist_ok=True)
        save(self.model, folder)
        record = self.record() | {"start": self.start, "heldout_accuracy": accuracy(self)}
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if self.state_file is not None:
            self.state_file.unlink(missing_ok=True)
        return record
