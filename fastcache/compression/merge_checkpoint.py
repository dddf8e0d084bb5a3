"""Files of the merging networks: read and checked, written in one piece.

Layout: `compress_{tk,tv,ik,iv}.{layer}.{0,3,6}.{weight,bias}` for text and image keys and values; 0, 3 and 6 are
the linear layers of a Sequential with ReLU and dropout between them. Safetensors files carry their `MergeLayout`
and training record as JSON under the metadata key `fastcache`. A `.pth` of the original has neither; it may nest
the tensors under `model_state_dict` and `compressor`, and holds `attention.*` tensors that nothing uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache.compression.merge import MergeLayout, Net
from fastcache.compression.tensor_file import DUMMY, read_safetensors, write_safetensors
from fastcache.errors import CheckpointError

DUMMY_WIDTH = 128  # of seeded networks, as of the original's
LINEAR = (0, 3, 6)
_NAME = re.compile(r"compress_(tk|tv|ik|iv)\.(\d+)\.(0|3|6)\.(weight|bias)")
_UNUSED = re.compile(r"attention\.\d+\.(weight|bias)")


def tensor_name(kind: str, layer: int, linear: int, part: str) -> str:
    return f"compress_{kind}.{layer}.{linear}.{part}"


@dataclass(frozen=True)
class MergeCheckpoint:
    """Tensors by name, on the CPU, as the file holds them; `unused` are names that were skipped."""

    path: str
    tensors: Mapping[str, Tensor]
    layout: MergeLayout | None  # None: the file does not say, as the original's do not
    record: Mapping[str, Any]
    unused: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({name.split(".")[0].removeprefix("compress_") for name in self.tensors}))

    def nets(self, layer: int, dtype: torch.dtype, device: torch.device) -> dict[str, Net]:
        """The networks of one layer by kind."""
        return {
            kind: tuple(
                self.tensors[tensor_name(kind, layer, linear, part)].to(device, dtype)
                for linear in LINEAR
                for part in ("weight", "bias")
            )
            for kind in self.kinds
        }


def read_checkpoint(path: str) -> MergeCheckpoint:
    """Errors: `CheckpointError` for a file that is missing, unreadable or holds tensors of another kind."""
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(
            f"compressor checkpoint {path!r} does not exist. Give a .safetensors or .pth file; "
            "`fastcache train-compressor` makes one for a model."
        )
    tensors, metadata = read_safetensors(file) if file.suffix == ".safetensors" else _pickle(file)
    unused = tuple(sorted(name for name in tensors if _UNUSED.fullmatch(name)))
    strange = sorted(name for name in tensors if not _NAME.fullmatch(name) and name not in unused)
    if strange or len(unused) == len(tensors):
        raise CheckpointError(
            f"{path} is no checkpoint of a merging compressor: it holds {strange[0] if strange else 'no tensors'!r}, "
            "and the names are compress_{tk,tv,ik,iv}.{layer}.{0,3,6}.{weight,bias}."
        )
    layout = metadata.get("layout")
    return MergeCheckpoint(
        path,
        {name: tensor for name, tensor in tensors.items() if name not in unused},
        MergeLayout.from_dict(layout) if layout is not None else None,
        metadata.get("record", {}),
        unused,
    )


def dummy_checkpoint(num_layers: int, head_dim: int, factor: int, images: bool) -> MergeCheckpoint:
    """Seeded networks that cost what trained ones cost and know nothing. All entries are merged, as keys unrotated."""
    generator = torch.Generator().manual_seed(0)
    sizes = {0: (DUMMY_WIDTH, factor * head_dim), 3: (DUMMY_WIDTH, DUMMY_WIDTH), 6: (head_dim, DUMMY_WIDTH)}
    tensors = {}
    for kind in ("tk", "tv", "ik", "iv") if images else ("tk", "tv"):
        for layer in range(num_layers):
            for linear, (rows, columns) in sizes.items():
                weight = torch.randn(rows, columns, generator=generator) / columns**0.5
                tensors[tensor_name(kind, layer, linear, "weight")] = weight
                tensors[tensor_name(kind, layer, linear, "bias")] = torch.zeros(rows)
    return MergeCheckpoint(DUMMY, tensors, MergeLayout(factor, unrotated=True, base="mean"), {}, ())


def _pickle(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle can raise anything
        # Without torch's own words: they advise to open the file in the way that runs code.
        raise CheckpointError(
            f"{file} cannot be read as a torch checkpoint of plain tensors ({type(error).__name__}): it is damaged, or "
            "runs code when it is opened, which is refused. Copy it again, or save its state dict as .safetensors."
        ) from error
    for key in ("model_state_dict", "compressor"):
        if isinstance(content, Mapping) and key in content:
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in content.items()
    ):
        raise CheckpointError(f"{file} holds no state dict of tensors, alone or under model_state_dict.")
    return dict(content), {}


def check_shapes(checkpoint: MergeCheckpoint, num_layers: int, head_dim: int, factor: int) -> None:
    """Errors: `CheckpointError` naming the first tensor that is missing or has another shape."""
    for kind in sorted({"tk", "tv", *checkpoint.kinds}):
        for layer in range(num_layers):
            width = _tensor(checkpoint, kind, layer, 0, "bias", num_layers).numel()
            sizes = {0: (width, factor * head_dim), 3: (width, width), 6: (head_dim, width)}
            for linear, size in sizes.items():
                for part, shape in (("weight", size), ("bias", size[:1])):
                    tensor = _tensor(checkpoint, kind, layer, linear, part, num_layers)
                    if tuple(tensor.shape) != shape:
                        raise CheckpointError(
                            f"{checkpoint.path}: {tensor_name(kind, layer, linear, part)} has shape "
                            f"{tuple(tensor.shape)}; factor {factor} and head size {head_dim} need {shape}."
                        )
    if ("ik" in checkpoint.kinds) != ("iv" in checkpoint.kinds):
        raise CheckpointError(f"{checkpoint.path} has networks for image keys or values alone; both belong.")
    layers = {int(name.split(".")[1]) for name in checkpoint.tensors}
    if max(layers) >= num_layers:
        raise CheckpointError(
            f"{checkpoint.path} is for a model of {max(layers) + 1} layers, this one has {num_layers}."
        )


def _tensor(
    checkpoint: MergeCheckpoint, kind: str, layer: int, linear: int, part: str, num_layers: int
) -> Tensor:
    name = tensor_name(kind, layer, linear, part)
    if name not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.path} has no {name}; a model of {num_layers} layers needs it. Was it trained for another "
            "model?"
        )
    return checkpoint.tensors[name]


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], layout: MergeLayout, record: Mapping[str, Any]
) -> None:
    """Safetensors with layout and record inside; appears complete or not at all."""
    write_safetensors(path, tensors, {"layout": layout.to_dict(), "record": record})
