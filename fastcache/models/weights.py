"""Weights into a model: a Hugging Face safetensors folder, or seeded random numbers that say they are.

Checkpoint names are translated to ours here and nowhere else. Every parameter must be filled exactly once.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastcache.errors import ModelFolderError
from fastcache.models.config import ModelConfig, read_json
from fastcache.models.llava_names import beyond_features, text_name, vision_target

DUMMY_STD = 0.02
_PARTS = {
    "self_attn.q_proj": ("attention.qkv", "q"),
    "self_attn.k_proj": ("attention.qkv", "k"),
    "self_attn.v_proj": ("attention.qkv", "v"),
    "self_attn.o_proj": ("attention.output", None),
    "self_attn.q_norm": ("attention.q_norm", None),
    "self_attn.k_norm": ("attention.k_norm", None),
    "mlp.gate_proj": ("feed_forward.gate_up", "gate"),
    "mlp.up_proj": ("feed_forward.gate_up", "up"),
    "mlp.down_proj": ("feed_forward.down", None),
    "input_layernorm": ("input_norm", None),
    "post_attention_layernorm": ("post_norm", None),
}
_WHOLE = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
# Recomputed from the config, or numbers 0, 1, ... in order.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.embeddings\.position_ids$")


@dataclass(frozen=True)
class WeightsInfo:
    """`kind` is "checkpoint" or "dummy". sha256 covers the names and bytes of all weight files."""

    kind: str
    sha256: str | None
    source: str

    def to_dict(self) -> dict[str, str | None]:
        return {"kind": self.kind, "sha256": self.sha256, "source": self.source}


def translate(name: str) -> tuple[str, str | None] | None:
    """Checkpoint name -> (our parameter, which part of it); None for a name no model of ours has."""
    if (target := vision_target(name)) is not None:
        return target
    name = text_name(name)
    if name in _WHOLE:
        return _WHOLE[name], None
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in _PARTS:
        return None
    target, part = _PARTS[match[2]]
    return f"layers.{match[1]}.{target}.{match[3]}", part


def part_range(part: str | None, rows: int, config: ModelConfig) -> slice:
    """Which rows of a merged parameter one checkpoint tensor fills."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    third = rows // 3
    ranges = {
        "vision q": slice(0, third),
        "vision k": slice(third, 2 * third),
        "vision v": slice(2 * third, rows),
        None: slice(0, rows),
        "q": slice(0, q),
        "k": slice(q, q + kv),
        "v": slice(q + kv, q + 2 * kv),
        "gate": slice(0, config.intermediate_size),
        "up": slice(config.intermediate_size, 2 * config.intermediate_size),
    }
    return ranges[part]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, else every one. Errors name what is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelFolderError(
                f"{folder}: the index names {missing[0]}, which is not there; copy it again."
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelFolderError(
            f"{folder} has no *.safetensors. Download the model's weights into it, or run with dummy weights "
            "(load_format 'dummy')."
        )
    return files


def load_checkpoint(model: nn.Module, config: ModelConfig, folder: Path) -> WeightsInfo:
    """Fill `model` from `folder`. Errors: `ModelFolderError` for missing, corrupt or misshapen tensors."""
    parameters = dict(model.named_parameters())
    wanted = {name: parameter.shape[0] for name, parameter in parameters.items()}
    files = weight_files(folder)
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    _place(name, tensors.get_tensor(name), parameters, wanted, config, file)
        except (SafetensorError, OSError) as error:
            raise ModelFolderError(
                f"{file} is not a readable safetensors file ({error}); copy it again."
            ) from None
    unfilled = sorted(name for name, rows in wanted.items() if rows > 0)
    if unfilled:
        raise ModelFolderError(
            f"{folder}: no tensor for {unfilled[0]} ({len(unfilled)} parameters unfilled)."
        )
    return WeightsInfo("checkpoint", checksum(files), str(folder))


def _place(
    name: str,
    tensor: Tensor,
    parameters: dict[str, nn.Parameter],
    wanted: dict[str, int],
    config: ModelConfig,
    file: Path,
) -> None:
    target = translate(name)
    if target is None or target[0] not in parameters:
        tied = text_name(name) == "lm_head.weight" and config.tie_word_embeddings
        unused = config.vision is not None and beyond_features(name, config.vision)
        if tied or unused or _IGNORED.search(name):
            return
        raise ModelFolderError(f"{file}: tensor {name!r} has no place in a {config.architecture} model.")
    parameter = parameters[target[0]]
    rows = part_range(target[1], parameter.shape[0], config)
    view = parameter.data[rows]
    if view.shape != tensor.shape:
        raise ModelFolderError(
            f"{file}: {name} has shape {tuple(tensor.shape)}, config.json implies {tuple(view.shape)}."
        )
    view.copy_(tensor)
    wanted[target[0]] -= tensor.shape[0]


def checksum(files: list[Path]) -> str:
    """sha256 over each file's name and content."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode())
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def fill_dummy(model: nn.Module, seed: int, source: str) -> WeightsInfo:
    """Seeded normal weights (std 0.02), norms at one, their biases at zero: real shapes' arithmetic, no meaning."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "norm" in name:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = torch.Generator(device=parameter.device).manual_seed(seed * 1_000_003 + index)
            parameter.data.normal_(0.0, DUMMY_STD, generator=generator)
    return WeightsInfo("dummy", None, f"{source} (seed {seed})")
