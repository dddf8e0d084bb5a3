"""The models the command line knows by name: their shapes and their defaults. Imports no torch.

A name is a label plus defaults, never a location: paths come from the user. The shapes serve seeded dummy
weights (`load_format="dummy"`) when no folder is given; they are those of the public `config.json` files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastcache.config import require
from fastcache.errors import UnknownName


@dataclass(frozen=True)
class ModelAlias:
    """`flag` is the command-line option that carries the folder; `hf_config` a Hugging Face `config.json`."""

    name: str
    title: str
    flag: str
    hf_config: Mapping[str, Any]
    max_model_len: int
    batch_sizes: tuple[int, ...]


SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    }


LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "image_seq_length": 576,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
}

MODELS: dict[str, ModelAlias] = {
    alias.name: alias
    for alias in (
        ModelAlias("smollm2", "SmolLM2-135M-Instruct", "--smollm2", SMOLLM2, 4096, (1, 4)),
        ModelAlias("qwen3-8b", "Qwen3-8B", "--qwen3-8b", _qwen3(4096, 12288, 36, 32), 4096, (16, 64)),
        ModelAlias("qwen3-32b", "Qwen3-32B", "--qwen3-32b", _qwen3(5120, 25600, 64, 64), 4096, (8, 16)),
        ModelAlias("llava-mlp", "LLaVA-1.5-7B", "--llava", LLAVA, 4096, (1, 4)),
    )
}


def alias(name: str) -> ModelAlias:
    """The table's entry for `name`. Errors: `UnknownName` with the nearest one."""
    if name not in MODELS:
        raise UnknownName("model", name, MODELS)
    return MODELS[name]


def check_source(name: str, path: str | None, load_format: str) -> None:
    """A model needs a folder, or dummy weights in the shapes of a name the table knows."""
    if path is not None:
        return
    flag = alias(name).flag
    require(
        load_format == "dummy",
        f"model {name!r} was named without a folder. Give its path (`{flag} PATH`, or `path:` in the "
        "config), or ask for seeded dummy weights in its shapes (`--load-format dummy`).",
    )
