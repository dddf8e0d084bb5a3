"""GGUF -> Hugging Face folder: the same weights, the same tokenizer, the same answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from safetensors.numpy import load_file
from tiny_gguf import CORPUS, interleave, write_tiny_gguf

from fastcache.errors import ModelFolderError, UnsupportedArchitecture
from fastcache.models.gguf import convert, split_rotary_halves

SHAPES = {
    "grouped, head size of its own": {"heads": 4, "kv_heads": 2, "head_dim": 32, "tied": True},
    "three query heads per KV head, untied": {"heads": 3, "kv_heads": 1, "head_dim": 16, "tied": False},
}


def convert_tiny(tmp_path: Path, model: Path, **changes):
    """Write `model` as GGUF and convert it back; returns the new folder and the tokenizer that went in."""
    tokenizer = write_tiny_gguf(tmp_path / "tiny.gguf", model, **changes)
    folder = tmp_path / "converted"
    folder.mkdir()
    convert(tmp_path / "tiny.gguf", folder)
    return folder, tokenizer


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_come_back_bit_for_bit(tiny_model, tmp_path: Path, shape) -> None:
    model = tiny_model("llama", **shape)
    folder, _ = convert_tiny(tmp_path, model)
    expected, found = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_transformers_computes_the_same_with_the_folder(tiny_model, tmp_path: Path, shape) -> None:
    """Catches what equal weights cannot: a wrong theta, epsilon, head count, tie or activation."""
    import torch
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama", **shape, rope_theta=50_000.0)
    folder, _ = convert_tiny(tmp_path, model)
    ids = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (model, folder))
    assert torch.equal(expected, found)


@pytest.mark.parametrize(("kind", "error"), [(Quant.Q8_0, 0.01), (Quant.Q4_1, 0.08)])
def test_quantised_weights_are_close(tiny_model, tmp_path: Path, kind: Quant, error: float) -> None:
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=32)
    folder, _ = convert_tiny(tmp_path, model, quantisation=kind)
    expected, found = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        assert np.abs(found[name] - array).max() <= error * np.ptp(array), name


def test_rotary_rows_are_put_back_by_head() -> None:
    weight = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)
    mixed = interleave(weight, heads=2)
    assert mixed[:4, 0].tolist() == [0, 12, 3, 15], "rows 0, 4, 1, 5 of the first head"
    np.testing.assert_array_equal(split_rotary_halves(mixed, heads=2), weight)
    assert not np.array_equal(split_rotary_halves(mixed, heads=1), weight)


def test_the_configuration_says_what_the_file_says(tiny_model, tmp_path: Path) -> None:
    folder, _ = convert_tiny(tmp_path, tiny_model("llama", **SHAPES["grouped, head size of its own"]))
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000
    assert config["rms_norm_eps"] == 1e-5, "the float32 of the file, in its shortest decimal"
    assert config["tie_word_embeddings"] is True
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert ids.items() <= config.items()
    assert json.loads((folder / "generation_config.json").read_text()) == ids


def test_the_tokenizer_is_rebuilt_from_the_merges(tiny_model, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, original = convert_tiny(tmp_path, tiny_model())
    rebuilt = AutoTokenizer.from_pretrained(folder)
    assert len(rebuilt) == original.get_vocab_size() == 320
    for text in [*CORPUS, "that hat: 1234 à 日本\n\n\tthe", "<|im_start|>the<|im_end|>", "  a  "]:
        ids = original.encode(text).ids
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids) == text
    assert len(rebuilt.encode("the cat")) < len("the cat"), "merges are in use"
    assert rebuilt.encode("24") == [*rebuilt.encode("2"), *rebuilt.encode("4")]
    assert (rebuilt.bos_token, rebuilt.eos_token, rebuilt.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    prompt = rebuilt.apply_chat_template([{"role": "user", "content": "hat"}], tokenize=False)
    assert prompt == "hat<|im_end|>"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"architecture": "qwen2"}, UnsupportedArchitecture, "'qwen2'"),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, UnsupportedArchitecture, "'yarn'"),
        ({"keys": {"llama.rope.dimension_count": 8}}, UnsupportedArchitecture, "8 of 16"),
        ({"keys": {"tokenizer.ggml.pre": "llama-bpe"}}, UnsupportedArchitecture, "'llama-bpe'"),
        ({"tensors": {"blk.1.attn_v.weight": None}}, ModelFolderError, r"missing.*blk\.1\.attn_v"),
        ({"tensors": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, ModelFolderError, "unknown.*bias"),
        ({"tensors": {"output_norm.weight": np.ones(32, np.float32)}}, ModelFolderError, r"\(32,\)"),
    ],
)
def test_a_file_that_would_convert_wrongly_is_refused(tiny_model, tmp_path, changes, error, words) -> None:
    with pytest.raises(error, match=words):
        convert_tiny(tmp_path, tiny_model(), **changes)


@pytest.mark.parametrize("cut", [0, 3, 1000, -64])
def test_a_truncated_file_is_refused(tiny_model, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, tiny_model())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelFolderError, match=r"tiny\.gguf cannot be read"):
        convert(path, tmp_path)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    """With nothing but transformers: the folder is an ordinary one, and its chat template works."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, do_sample=False, max_new_tokens=16)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
