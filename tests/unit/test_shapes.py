"""Pictures of shapes: what is drawn is what is answered, and nothing held out is trained on."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from fastcache.errors import ConfigError, UnknownName
from fastcache.shapes.album import album, words
from fastcache.shapes.questions import COLUMNS, KINDS, plural, questions
from fastcache.shapes.scene import COLOURS, GRID, PICTURE, SHAPES, Scene, Thing, scene, split_of

CELL = PICTURE // GRID


def seen(one: Scene) -> dict[tuple[int, int], str]:
    """The colour in each cell that is not empty, read from the pixels alone: the nearest of the colours."""
    pixels = np.asarray(one.draw()).astype(int)
    found = {}
    for row in range(GRID):
        for column in range(GRID):
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].reshape(-1, 3)
            vivid = cell[np.ptp(cell, axis=1) > 90]
            if len(vivid):
                middle = np.median(vivid, axis=0)
                name = min(COLOURS, key=lambda c: np.abs(middle - COLOURS[c]).sum())
                found[row + 1, column + 1] = name
    return found


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_picture_shows_its_things_and_nothing_else(split):
    for seed in range(40):
        one = scene(split, str(seed))
        assert seen(one) == {(t.row, t.column): t.colour for t in one.things}
        assert one.draw().tobytes() == scene(split, str(seed)).draw().tobytes()
        assert split_of(one.things) == split


def test_the_four_shapes_cover_different_parts_of_a_cell():
    covered = {}
    for shape in SHAPES:
        pixels = np.asarray(Scene((Thing(shape, "red", 3, 3),), "one").draw()).astype(int)
        inside = np.ptp(pixels, axis=2) > 90
        rows, columns = np.nonzero(inside)
        box = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        covered[shape] = box.mean()
    assert covered["square"] > 0.95 > covered["circle"] > 0.7
    assert 0.4 < covered["triangle"] < 0.65 and 0.45 < covered["cross"] < 0.7


def answer(one: Scene, text: str) -> str:
    """The right answer, worked out from the sentence alone."""
    if match := re.fullmatch(r"what colour is the (\w+)", text):
        (thing,) = [t for t in one.things if t.shape == match[1]]
        return thing.colour
    if match := re.fullmatch(r"how many are (\w+)", text):
        return str(sum(t.colour == match[1] for t in one.things))
    if match := re.fullmatch(r"how many (\w+)", text):
        return str(sum(plural(t.shape) == match[1] for t in one.things))
    match = re.fullmatch(r"where is the (\w+) (\w+)", text)
    (thing,) = [t for t in one.things if (t.colour, t.shape) == match.groups()]
    return f"{COLUMNS[thing.column - 1]} {thing.row}"


def test_every_question_has_exactly_its_answer():
    asked = [
        (one, q)
        for i in range(60)
        for one in [scene("train", f"q{i}")]
        for k in KINDS
        for q in questions(one, k)
    ]
    assert {q.kind for _, q in asked} == set(KINDS) and len(asked) > 500
    for one, q in asked:
        assert q.answer == answer(one, q.text)


@pytest.mark.parametrize("pictures", [1, 2, 3, 4])
def test_an_album_asks_every_kind_about_every_picture_and_repeats_itself(pictures):
    made = album("heldout", "a", pictures)
    asked = made.ask(3 * pictures)
    assert asked == album("heldout", "a", pictures).ask(3 * pictures)
    assert asked != album("heldout", "b", pictures).ask(3 * pictures)
    pairs = {(one.picture, one.question.kind) for one in asked}
    assert len(pairs) >= 3 * pictures - 1  # a picture may have no question of a kind, and is asked another
    assert made.context.count("<image>") == pictures
    known = set(words())
    for one in asked:
        said = f"{made.context.replace('<image>', '')} {one.prompt} {one.question.answer}"
        assert set(said.split()) <= known


def test_a_held_out_layout_is_none_of_training_whatever_the_seeds():
    def layouts(split):
        return {scene(split, f"{random.random()}").things for _ in range(150)}

    assert not layouts("train") & layouts("heldout")


def test_what_cannot_be_is_said():
    with pytest.raises(UnknownName, match="heldout"):
        scene("held-out", "0")
    with pytest.raises(ConfigError, match="at most 9"):
        album("train", "0", 10)
