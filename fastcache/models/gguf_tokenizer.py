"""The tokenizer inside a GGUF file, written as the `tokenizer.json` that its merges came from.

transformers picks a tokenizer class by the model's architecture, which for a llama file adds tokens beyond
the embedding; so the byte-level BPE is rebuilt from the file's own vocabulary and merges. What a GGUF file
does not say is the splitting in front of the merges; it only names it (`tokenizer.ggml.pre`), and the names
known here are listed below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcache.errors import ModelFolderError, UnsupportedArchitecture

# Of the splits that llama.cpp names, the one whose definition was checked: every digit alone, then GPT-2's.
PRE_TOKENIZERS = ("smollm",)
CONTROL = 3  # gguf.TokenType.CONTROL


def write_tokenizer(keys: Mapping[str, Any], folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`. `keys` are the file's, without `tokenizer.`.

    Errors: `UnsupportedArchitecture` for a tokenizer that is no byte-level BPE with a known split,
    `ModelFolderError` for a missing part.
    """
    kind, split = keys.get("ggml.model"), keys.get("ggml.pre")
    if kind != "gpt2" or split not in PRE_TOKENIZERS:
        raise UnsupportedArchitecture(
            f"the GGUF file has a tokenizer of kind {kind!r} with the split {split!r}; allowed is 'gpt2' "
            f"(byte-level BPE) with {', '.join(PRE_TOKENIZERS)}. Use a Hugging Face folder of the model "
            "instead."
        )
    for key in ("ggml.tokens", "ggml.token_type", "ggml.merges"):
        if not keys.get(key):
            raise ModelFolderError(f"the GGUF file has no tokenizer.{key}. Download the file again.")
    _byte_level_bpe(keys).save(str(folder / "tokenizer.json"))
    config = json.dumps(_config(keys, max_length), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def _byte_level_bpe(keys: Mapping[str, Any]):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = keys["ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in keys["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, keys["ggml.token_type"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _config(keys: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    # This class takes tokenizer.json as it is; a model's own class may rebuild it by other rules.
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = keys.get(f"ggml.{key}_token_id")
        if index is not None:
            config[f"{name}_token"] = keys["ggml.tokens"][index]
    if keys.get("chat_template"):
        config["chat_template"] = keys["chat_template"]
    return config
