"""Synthetic retrieval in the manner of RULER (arXiv:2404.06654): facts in a long context, asked for afterwards.

Seeded: an item depends on the seed, the task and its number alone. Imports no torch. Lengths are tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from fastcache.bench.quality.texts import Prose
from fastcache.config import require

Encode = Callable[[str], list[int]]

NAMES = ("Alice", "Bruno", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karen",
         "Louis")  # fmt: skip
WORDS = ("violin", "lantern", "marble", "pepper", "anchor", "ribbon", "candle", "copper", "velvet", "thunder",
         "garden", "pencil", "silver", "window", "butter", "desert")  # fmt: skip
COUNTRIES = ("Brazil", "Norway", "Egypt", "Japan", "Canada", "Kenya", "Chile", "Poland", "India", "Mexico",
             "Peru", "Greece", "Turkey", "Finland", "Morocco", "Vietnam")  # fmt: skip
ANIMALS = ("parrot", "tiger", "rabbit", "donkey", "monkey", "turtle", "falcon", "goat", "camel", "beaver",
           "wolf", "horse", "penguin", "lizard", "otter", "zebra")  # fmt: skip


@dataclass(frozen=True)
class Question:
    """`prompt` ends where the answer begins; both are token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Item:
    """One context and what is asked of it after it has been compressed."""

    context: list[int]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, a question, the beginning of its answer, and the rest of it."""

    sentence: str
    question: str
    prefix: str
    answer: str


def item(task: str, number: int, context: int, seed: int, prose: Prose, encode: Encode) -> Item:
    """Item `number` of a task, its context of at most `context` tokens, and near it. Tasks: the keys of `TASKS`.

    Errors: `ConfigError` for a context too short to hide anything in.
    """
    rng = random.Random(f"{seed}/{task}/{number}")
    return TASKS[task](rng, context, prose, encode)


def four_facts(rng: random.Random) -> list[Fact]:
    """Four facts worded differently, so that no two questions fit one of them."""
    name, word, key = rng.choice(NAMES), rng.choice(WORDS), rng.randrange(10_000, 100_000)
    country, animal = rng.choice(COUNTRIES), rng.choice(ANIMALS)
    return [
        Fact(
            f"The secret word of {name} is {word}.",
            f"What is the secret word of {name}?",
            f"The secret word of {name} is",
            word,
        ),
        Fact(
            f"The pass key is {key}. Remember it: {key} is the pass key.",
            "What is the pass key?",
            "The pass key is",
            str(key),
        ),
        Fact(
            f"The treasure of the old king is buried in {country}.",
            "In which country is the treasure of the old king buried?",
            "The treasure of the old king is buried in",
            country,
        ),
        Fact(
            f"The captain of the ship always travels with a {animal}.",
            "With which animal does the captain of the ship travel?",
            "The captain of the ship always travels with a",
            animal,
        ),
    ]


def needles4(rng: random.Random, context: int, prose: Prose, encode: Encode) -> Item:
    """Four facts at random places in prose, all four asked for."""
    return _hide(rng, four_facts(rng), context, prose, encode)


def needle(rng: random.Random, context: int, prose: Prose, encode: Encode) -> Item:
    """One fact at a random place in prose (RULER's niah_single)."""
    return _hide(rng, [rng.choice(four_facts(rng))], context, prose, encode)


def kv_lookup(rng: random.Random, context: int, prose: Prose, encode: Encode) -> Item:
    """A list of names with numbers, four of which are asked for (RULER's niah_multikey, without any filler)."""
    pairs: dict[str, int] = {}
    lines, used = ["Room numbers:"], 8
    while used < context:
        who = f"{rng.choice(WORDS)} {rng.choice(ANIMALS)}"
        if who in pairs:
            continue
        number = rng.randrange(100, 1000)
        line = f"The {who} is in room {number}."
        used += len(encode("\n" + line))
        if used <= context:
            pairs[who] = number
            lines.append(line)
    require(
        len(pairs) >= 4,
        f"a list of {context} tokens holds {len(pairs)} pairs, four are asked for; make it longer.",
    )
    asked = [
        Fact("", f"In which room is the {who}?", f"The {who} is in room", str(pairs[who]))
        for who in rng.sample(sorted(pairs), 4)
    ]
    return Item(encode("\n".join(lines)), tuple(_question(fact, encode) for fact in asked))


def _hide(rng: random.Random, facts: list[Fact], context: int, prose: Prose, encode: Encode) -> Item:
    room = context - sum(len(encode(" " + fact.sentence)) for fact in facts)
    document = rng.choice(prose.sentences)
    start, filler, used = rng.randrange(len(document)), [], 0
    while True:
        sentence = document[(start + len(filler)) % len(document)]
        used += len(encode(" " + sentence))
        if used > room:
            break
        filler.append(sentence)
    require(
        len(filler) > len(facts),
        f"a context of {context} tokens holds {len(filler)} sentences of the prose, too few to hide {len(facts)} facts "
        "between them; ask for a longer one.",
    )
    places = sorted(rng.sample(range(1, len(filler)), len(facts)), reverse=True)
    order = list(facts)
    rng.shuffle(order)
    for place, fact in zip(places, order, strict=True):
        filler.insert(place, fact.sentence)
    return Item(encode(" ".join(filler)), tuple(_question(fact, encode) for fact in facts))


def _question(fact: Fact, encode: Encode) -> Question:
    return Question(
        encode(f"\n\nQuestion: {fact.question}\nAnswer: {fact.prefix}"), encode(f" {fact.answer}")
    )


TASKS = {"needles4": needles4, "needle": needle, "kv_lookup": kv_lookup}
