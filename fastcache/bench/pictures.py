"""Seeded pictures for requests that have some, and where they stand in the prompt. Imports no torch."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from fastcache.bench.prompts import PlannedRequest, Vocabulary
from fastcache.bench.workloadconfig import WorkloadConfig
from fastcache.errors import ConfigError, UnsupportedCombination

SIZE = (
    640,
    480,
)  # width, height in pixels: a common camera size, so that a request pays for resizing as real ones do
PALETTE = (16, 12)


def text_tokens(workload: WorkloadConfig, context: int, vocabulary: Vocabulary) -> int:
    """How many of a request's `context` tokens are left for text beside its pictures.

    Errors: `UnsupportedCombination` for pictures in front of a model that reads text alone, `ConfigError` for
    a context that they fill.
    """
    if workload.images == 0:
        return context
    each = vocabulary.tokens_per_image
    if each is None:
        raise UnsupportedCombination(
            f"workload {workload.name!r} asks for images: {workload.images}, and this model reads text alone."
        )
    if context <= workload.images * each:
        raise ConfigError(
            f"workload {workload.name!r}: context {context} has no room for text beside {workload.images} images of "
            f"{each} tokens; ask for a context of more than {workload.images * each}, or for fewer images."
        )
    return context - workload.images * each


def with_pictures(
    request: PlannedRequest, workload: WorkloadConfig, number: int, seed: int, vocabulary: Vocabulary
) -> PlannedRequest:
    """`request`, the `number`-th of the plan, with each picture in front of its equal share of the text.

    A text token that happens to be the placeholder becomes its neighbour: it would stand for a picture.
    """
    token = vocabulary.image_token_id
    if token is None:
        return request
    text = [token - 1 if i == token else i for i in request.prompt_token_ids]
    if workload.images == 0:
        return dataclasses.replace(request, prompt_token_ids=text)
    ids, content, images = [], [], []
    share = -(-len(text) // workload.images)
    for place in range(workload.images):
        picture = number * workload.images + place
        part = text[place * share : (place + 1) * share]
        ids += [token] * vocabulary.tokens_per_image + part
        content += [-1 - picture] * vocabulary.tokens_per_image + part
        images.append(draw(f"{seed}/{workload.name}/picture/{picture}"))
    return PlannedRequest(ids, request.max_tokens, tuple(images), content)


def draw(seed: str) -> Any:
    """A PIL picture of `SIZE`: seeded colours that run into each other, different for every seed."""
    from PIL import Image

    width, height = PALETTE
    colours = random.Random(seed).randbytes(3 * width * height)
    return Image.frombytes("RGB", PALETTE, colours).resize(SIZE, Image.Resampling.BICUBIC)
