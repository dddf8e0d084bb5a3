"""Two caches of one context, side by side: the whole one, and the one a quality cell is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastcache.bench import models
from fastcache.bench.quality.cells import FULL, NO_CONTEXT, QualityCell
from fastcache.config import CompressionConfig, SamplingParams

# Questions asked of one context at once; beside them the pool keeps the pages of the whole context.
AT_ONCE = 8
Ids = Sequence[int]
Pictures = Sequence[Any]  # as `LLM` takes them; a context then has every image token's placeholder


class Pair:
    """Answers of the whole cache (`full`) and of the cell's (`ours`) to the same questions.

    One engine gives both: a request whose context_len is 0 is left whole, and the prefix cache lets all requests of a
    context share its prefill. Only a pool that stores another type needs an engine of its own.
    """

    def __init__(self, cell: QualityCell, longest: int) -> None:
        from fastcache import LLM  # here, as it loads torch: what goes wrong with that becomes a row, too

        self.cell = cell
        self._compresses = cell.method not in (FULL, NO_CONTEXT)
        compression = None
        if self._compresses:
            compression = CompressionConfig(
                cell.method, cell.compression_ratio, cell.method_params, cell.head_budgets
            )
        self._ours = LLM(**_options(cell, longest), kv_dtype=cell.kv_dtype, compression=compression)
        self._full = self._ours
        if cell.kv_dtype != "auto":
            self._full = LLM(**_options(cell, longest))
        self.same = cell.method == FULL and cell.kv_dtype == "auto"
        self.uncompressed_requests = 0
        self._kept: list[float] = []
        self._stored: dict[int, tuple[Ids, Pictures]] = {}  # engine -> the context it computed last

    @property
    def model(self) -> Any:
        return self._ours

    @property
    def kept(self) -> float:
        """Share of a context's KV entries that stayed, the mean over requests."""
        if self.cell.method == NO_CONTEXT:
            return 0.0
        return sum(self._kept) / len(self._kept) if self._kept else 1.0

    def full(
        self, context: Ids, questions: Sequence[Ids], answers: Sequence[Ids], pictures: Pictures = ()
    ) -> list[Any]:
        """(answer tokens, vocab) float32 log-probabilities for each answer, from the whole cache."""
        prompts = [_prompt([*context, *question], pictures) for question in questions]
        self._store(self._full, context, pictures)
        return [output.logprobs for output in self._full.score(prompts, answers, [0] * len(prompts))]

    def ours(
        self, context: Ids, questions: Sequence[Ids], answers: Sequence[Ids], pictures: Pictures = ()
    ) -> list[Any]:
        """The same from the cell's cache: compressed, of another type, or without the context."""
        prompts, lens = self._asked(context, questions, pictures)
        if self.cell.method != NO_CONTEXT:
            self._store(self._ours, context, pictures)
        outputs = self._ours.score(prompts, answers, lens)
        self._count(outputs)
        return [output.logprobs for output in outputs]

    def answers(
        self, context: Ids, questions: Sequence[Ids], length: int, pictures: Pictures = ()
    ) -> tuple[list[str], list[str]]:
        """What both caches answer, as text: greedy, at most `length` tokens."""
        params = SamplingParams(max_tokens=length)
        whole = [_prompt([*context, *question], pictures) for question in questions]
        full = self._full.generate(whole, params, [0] * len(whole))
        prompts, lens = self._asked(context, questions, pictures)
        ours = full if self.same else self._ours.generate(prompts, params, lens)
        return [output.text.strip() for output in full], [output.text.strip() for output in ours]

    def _asked(
        self, context: Ids, questions: Sequence[Ids], pictures: Pictures
    ) -> tuple[list[Any], list[int]]:
        """Prompts for the cell's cache, and how many of their tokens it compresses."""
        if self.cell.method == NO_CONTEXT:
            return [list(question) for question in questions], [0] * len(questions)
        prompts, lens = [[*context, *question] for question in questions], [0] * len(questions)
        if self._compresses:
            # Query-aware, the last token stays outside: something has to ask the compressed cache.
            lens = [len(p) - 1 if self.cell.query_aware else len(context) for p in prompts]
        return [_prompt(ids, pictures) for ids in prompts], lens

    def generate(self, contexts: Sequence[Ids], length: int) -> tuple[list[list[int]], list[list[int]]]:
        """`length` greedy tokens after each context, from both caches; a context's last token is never compressed."""
        params = SamplingParams(max_tokens=length, ignore_eos=True)
        prompts, nothing = [list(context) for context in contexts], [0] * len(contexts)
        for prompt in prompts:
            self._store(self._full, prompt)
        whole = mine = self._full.generate(prompts, params, nothing)
        if self.cell.method == NO_CONTEXT:
            mine = self._ours.generate([prompt[-1:] for prompt in prompts], params, nothing)
        elif not self.same:
            lens = [len(prompt) - 1 for prompt in prompts] if self._compresses else nothing
            if self._ours is not self._full:
                for prompt in prompts:
                    self._store(self._ours, prompt)
            mine = self._ours.generate(prompts, params, lens)
            self._count(mine)
        return [output.token_ids for output in whole], [output.token_ids for output in mine]

    def _store(self, llm: Any, context: Ids, pictures: Pictures = ()) -> None:
        """Compute a context once, so that everything asked of it shares its pages, and reads what they store."""
        known = (context, pictures)
        if context and self._stored.get(id(llm)) != known:
            prompt = _prompt(list(context), pictures)
            llm.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True), [0])
            self._stored[id(llm)] = known

    def _count(self, outputs: Sequence[Any]) -> None:
        for metrics in (output.metrics for output in outputs):
            if metrics.compressed:
                self._kept.append(metrics.kv_len_after / metrics.kv_len_before)
            else:
                self.uncompressed_requests += 1

    def close(self) -> None:
        for llm in {id(each): each for each in (self._ours, self._full)}.values():
            llm.close()


def _prompt(ids: list[int], pictures: Pictures) -> Any:
    return {"prompt": ids, "images": list(pictures)} if pictures else ids


def _options(cell: QualityCell, longest: int) -> dict[str, Any]:
    return {
        "model": models.engine_source(cell.model, cell.model_path),
        "dtype": cell.dtype,
        "device": cell.device,
        "page_size": cell.page_size,
        "gpu_memory_utilization": cell.gpu_mem_util,
        "attention_backend": cell.attention_backend,
        "max_num_batched_tokens": cell.max_num_batched_tokens,
        "enforce_eager": cell.enforce_eager,
        "num_pages": cell.num_pages,
        "max_model_len": longest,
        "max_num_seqs": AT_ONCE,
        "enable_prefix_caching": True,
        "seed": cell.seed,
    }
