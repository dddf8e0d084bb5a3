"""Which requests a cell sends: seeded, distinct, the same for every variant. Imports no torch.

A plan has one round per timed repeat (and per warm-up), a round has batches, a batch has requests. Prompts
differ between all of them, so that no prefix cache can turn a measurement into a memory of the one before;
where a workload repeats itself on purpose, the plan counts what such a cache would have shared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from fastcache.bench.pictures import text_tokens, with_pictures
from fastcache.bench.prompts import Order, PlannedRequest, Vocabulary, fill
from fastcache.bench.workloadconfig import WorkloadConfig
from fastcache.errors import PromptTooLong

Batch = list[PlannedRequest]


@dataclass(frozen=True)
class Plan:
    """`rounds[r][b][i]` is request i of batch b in round r. Lengths are those of the longest request."""

    rounds: list[list[Batch]]
    text_source: str
    context_used: int
    output_used: int
    notes: list[str]


def make_plan(
    workload: WorkloadConfig,
    batch_size: int,
    rounds: int,
    seed: int,
    vocabulary: Vocabulary,
    max_model_len: int,
) -> Plan:
    """The requests of `rounds` rounds.

    Errors: `PromptTooLong` if the output leaves no room for a prompt, `DatasetError` for the user's files,
    `UnsupportedCombination` for text without a tokenizer, and those of `pictures.text_tokens`.
    """
    context = fit(workload.context, workload.output, max_model_len)
    batch_size = workload.requests or batch_size
    needed = rounds * workload.num_batches * batch_size
    text = text_tokens(workload, context, vocabulary)
    requests, source, notes = fill(Order(workload, text, needed, rounds, seed, vocabulary))
    assert len(requests) == needed
    requests = [with_pictures(made, workload, i, seed, vocabulary) for i, made in enumerate(requests)]
    batches = [requests[i : i + batch_size] for i in range(0, needed, batch_size)]
    per_round = workload.num_batches
    context_used = max(len(request.prompt_token_ids) for request in requests)
    if context < workload.context:
        notes = [
            f"context {workload.context} clipped to {context}: with {workload.output} output tokens it "
            f"must fit max_model_len {max_model_len}",
            *notes,
        ]
    return Plan(
        [batches[i : i + per_round] for i in range(0, len(batches), per_round)],
        source,
        context_used,
        max(request.max_tokens for request in requests),
        notes,
    )


def fit(context: int, output: int, max_model_len: int) -> int:
    """Prompt tokens that leave room for the output: min(context, max_model_len - output)."""
    if output >= max_model_len:
        raise PromptTooLong(
            f"{output} output tokens leave no room for a prompt in max_model_len {max_model_len}; "
            "ask for fewer, or raise max_model_len."
        )
    return min(context, max_model_len - output)


def shareable_tokens(prompts: Iterable[list[int]], page_size: int) -> int:
    """Prompt tokens whose whole pages an earlier prompt already holds, as a prefix cache matches them.

    At least one token of every prompt must be computed to sample from, so a prompt's last page is shared
    only if it ends before the last token.
    """
    seen: set[bytes] = set()
    shared = 0
    for prompt in prompts:
        chain, matching = b"", True
        for start in range(0, (len(prompt) - 1) // page_size * page_size, page_size):
            page = ",".join(map(str, prompt[start : start + page_size])).encode()
            chain = hashlib.sha256(chain + page).digest()
            matching = matching and chain in seen
            shared += page_size * matching
            seen.add(chain)
    return shared
