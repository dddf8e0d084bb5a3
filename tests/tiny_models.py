"""Tiny seeded random Llama and Qwen3 folders, as Hugging Face writes them: the oracle's own files.

transformers builds and saves them, so a test compares our reader and our arithmetic with an independent
implementation. The sizes are chosen by the test: head size times heads need not be the hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch

VOCAB_SIZE = 320  # 256 bytes, 3 specials, and a tail of ids that no text ever produces
BOS, EOS, PAD = 256, 257, 258
SPECIALS = {"<|bos|>": BOS, "<|eos|>": EOS, "<|pad|>": PAD}


def write_tiny_model(
    folder: Path,
    arch: str = "llama",
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    hidden: int = 64,
    layers: int = 2,
    tied: bool = False,
    seed: int = 0,
    *,
    intermediate: int | None = None,
    rope_theta: float = 10_000.0,
    max_positions: int = 1024,
    attention_bias: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Write `config.json`, float32 safetensors and a byte-level tokenizer into `folder`; return it.

    `arch` is "llama" or "qwen3". `max_shard_size` such as "50KB" gives several files and an index. Weights
    have a spread of 1/sqrt(fan in) and norm weights vary around 1, so that logits differ clearly between
    tokens and a forgotten norm weight, bias or rotation changes them.
    """
    model = _build(
        arch,
        tied,
        seed,
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=intermediate or 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=1e-5,
        attention_bias=attention_bias,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _tokenizer().save_pretrained(folder)
    return folder


def _build(arch: str, tied: bool, seed: int, **sizes):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = kinds[arch]
    config = config_class(tie_word_embeddings=tied, use_cache=True, **sizes)
    model = model_class(config).to(torch.float32).eval()
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    """The spread that `write_tiny_model` promises, for every parameter in the order of its name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1 and name.endswith("weight"):
                weight.copy_(1 + 0.3 * noise)
            else:
                weight.copy_(noise / weight.shape[-1] ** 0.5)


def _tokenizer():
    """One token per byte, so any text round-trips and its length is its UTF-8 length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
