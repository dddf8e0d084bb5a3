"""Albums as tensors: pixels, prompts with their questions packed behind one context, and what is in each patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastcache.models.pictures import CLIP_MEAN, CLIP_STD
from fastcache.shapes.album import Album, Asked, album
from fastcache.shapes.questions import COLUMNS
from fastcache.shapes.scene import COLOURS, GRID, SHAPES, Scene
from fastcache.training.shapes_model import BOS_ID, EOS_ID, PAD_ID, encode

SLOT = 11  # tokens of the longest question with its answer and its end
# Words for what a patch shows, one of each row: a shape and a colour or nothing, the row and the column of its cell.
NAMES = (
    [PAD_ID, *encode(" ".join(SHAPES))],
    [PAD_ID, *encode(" ".join(COLOURS))],
    encode(" ".join(str(row) for row in range(1, GRID + 1))),
    encode(" ".join(COLUMNS)),
)


@dataclass(frozen=True)
class Batch:
    """B albums of n pictures, Q questions each.

    pixels: (B n, 3, size, size) uint8. patches: (B n, tokens, 4) int64, a word of each of `NAMES`. context: (B, N)
    ids with one placeholder for each image token. slots: (B, Q, SLOT) question, answer, end, padding. targets:
    (B, Q, SLOT), the answer token that follows each place, or -100.
    """

    pixels: Tensor
    patches: Tensor
    context: Tensor
    slots: Tensor
    targets: Tensor
    asked: list[list[Asked]]

    def to(self, device: torch.device) -> Batch:
        moved = (t.to(device) for t in (self.pixels, self.patches, self.context, self.slots, self.targets))
        return Batch(*moved, self.asked)


def batch(
    split: str, seed: str, albums: int, pictures: int, asked: int, side: int, image_tokens: int | None = None
) -> Batch:
    """Seeded; pictures have `side` patches along each edge, and as many tokens if `image_tokens` does not say less."""
    made = [album(split, f"{seed}/{i}", pictures) for i in range(albums)]
    scenes = [one for each in made for one in each.scenes]
    pixels = np.stack([np.asarray(one.draw()) for one in scenes]).transpose(0, 3, 1, 2)
    questions = [each.ask(asked) for each in made]
    pairs = [[_slot(one) for one in each] for each in questions]
    slots, targets = torch.tensor(pairs).unbind(2)
    return Batch(
        torch.from_numpy(np.ascontiguousarray(pixels)),
        torch.stack([_patches(one, side) for one in scenes]),
        torch.tensor([context_ids(each, image_tokens or side * side) for each in made]),
        slots,
        targets,
        questions,
    )


def context_ids(made: Album, image_tokens: int) -> list[int]:
    """The prompt before a question, expanded."""
    return [BOS_ID, *encode(made.context.replace("<image>", " ".join(["<image>"] * image_tokens)))]


def _slot(asked: Asked) -> tuple[list[int], list[int]]:
    question, answer = encode(asked.prompt), [*encode(asked.question.answer), EOS_ID]
    ids = question + answer
    targets = [-100] * (len(question) - 1) + answer
    return ids + [PAD_ID] * (SLOT - len(ids)), targets + [-100] * (SLOT - len(targets))


def _patches(scene: Scene, side: int) -> Tensor:
    """(side * side, 4): words of `NAMES` for each patch, row by row."""
    cells = torch.zeros(GRID, GRID, 4, dtype=torch.int64)
    cells[..., 2], cells[..., 3] = torch.arange(GRID)[:, None], torch.arange(GRID)
    for thing in scene.things:
        what = (1 + SHAPES.index(thing.shape), 1 + tuple(COLOURS).index(thing.colour))
        cells[thing.row - 1, thing.column - 1, :2] = torch.tensor(what)
    cell = torch.arange(side) * GRID // side
    return cells[cell[:, None], cell].flatten(0, 1)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 -> what CLIP's processor makes of it, float32."""
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255 - mean) / std


@cache
def packing(context: int, asked: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Questions side by side behind one context, each seeing the context and itself alone.

    Returns what is visible, (1, 1, L, L) bool, and positions (1, L), each question's going on from the context's.
    """
    length = context + asked * SLOT
    visible = torch.zeros(length, length, dtype=torch.bool, device=device)
    visible[:, :context] = True
    for start in range(context, length, SLOT):
        visible[start : start + SLOT, start : start + SLOT] = True
    positions = torch.cat((torch.arange(context), context + torch.arange(SLOT).repeat(asked)))
    return visible.tril()[None, None], positions[None].to(device)


def right(logits: Tensor, targets: Tensor) -> Tensor:
    """(..., SLOT, vocab), (..., SLOT) -> (...,) bool: every token of the answer is the likeliest."""
    return ((logits.argmax(-1) == targets) | (targets < 0)).all(-1)


def by_kind(outcomes: Tensor, asked: Sequence[Sequence[Asked]]) -> dict[str, list[bool]]:
    """Outcomes (B, Q) of the questions, by their kind."""
    found: dict[str, list[bool]] = {}
    for row, questions in zip(outcomes.tolist(), asked, strict=True):
        for good, one in zip(row, questions, strict=True):
            found.setdefault(one.question.kind, []).append(good)
    return found
