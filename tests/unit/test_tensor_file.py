"""Files of trained compressors: what comes back, and who may read them."""

from __future__ import annotations

import os
import stat

import torch

from fastcache.compression.tensor_file import read_safetensors, write_safetensors


def test_tensors_and_facts_come_back_and_others_may_read_them(tmp_path):
    file = tmp_path / "new/folder/f5.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    before = os.umask(0o022)
    try:
        write_safetensors(file, tensors, {"factor": 5})
    finally:
        os.umask(before)
    back, facts = read_safetensors(file)
    assert facts == {"factor": 5}
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items()) and len(back) == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert [path.name for path in file.parent.iterdir()] == ["f5.safetensors"]
