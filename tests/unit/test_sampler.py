"""Sampling: filters against a plain formula, draws against their distribution, seeds against the batch."""

from __future__ import annotations

import pytest
import torch

from fastcache.config import SamplingParams
from fastcache.engine.sampler import _filter, _uniform, sample, sampling_batch
from fastcache.errors import ConfigError

CPU = torch.device("cpu")


def draw(logits, params, seeds, step=0):
    return sample(logits, sampling_batch(params, seeds, [step] * len(params), CPU)).tolist()


def test_greedy_is_argmax_alone_and_in_a_mixed_batch():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert draw(logits, [SamplingParams()] * 3, [0] * 3) == logits.argmax(-1).tolist()
    mixed = draw(logits, [SamplingParams(), SamplingParams(temperature=5.0), SamplingParams()], [0, 1, 2])
    assert mixed[0] == logits[0].argmax() and mixed[2] == logits[2].argmax()


def test_frequencies_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    n, temperature = 20_000, 0.7
    params = [SamplingParams(temperature=temperature)] * n
    drawn = torch.tensor(draw(logits.expand(n, 4), params, list(range(n))))
    want = (logits / temperature).softmax(-1)
    got = torch.bincount(drawn, minlength=4) / n
    assert (got - want).abs().max() < 4 * (0.25 / n) ** 0.5 + 1e-3


def test_the_same_request_draws_the_same_token_in_any_batch():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=1.3)] * 5
    together = draw(logits, params, [10, 11, 12, 13, 14], step=7)
    alone = [draw(logits[i : i + 1], params[:1], [10 + i], step=7)[0] for i in range(5)]
    assert together == alone
    assert together != draw(logits, params, [10, 11, 12, 13, 14], step=8)


@pytest.mark.parametrize("top_k,top_p", [(3, 1.0), (0, 0.6), (4, 0.5), (1, 1.0), (0, 1e-6)])
def test_filters_keep_what_the_definition_keeps(top_k, top_p):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    batch = sampling_batch(
        [SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p)] * 6, [0] * 6, [0] * 6, CPU
    )
    kept = _filter(logits, batch).isfinite()
    for row in range(6):
        order = logits[row].argsort(descending=True).tolist()
        allowed = order[:top_k] if top_k else order
        probabilities = torch.tensor([logits[row, i] for i in allowed]).double().softmax(-1)
        want, mass = set(), 0.0
        for token, p in zip(allowed, probabilities.tolist(), strict=True):
            if mass >= top_p:
                break
            want.add(token)
            mass += p
        assert set(kept[row].nonzero().flatten().tolist()) == want


def test_noise_is_uniform_and_uncorrelated():
    u = _uniform(torch.arange(64), torch.zeros(64, dtype=torch.int64), 1000)
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean().item() - 0.5) < 5e-3
    assert abs(torch.corrcoef(u[:2])[0, 1].item()) < 0.15


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -2}, {"max_tokens": 0}]
)
def test_bad_parameters_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingParams(**bad)
