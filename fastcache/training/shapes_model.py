"""The small multimodal model of the shapes: its sizes, its words, and the Hugging Face folder it is kept in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcache.config import StrictConfig, positive_int, require
from fastcache.errors import ConfigError, ModelFolderError
from fastcache.models.config import read_json
from fastcache.shapes.album import IMAGE, words
from fastcache.shapes.scene import GRID, PICTURE

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = (PAD, BOS, EOS, IMAGE, UNKNOWN)
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = range(4)
# High, as heads are narrow: more of their dimensions turn slowly enough to find a picture's patch by what it shows.
ROPE_THETA = 1e6


@dataclass(frozen=True)
class ShapesModelConfig(StrictConfig):
    """Sizes of a LLaVA: a CLIP tower and a Llama of the same width. `patch` in pixels."""

    width: int = 128
    vision_layers: int = 2
    text_layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    patch: int = 8

    def __post_init__(self) -> None:
        for name in ("width", "vision_layers", "text_layers", "heads", "kv_heads", "patch"):
            positive_int(name, getattr(self, name))
        require(
            self.width % (2 * self.heads) == 0
            and self.heads % self.kv_heads == 0
            and PICTURE // GRID % self.patch == 0,
            f"width {self.width}, heads {self.heads}, kv_heads {self.kv_heads}, patch {self.patch}; width must divide "
            f"by twice the heads, heads by kv_heads, and a cell's {PICTURE // GRID} pixels by patch.",
        )

    @property
    def image_tokens(self) -> int:
        return (PICTURE // self.patch) ** 2


def vocabulary() -> dict[str, int]:
    """Every token's id; special ones first."""
    return {word: index for index, word in enumerate((*SPECIAL, *words()))}


def encode(text: str) -> list[int]:
    """Ids of words separated by spaces; what `tokenizer.json` gives, without its first token."""
    known = vocabulary()
    return [known[word] for word in text.split()]


def build(config: ShapesModelConfig, seed: int) -> Any:
    """transformers' LLaVA with first weights from `seed`, float32. Errors: `ConfigError` without transformers."""
    try:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    except ImportError:
        raise ConfigError(
            "training the shapes model needs transformers, whose model classes it trains: pip install transformers "
            "(envs/dev.txt has the version that is tested)."
        ) from None
    common = {"hidden_size": config.width, "intermediate_size": 3 * config.width}
    vision = CLIPVisionConfig(
        **common,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.heads,
        image_size=PICTURE,
        patch_size=config.patch,
    )
    text = LlamaConfig(**common, **_text_sizes(config))
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_ID,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
    )
    _look_up(model, config.heads // config.kv_heads)
    return model


def _text_sizes(config: ShapesModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": -(-len(vocabulary()) // 16) * 16,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.width // config.heads,
        "max_position_embeddings": 2048,
        # transformers' 0.02 is for wide models: at this width attention would start all but blind to its inputs.
        "initializer_range": config.width**-0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": True,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }


@torch.no_grad()
def _look_up(model: Any, group: int) -> None:
    """Attention starts as a look-up: a token attends to those like it and adds what they hold, since keys begin as
    queries and outputs undo values (Trockman, Kolter 2023, arXiv:2305.09828). From independent weights a small model
    first has to find both at once, which takes it longer than all the rest."""
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        heads = attention.q_proj.weight.unflatten(0, (-1, group, attention.head_dim))
        attention.k_proj.weight.copy_(heads[:, 0].flatten(0, 1))
        values = attention.v_proj.weight.unflatten(0, (-1, 1, attention.head_dim))
        attention.o_proj.weight.copy_(values.expand(-1, group, -1, -1).flatten(0, 2).T)


def load(model: Any, folder: Path) -> dict[str, Any]:
    """Put the weights of `folder` into `model`; returns how they came to be. Errors: `ModelFolderError`."""
    from transformers import LlavaForConditionalGeneration

    record = folder / "training.json"
    if not record.is_file():
        raise ModelFolderError(
            f"{folder} has no training.json; give a folder that `fastcache train-shapes` wrote."
        )
    known = read_json(record)
    stored = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    try:
        model.load_state_dict(stored.state_dict())
    except RuntimeError as error:
        raise ModelFolderError(f"{folder} holds a model of other sizes ({error}).") from None
    return {
        "config": known["config"],
        "heldout_accuracy": known["heldout_accuracy"],
        "start": known.get("start"),
    }


def save(model: Any, folder: Path) -> None:
    """The folder that the engine loads: config, bfloat16 safetensors, preprocessor and tokenizer."""
    from transformers import CLIPImageProcessor

    model.to(torch.bfloat16).save_pretrained(folder)
    size = {"height": PICTURE, "width": PICTURE}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))


def _tokenizer() -> Any:
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    made = tokenizers.Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return made
