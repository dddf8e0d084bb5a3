"""Which contexts are padded to each other, and where a step's packed entries hold them."""

from __future__ import annotations

import numpy as np
import torch

from fastcache.compression.work import Packed, similar


def test_padding_never_takes_more_than_the_contexts():
    lengths = np.array([16_000, 160, 100, 9_000, 79, 8_000, 160])
    groups = similar([0, 1, 2, 3, 4, 5, 6], lengths)
    assert groups == [[0, 3, 5], [1, 2, 6], [4]]
    for group in groups:
        assert len(group) * lengths[group].max() <= 2 * lengths[group].sum()
    assert similar([], lengths) == []
    assert similar([0, 1, 2, 3, 5, 6], lengths, most=2) == [[0, 3], [5], [1, 6], [2]]


def test_equal_neighbours_are_a_view_and_others_are_copied():
    x = torch.randn(20, 3, 4)
    where = Packed.of(np.array([2, 7]), np.array([5, 5]), torch.device("cpu"))
    view = where.padded(x, 5)
    assert view.data_ptr() == x[2].data_ptr() and torch.equal(view[1], x[7:12].transpose(0, 1))
    apart = Packed.of(np.array([2, 9]), np.array([5, 3]), torch.device("cpu")).padded(x, 5)
    assert torch.equal(apart[1, :, :3], x[9:12].transpose(0, 1))
    assert where.shaped(x, 5).shape == view.shape == apart.shape
