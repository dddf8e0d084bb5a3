"""A tiny GGUF file out of a Hugging Face Llama folder, laid out as llama.cpp's converter lays it out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the cat sat on the mat while another cat, thinner than that one, watched from under the table",
    "when water freezes it expands, which is why pipes burst in winter and why ice floats on the lake",
    "every number in a report should be read from a row that somebody can open and check in 2024",
] * 4
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
STRING, UINT32 = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32
F32 = gguf.GGMLQuantizationType.F32


def trained_tokenizer(vocabulary: int) -> Tokenizer:
    """The byte-level BPE, digits alone, that the file's vocabulary and merges are taken from."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_tiny_gguf(
    path: Path,
    folder: Path,
    *,
    quantisation: gguf.GGMLQuantizationType = F32,
    architecture: str = "llama",
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Tokenizer:
    """Write `folder`'s weights to `path`; return the tokenizer that went in.

    `keys` adds or replaces text and integer keys; `tensors` replaces tensors by GGUF name, or leaves them
    out (None). Matrices are stored as `quantisation`.
    """
    config = json.loads((folder / "config.json").read_text())
    tokenizer = trained_tokenizer(config["vocab_size"])
    writer = gguf.GGUFWriter(path, architecture)
    _write_sizes(writer, config)
    _write_tokenizer(writer, tokenizer, config["vocab_size"])
    for key, value in {"tokenizer.ggml.pre": "smollm", **(keys or {})}.items():
        writer.add_key_value(key, value, STRING if isinstance(value, str) else UINT32)
    for name, array in {**_tensors(folder, config), **(tensors or {})}.items():
        if array is not None:
            kind = quantisation if array.ndim == 2 else F32
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizer


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row, as a definition: GGUF's row 2i + j of a head is its row i + j * d / 2."""
    head_dim = len(weight) // heads
    order = [
        head * head_dim + pair + half * head_dim // 2
        for head in range(heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    return weight[order]


def _tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for name, array in load_file(folder / "model.safetensors").items():
        if name in WHOLE:
            found[WHOLE[name]] = array
            continue
        layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        short = NAMES[part]
        found[f"blk.{layer}.{short}.weight"] = interleave(array, heads[short]) if short in heads else array
    return found


def _write_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocabulary: int) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    assert len(tokens) == vocabulary, "the corpus is too small for so many tokens"
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
