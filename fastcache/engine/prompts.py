"""What a user gives as a prompt, as token ids and pictures; each placeholder becomes as many as its picture needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image
from torch import Tensor

from fastcache.config import require
from fastcache.core import ImageInput
from fastcache.errors import ConfigError, ImageError, UnknownName, UnsupportedCombination
from fastcache.models.config import ModelConfig
from fastcache.models.pictures import PictureProcessor, digest, open_picture
from fastcache.tokenizer import Tokenizer

# Text or token ids; with pictures a mapping {"prompt": text or ids, "images": [path, bytes or PIL image, ...]}.
Prompt = str | Many[int] | Mapping
KEYS = ("prompt", "images")
# Pictures that are decoded and resized at once.
MOST_THREADS = 8


@dataclass(frozen=True)
class Expanded:
    """`tokens` with a placeholder for every image token, `images` with their spans in it."""

    tokens: tuple[int, ...]
    images: tuple[ImageInput, ...] = ()
    context_len: int | None = None


@dataclass(frozen=True)
class Prepared:
    """A picture as the vision tower will see it: (3, height, width) uint8, and its digest."""

    pixels: Tensor
    digest: bytes


@dataclass(frozen=True)
class PromptReader:
    """Knows the model's vocabulary, its tokenizer if it has one, and how it wants pictures if it reads them."""

    model: ModelConfig
    tokenizer: Tokenizer | None
    processor: PictureProcessor | None

    def read(self, prompt: Prompt, context_len: int | None = None) -> Expanded:
        """`context_len` counts tokens of `prompt` as it was given; in the result, as it was expanded.

        Errors: `ConfigError` for tokens, `ImageError` for pictures and their placeholders,
        `UnsupportedCombination` for pictures in front of a model that reads text alone.
        """
        pictures: Many = ()
        if isinstance(prompt, Mapping):
            for key in prompt:
                if key not in KEYS:
                    raise UnknownName("key of a prompt", key, KEYS)
            require(
                "prompt" in prompt, "a prompt with `images` also needs its text or token ids as `prompt`."
            )
            prompt, pictures = prompt["prompt"], prompt.get("images") or ()
            if isinstance(pictures, str | bytes | Image):
                raise ConfigError("`images` of a prompt is a list, also for a single picture.")
        tokens = self._tokens(prompt)
        if self.model.vision is None:
            if pictures:
                raise UnsupportedCombination(
                    f"a prompt has {len(pictures)} images, and this model reads text alone; leave them out, or use a "
                    "model of the LlavaForConditionalGeneration architecture."
                )
            return Expanded(tokens, context_len=context_len)
        return self._expand(tokens, pictures, context_len)

    def ahead(self, prompts: Many[Prompt]) -> list[Prompt]:
        """The same prompts, their pictures prepared, many at once: decoding and resizing one takes longer than the
        vision tower does. Errors: `ImageError`; what else is wrong with a prompt is for `read` to say."""
        given = [_pictures(prompt) for prompt in prompts]
        if self.processor is None or sum(map(len, given)) < 2:
            return list(prompts)
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
            prepared = iter(list(threads.map(self._prepare, [each for some in given for each in some])))
        return [
            {**prompt, "images": [next(prepared) for _ in some]} if some else prompt
            for prompt, some in zip(prompts, given, strict=True)
        ]

    def _prepare(self, picture: Any) -> Prepared:
        if isinstance(picture, Prepared):
            return picture
        pixels = self.processor.pixels(open_picture(picture))
        return Prepared(pixels, digest(pixels))

    def _tokens(self, prompt: str | Many[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError("this model has no tokenizer.json; give prompts as lists of token ids.")
            prompt = self.tokenizer.encode(prompt)
        tokens = tuple(int(token) for token in prompt)
        require(len(tokens) > 0, "a prompt is empty; it needs at least one token.")
        limit = self.model.vocab_size
        bad = next((token for token in tokens if not 0 <= token < limit), None)
        require(bad is None, f"token id {bad} is outside the vocabulary; allowed is 0 to {limit - 1}.")
        return tokens

    def _expand(self, tokens: tuple[int, ...], pictures: Many, context_len: int | None) -> Expanded:
        vision = self.model.vision
        each, token_id = vision.tokens_per_image, vision.image_token_id
        places = [i for i, token in enumerate(tokens) if token == token_id]
        width = self._width(places, len(pictures))
        starts = places[::width]
        expanded: list[int] = []
        images, done, context = [], 0, context_len
        for start, picture in zip(starts, pictures, strict=True):
            expanded += tokens[done:start]
            seen = self._prepare(picture)
            images.append(ImageInput(len(expanded), each, seen.pixels, seen.digest))
            expanded += [token_id] * each
            done = start + width
            if context_len is not None and start < context_len:
                context += each - width
        return Expanded((*expanded, *tokens[done:]), tuple(images), context)

    def _width(self, places: list[int], pictures: int) -> int:
        """How many placeholders stand for one picture: one, or, if the prompt was expanded already, all of them."""
        vision = self.model.vision
        if len(places) == pictures:
            return 1
        each = vision.tokens_per_image
        runs = all(
            places[i + each - 1] - places[i] == each - 1 for i in range(0, len(places) - each + 1, each)
        )
        if len(places) == pictures * each and runs:
            return each
        raise ImageError(
            f"a prompt has {len(places)} placeholders (token {vision.image_token_id}, `<image>` in text) and "
            f"{pictures} images; it needs one for each image, or {each} in a row for each if it is expanded already."
        )


def _pictures(prompt: Prompt) -> Many:
    """Those of a prompt that has a list of them."""
    given = prompt.get("images") if isinstance(prompt, Mapping) else None
    return given if isinstance(given, list | tuple) else ()
