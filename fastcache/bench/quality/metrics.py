"""From paired answers to numbers with standard errors. Pure functions on lists of floats; imports no torch.

A context is the unit of chance: everything asked of one context is averaged before a standard error is taken, since
answers from the same context stand and fall together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from fastcache.bench.table import first_difference

# A task that the uncompressed cache does not solve to this share of its ceiling says nothing about compression.
USABLE = 0.8


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None for the error of a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def paired(name: str, values: Sequence[float]) -> dict[str, float | None]:
    mean, error = mean_and_error(values)
    return {name: mean, f"{name}_se": error}


def continuation(full_nll: Sequence[float], nll: Sequence[float], kl: Sequence[float], top1: Sequence[float],
                 tokens: int) -> dict[str, Any]:  # fmt: skip
    """One value per context, each a mean over its `tokens` scored tokens; nats per token."""
    full, ours = statistics.fmean(full_nll), statistics.fmean(nll)
    return {
        "contexts": len(nll),
        "tokens": tokens,
        "nll_full": full,
        "nll": ours,
        "perplexity_full": math.exp(full),
        "perplexity": math.exp(ours),
        **paired("dnll", [b - a for a, b in zip(full_nll, nll, strict=True)]),
        **paired("kl", kl),
        **paired("top1", top1),
    }


def greedy(full: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Generated tokens of both caches, context by context, all of one length."""
    first = [first_difference(a, b) for a, b in zip(ours, full, strict=True)]
    equal = [
        statistics.fmean(x == y for x, y in zip(a, b, strict=True)) for a, b in zip(ours, full, strict=True)
    ]
    return {
        "contexts": len(ours),
        "tokens": len(ours[0]),
        "identical": sum(a == b for a, b in zip(map(list, ours), map(list, full), strict=True)),
        "first_difference": statistics.median(first),
        **paired("token_match", equal),
        **paired("prefix_match", [n / len(ours[0]) for n in first]),
    }


def retrieval(full: Sequence[Sequence[bool]], ours: Sequence[Sequence[bool]], full_nll: Sequence[Sequence[float]],
              nll: Sequence[Sequence[float]]) -> dict[str, Any]:  # fmt: skip
    """Per context, the outcome and the answer's NLL (nats per token) of each question; exact greedy match."""
    both = [(f, o) for a, b in zip(full, ours, strict=True) for f, o in zip(a, b, strict=True)]
    solved = [o for f, o in both if f]
    return {
        "contexts": len(ours),
        "questions": len(both),
        **paired("accuracy_full", [statistics.fmean(map(float, each)) for each in full]),
        **paired("accuracy", [statistics.fmean(map(float, each)) for each in ours]),
        **paired(
            "loss",
            [
                statistics.fmean(float(f) - float(o) for f, o in zip(a, b, strict=True))
                for a, b in zip(full, ours, strict=True)
            ],
        ),
        "accuracy_of_solved": statistics.fmean(map(float, solved)) if solved else None,
        "answer_nll_full": statistics.fmean(value for each in full_nll for value in each),
        "answer_nll": statistics.fmean(value for each in nll for value in each),
    }


def unusable(name: str, result: dict[str, Any]) -> str | None:
    """Why a retrieval result may not be used, or None."""
    score = result["accuracy_full"]
    if score >= USABLE:
        return None
    return (
        f"{name} is not used: the uncompressed cache solves {score:.0%} of its {result['questions']} questions, less "
        f"than {USABLE:.0%}; a shorter context or a larger model may solve it"
    )
