"""Task `shapes`: several pictures of coloured shapes in one context, and questions with exact answers about them.

The pictures are held out (`fastcache.shapes`); the model made for them is trained by `fastcache train-shapes`, and any
other that reads pictures may be asked too. Imports no torch.
"""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from fastcache.bench.quality.metrics import paired
from fastcache.bench.quality.pair import Pair
from fastcache.bench.quality.retrieval import Item, Question
from fastcache.errors import UnsupportedCombination
from fastcache.shapes.album import IMAGE, Album, Asked, album
from fastcache.shapes.questions import KINDS

QUESTIONS = 6  # asked of each album
EXAMPLES = 6  # shown with their pictures: the first of as many albums
ANSWER = 4  # tokens an answer is given to end in


@dataclass(frozen=True)
class ShapesItem:
    """An album as an item, with its pictures and what is asked."""

    item: Item
    pictures: tuple[Image.Image, ...]
    asked: tuple[Asked, ...]


class ShapesReader:
    """Albums as token ids for one model. Errors: `UnsupportedCombination` for a model that reads text alone."""

    def __init__(self, llm: Any) -> None:
        self.tokenizer, facts = llm.tokenizer, llm.describe()
        self.image_token, self.each = facts["image_token_id"], facts["tokens_per_image"]
        if self.image_token is None:
            raise UnsupportedCombination(
                "quality task 'shapes' asks about pictures, and this model reads text alone; name a model of the "
                "LlavaForConditionalGeneration architecture (`fastcache train-shapes` makes a small one)."
            )

    def item(self, number: int, pictures: int, seed: int) -> ShapesItem:
        """Album `number`, the same for the same arguments."""
        made: Album = album("heldout", f"quality/{seed}/{number}", pictures)
        context: list[int] = []
        for token in self.tokenizer.encode(made.context):
            context += [token] * (self.each if token == self.image_token else 1)
        assert context.count(self.image_token) == self.each * pictures, f"{IMAGE} is one token"
        asked = tuple(made.ask(QUESTIONS))
        questions = tuple(
            Question(self._plain(one.prompt), self._plain(one.question.answer)) for one in asked
        )
        return ShapesItem(Item(context, questions), tuple(one.draw() for one in made.scenes), asked)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def by_kind(
    items: Sequence[ShapesItem], full: Sequence[Sequence[bool]], ours: Sequence[Sequence[bool]]
) -> dict[str, Any]:
    """Accuracy of each kind of question, both caches; standard errors over the albums that were asked one."""
    found = {}
    for kind in KINDS:
        places = [[i for i, one in enumerate(each.asked) if one.question.kind == kind] for each in items]

        def means(outcomes: Sequence[Sequence[bool]], places: list[list[int]] = places) -> list[float]:
            pairs = zip(places, outcomes, strict=True)
            return [statistics.fmean(float(row[i]) for i in at) for at, row in pairs if at]

        if not any(places):
            continue
        found[kind] = {
            "questions": sum(map(len, places)),
            **paired("accuracy_full", means(full)),
            **paired("accuracy", means(ours)),
        }
    return found


def examples(pair: Pair, items: Sequence[ShapesItem]) -> list[dict[str, Any]]:
    """The first question of the first albums, each of another kind where it can be, with the answers of both caches."""
    shown = []
    for number, each in enumerate(items[:EXAMPLES]):
        wanted = KINDS[number % len(KINDS)]
        index = next((i for i, one in enumerate(each.asked) if one.question.kind == wanted), 0)
        question, asked = each.item.questions[index], each.asked[index]
        full, ours = pair.answers(each.item.context, [question.prompt], ANSWER, each.pictures)
        shown.append(
            {
                "picture": _png(each.pictures[asked.picture - 1]),
                "number": asked.picture,
                "of": len(each.pictures),
                "question": asked.question.text,
                "answer": asked.question.answer,
                "full": full[0],
                "given": ours[0],
            }
        )
    return shown


def _png(picture: Image.Image) -> str:
    """Base64; a PNG of few colours, small enough for a row."""
    buffer = io.BytesIO()
    picture.quantize(32).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
