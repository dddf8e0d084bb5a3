"""Checkpoint names of LLaVA: where its three parts are, in every spelling that transformers has written."""

from __future__ import annotations

import re

from fastcache.models.vision_config import VisionConfig

_TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)")
_PROJECTOR = re.compile(r"(?:model\.)?multi_modal_projector\.(linear_[12]\.(?:weight|bias))")
# Files have language_model.model.*; the modules of transformers since 4.52 are called model.language_model.*
_TEXT = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
)
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PARTS = {
    "self_attn.q_proj": ("qkv", "vision q"),
    "self_attn.k_proj": ("qkv", "vision k"),
    "self_attn.v_proj": ("qkv", "vision v"),
    "self_attn.out_proj": ("output", None),
    "layer_norm1": ("attention_norm", None),
    "layer_norm2": ("mlp_norm", None),
    "mlp.fc1": ("up", None),
    "mlp.fc2": ("down", None),
}
_WHOLE = {
    "embeddings.class_embedding": "vision.class_embedding",
    "embeddings.patch_embedding.weight": "vision.patches.weight",
    "embeddings.position_embedding.weight": "vision.positions",
    "pre_layrnorm.weight": "vision.input_norm.weight",  # sic
    "pre_layrnorm.bias": "vision.input_norm.bias",
}


def text_name(name: str) -> str:
    """The name that the language model alone would have given the tensor; other names are returned as they are."""
    for prefix, own in _TEXT:
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def vision_target(name: str) -> tuple[str, str | None] | None:
    """Checkpoint name -> (our parameter, which part of it), for the tower and the projector; else None."""
    if match := _PROJECTOR.fullmatch(name):
        return f"projector.{match[1]}", None
    tower = _TOWER.fullmatch(name)
    if tower is None:
        return None
    if tower[1] in _WHOLE:
        return _WHOLE[tower[1]], None
    match = _LAYER.fullmatch(tower[1])
    if match is None or match[2] not in _PARTS:
        return None
    target, part = _PARTS[match[2]]
    return f"vision.layers.{match[1]}.{target}.{match[3]}", part


def beyond_features(name: str, vision: VisionConfig) -> bool:
    """Whether a tensor of the tower lies behind the last feature that is used, and so is never computed."""
    tower = _TOWER.fullmatch(name)
    if tower is None:
        return False
    if tower[1].startswith("post_layernorm."):
        return True
    match = _LAYER.fullmatch(tower[1])
    return match is not None and match[2] in _PARTS and vision.depth <= int(match[1]) < vision.num_layers
