"""Where prompts come from, one maker per workload. Imports no torch.

Everything is drawn from a stream seeded with the cell's seed, the workload and the request's number, so a
prompt does not depend on what else was made before it.
"""

from __future__ import annotations

import hashlib
import platform
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastcache.bench.datasets import read_prompts, read_trace
from fastcache.bench.workloadconfig import WorkloadConfig
from fastcache.errors import DatasetError, UnsupportedCombination

TOPICS = ("weather", "music", "bread", "trains", "rivers", "chess", "gardens", "maps", "birds", "clocks")
ASKS = ("What do you know about", "Tell me more about", "Why do people care for", "How would you explain")


@dataclass(frozen=True)
class Vocabulary:
    """What prompts need of a tokenizer: the number of ids, and text to ids (None: there is no tokenizer).

    `image_token_id`, `tokens_per_image`: the placeholder, and how many stand for a picture; None for a model
    that reads text alone.
    """

    size: int
    encode: Callable[[str], list[int]] | None
    image_token_id: int | None = None
    tokens_per_image: int | None = None


@dataclass(frozen=True)
class PlannedRequest:
    """`images`: PIL pictures, whose placeholders are in the ids, one for each of their tokens. `content`: the ids
    with these placeholders told apart by picture; None where there are none."""

    prompt_token_ids: list[int]
    max_tokens: int
    images: tuple[Any, ...] = ()
    content: list[int] | None = None

    @property
    def prompt(self) -> list[int] | dict[str, Any]:
        """In the form that `LLM.generate` takes."""
        if not self.images:
            return self.prompt_token_ids
        return {"prompt": self.prompt_token_ids, "images": list(self.images)}


@dataclass(frozen=True)
class Order:
    """`count` requests in all, for `rounds` equal rounds, of at most `context` prompt tokens."""

    workload: WorkloadConfig
    context: int
    count: int
    rounds: int
    seed: int
    vocabulary: Vocabulary

    def encode(self, text: str) -> list[int]:
        if self.vocabulary.encode is None:
            raise UnsupportedCombination(
                f"workload {self.workload.name!r} is text, and this model folder has no tokenizer; add its "
                "tokenizer files, or use 'synthetic-long'."
            )
        return self.vocabulary.encode(text)

    def rng(self, *what: object) -> random.Random:
        """A stream of its own for each use; seeding with text is stable across Python versions."""
        return random.Random("/".join(map(str, (self.seed, self.workload.name, *what))))

    def requests(self, prompts: list[list[int]]) -> list[PlannedRequest]:
        return [PlannedRequest(ids, self.workload.output) for ids in prompts]


Filled = tuple[list[PlannedRequest], str, list[str]]  # requests, their source in words, notes


def fill(order: Order) -> Filled:
    """The requests of an order. Errors: `DatasetError`, `UnsupportedCombination`."""
    makers = {
        "synthetic-long": _synthetic,
        "english-prose": _prose,
        "light-dataset": _dataset,
        "heavy-trace": _trace,
    }
    return makers[order.workload.name](order)


def _synthetic(order: Order) -> Filled:
    token = order.workload.token
    if token is not None:
        ids = repeated_token(token, order.context, order.vocabulary)
        source = f"the text {token!r} repeated, the same in every prompt"
        return order.requests([ids] * order.count), source, []
    if order.workload.dialogue:
        made = [_dialogue(order, i) for i in range(order.count)]
        return order.requests(made), "a seeded two-speaker pattern", []
    made = [_random(order, number) for number in range(order.count)]
    return made, "seeded random token ids", []


def _random(order: Order, number: int) -> PlannedRequest:
    """Contents differ between all requests; lengths repeat from round to round, so that rounds are comparable."""
    workload, lengths = order.workload, order.rng("lengths", number % (order.count // order.rounds))
    context = lengths.randint(min(workload.min_context or order.context, order.context), order.context)
    output = lengths.randint(workload.min_output or workload.output, workload.output)
    return PlannedRequest(random_ids(order.rng(number), context, order.vocabulary.size), output)


def _dialogue(order: Order, number: int) -> list[int]:
    """Turns enough for the context: a pair has over ten words, and a word is at least one token."""
    rng, turns = order.rng("dialogue", number), []
    for answer in range(order.context // 10 + 1):
        topic, other = rng.sample(TOPICS, 2)
        turns.append(f"User: {rng.choice(ASKS)} {topic} and {other}, case {rng.randrange(10**6)}?")
        turns.append(f"Assistant: Here is answer {answer} about {topic}, and then about {other}.")
    ids = order.encode("\n".join(turns))
    assert len(ids) >= order.context, (len(ids), order.context)
    return ids[: order.context]


def _prose(order: Order) -> Filled:
    text = prose()
    ids = order.encode(text)
    places = len(ids) - order.context + 1
    if places < order.count:
        raise DatasetError(
            f"the prose has {len(ids)} tokens, too few for {order.count} distinct windows of "
            f"{order.context}; ask for a shorter context, fewer batches or fewer repeats."
        )
    starts = order.rng(order.context).sample(range(places), order.count)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    source = (
        "seeded windows of pydoc_data.topics, the language reference inside Python "
        f"{platform.python_version()} ({len(text)} characters, sha256 {digest})"
    )
    return order.requests([ids[s : s + order.context] for s in starts]), source, []


def _dataset(order: Order) -> Filled:
    folder, shortest = str(order.workload.dataset_dir), order.workload.min_prompt_tokens or 1
    encoded = [order.encode(text) for text in read_prompts(folder)]
    usable = [ids for ids in encoded if shortest <= len(ids) <= order.context]
    if not usable:
        lengths = [len(ids) for ids in encoded]
        raise DatasetError(
            f"{folder}: none of {len(encoded)} prompts has {shortest} to {order.context} tokens (they have "
            f"{min(lengths)} to {max(lengths)}); change min_prompt_tokens or context."
        )
    order.rng().shuffle(usable)
    notes = []
    if len(usable) < order.count:
        notes.append(f"{len(usable)} usable prompts for {order.count} requests, so prompts repeat")
    made = [usable[i % len(usable)] for i in range(order.count)]
    return order.requests(made), f"{len(usable)} of {len(encoded)} prompts of a given data set", notes


def _trace(order: Order) -> Filled:
    """Every round replays the same rows, so that repeats are comparable; the contents differ."""
    path, shortest, longest = (
        order.workload.trace,
        order.workload.min_prompt_tokens or 1,
        order.workload.output,
    )
    every = read_trace(str(path))
    usable = [row for row in every if row.context >= shortest and row.output <= longest]
    if not usable:
        raise DatasetError(
            f"{path}: none of {len(every)} rows has at least {shortest} context tokens and at most {longest} "
            "generated tokens; change min_prompt_tokens or output."
        )
    per_round, notes = order.count // order.rounds, []
    if len(usable) < per_round:
        notes.append(f"{len(usable)} usable trace rows for {per_round} requests, so lengths repeat")
    made = []
    for i in range(order.count):
        row = usable[i % per_round % len(usable)]
        ids = random_ids(order.rng(i), min(row.context, order.context), order.vocabulary.size)
        made.append(PlannedRequest(ids, row.output))
    return made, f"seeded random token ids in the lengths of {len(usable)} trace rows", notes


def repeated_token(token: str, length: int, vocabulary: Vocabulary) -> list[int]:
    """`token`'s ids over and over. Without a tokenizer an id derived from the text stands in for it."""
    if vocabulary.encode is None:
        ids = [int(hashlib.sha256(token.encode()).hexdigest(), 16) % vocabulary.size]
    else:
        ids = vocabulary.encode(token)
    if not ids:
        raise DatasetError(f"the tokenizer makes no token of {token!r}; give another --synthetic-token.")
    return (ids * (length // len(ids) + 1))[:length]


def random_ids(rng: random.Random, length: int, size: int) -> list[int]:
    """Uniform ids, leaving out a twentieth at both ends of the vocabulary, where special tokens live."""
    low = size // 20
    span = size - 2 * low
    return [low + int(rng.random() * span) for _ in range(length)]


def prose() -> str:
    """A real English text that every Python carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))
