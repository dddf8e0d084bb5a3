"""Training a scorer on a tiny model: its pairs, its gradients, a cut run, its judge and its file."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from fastcache import LLM, SamplingParams
from fastcache.cli import main
from fastcache.compression.kvzap import KVzapRater, read_scorer
from fastcache.compression.states import StateFit
from fastcache.engine.replay import prefill_dense, replay_prompt, replay_scores
from fastcache.errors import CheckpointError, ConfigError
from fastcache.models.config import load_model_config
from fastcache.models.loader import load_model
from fastcache.tokenizer import load_tokenizer
from fastcache.training.pairs import Teacher
from fastcache.training.scorer import ScorerConfig, ScorerTrainer
from fastcache.training.scorer_job import agreement
from fastcache.training.text import Corpus, random_windows

CONFIG = ScorerConfig(
    hidden=12,
    windows=6,
    min_context=40,
    context=50,
    tokens=30,
    epochs=4,
    batch_size=32,
    learning_rate=1e-2,
    weight_decay=0.1,
)
LAYERS, WIDTH, KV_HEADS = 2, 48, 2


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(
        rng.choice(("cache", "keeps", "what", "was", "read", "and", "a", "word")) for _ in range(count)
    )


def corpus(seed: int = 0) -> Corpus:
    return Corpus("words", torch.tensor(list(words(seed, 600).encode())), str(seed))


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("qwen3", heads=4, kv_heads=KV_HEADS, head_dim=16, hidden=WIDTH)


@pytest.fixture(scope="module")
def teacher(folder):
    config = load_model_config(str(folder), "auto")
    model, _ = load_model(config, str(folder), "auto", torch.float32, torch.device("cpu"), 1024, 0)
    return Teacher(model, replay_prompt(load_tokenizer(str(folder), required=True)), CONFIG.context)


def trainer_in(place, teacher, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return ScorerTrainer(teacher, [corpus()], config, place / "scorer.safetensors", "model")


def test_pairs_are_what_attention_reads_and_what_kvzip_says(teacher, folder):
    from transformers import AutoModelForCausalLM

    oracle, read = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for layer in oracle.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: read.append(kwargs["hidden_states"][0]), with_kwargs=True
        )
    ids, rows = list(words(3, 12).encode()), torch.tensor([0, 5, 17, 40])
    with torch.no_grad():
        oracle(torch.tensor([ids]))
    hidden, scores = teacher.pairs(ids, rows)
    torch.testing.assert_close(hidden, torch.stack(read)[:, rows], atol=1e-4, rtol=1e-4)
    cache = prefill_dense(teacher.model, ids)
    replayed = replay_scores(teacher.model, ids, cache, teacher.prompt, 4, 2048)
    torch.testing.assert_close(scores.exp().transpose(1, 2), replayed[..., rows])
    assert not any(layer.attention._forward_pre_hooks for layer in teacher.model.layers)


def test_every_parameter_moves_and_the_loss_falls(teacher, tmp_path):
    trainer = trainer_in(tmp_path, teacher, epochs=30)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    assert trainer.run()
    for name, parameter in trainer.parameters.items():
        assert (parameter != before[name]).all(dim=-1).any(dim=-1).all(), f"{name} stands still in a layer"
    # In squared spreads: 1 is what a network that knows nothing but the means would lose.
    assert trainer.losses[-1] < 0.5 * trainer.losses[0] and trainer.losses[-1] < 0.5


def test_what_is_written_says_what_was_learned_of_text_it_never_saw(teacher, tmp_path):
    trainer = trainer_in(tmp_path, teacher, windows=12, epochs=20)
    assert trainer.run()
    fit = StateFit(LAYERS, WIDTH, KV_HEADS, torch.float32, torch.device("cpu"))
    rater = KVzapRater("trained", trainer.export(torch.float32), fit)
    (ids,) = random_windows([corpus(1)], 50, 1, "unseen").tolist()
    hidden, true = teacher.pairs(ids, torch.arange(50))
    told = torch.stack([rater.rate(layer, states) for layer, states in enumerate(hidden)])
    found = agreement(told.transpose(1, 2)[None], true.transpose(1, 2)[None])
    assert found["r2"] > 0.3 and found["rank_correlation"] > 0.5 and found["overlap"]["0.8"] > 0.4


def test_a_run_that_was_cut_ends_like_one_that_was_not(teacher, tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = trainer_in(tmp_path / "whole", teacher)
    assert whole.run()
    stops = 0
    while not (cut := trainer_in(tmp_path / "cut", teacher)).run(stop_after_s=0.0):
        stops += 1
    assert stops == CONFIG.windows + CONFIG.steps - 1
    assert cut.losses == whole.losses
    for name, tensor in whole.export(torch.float32).items():
        assert torch.equal(tensor, cut.export(torch.float32)[name]), name
    with pytest.raises(CheckpointError, match="other settings"):
        trainer_in(tmp_path / "cut", teacher, seed=1)


def test_rounding_moves_nothing_where_inputs_are_at_their_mean(teacher, tmp_path):
    trainer = trainer_in(tmp_path, teacher)
    assert trainer.run()
    mean = trainer.constants["input.mean"]
    mean += 50  # far from zero, as some of a real model's are
    exact, rounded = trainer.export(torch.float32), trainer.export(torch.bfloat16)
    for layer in range(LAYERS):
        inner = [
            each[f"layers.{layer}.0.weight"].double() @ mean[layer].double()
            + each[f"layers.{layer}.0.bias"].double()
            for each in (exact, rounded)
        ]
        bias = exact[f"layers.{layer}.0.bias"].double()
        # What is left is the rounding of the bias itself.
        assert ((inner[0] - inner[1]).abs() <= bias.abs() * 2**-7 + 1e-3).all()


def test_agreement_by_hand():
    true = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(1, 1, 2, 4).clone()
    true[:, :, 1] += 10  # heads of another height: r2 is of each, r2_all of both
    same = agreement(true, true)
    assert same["r2"] == same["r2_all"] == same["rank_correlation"] == 1 and same["overlap"] == {
        "0.5": 1,
        "0.8": 1,
    }
    told = true.clone()
    told[:, :, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    found = agreement(told, true)
    assert found["r2"] == pytest.approx((1 - 20 / 5 + 1) / 2) and found["rank_correlation"] == 0
    assert found["r2_all"] == pytest.approx(1 - 20 / (2 * 5 + 8 * 25), abs=1e-4)
    assert found["overlap"] == {"0.5": 0.5, "0.8": 0.5}


def test_the_command_trains_judges_and_writes_what_the_engine_loads(folder, tmp_path, capsys):
    for name, seed in (("text.txt", 0), ("heldout.txt", 1)):
        (tmp_path / name).write_text(words(seed, 300), encoding="utf-8")
    output = tmp_path / "out" / "scorer.safetensors"
    arguments = [
        *(
            "train-scorer",
            "--model",
            str(folder),
            "--text",
            str(tmp_path / "text.txt"),
            "--output",
            str(output),
        ),
        *("--heldout", str(tmp_path / "heldout.txt"), "--device", "cpu", "--judge-windows", "2"),
    ]
    for name in (
        "hidden",
        "windows",
        "min_context",
        "context",
        "tokens",
        "epochs",
        "batch_size",
        "weight_decay",
    ):
        arguments += ["--" + name.replace("_", "-"), str(getattr(CONFIG, name))]
    assert main([*arguments, "--stop-after", "0"]) == 3
    assert main(arguments) == 0, capsys.readouterr().err
    tensors, record = read_scorer(str(output))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert record["heldout"]["windows"] == 2 and len(record["heldout"]["r2_by_layer"]) == LAYERS
    assert len(record["losses"]) == CONFIG.epochs and record["config"]["windows"] == CONFIG.windows
    assert [file.name for file in output.parent.iterdir()] == [output.name]
    compression = {"method": "kvzap", "compression_ratio": 0.5, "params": {"checkpoint": str(output)}}
    llm = LLM(str(folder), device="cpu", num_pages=40, max_model_len=128, compression=compression)
    outputs = llm.generate([list(range(60))], SamplingParams(max_tokens=3, ignore_eos=True))
    assert outputs[0].metrics.kv_len_after == 30
    assert (
        main([*arguments[:5], str(tmp_path / "heldout.txt"), *arguments[5:]]) == 2
    )  # trained and judged on the same


@pytest.mark.parametrize("change", [{"tokens": 41}, {"min_context": 51}, {"batch_size": 181}, {"epochs": 0}])
def test_settings_that_make_no_sense_are_refused(change):
    with pytest.raises(ConfigError, match="allowed is"):
        dataclasses.replace(CONFIG, **change)


def test_a_text_without_room_for_its_repetition_is_refused(teacher):
    with pytest.raises(ConfigError, match="Lower context"):
        Teacher(teacher.model, teacher.prompt, 600)
