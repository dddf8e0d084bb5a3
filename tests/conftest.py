"""Fixtures that every test folder shares: the real small model, and tiny random ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The oracle libraries must neither look for files on a server nor draw progress bars into test logs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

SMOLLM2_DEFAULT = ROOT / "resources" / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The SmolLM2-135M-Instruct folder; `FASTCACHE_SMOLLM2` names another place for it."""
    folder = Path(os.environ.get("FASTCACHE_SMOLLM2", SMOLLM2_DEFAULT))
    if not (folder / "model.safetensors").is_file():
        pytest.skip(
            f"no SmolLM2 at {folder}: run `python -m fastcache.models.fetch`, or set FASTCACHE_SMOLLM2"
        )
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(arch, heads, kv_heads, head_dim, hidden, layers, tied, seed, ...)` -> its folder.

    The arguments are those of `write_tiny_model`; equal arguments share one folder for the whole session,
    so treat it as read-only.
    """
    from tiny_models import write_tiny_model

    made: dict[tuple, Path] = {}
    names = ("arch", "heads", "kv_heads", "head_dim", "hidden", "layers", "tied", "seed")

    def make(*args, **kwargs) -> Path:
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        key = tuple(sorted(kwargs.items()))
        if key not in made:
            made[key] = write_tiny_model(tmp_path_factory.mktemp("tiny"), **kwargs)
        return made[key]

    return make
