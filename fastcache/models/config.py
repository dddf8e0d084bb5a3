"""A model's shape, read from a Hugging Face `config.json` or from a built-in preset.

Only what our model files implement is accepted; anything else is named and refused, never approximated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastcache.errors import ModelFolderError, UnsupportedArchitecture
from fastcache.models.presets import PRESETS
from fastcache.models.vision_config import VisionConfig, text_config

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "LlavaForConditionalGeneration": "llava",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base `theta` and, for `linear` and `llama3`, the scaling's own parameters."""

    theta: float
    kind: str = "default"
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder-only transformer. `head_dim` need not be hidden_size / num_heads.

    `vision`: the tower in front of a model that reads pictures, None for one that reads text alone.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    eos_token_ids: frozenset[int]
    vision: VisionConfig | None = None

    @property
    def num_parameters(self) -> int:
        """Weights of the matrices and embeddings; norms and biases are too few to count."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        tower = self.vision.num_parameters if self.vision is not None else 0
        return self.num_layers * layer + embeddings + tower

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str) -> ModelConfig:
        """From the dictionary of a `config.json`; `source` names it in errors."""
        names = raw.get("architectures") or []
        name = next((n for n in names if n in ARCHITECTURES), None)
        if name is None:
            raise UnsupportedArchitecture(
                f"{source}: architecture {', '.join(names) or '(none named)'} is not implemented. Supported: "
                f"{', '.join(sorted(ARCHITECTURES))}."
            )
        vision = None
        if ARCHITECTURES[name] == "llava":
            vision, raw = VisionConfig.from_hf(raw, source), text_config(raw, source)
        _refuse_unsupported(raw, source)
        try:
            heads = raw["num_attention_heads"]
            return cls(
                architecture=ARCHITECTURES[name],
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_layers=raw["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                max_position_embeddings=raw.get("max_position_embeddings", 2048),
                rope=_rope(raw, source),
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                attention_bias=bool(raw.get("attention_bias", False)),
                mlp_bias=bool(raw.get("mlp_bias", False)),
                dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
                eos_token_ids=_token_ids(raw.get("eos_token_id")),
                vision=vision,
            )
        except KeyError as error:
            raise ModelFolderError(
                f"{source} has no {error.args[0]!r}; is it a complete config.json?"
            ) from None


def _refuse_unsupported(raw: Mapping[str, Any], source: str) -> None:
    checks = {
        "hidden_act": raw.get("hidden_act", "silu") == "silu",
        "use_sliding_window": not raw.get("use_sliding_window", False),
        "quantization_config": raw.get("quantization_config") is None,
    }
    for key, supported in checks.items():
        if not supported:
            raise UnsupportedArchitecture(f"{source}: {key} = {raw[key]!r} is not implemented.")


def _rope(raw: Mapping[str, Any], source: str) -> RopeConfig:
    """Both spellings: transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`)."""
    parameters = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    theta = parameters.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    if kind not in ROPE_TYPES:
        raise UnsupportedArchitecture(
            f"{source}: rotary scaling {kind!r} is not implemented. Supported: {', '.join(ROPE_TYPES)}."
        )
    numbers = {key: value for key, value in parameters.items() if isinstance(value, int | float)}
    return RopeConfig(float(theta), kind, numbers)


def _token_ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset([value])


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelFolderError(f"{path} cannot be read as JSON: {error}") from None


def load_model_config(model: str, load_format: str) -> ModelConfig:
    """The shape of `model`: a local folder, or, for dummy weights only, the name of a preset.

    Errors: `ModelFolderError` for a folder that is missing or has no config.json, `UnsupportedArchitecture`.
    """
    folder = Path(model)
    if not folder.is_dir():
        if load_format == "dummy" and model in PRESETS:
            return ModelConfig.from_hf(PRESETS[model], f"preset {model!r}")
        raise ModelFolderError(
            f"model folder {model!r} does not exist. Give the path of a local Hugging Face folder"
            f" (config.json and *.safetensors), or, for dummy weights (load_format 'dummy'), a preset: "
            f"{', '.join(PRESETS)}."
        )
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelFolderError(f"{folder} has no config.json; give the folder of a Hugging Face model.")
    raw = read_json(config_path)
    generation = folder / "generation_config.json"
    if generation.is_file() and "eos_token_id" in (extra := read_json(generation)):
        raw["eos_token_id"] = extra["eos_token_id"]
    return ModelConfig.from_hf(raw, str(config_path))
