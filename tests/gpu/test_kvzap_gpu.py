"""Method `kvzap` on the GPU: the tokens of the CPU, 16-bit runs, and a scorer trained there."""

from __future__ import annotations

import pytest
import torch
from head_budget_files import write_budgets

from fastcache import LLM, SamplingParams
from fastcache.cli import main
from fastcache.compression.kvzap import dummy_scorer, read_scorer
from fastcache.compression.states import StateFit
from fastcache.compression.tensor_file import write_safetensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS, HIDDEN, KV_HEADS, RATIO = 2, 64, 2, 0.5
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tiny_model):
    return str(tiny_model("llama", heads=4, kv_heads=KV_HEADS, head_dim=64, hidden=HIDDEN, layers=LAYERS))


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (95, 60, 41, 95)]


@pytest.fixture(scope="module")
def compression(tmp_path_factory):
    file = tmp_path_factory.mktemp("scorer") / "scorer.safetensors"
    fit = StateFit(LAYERS, HIDDEN, KV_HEADS, torch.float32, torch.device("cpu"))
    write_safetensors(file, dummy_scorer(fit), {})
    return {"method": "kvzap", "compression_ratio": RATIO, "params": {"checkpoint": str(file)}}


def tokens(folder, prompts, compression, device, rounds=1, dtype="float32", **options):
    options = {"num_pages": 400, "max_model_len": 512, **options}
    llm = LLM(folder, device=device, dtype=dtype, compression=compression, **options)
    for _ in range(rounds):
        outputs = llm.generate(prompts, PARAMS)
    llm.check_books()
    hits = llm.stats().prefix_hit_tokens
    llm.close()
    return [output.token_ids for output in outputs], hits


def test_float32_on_the_gpu_equals_the_cpu(folder, prompts, compression, tmp_path):
    want, _ = tokens(folder, prompts, compression, "cpu")
    whole = LLM(folder, device="cpu", num_pages=400, max_model_len=512).generate(prompts, PARAMS)
    assert want != [output.token_ids for output in whole], "the test must see which entries are kept"
    ways = (
        {},
        {"max_num_batched_tokens": 32},
        {"policy": "p2c1d2"},
        {"enable_prefix_caching": True, "rounds": 2},
    )
    for options in ways:
        got, hits = tokens(folder, prompts, compression, "cuda", **options)
        assert got == want, options
        assert (hits > 0) == ("rounds" in options)
    write_budgets(tmp_path / "budgets.json", LAYERS, KV_HEADS, RATIO)
    for budgets in ("adakv", str(tmp_path / "budgets.json")):
        ragged = compression | {"head_budgets": budgets}
        want, _ = tokens(folder, prompts, ragged, "cpu")
        assert tokens(folder, prompts, ragged, "cuda", max_num_batched_tokens=128)[0] == want, budgets


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_gives_the_same_whichever_way_a_prompt_is_cut(folder, prompts, compression, dtype):
    """A rating that went to another entry's slot would show: the kept sets would differ."""
    one, _ = tokens(folder, prompts, compression, "cuda", dtype=dtype)
    other, _ = tokens(folder, prompts, compression, "cuda", dtype=dtype, kv_dtype="auto", policy="p4c4d4")
    assert one[0] != one[1] and sum(a == b for a, b in zip(one, other, strict=True)) >= 3


def test_training_on_the_gpu(folder, tmp_path):
    for name in ("text", "heldout"):
        (tmp_path / name).write_text(" ".join(f"{name} {i * 37 % 101}" for i in range(900)), encoding="utf-8")
    output = tmp_path / "scorer.safetensors"
    arguments = [
        *(
            "train-scorer",
            "--model",
            folder,
            "--text",
            str(tmp_path / "text"),
            "--heldout",
            str(tmp_path / "heldout"),
        ),
        *(
            "--output",
            str(output),
            "--windows",
            "24",
            "--min-context",
            "60",
            "--context",
            "80",
            "--tokens",
            "50",
        ),
        *(
            "--epochs",
            "20",
            "--batch-size",
            "64",
            "--hidden",
            "16",
            "--judge-windows",
            "4",
            "--device",
            "cuda",
        ),
    ]
    assert main([*arguments, "--stop-after", "0"]) == 3
    assert main(arguments) == 0
    _, record = read_scorer(str(output))
    assert record["losses"][-1] < 0.7 * record["losses"][0]
    assert record["heldout"]["rank_correlation"] > 0.3
