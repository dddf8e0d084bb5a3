"""The engine with method `mlp` against transformers whose cache was merged entry by entry."""

from __future__ import annotations

import hashlib

import merge_oracle
import pytest
import torch

from fastcache import LLM, SamplingParams
from fastcache.compression.merge import MergeLayout
from fastcache.compression.merge_checkpoint import write_checkpoint
from fastcache.errors import CheckpointError, ConfigError, UnsupportedCombination

FACTOR, SIZE, LAYERS, NEW = 4, 16, 2, 6
LENGTHS = (61, 24, 43)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, tiny_model):
    """Heads wider than hidden / heads, and two query heads to a KV head."""
    return tiny_model(request.param, heads=4, kv_heads=2, head_dim=SIZE, hidden=48, layers=LAYERS)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in LENGTHS]


def expected_tokens(folder, prompt, layout, nets) -> list[int]:
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    with torch.no_grad():
        out = model(torch.tensor([prompt]), use_cache=True)
        cache = DynamicCache()
        for layer in range(LAYERS):
            stored = out.past_key_values.layers[layer]
            heads = [
                merge_oracle.merged(k, v, {}, layout, nets, layer)
                for k, v in zip(stored.keys[0], stored.values[0], strict=True)
            ]
            cache.update(
                torch.stack([k for k, _ in heads])[None], torch.stack([v for _, v in heads])[None], layer
            )
        tokens = [int(out.logits[0, -1].argmax())]
        while len(tokens) < NEW:
            position = torch.tensor([[len(prompt) + len(tokens) - 1]])
            logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache, position_ids=position).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("layout", [MergeLayout(FACTOR), MergeLayout(FACTOR, 2, 5, True, "mean")])
def test_greedy_tokens_of_a_ragged_batch(folder, prompts, layout, tmp_path):
    nets = merge_oracle.networks(FACTOR, SIZE, 12, LAYERS, ("tk", "tv"))
    file = tmp_path / "nets.safetensors"
    write_checkpoint(file, nets.state_dict(), layout, {})
    compression = {"method": "mlp", "compression_factor": FACTOR, "params": {"checkpoint": str(file)}}
    options = {"compression": compression, "device": "cpu", "num_pages": 64, "max_model_len": 128}
    # Small steps: one context is compressed out of its step, others out of pages that earlier steps filled.
    for tokens_per_step in (256, 32):
        llm = LLM(str(folder), max_num_batched_tokens=tokens_per_step, **options)
        assert llm.describe()["compressor"] == {
            "kind": "checkpoint",
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            **{"factor": FACTOR, "n_sink": layout.n_sink, "recent": layout.recent, "unused": 0},
        }
        outputs = llm.generate(prompts, SamplingParams(max_tokens=NEW, ignore_eos=True))
        llm.check_books()
        llm.close()
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.metrics.kv_len_after == layout.kept(len(prompt))
            assert output.token_ids == expected_tokens(folder, prompt, layout, nets)


def test_what_does_not_go_together_is_refused(folder, tmp_path):
    compression = {"method": "mlp", "compression_factor": FACTOR, "params": {"checkpoint": "nowhere.pth"}}
    with pytest.raises(CheckpointError, match="does not exist"):
        LLM(str(folder), compression=compression, device="cpu", num_pages=8)
    with pytest.raises(UnsupportedCombination, match="no head_budgets"):
        LLM(str(folder), compression=compression | {"head_budgets": "b.json"}, device="cpu", num_pages=8)


def test_dummy_networks_are_for_dummy_models_alone(folder):
    compression = {"method": "mlp", "compression_factor": FACTOR, "params": {"checkpoint": "dummy"}}
    options = {"compression": compression, "device": "cpu", "num_pages": 64, "max_model_len": 128}
    with pytest.raises(ConfigError, match=r"dummy.*load_format 'dummy'"):
        LLM(str(folder), **options)
    tokens = []
    for _ in range(2):
        llm = LLM(str(folder), load_format="dummy", **options)
        known = llm.describe()["compressor"]
        assert known == {
            "kind": "dummy",
            "sha256": None,
            "factor": FACTOR,
            "n_sink": 0,
            "recent": 0,
            "unused": 0,
        }
        (output,) = llm.generate([list(range(40))], SamplingParams(max_tokens=NEW, ignore_eos=True))
        assert output.metrics.kv_len_after == 10
        tokens.append(output.token_ids)
        llm.close()
    assert tokens[0] == tokens[1]


def test_images_are_merged_apart_from_text(tmp_path):
    from tiny_llava import IMAGE_TOKEN, picture, write_tiny_llava

    folder = write_tiny_llava(tmp_path / "llava", head_dim=SIZE)
    layout = MergeLayout(FACTOR, n_sink=2)
    file = tmp_path / "nets.safetensors"
    write_checkpoint(file, merge_oracle.networks(FACTOR, SIZE, 12, 3).state_dict(), layout, {})
    compression = {"method": "mlp", "compression_factor": FACTOR, "params": {"checkpoint": str(file)}}
    llm = LLM(str(folder), compression=compression, device="cpu", num_pages=64, max_model_len=128)
    prompt = [*range(9), IMAGE_TOKEN, *range(23)]
    outputs = llm.generate(
        [{"prompt": prompt, "images": [picture(1)]}, list(range(30))],
        SamplingParams(max_tokens=3, ignore_eos=True),
    )
    llm.check_books()
    image = outputs[0].metrics.image_tokens
    assert outputs[0].metrics.kv_len_after == layout.kept(32 + image, ((9, image),))
    assert outputs[0].metrics.kv_len_after != layout.kept(32 + image)
    assert outputs[1].metrics.kv_len_after == layout.kept(30)
