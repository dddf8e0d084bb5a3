"""Safetensors files of trained compressors, with what is to be known of them as JSON inside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastcache.errors import CheckpointError

METADATA = "fastcache"


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
