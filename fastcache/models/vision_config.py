"""The vision side of a LLaVA `config.json`: sizes of the CLIP tower, and which of its features are used.

Both nested configs leave out what equals transformers' defaults, so those defaults are written down here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastcache.errors import ModelFolderError, UnsupportedArchitecture

ACTIVATIONS = ("quick_gelu", "gelu")
STRATEGIES = ("default", "full")
_TEXT_DEFAULTS = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}
_VISION_DEFAULTS = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower and what LLaVA takes from it. Sizes of pictures and patches are in pixels.

    feature_layers: which hidden states are used, concatenated in this order; 0 is the tower's input, i the
        output of layer i. class_token: whether the first token, of no patch, is kept ("full") or dropped.
    image_token_id: the placeholder in a prompt. projector_bias: of the projector's two layers.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    activation: str
    feature_layers: tuple[int, ...]
    class_token: bool
    image_token_id: int
    projector_bias: bool

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_image(self) -> int:
        return self.num_patches + self.class_token

    @property
    def depth(self) -> int:
        """How many layers have to be computed: up to the last one whose output is used."""
        return max(self.feature_layers)

    @property
    def num_parameters(self) -> int:
        """Weights of the tower's matrices, as far as it is computed."""
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        return self.depth * layer + self.num_channels * self.patch_size**2 * self.hidden_size

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str) -> VisionConfig:
        """From the dictionary of a LLaVA `config.json`. Errors: `ModelFolderError`, `UnsupportedArchitecture`."""
        vision = {**_VISION_DEFAULTS, **(raw.get("vision_config") or {})}
        strategy = raw.get("vision_feature_select_strategy", "default")
        for key, given, allowed in (
            ("vision_config.model_type", vision["model_type"], ("clip_vision_model",)),
            ("vision_config.hidden_act", vision["hidden_act"], ACTIVATIONS),
            ("vision_feature_select_strategy", strategy, STRATEGIES),
            ("projector_hidden_act", raw.get("projector_hidden_act", "gelu"), ("gelu",)),
        ):
            if given not in allowed:
                raise UnsupportedArchitecture(
                    f"{source}: {key} = {given!r} is not implemented. Supported: {', '.join(allowed)}."
                )
        return cls(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_layers=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            num_channels=vision["num_channels"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            layer_norm_eps=vision["layer_norm_eps"],
            activation=vision["hidden_act"],
            feature_layers=_feature_layers(
                raw.get("vision_feature_layer", -2), vision["num_hidden_layers"], source
            ),
            class_token=strategy == "full",
            image_token_id=raw.get("image_token_id", raw.get("image_token_index", 32000)),
            projector_bias=bool(raw.get("multimodal_projector_bias", True)),
        )


def text_config(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The language model's own `config.json` out of a LLaVA one. Errors: `UnsupportedArchitecture`."""
    text = dict(raw.get("text_config") or {})
    if text.get("model_type", "llama") != "llama":
        raise UnsupportedArchitecture(
            f"{source}: text_config.model_type = {text['model_type']!r} is not implemented. Supported: llama."
        )
    outer = {key: raw[key] for key in ("dtype", "torch_dtype", "quantization_config") if raw.get(key)}
    tied = raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    merged = {**_TEXT_DEFAULTS, **text, **outer, "tie_word_embeddings": tied}
    merged["architectures"] = _TEXT_DEFAULTS["architectures"]
    if raw.get("eos_token_id") is not None:  # of generation_config.json
        merged["eos_token_id"] = raw["eos_token_id"]
    return merged


def _feature_layers(given: int | list[int], num_layers: int, source: str) -> tuple[int, ...]:
    """Counted from the tower's input; negative ones count back from the last layer's output, which is -1."""
    layers = given if isinstance(given, list) else [given]
    found = tuple(layer + num_layers + 1 if layer < 0 else layer for layer in layers)
    if not found or not all(0 <= layer <= num_layers for layer in found):
        raise ModelFolderError(
            f"{source}: vision_feature_layer is {given!r}; the tower has {num_layers} layers, so allowed is "
            f"{-num_layers - 1} to {num_layers}, or a list of these."
        )
    return found
