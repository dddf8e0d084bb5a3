"""The shapes model: its folder is transformers' and ours, and a run of training can be cut and repeated."""

from __future__ import annotations

import json

import pytest
import torch

from fastcache import LLM
from fastcache.cli import main
from fastcache.compression.merge_checkpoint import read_checkpoint
from fastcache.errors import CheckpointError, ConfigError, ModelFolderError
from fastcache.shapes.album import album
from fastcache.tokenizer import Tokenizer
from fastcache.training.shapes_data import SLOT, batch, context_ids, normalise
from fastcache.training.shapes_model import EOS_ID, ShapesModelConfig, encode
from fastcache.training.shapes_trainer import ShapesTrainConfig, ShapesTrainer

SMALL = ShapesModelConfig(width=32, vision_layers=1, text_layers=2, heads=2, kv_heads=1, patch=16)
CONFIG = ShapesTrainConfig(
    model=SMALL,
    steps=6,
    align_steps=2,
    coarse_steps=2,
    pictures_per_step=6,
    most_pictures=3,
    questions_per_picture=2,
    learning_rate=3e-3,
)
CPU = "cpu"


def small(changes: dict | None = None) -> dict:
    return CONFIG.to_dict() | {"model": SMALL} | (changes or {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = ShapesTrainer(CONFIG, None, CPU)
    first = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert trainer.run()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, first[name])}
    # CLIP's norm behind the last layer is no part of what LLaVA uses.
    assert {name for name in first if name not in moved and "post_layernorm" not in name} == set()
    assert [entry["step"] for entry in trainer.losses] == [1, 6]
    folder = tmp_path_factory.mktemp("shapes") / "model"
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return folder, trainer.finish(folder), weights


def test_a_cut_run_ends_as_if_it_had_not_been(trained, tmp_path):
    state = tmp_path / "model.state"
    assert not ShapesTrainer(CONFIG, state, CPU).run(stop_after_s=0.0)
    again = ShapesTrainer(CONFIG, state, CPU)
    assert again.step == 1 and again.run()
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, trained[2][name]), name
    again.save()
    with pytest.raises(CheckpointError, match="other settings"):
        ShapesTrainer(ShapesTrainConfig(**small({"seed": 1})), state, CPU)


def test_the_record_says_how_it_came_to_be(trained):
    folder, record, _ = trained
    assert json.loads((folder / "training.json").read_text()) == record
    judged = record["heldout_accuracy"]
    assert list(judged) == ["1", "2", "3"] and judged["3"]["questions"] == 600
    assert all(0 <= value <= 1 for value in (judged["2"][k] for k in ("all", "colour", "count", "where")))
    assert ShapesTrainConfig.from_dict(record["config"] | {"model": SMALL}) == CONFIG


def test_a_run_may_go_on_from_anothers_weights(trained, tmp_path):
    folder, record, weights = trained
    trainer = ShapesTrainer(ShapesTrainConfig(**small({"seed": 1})), None, CPU, start=folder)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name].bfloat16().float(), rtol=0, atol=0)
    assert trainer.start["config"] == record["config"] and trainer.step == 0
    with pytest.raises(ModelFolderError, match="has no training"):
        ShapesTrainer(CONFIG, None, CPU, start=tmp_path)
    other = ShapesModelConfig(width=64, vision_layers=1, text_layers=2, heads=2, kv_heads=1, patch=16)
    with pytest.raises(ModelFolderError, match="other sizes"):
        ShapesTrainer(ShapesTrainConfig(**small({"model": other})), None, CPU, start=folder)


@torch.no_grad()
def test_packed_questions_are_answered_as_transformers_answers_each_alone(trained):
    from transformers import AutoModelForImageTextToText

    folder = trained[0]
    oracle = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    trainer = ShapesTrainer(CONFIG, None, CPU)
    trainer.model.load_state_dict(oracle.state_dict())
    trainer.model.eval()
    made = batch("heldout", "parity", 2, 2, 3, 5)
    ours = trainer.answers(made)
    pixels = normalise(made.pixels)
    for a in range(2):
        for q in range(3):
            ids = torch.cat((made.context[a], made.slots[a, q]))[None]
            want = oracle(input_ids=ids, pixel_values=pixels[2 * a : 2 * a + 2]).logits[0, -SLOT:]
            torch.testing.assert_close(ours[a, q], want, atol=2e-4, rtol=1e-4)


def test_the_engine_reads_the_folder_and_answers_as_transformers_does(trained):
    from transformers import AutoModelForImageTextToText

    folder = trained[0]
    made = album("heldout", "engine", 2)
    question = made.ask(1)[0]
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode(made.context) == context_ids(made, 1)
    assert tokenizer.encode(question.prompt, add_special_tokens=False) == encode(question.prompt)
    assert tokenizer.eos_token_ids == {EOS_ID}
    pictures = [one.draw() for one in made.scenes]
    prompt = [*context_ids(made, 25), *encode(question.prompt)]
    llm = LLM(str(folder), device="cpu", dtype="float32", num_pages=64)
    (scored,) = llm.score([{"prompt": prompt, "images": pictures}], [encode("red")], [0])
    llm.close()
    oracle = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    from transformers import CLIPImageProcessor

    pixels = CLIPImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = oracle(input_ids=torch.tensor([prompt]), pixel_values=pixels).logits[0, -1]
    torch.testing.assert_close(scored.logprobs[0], logits.log_softmax(-1), atol=2e-4, rtol=1e-4)


def test_networks_for_pictures_are_trained_and_every_one_moves(trained, tmp_path):
    folder = trained[0]
    files = [tmp_path / f"{steps}.safetensors" for steps in (1, 8)]
    for file in files:
        arguments = ["train-compressor", "--model", str(folder), "--shapes", "--factor", "2", "--hidden", "8"]
        arguments += ["--steps", file.stem, "--n-sink", "1", "--batch-size", "2", "--device", "cpu"]
        assert main([*arguments, "--learning-rate", "0.01", "--output", str(file)]) == 0
    first, last = (read_checkpoint(str(file)) for file in files)
    assert first.kinds == ("ik", "iv", "tk", "tv") and last.layout.n_sink == 1
    for name, tensor in last.tensors.items():
        assert not torch.equal(tensor, first.tensors[name]), name
    losses = last.record["losses"]
    assert losses[-1]["kl"] < losses[0]["kl"] and last.record["pictures"]


def test_what_cannot_be_trained_is_said(tiny_model, tmp_path):
    text_only = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, hidden=48)
    arguments = ["train-compressor", "--model", str(text_only), "--shapes", "--output"]
    assert main([*arguments, str(tmp_path / "x.safetensors")]) == 2
    with pytest.raises(ConfigError, match="align_steps"):
        ShapesTrainConfig(steps=10, align_steps=5, coarse_steps=5)
    with pytest.raises(ConfigError, match="width"):
        ShapesModelConfig(width=30)
