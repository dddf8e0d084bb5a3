"""What is asked about a scene, and the exact answers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fastcache.shapes.scene import COLOURS, SHAPES, Scene

KINDS = ("colour", "count", "where")
COLUMNS = "abcde"  # cells are named as on a chessboard, rows counted from the top


@dataclass(frozen=True)
class Question:
    """`kind`: one of `KINDS`. `text` ends in the word that is asked about; `answer` is the only right one."""

    kind: str
    text: str
    answer: str


def questions(scene: Scene, kind: str) -> list[Question]:
    """Every question of a kind that has one right answer, in a fixed order."""
    return {"colour": _colours, "count": _counts, "where": _places}[kind](scene)


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _colours(scene: Scene) -> list[Question]:
    return [
        Question("colour", f"what colour is the {thing.shape}", thing.colour)
        for thing in scene.things
        if scene.count(shape=thing.shape) == 1
    ]


def _counts(scene: Scene) -> list[Question]:
    """Of every shape, also those that are not there, and of every colour that is."""
    asked = [(f"how many {plural(shape)}", scene.count(shape=shape)) for shape in SHAPES]
    present = [colour for colour in COLOURS if scene.count(colour=colour)]
    asked += [(f"how many are {colour}", scene.count(colour=colour)) for colour in present]
    return [Question("count", text, str(number)) for text, number in asked]


def _places(scene: Scene) -> list[Question]:
    return [
        Question("where", f"where is the {t.colour} {t.shape}", f"{COLUMNS[t.column - 1]} {t.row}")
        for t in scene.things
        if scene.count(shape=t.shape, colour=t.colour) == 1
    ]
