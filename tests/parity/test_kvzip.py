"""KVzip's replay scores and both of its budgets against kvpress, on tiny models and on SmolLM2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kvpress import KVzipPress
from transformers import AutoModelForCausalLM, DynamicCache

from fastcache import LLM, SamplingParams
from fastcache.cli import main
from fastcache.compression.head_budgets import HeadBudgets
from fastcache.compression.kvzip import global_keep
from fastcache.engine.replay import prefill_dense, replay_prompt, replay_scores
from fastcache.tokenizer import load_tokenizer

SHAPES = [("llama", 6, 2), ("qwen3", 8, 2), ("llama", 4, 4)]


class Noting(KVzipPress):
    """The press, and a copy of its scores with the sinks as it found them."""

    def compress_post(self, model):
        self.found = self.score_val[:, 0].clone()
        super().compress_post(model)
        self.gone = [layer.self_attn.masked_key_indices[1:] for layer in model.model.layers]

    def kept(self):
        keep = torch.ones_like(self.found, dtype=bool)
        for layer, (heads, positions) in enumerate(self.gone):
            keep[layer, heads, positions] = False
        return keep


@torch.no_grad()
def oracle(model, context, **options):
    press = Noting(**options)
    with press(model):
        model.model(input_ids=torch.tensor([context]), past_key_values=DynamicCache())
    return press


def ours(llm, context, chunk_size):
    model = llm._runner.model
    cache = prefill_dense(model, context)
    return replay_scores(model, context, cache, replay_prompt(llm.tokenizer), 4, chunk_size)


def check(model, llm, context, chunk_size):
    scores = ours(llm, context, chunk_size)
    for ratio in (0.2, 0.5, 0.8):
        press = oracle(model, context, compression_ratio=ratio, layerwise=False, chunk_size=chunk_size)
        assert torch.allclose(scores, press.found, rtol=1e-3, atol=2e-6)
        got, want = global_keep(scores, ratio, 4), press.kept()
        assert got.sum() == want.sum()
        # Scores that are equal but for rounding may change places at the cut, and one of them at most.
        assert (got != want).sum() <= 2


@pytest.mark.parametrize("chunk_size", [2048, 40])
@pytest.mark.parametrize("arch,heads,kv_heads", SHAPES)
def test_scores_and_kept_sets_equal_kvpress(tiny_model, arch, heads, kv_heads, chunk_size):
    folder = tiny_model(arch, heads, kv_heads, 16, 48, 3, False)
    generator = torch.Generator().manual_seed(3)
    context = torch.randperm(256, generator=generator)[:95].tolist()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    check(model, LLM(folder, device="cpu", num_pages=2), context, chunk_size)


@pytest.mark.slow
def test_smollm2_scores_equal_kvpress_behind_its_chat_prefix(smollm2):
    llm = LLM(str(smollm2), device="cpu", num_pages=2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="sdpa")
    chat = llm.tokenizer.apply_chat_template([{"role": "user", "content": "The river rose. " * 40}])
    check(model, llm, llm.tokenizer.encode(chat, add_special_tokens=False)[:180], 100)


def test_the_method_keeps_the_best_replayed_entries_of_each_head(tiny_model):
    """Uniform budgets: the engine decodes as transformers does from the entries that kvpress's scores choose."""
    from test_head_budgets import MaskedOracle

    folder = tiny_model("llama", 6, 2, 16, 48, 3, False)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randperm(256, generator=generator)[:n].tolist() for n in (95, 60)]
    compression = {"method": "kvzip", "compression_ratio": 0.7}
    llm = LLM(folder, device="cpu", page_size=4, num_pages=200, max_model_len=200, compression=compression)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    llm.check_books()
    cut = LLM(
        folder,
        device="cpu",
        page_size=4,
        max_num_batched_tokens=40,
        max_model_len=200,
        compression=compression,
    )
    assert [o.token_ids for o in cut.generate(prompts, params)] == [o.token_ids for o in outputs]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    masked = MaskedOracle(folder)
    for prompt, output in zip(prompts, outputs, strict=True):
        scores = oracle(model, prompt, compression_ratio=0.5).found
        scores[..., :4] = 2
        count = output.metrics.kv_len_after
        kept = scores.argsort(dim=-1, descending=True)[..., :count]
        masked._gone = lambda keys, rows: torch.ones(keys.shape[:2], dtype=bool).scatter(1, rows, False)
        assert output.token_ids == masked.tokens(prompt, [], kept, 20)


def test_calibration_averages_what_kvpress_keeps(tiny_model, tmp_path):
    """The command's file, twice the same, against the kept sets of the press on the same texts."""
    folder = tiny_model("llama", 6, 2, 16, 48, 3, False)
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    texts[0].write_text("The quick brown fox jumps over the lazy dog. " * 3)
    texts[1].write_text("Pack my box with five dozen liquor jugs, please! " * 3)
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        arguments = ["calibrate", "--model", str(folder), "--output", str(file), "--length", "90"]
        assert main([*arguments, *(word for text in texts for word in ("--text", str(text)))]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    budgets = HeadBudgets.load(files[0])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = load_tokenizer(str(folder), required=True)
    contexts = [tokenizer.encode(text.read_text(), add_special_tokens=False)[:90] for text in texts]
    for ratio in (0.2, 0.5, 0.8):
        kept = [oracle(model, context, compression_ratio=ratio).kept() for context in contexts]
        want = torch.stack(kept).double().mean((0, 3)).numpy()
        assert np.abs(budgets.at(ratio) - want).max() <= 1 / 90  # one entry may change places at the cut
        assert abs(budgets.at(ratio).mean() - (1 - ratio)) < 1e-2
    kept = budgets.kept(90, 0.5)
    assert kept.sum() == 45 * kept.size and kept.min() < kept.max()


def test_calibration_without_room_for_the_repetition_says_so(tiny_model, tmp_path, capsys):
    folder, out = tiny_model("llama", 6, 2, 16, 48, 3, False), str(tmp_path / "a.json")
    assert main(["calibrate", "--model", str(folder), "--output", out, "--length", "900"]) == 2
    assert "positions" in capsys.readouterr().err
