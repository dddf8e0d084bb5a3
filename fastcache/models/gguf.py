"""A llama-architecture GGUF file becomes an ordinary Hugging Face folder: float32 safetensors and JSON.

Two things in such a file are not what they seem (source: convert_hf_to_gguf.py of ggml-org/llama.cpp): the
rows of the query and key weights are interleaved, because its rotary embedding turns neighbouring rows where
Hugging Face's turns the two halves of a head; and the norm epsilon is a float32, so 1e-5 reads as
9.999999747378752e-06. Both are undone here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcache.errors import ModelFolderError, UnsupportedArchitecture, UserError
from fastcache.models.gguf_tokenizer import write_tokenizer

logger = logging.getLogger(__name__)

MODEL_TYPE = "llama"


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a llama-architecture file; all in elements."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    rope_theta: float
    rms_norm_eps: float


@dataclass(frozen=True)
class TensorSpec:
    """Where a GGUF tensor goes. `heads` is set when its rows are interleaved and must be put back."""

    name: str
    shape: tuple[int, ...]
    heads: int | None = None


def convert(source: Path, folder: Path) -> None:
    """Write `model.safetensors`, `config.json`, `generation_config.json` and the tokenizer of `source`.

    `folder` must exist; the files are not written atomically, so give a temporary folder and rename it.
    Errors: `ModelFolderError` for a file that is no GGUF or lacks a part, `UnsupportedArchitecture` for any
    architecture, rotary scaling or tokenizer other than those of plain llama with a byte-level BPE.
    """
    from safetensors.numpy import save

    reader = _open(source)
    fields = _Fields(reader, source)
    shape = read_shape(fields)
    weights = read_weights(reader, shape, source)
    # Not `save_file`, whose files nobody else on a shared machine may read.
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    tied = "lm_head.weight" not in weights
    ids = {
        f"{name}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    ids = {name: int(value) for name, value in ids.items() if value is not None}
    write_json(folder / "config.json", model_config(shape, ids, tied))
    write_json(folder / "generation_config.json", ids)
    write_tokenizer(fields.tokenizer(), folder, shape.positions)
    logger.info("wrote %d tensors and the tokenizer to %s", len(weights), folder)


def read_shape(fields: _Fields) -> LlamaShape:
    """Read the sizes; refuse what the arithmetic of a plain Llama would get wrong."""
    architecture = fields["general.architecture"]
    if architecture != MODEL_TYPE:
        raise UnsupportedArchitecture(
            f"{fields.source} holds the architecture {architecture!r}; only GGUF files of the architecture "
            f"{MODEL_TYPE!r} are converted. Use a Hugging Face folder of the model instead."
        )
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    scaling = fields.get("llama.rope.scaling.type", "none")
    if not isinstance(heads, int) or scaling != "none":
        raise UnsupportedArchitecture(
            f"{fields.source} uses rotary scaling {scaling!r} and head count {heads!r}; allowed are no "
            "scaling and one head count for all layers. Use a Hugging Face folder of the model instead."
        )
    head_dim = fields.get("llama.attention.key_length", hidden // heads)
    rotary = fields.get("llama.rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise UnsupportedArchitecture(
            f"{fields.source} rotates {rotary} of {head_dim} dimensions of a head; allowed is all of them. "
            "Use a Hugging Face folder of the model instead."
        )
    return LlamaShape(
        layers=fields["llama.block_count"],
        hidden=hidden,
        intermediate=fields["llama.feed_forward_length"],
        heads=heads,
        kv_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocabulary=len(fields["tokenizer.ggml.tokens"]),
        positions=fields["llama.context_length"],
        rope_theta=_shortest(fields.get("llama.rope.freq_base", 10000.0)),
        rms_norm_eps=_shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
    )


def tensor_specs(shape: LlamaShape) -> dict[str, TensorSpec]:
    """GGUF tensor name -> Hugging Face name, shape (rows, columns) and interleaving, for every layer."""
    hidden, inner = shape.hidden, shape.intermediate
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    specs = {
        "token_embd.weight": TensorSpec("model.embed_tokens.weight", (shape.vocabulary, hidden)),
        "output_norm.weight": TensorSpec("model.norm.weight", (hidden,)),
    }
    for layer in range(shape.layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        specs |= {
            f"{theirs}.attn_norm.weight": TensorSpec(f"{ours}.input_layernorm.weight", (hidden,)),
            f"{theirs}.attn_q.weight": TensorSpec(
                f"{ours}.self_attn.q_proj.weight", (q_rows, hidden), shape.heads
            ),
            f"{theirs}.attn_k.weight": TensorSpec(
                f"{ours}.self_attn.k_proj.weight", (kv_rows, hidden), shape.kv_heads
            ),
            f"{theirs}.attn_v.weight": TensorSpec(f"{ours}.self_attn.v_proj.weight", (kv_rows, hidden)),
            f"{theirs}.attn_output.weight": TensorSpec(f"{ours}.self_attn.o_proj.weight", (hidden, q_rows)),
            f"{theirs}.ffn_norm.weight": TensorSpec(f"{ours}.post_attention_layernorm.weight", (hidden,)),
            f"{theirs}.ffn_gate.weight": TensorSpec(f"{ours}.mlp.gate_proj.weight", (inner, hidden)),
            f"{theirs}.ffn_up.weight": TensorSpec(f"{ours}.mlp.up_proj.weight", (inner, hidden)),
            f"{theirs}.ffn_down.weight": TensorSpec(f"{ours}.mlp.down_proj.weight", (hidden, inner)),
        }
    return specs


def read_weights(reader: Any, shape: LlamaShape, source: Path) -> dict[str, np.ndarray]:
    """Dequantise every tensor to float32 under its Hugging Face name; `lm_head.weight` only if untied."""
    from gguf import dequantize

    specs = tensor_specs(shape)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "output.weight" in tensors:
        specs["output.weight"] = TensorSpec("lm_head.weight", (shape.vocabulary, shape.hidden))
    missing, unknown = sorted(specs.keys() - tensors.keys()), sorted(tensors.keys() - specs.keys())
    if missing or unknown:
        raise ModelFolderError(
            f"{source} is not a plain llama model of {shape.layers} layers: tensors missing: "
            f"{missing[:3] or 'none'}, unknown: {unknown[:3] or 'none'}. Download the file again, or use a "
            "Hugging Face folder of the model instead."
        )
    weights = {}
    for name, spec in specs.items():
        array = np.asarray(dequantize(tensors[name].data, tensors[name].tensor_type), dtype=np.float32)
        if array.shape != spec.shape:
            raise ModelFolderError(
                f"{source}: tensor {name} has shape {array.shape}, the file's own sizes say {spec.shape}. "
                "Download the file again."
            )
        rows = array if spec.heads is None else split_rotary_halves(array, spec.heads)
        weights[spec.name] = np.ascontiguousarray(rows)
    return weights


def split_rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """(heads * d, columns), rows (0, d/2, 1, d/2+1, ...) inside each head -> rows 0 .. d-1 in order.

    GGUF stores pair i of a head's rotary dimensions as rows 2i and 2i+1; Hugging Face keeps the first of
    each pair in the first half of the head and the second in the second half.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def model_config(shape: LlamaShape, token_ids: Mapping[str, int], tied: bool) -> dict[str, Any]:
    """`config.json`. Rotary theta is given twice: transformers 5 reads one key, older readers the other."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.positions,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": shape.vocabulary,
        **token_ids,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Fields:
    """The key-value part of a GGUF file, with an error that names the file when a key is absent."""

    def __init__(self, reader: Any, source: Path) -> None:
        self._reader, self.source = reader, source

    def get(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelFolderError(
                f"{self.source} has no key {key!r}, so it cannot be converted. Download the file again."
            )
        return value

    def tokenizer(self) -> dict[str, Any]:
        """Every `tokenizer.` key of the file, e.g. `ggml.merges` and `chat_template`."""
        prefix = "tokenizer."
        names = [name for name in self._reader.fields if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.get(name) for name in names}


def _open(source: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            "converting a GGUF file needs the package gguf: run `pip install gguf`, or install fastcache "
            "with its extra `workflow`."
        ) from error
    try:
        return GGUFReader(source)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelFolderError(
            f"{source} cannot be read as a GGUF file ({error}). Download it again."
        ) from error


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))
