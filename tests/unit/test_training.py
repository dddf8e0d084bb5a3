"""Training a merging compressor on a tiny model: gradients arrive, the loss falls, a cut run goes on alike."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
import torch

from fastcache.cli import main
from fastcache.compression.merge import run_net
from fastcache.compression.merge_checkpoint import read_checkpoint
from fastcache.errors import CheckpointError
from fastcache.models.config import load_model_config
from fastcache.models.loader import load_model
from fastcache.models.ops import Ops
from fastcache.training.distil import distillation_loss
from fastcache.training.frozen import FrozenModel
from fastcache.training.judge import continuation_quality
from fastcache.training.networks import MergeNetworks
from fastcache.training.text import Corpus, even_windows, plain, random_windows
from fastcache.training.trainer import TrainConfig, Trainer

WORDS = (
    "the",
    "cache",
    "keeps",
    "what",
    "was",
    "read",
    "and",
    "gives",
    "it",
    "back",
    "when",
    "a",
    "word",
    "asks",
)
CONFIG = TrainConfig(
    factor=3, steps=12, hidden=16, n_sink=2, min_context=20, context=32, continuation=12, batch_size=4
)


def sentence(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def corpus(seed: int = 0) -> Corpus:
    return Corpus("words", torch.tensor(list(sentence(seed, 800).encode())), "0" * 64)


@pytest.fixture(scope="module")
def folder(tiny_model):
    """Qwen3 has all that Llama has, norms of queries and keys, and here heads wider than its hidden state."""
    return tiny_model("qwen3", heads=4, kv_heads=2, head_dim=16, hidden=48)


@pytest.fixture(scope="module")
def frozen(folder):
    config = load_model_config(str(folder), "auto")
    model, _ = load_model(config, str(folder), "auto", torch.float32, torch.device("cpu"), 256, 0, ops=Ops())
    return FrozenModel(model)


def test_teacher_and_student_are_the_model(frozen, folder):
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = random_windows([corpus()], 40, 3, "ids")
    with torch.no_grad():
        want = oracle(ids, output_hidden_states=True)
    teacher = frozen.teacher(ids, 28)
    torch.testing.assert_close(
        teacher.logits.unflatten(0, (3, -1)), want.logits[:, 28:], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        teacher.hidden[0].unflatten(0, (3, -1)), want.hidden_states[1][:, 28:], atol=1e-4, rtol=1e-4
    )
    hidden, logits = frozen.student(ids[:, 28:], 28, teacher.caches)
    torch.testing.assert_close(logits, teacher.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden[-1], teacher.hidden[-1], atol=1e-4, rtol=1e-4)


def test_every_parameter_moves_and_the_loss_falls(frozen):
    trainer = Trainer(frozen, [corpus()], TrainConfig(**(CONFIG.to_dict() | {"steps": 50})), None)
    unseen = random_windows([corpus(1)], 44, 32, "unseen")
    first, _ = distillation_loss(frozen, trainer.networks, unseen, 32, 1.0)
    before = {name: p.detach().clone() for name, p in trainer.networks.parameters.items()}
    weights = {name: p.clone() for name, p in frozen.model.named_parameters()}
    assert trainer.run()
    for name, stacked in trainer.networks.parameters.items():
        for layer, parameter in enumerate(stacked):
            assert not torch.equal(parameter, before[name][layer]), f"{name} stands still in layer {layer}"
    assert all(torch.equal(p, weights[name]) for name, p in frozen.model.named_parameters())
    last, _ = distillation_loss(frozen, trainer.networks, unseen, 32, 1.0)
    assert last.item() < 0.95 * first.item()


def test_a_run_that_was_cut_ends_like_one_that_was_not(frozen, tmp_path):
    whole = Trainer(frozen, [corpus()], CONFIG, None)
    assert whole.run()
    state = tmp_path / "run.state"
    assert not Trainer(frozen, [corpus()], CONFIG, state).run(stop_after_s=0.0)
    resumed = Trainer(frozen, [corpus()], CONFIG, state)
    assert resumed.step == 1 and resumed.run()
    for name, tensor in whole.networks.export(torch.float32).items():
        assert torch.equal(tensor, resumed.networks.export(torch.float32)[name]), name
    other = TrainConfig(**(CONFIG.to_dict() | {"seed": 1}))
    for config, model in ((other, ""), (CONFIG, "another model")):
        with pytest.raises(CheckpointError, match="other settings"):
            Trainer(frozen, [corpus()], config, state, model)


def test_a_run_within_a_time_does_the_steps_that_fit_and_ends_as_planned(frozen, tmp_path, monkeypatch):
    seconds = itertools.count()  # a step takes one
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    long = TrainConfig(**(CONFIG.to_dict() | {"steps": 1000}))
    state = tmp_path / "run.state"
    run = Trainer(frozen, [corpus()], long, state)
    assert run.run(finish_within_s=10.0)
    assert run.step == run.config.steps == 10
    run.save()
    again = Trainer(frozen, [corpus()], long, state)  # what was asked for still names it
    assert again.step == again.config.steps == 10
    short = Trainer(frozen, [corpus()], TrainConfig(**(CONFIG.to_dict() | {"steps": 10})), None)
    assert short.run()
    for name, tensor in short.networks.export(torch.float32).items():
        assert torch.equal(tensor, run.networks.export(torch.float32)[name]), name


def test_saved_weights_are_rounded_without_moving_the_mean():
    networks = MergeNetworks(2, 16, 32, CONFIG.layout, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.randn(2, 2, 16, generator=generator).abs()
    with torch.no_grad():
        networks.parameters["tk.6.weight"].normal_(0, 0.2, generator=generator)
        networks.constants["tk.mean"].copy_(100 * mean)
        networks.constants["tk.spread"].copy_(spread)
        stacked = networks.fold()["tk"]
    saved = networks.export(torch.bfloat16)
    entries = 100 * mean[1] + spread[1] * torch.randn(50, 3, 16, generator=generator)
    names = [f"compress_tk.1.{linear}.{part}" for linear in (0, 3, 6) for part in ("weight", "bias")]
    got = run_net(tuple(saved[name].float() for name in names), entries, "none")
    want = run_net(tuple(part[1] for part in stacked), entries, "none")
    assert (got - want).norm() < 0.01 * want.norm()


def test_the_full_cache_is_its_own_measure(frozen):
    windows = even_windows(corpus(1), 32, 5)
    quality = continuation_quality(frozen, windows, 20, {"same": lambda t: t.caches}, 2, 1)
    assert quality["full"]["kl"] == 0 and quality["full"]["agreement"] == 1
    assert quality["same"] == quality["full"] and quality["full"]["over"] == {"full": [0, 0], "same": [0, 0]}
    cut = {"same": lambda t: t.caches, "cut": lambda t: [(k[:, :, :4], v[:, :, :4]) for k, v in t.caches]}
    worse = continuation_quality(frozen, windows, 20, cut, 2, 1)["cut"]
    mean, error = worse["over"]["same"]
    assert error > 0 and mean == pytest.approx(
        math.log(worse["perplexity"] / quality["full"]["perplexity"]), abs=1e-4
    )
    logits = frozen.teacher(windows, 20).logits.unflatten(0, (5, -1))[:, :-1].double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 21:].flatten())
    assert quality["full"]["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_trains_judges_and_writes(folder, tmp_path, capsys, dtype):
    for name, seed in (("text.txt", 0), ("heldout.txt", 1)):
        (tmp_path / name).write_text(sentence(seed, 900), encoding="utf-8")
    output = tmp_path / "out" / "mlp.safetensors"
    arguments = [
        *("train-compressor", "--model", str(folder), "--text", str(tmp_path / "text.txt")),
        *("--heldout", str(tmp_path / "heldout.txt"), "--output", str(output), "--factor", "3"),
        *("--steps", "4", "--hidden", "8", "--min-context", "24", "--context", "24", "--continuation", "8"),
        *("--batch-size", "2", "--judge-contexts", "24", "--judge-windows", "4", "--device", "cpu"),
        *("--dtype", dtype),
    ]
    assert main(arguments) == 0, capsys.readouterr().err
    checkpoint = read_checkpoint(str(output))
    assert (
        checkpoint.layout.factor == 3 and checkpoint.tensors["compress_tk.0.0.weight"].dtype == torch.bfloat16
    )
    judged = checkpoint.record["heldout"]["contexts"]["24"]
    assert {"full", "mlp", "streaming_llm", "random"} <= set(judged)
    assert judged["mlp"]["kept"] == judged["random"]["kept"] == checkpoint.layout.kept(24)
    assert not list(output.parent.glob("*.state")) and not list(output.parent.glob("*.partial"))


def test_wiki_markup_becomes_text():
    markup = (
        "{{Box|a={{b}}}}'''Ants''' are [[insect|insects]] of [[Earth]].<ref name=x>Who?</ref>\n"
        "{| class=w\n| cell {{t}}\n|}[[File:a.jpg|thumb|An [[ant]]]]* one [http://x.org two]<!-- no -->"
    )
    assert plain(markup) == "Ants are insects of Earth.\none two"
