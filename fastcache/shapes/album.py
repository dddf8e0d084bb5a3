"""Several pictures in one prompt, and questions that say which picture they mean. Imports no torch.

picture 1 <image> picture 2 <image> picture 3 <image> in picture 2 what colour is the circle red
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from fastcache.config import positive_int, require
from fastcache.shapes.questions import COLUMNS, KINDS, Question, plural, questions
from fastcache.shapes.scene import COLOURS, GRID, MOST, SHAPES, Scene, scene

IMAGE = "<image>"
MOST_PICTURES = 9  # pictures are numbered by one digit
_FIXED = "picture in what colour is the how many are where"


@dataclass(frozen=True)
class Asked:
    """A question about picture `picture` (counted from 1) of an album."""

    picture: int
    question: Question

    @property
    def prompt(self) -> str:
        return f"in picture {self.picture} {self.question.text}"


@dataclass(frozen=True)
class Album:
    """Scenes in their order, and the seed of what is asked about them."""

    scenes: tuple[Scene, ...]
    seed: str

    @property
    def context(self) -> str:
        """What stands before a question, one `<image>` for each picture."""
        return " ".join(f"picture {number} {IMAGE}" for number in range(1, len(self.scenes) + 1))

    def ask(self, count: int) -> list[Asked]:
        """`count` questions, the kinds and the pictures in turn, each drawn evenly from those of its kind.

        A picture that has no question of a kind (every shape of it is there twice) is asked another.
        """
        rng = random.Random(f"{self.seed}/questions")
        kinds, numbers = list(KINDS), list(range(1, len(self.scenes) + 1))
        rng.shuffle(kinds)
        rng.shuffle(numbers)
        asked = []
        for i in range(count):
            number, turn = numbers[i % len(numbers)], i // len(numbers) + i % len(numbers)
            possible = (
                questions(self.scenes[number - 1], kinds[(turn + j) % len(kinds)]) for j in range(len(kinds))
            )
            asked.append(Asked(number, rng.choice(next(found for found in possible if found))))
        return asked


def album(split: str, seed: str, pictures: int) -> Album:
    """An album of `split`, the same for the same arguments. Errors: `ConfigError`, `UnknownName`."""
    positive_int("pictures of an album", pictures)
    require(
        pictures <= MOST_PICTURES, f"an album of {pictures} pictures; allowed is at most {MOST_PICTURES}."
    )
    return Album(tuple(scene(split, f"{seed}/{i}") for i in range(pictures)), seed)


def words() -> list[str]:
    """Every word and sign of every prompt and answer, sorted."""
    numbers = [str(n) for n in range(max(GRID, MOST, MOST_PICTURES) + 1)]
    return sorted({*_FIXED.split(), *numbers, *COLUMNS, *SHAPES, *map(plural, SHAPES), *COLOURS})
