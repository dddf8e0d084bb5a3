"""Checkpoints of methods with trained weights: safetensors files, with what is to be known of them as JSON inside."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastcache.config import require
from fastcache.errors import CheckpointError

METADATA = "fastcache"
# In place of a path: seeded networks, for models whose weights are seeded, too.
DUMMY = "dummy"


def check_dummy(dummy_weights: bool) -> None:
    """Whether the model's weights are seeded. Errors: `ConfigError` if not."""
    require(
        dummy_weights,
        f"checkpoint is {DUMMY!r}, which makes seeded networks that know nothing; allowed is that for a model with "
        "dummy weights (load_format 'dummy'). Give the path of a checkpoint trained for this model.",
    )


def identity(checkpoint: str) -> dict[str, Any]:
    """Which weights these are: seeded ones, or a file's."""
    if checkpoint == DUMMY:
        return {"kind": DUMMY, "sha256": None}
    return {"kind": "checkpoint", "sha256": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()}


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU, and the facts that `write_safetensors` was given; none in a file of others.

    Errors: `CheckpointError` for a file that cannot be read.
    """
    try:
        with safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
            facts = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({error}); copy it again."
        ) from None
    return tensors, facts


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Appears complete or not at all, with the rights of any new file: `save_file` gives others none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    metadata = {METADATA: json.dumps(facts, sort_keys=True)}
    partial.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
    os.replace(partial, path)
