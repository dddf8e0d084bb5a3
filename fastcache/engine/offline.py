"""Prompts that are all there from the start, run to their end: `generate`, and `score` for given continuations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many
from typing import Any

from fastcache.config import SamplingParams, require
from fastcache.engine.prompts import Prompt
from fastcache.results import RequestOutput


class Offline:
    """What `LLM` offers on top of `add_request` and `step`."""

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
        context_lens: Many[int | None] | None = None,
    ) -> list[RequestOutput]:
        """Run prompts (see `add_request`) to the end; outputs in the order of the prompts."""
        if isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            prompts = [prompts]
        params = sampling_params
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        require(
            len(params) == len(prompts),
            f"{len(prompts)} prompts with {len(params)} sampling_params; give one for all, or one each.",
        )
        lens = [None] * len(prompts) if context_lens is None else context_lens
        require(
            len(lens) == len(prompts), f"{len(prompts)} prompts with {len(lens)} context_lens; give one each."
        )
        return self._run(
            {"prompt": prompt, "sampling_params": each, "context_len": length}
            for prompt, each, length in zip(self._reader.ahead(prompts), params, lens, strict=True)
        )

    def score(
        self,
        prompts: Many[Many[int] | Mapping],
        continuations: Many[Many[int]],
        context_lens: Many[int | None] | None = None,
    ) -> list[RequestOutput]:
        """What the model makes of given continuations; outputs in the order of the prompts. Prompts are token ids,
        those with pictures {"prompt": ids, "images": [...]} with all placeholders in place.

        The first `context_lens` tokens of a prompt (default: all of it; 0: none) are compressed as in `add_request`;
        the rest of it and the continuation are appended to that cache. `logprobs` of an output is (continuation
        tokens, vocab) float32 on the device, row i for token i. Row 0 belongs to the prompt's last token: where that
        is the end of the context, it was computed before the compression.
        """
        lens = [None] * len(prompts) if context_lens is None else context_lens
        require(
            len(prompts) == len(continuations) == len(lens),
            f"{len(prompts)} prompts, {len(continuations)} continuations, {len(lens)} context_lens; give one each.",
        )
        require(
            all(len(each) > 0 for each in continuations), "a continuation is empty; give one token or more."
        )
        once = SamplingParams(max_tokens=1, ignore_eos=True)
        return self._run(
            {
                "prompt": {"prompt": [*ids, *continuation[:-1]], "images": images},
                "sampling_params": once,
                "context_len": len(ids) if length is None else length,
                "logprobs_from": len(ids) - 1,
            }
            for (ids, images), continuation, length in zip(
                map(_ids_and_images, prompts), continuations, lens, strict=True
            )
        )

    def _run(self, requests: Iterable[Mapping[str, Any]]) -> list[RequestOutput]:
        """All or none: a rejected request must not leave its neighbours queued."""
        ids = []
        try:
            ids.extend(self.add_request(**request) for request in requests)
        except ValueError:
            for request_id in ids:
                self.cancel(request_id)
            raise
        done: dict[str, RequestOutput] = {}
        while self.has_unfinished():
            done.update((output.request_id, output) for output in self.step())
        return [done[request_id] for request_id in ids]


def _ids_and_images(prompt: Many[int] | Mapping) -> tuple[Many[int], Many]:
    if isinstance(prompt, Mapping):
        return prompt["prompt"], prompt.get("images") or ()
    return prompt, ()
