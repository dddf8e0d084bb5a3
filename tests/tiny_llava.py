"""Tiny seeded random LLaVA folders and pictures, as transformers writes them and as its processor reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tiny_models import BOS, EOS, PAD, VOCAB_SIZE, _tokenizer, randomise

IMAGE_TOKEN = 259
IMAGE_SIZE, PATCH_SIZE = 28, 7


def write_tiny_llava(
    folder: Path,
    feature_layer: int | list[int] = -2,
    strategy: str = "default",
    hidden_act: str = "quick_gelu",
    bias: bool = True,
    tied: bool = False,
    head_dim: int = 16,
    seed: int = 0,
    patch_size: int = PATCH_SIZE,
) -> Path:
    """Config, float32 safetensors, preprocessor config and a byte-level tokenizer that knows `<image>`."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=patch_size,
        hidden_act=hidden_act,
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        multimodal_projector_bias=bias,
        tie_word_embeddings=tied,
    )
    model = LlavaForConditionalGeneration(config).to(torch.float32).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    tokenizer.save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Seeded noise: no two pixels alike, so a shifted crop or a swapped axis shows."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
