"""KVzap: what KVzip would find out by a replay, told from each token's hidden state by a small trained network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.compression.states import StateFit, StateMethod
from fastcache.compression.tensor_file import DUMMY, check_dummy, identity, read_safetensors
from fastcache.config import require
from fastcache.errors import CheckpointError

# Rows in float32 at once where the network is a single layer.
ROWS = 4096
DUMMY_SHARE = 8  # of the hidden size, the width of seeded networks: as the paper's are beside its models
_NAME = re.compile(r"layers\.(\d+)\.(?:[02]\.)?(?:weight|bias)")

Net = tuple[Tensor, ...]  # weight and bias of one linear layer, or of two with GELU between them


@dataclass(frozen=True, kw_only=True)
class KVzap(StateMethod):
    """Keep the entries whose hidden state, as their layer's attention reads it, promises the highest KVzip score.

    Jegou, Jeblick, "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning", arXiv:2601.07891. The paper drops what
    scores below a threshold, outside a window of the last 128 entries; here the compression ratio decides how many
    stay and the scores which, with `head_budgets` across heads as well. The first entries stay as in KVzip.

    checkpoint: a file of `fastcache train-scorer`, or one of the paper's, whose names it shares. There is no default,
        and there are no random weights, except that "dummy" makes seeded networks for a model with dummy weights.
    """

    name: ClassVar[str] = "kvzap"

    n_sink: int = 4
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.checkpoint is None or (isinstance(self.checkpoint, str) and self.checkpoint != ""),
            f"checkpoint is {self.checkpoint!r}; allowed is the path of a scorer's checkpoint.",
        )

    def rater(self, fit: StateFit) -> KVzapRater:
        require(
            self.checkpoint is not None,
            "method 'kvzap' needs the parameter checkpoint, a file of `fastcache train-scorer`; it has no default.",
        )
        if self.checkpoint != DUMMY:
            return KVzapRater(str(self.checkpoint), read_scorer(str(self.checkpoint))[0], fit)
        check_dummy(fit.dummy_weights)
        return KVzapRater(DUMMY, dummy_scorer(fit), fit)


class KVzapRater:
    """The networks of one model. The last linear layer is computed in float32: scores in bfloat16 tie.

    path: where `tensors` come from. Errors: `CheckpointError` where they and the model do not go together.
    """

    def __init__(self, path: str, tensors: Mapping[str, Tensor], fit: StateFit) -> None:
        self.path = path
        names = check_shapes(path, tensors, fit)
        self.hidden = len(tensors["layers.0.0.bias"]) if len(names) == 4 else None
        dtypes = (fit.dtype, fit.dtype, torch.float32, torch.float32)[-len(names) :]
        self._nets = [
            tuple(
                tensors[f"layers.{layer}.{name}"].to(fit.device, dtype)
                for name, dtype in zip(names, dtypes, strict=True)
            )
            for layer in range(fit.num_layers)
        ]

    def rate(self, layer: int, hidden: Tensor) -> Tensor:
        return rate(self._nets[layer], hidden)

    def flops(self, num_tokens: int) -> float:
        return 2.0 * num_tokens * sum(tensor.numel() for tensor in self._nets[0] if tensor.ndim == 2)

    def describe(self) -> dict[str, Any]:
        return identity(self.path) | {"hidden": self.hidden}


def rate(net: Net, hidden: Tensor) -> Tensor:
    """hidden: (T, n) in the dtype of all but the last layer. Returns (T, Hk) float32: the logarithm of a score."""
    if len(net) == 2:
        return torch.cat([F.linear(rows.float(), *net) for rows in hidden.split(ROWS)])
    return F.linear(F.gelu(F.linear(hidden, *net[:2])).float(), *net[2:])


def dummy_scorer(fit: StateFit) -> dict[str, Tensor]:
    """Networks that cost what trained ones cost and know nothing."""
    width = max(1, fit.hidden_size // DUMMY_SHARE)
    shapes = {"0.weight": (width, fit.hidden_size), "0.bias": (width,)}
    shapes |= {"2.weight": (fit.kv_heads, width), "2.bias": (fit.kv_heads,)}
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{layer}.{name}": torch.randn(shape, generator=generator) / fit.hidden_size**0.5
        for layer in range(fit.num_layers)
        for name, shape in shapes.items()
    }


def read_scorer(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name and the training record. Errors: `CheckpointError` for a file that holds anything else."""
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(
            f"scorer checkpoint {path!r} does not exist. Give a .safetensors file; `fastcache train-scorer` makes one "
            "for a model."
        )
    tensors, facts = read_safetensors(file)
    strange = sorted(name for name in tensors if not _NAME.fullmatch(name))
    if strange or not tensors:
        raise CheckpointError(
            f"{path} is no checkpoint of method 'kvzap': it holds {strange[0] if strange else 'no tensors'!r}, and the "
            "names are layers.{layer}.{0,2}.{weight,bias}, or layers.{layer}.{weight,bias} of a linear one."
        )
    return tensors, facts.get("record", {})


def check_shapes(path: str, tensors: Mapping[str, Tensor], fit: StateFit) -> list[str]:
    """The names of a layer's tensors, in order. Errors: `CheckpointError` naming the first that does not fit."""
    linear = "layers.0.weight" in tensors
    names = ["weight", "bias"] if linear else ["0.weight", "0.bias", "2.weight", "2.bias"]
    first = tensors.get("layers.0.0.bias")
    width = fit.hidden_size if linear or first is None else first.numel()
    shapes = [(fit.kv_heads, width), (fit.kv_heads,)]
    if not linear:
        shapes = [(width, fit.hidden_size), (width,), *shapes]
    for layer in range(fit.num_layers):
        for name, shape in zip(names, shapes, strict=True):
            tensor = tensors.get(f"layers.{layer}.{name}")
            if tensor is None or tuple(tensor.shape) != shape:
                found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise CheckpointError(
                    f"{path}: layers.{layer}.{name} {found}; this model, of {fit.num_layers} layers, hidden size "
                    f"{fit.hidden_size} and {fit.kv_heads} KV heads, needs {shape}. Was it trained for another model?"
                )
    if len(tensors) != fit.num_layers * len(names):
        raise CheckpointError(
            f"{path} holds {len(tensors)} tensors; a model of {fit.num_layers} layers has "
            f"{fit.num_layers * len(names)}. Was it trained for another model?"
        )
    return names
