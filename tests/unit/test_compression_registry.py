"""From a configuration to a method: names, parameters and the sentences for wrong ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastcache.compression.base import NEEDS, EvictionMethod
from fastcache.compression.registry import METHODS, TRANSFORMS, create, method_class
from fastcache.config import CompressionConfig
from fastcache.errors import ConfigError, UnknownName


@pytest.mark.parametrize("name", sorted(set(METHODS) - TRANSFORMS))
def test_every_name_creates_its_method(name):
    method = create(CompressionConfig(method=name))
    assert isinstance(method, EvictionMethod)
    assert method.name == name
    assert method.needs <= set(NEEDS)
    assert method_class(name).importance.__doc__, "say the shape and the meaning of the importance"
    assert "arXiv" in type(method).__doc__ or "control" in type(method).__doc__, "cite the paper"


@pytest.mark.parametrize("name", sorted(set(METHODS) - TRANSFORMS))
def test_every_method_can_protect_sinks(name):
    assert create(CompressionConfig(method=name, params={"n_sink": 7})).n_sink == 7


def test_parameters_reach_the_method():
    method = create(CompressionConfig(method="snapkv", params={"window": 32, "kernel": 7}))
    assert (method.window, method.kernel, method.n_sink) == (32, 7, 0)


def test_the_leaderboard_variant_differs_in_epsilon_alone():
    plain = create(CompressionConfig(method="expected_attention", params={"epsilon": 1e-2}))
    named = create(CompressionConfig(method="expected_attention_eps"))
    assert vars(plain) == vars(named)
    assert create(CompressionConfig(method="expected_attention")).epsilon == 0


def test_an_unknown_method_names_its_neighbour():
    with pytest.raises(UnknownName, match=r"'snapvk'\. Did you mean 'snapkv'"):
        create(CompressionConfig(method="snapvk"))


def test_an_unknown_parameter_names_its_neighbour_and_the_method():
    with pytest.raises(
        UnknownName, match=r"'snapkv', 'windw'\. Did you mean 'window'.*kernel, n_sink, window"
    ):
        create(CompressionConfig(method="snapkv", params={"windw": 3}))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("knorm", {"n_sink": -1}),
        ("streaming_llm", {"n_sink": 2.5}),
        ("snapkv", {"window": 0}),
        ("snapkv", {"window": "64"}),
        ("snapkv", {"kernel": 4}),
        ("random", {"seed": -1}),
        ("random", {"seed": True}),
        ("h2o", {"recent": 1.0}),
        ("h2o", {"recent": "half"}),
        ("expected_attention", {"n_future": 0}),
        ("expected_attention", {"epsilon": -1e-2}),
        ("expected_attention_eps", {"epsilon": float("nan")}),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(name, params):
    with pytest.raises(ConfigError, match=f"{next(iter(params))} is .*; allowed is a"):
        create(CompressionConfig(method=name, params=params))


def test_the_names_need_no_torch():
    code = "import sys, fastcache.compression.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
