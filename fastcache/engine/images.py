"""The pictures of a prefill step: through the vision tower once, all together, and into their tokens' places."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcache.core import Chunk, Step
from fastcache.models.llava import Llava
from fastcache.models.pictures import PictureProcessor


class PictureEmbedder:
    """Keeps a picture's embeddings with its sequence from the first chunk that touches it to the last."""

    def __init__(self, model: Llava, processor: PictureProcessor) -> None:
        self.model, self.processor = model, processor

    def embeddings(self, step: Step, input_ids: Tensor) -> Tensor | None:
        """(T, hidden_size): the step's token embeddings with those of pictures in place; None without pictures."""
        if step.decode or not any(_touched(chunk) for chunk in step.chunks):
            return None
        self._compute(step)
        rows = self.model.embed[input_ids]
        first = 0
        for chunk in step.chunks:
            end = chunk.start + chunk.length
            for index in _touched(chunk):
                image = chunk.seq.request.images[index]
                low, high = max(image.start, chunk.start), min(image.end, end)
                source = chunk.seq.image_embeddings[index]
                target = slice(first + low - chunk.start, first + high - chunk.start)
                rows[target] = source[low - image.start : high - image.start]
                if image.end <= end:
                    del chunk.seq.image_embeddings[index]
                elif source.untyped_storage().nbytes() > source.nbytes:
                    # Alone, so that it does not hold the whole batch it was computed in.
                    chunk.seq.image_embeddings[index] = source.clone()
            first += chunk.length
        return rows

    def _compute(self, step: Step) -> None:
        """Embed every picture that the step touches and that no earlier chunk left behind."""
        wanted = [
            (chunk.seq, index)
            for chunk in step.chunks
            for index in _touched(chunk)
            if index not in chunk.seq.image_embeddings
        ]
        if not wanted:
            return
        pixels = torch.stack([seq.request.images[index].pixels for seq, index in wanted])
        device = self.model.embed.device
        if device.type == "cuda":
            pixels = pixels.pin_memory().to(device, non_blocking=True)
        embedded = self.model.embed_pictures(self.processor.normalise(pixels))
        for (seq, index), rows in zip(wanted, embedded, strict=True):
            seq.image_embeddings[index] = rows


def _touched(chunk: Chunk) -> list[int]:
    """Which pictures of its sequence have tokens in the chunk."""
    end = chunk.start + chunk.length
    images = enumerate(chunk.seq.request.images)
    return [index for index, image in images if image.start < end and chunk.start < image.end]
