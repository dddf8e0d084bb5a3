"""The example of docs/adding-a-method.md is code that people paste, so it is held to the suite it promises."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import test_compression_methods as suite

from fastcache.compression import base, registry
from fastcache.config import CompressionConfig
from fastcache.errors import UnknownName

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")


@pytest.fixture
def vnorm(tmp_path, monkeypatch):
    """The page's file on the path and its line in the registry, as a reader would have put them."""
    source, line = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
    (tmp_path / "vnorm.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vnorm", raising=False)
    name, place = re.fullmatch(r'\s*"(\w+)": "fastcache\.compression\.([\w:]+)",\s*', line).groups()
    monkeypatch.setitem(registry.METHODS, name, place)
    return registry.create(CompressionConfig(method=name))


def test_the_example_passes_the_suite_of_every_method(vnorm):
    for ratio in suite.RATIOS:
        suite.test_each_head_keeps_its_budget_within_the_length(vnorm, ratio, 6, 2)
        suite.test_a_sequence_keeps_the_same_entries_alone_and_in_a_padded_batch(vnorm, ratio)
    suite.test_padding_never_matters(vnorm)
    suite.test_nothing_undeclared_is_read(vnorm)
    suite.test_a_declared_need_is_insisted_on(vnorm)
    suite.test_check_names_the_minimum(vnorm)
    suite.test_methods_differ_from_each_other()


def test_the_example_s_parameters_are_checked_by_name(vnorm):
    assert registry.create(CompressionConfig(method="vnorm", params={"order": 1, "n_sink": 4})).order == 1
    with pytest.raises(UnknownName, match="Did you mean 'order'"):
        registry.create(CompressionConfig(method="vnorm", params={"ordr": 1}))


def test_the_page_lists_every_need():
    for need in base.NEEDS:
        assert f"`{need}`" in PAGE
