"""Pictures of coloured shapes on a grid, drawn from a seed. Imports no torch.

A layout says which shape of which colour is in which cell; a drawing of it also has a size, a place inside the cell
and a shade of the colour for each shape. Whether a layout is for training or held out is decided by its digest
alone, so no layout is ever in both, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from fastcache.config import one_of

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 44),
    "blue": (38, 80, 214),
    "yellow": (240, 210, 30),
    "purple": (140, 50, 180),
    "orange": (250, 130, 20),
}
SPLITS = ("train", "heldout")
HELD_OUT_OF = 8  # one layout of this many is held out
GRID = 5  # cells along each edge
PICTURE = 80  # pixels along each edge
FEWEST, MOST = 3, 6  # shapes in a picture
SMALLEST, LARGEST = 0.62, 0.92  # of a shape, in cells
SHADE = 18  # how far a colour strays, in levels of 255
_FINER = 3  # drawn this much larger and scaled down, so that edges are smooth


@dataclass(frozen=True)
class Thing:
    """One shape. `row` and `column` count from 1, from the top left."""

    shape: str
    colour: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """Things in reading order, and the seed of everything about their drawing that no question asks for."""

    things: tuple[Thing, ...]
    drawing_seed: str

    def count(self, **what: str) -> int:
        """How many things have these attributes, for instance shape="circle"."""
        return sum(all(getattr(thing, k) == v for k, v in what.items()) for thing in self.things)

    def draw(self) -> Image.Image:
        """The picture, RGB, `PICTURE` pixels square; the same for the same scene."""
        rng = random.Random(self.drawing_seed)
        grey = rng.randint(225, 250)
        size = PICTURE * _FINER
        picture = Image.new("RGB", (size, size), (grey,) * 3)
        pen = ImageDraw.Draw(picture)
        for thing in self.things:
            _draw(pen, thing, size / GRID, rng)
        return picture.resize((PICTURE, PICTURE), Image.Resampling.BOX)


def scene(split: str, seed: str) -> Scene:
    """A scene of `split`, the same for the same seed. Errors: `UnknownName`."""
    one_of("split", split, SPLITS)
    rng = random.Random(f"{seed}/scene")
    while True:
        cells = sorted(rng.sample(range(GRID * GRID), rng.randint(FEWEST, MOST)))
        things = tuple(
            Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), cell // GRID + 1, cell % GRID + 1)
            for cell in cells
        )
        if split_of(things) == split:
            return Scene(things, f"{seed}/drawing")


def split_of(things: tuple[Thing, ...]) -> str:
    """Where a layout belongs."""
    digest = hashlib.sha256(repr([(t.shape, t.colour, t.row, t.column) for t in things]).encode()).digest()
    return SPLITS[int.from_bytes(digest[:4], "big") % HELD_OUT_OF == 0]


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, cell: float, rng: random.Random) -> None:
    """At a random size, wherever in its cell it fits."""
    size = rng.uniform(SMALLEST, LARGEST) * cell
    left = (thing.column - 1) * cell + rng.uniform(0, cell - size)
    top = (thing.row - 1) * cell + rng.uniform(0, cell - size)
    right, bottom, third = left + size, top + size, size / 3
    fill = tuple(min(255, max(0, level + rng.randint(-SHADE, SHADE))) for level in COLOURS[thing.colour])
    if thing.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill)
    elif thing.shape == "square":
        pen.rectangle((left, top, right, bottom), fill)
    elif thing.shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill)
    else:
        pen.rectangle((left + third, top, right - third, bottom), fill)
        pen.rectangle((left, top + third, right, bottom - third), fill)
