"""Merging on the GPU: the tokens of the CPU, and a few steps of training there."""

from __future__ import annotations

import merge_oracle
import pytest
import torch
from tiny_llava import IMAGE_TOKEN, picture, write_tiny_llava

from fastcache import LLM, SamplingParams
from fastcache.cli import main
from fastcache.compression.merge import MergeLayout
from fastcache.compression.merge_checkpoint import read_checkpoint, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FACTOR, SIZE = 4, 64


def test_float32_on_the_gpu_equals_the_cpu(tmp_path_factory):
    folder = write_tiny_llava(tmp_path_factory.mktemp("llava"), head_dim=SIZE)
    layers = LLM(folder, device="cpu", num_pages=20, max_model_len=128).model_config.num_layers
    file = tmp_path_factory.mktemp("nets") / "nets.safetensors"
    nets = merge_oracle.networks(FACTOR, SIZE, 32, layers).float()
    write_checkpoint(file, nets.state_dict(), MergeLayout(FACTOR, 2, 5, True, "mean"), {})
    text = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [
        {"prompt": [*text[0][:7], IMAGE_TOKEN, *text[0][7:]], "images": [picture(2)]},
        text[1],
        {"prompt": [*text[2], IMAGE_TOKEN, IMAGE_TOKEN], "images": [picture(3), picture(1)]},
    ]
    compression = {"method": "mlp", "compression_factor": FACTOR, "params": {"checkpoint": str(file)}}

    def run(device, **options):
        llm = LLM(
            folder,
            device=device,
            dtype="float32",
            num_pages=400,
            max_model_len=512,
            compression=compression,
            **options,
        )
        outputs = llm.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
        llm.check_books()
        return [(output.token_ids, output.metrics.kv_len_after) for output in outputs]

    want = run("cpu")
    for options in ({}, {"max_num_batched_tokens": 32}, {"policy": "dynamic"}):
        assert run("cuda", **options) == want


def test_training_on_the_gpu(tiny_model, tmp_path):
    folder = tiny_model("llama", heads=4, kv_heads=2, head_dim=SIZE, hidden=64)
    for name in ("text", "heldout"):
        (tmp_path / name).write_text(" ".join(f"{name} {i * 37 % 101}" for i in range(900)), encoding="utf-8")
    output = tmp_path / "nets.safetensors"
    arguments = [
        *(
            "train-compressor",
            "--model",
            str(folder),
            "--text",
            str(tmp_path / "text"),
            "--output",
            str(output),
        ),
        *("--heldout", str(tmp_path / "heldout"), "--factor", "4", "--steps", "40", "--hidden", "32"),
        *("--min-context", "32", "--context", "64", "--continuation", "16", "--batch-size", "4"),
        *("--judge-contexts", "64", "--judge-windows", "8", "--device", "cuda"),
    ]
    assert main([*arguments, "--stop-after", "0"]) == 3  # and from there on
    assert main([*arguments, "--finish-within", "60"]) == 0
    losses = read_checkpoint(str(output)).record["losses"]
    assert losses[-1]["hidden"] < losses[0]["hidden"]
