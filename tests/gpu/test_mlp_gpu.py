"""Merging on the GPU: the tokens of the CPU, and a few steps of training there."""

from __future__ import annotations

import merge_oracle
import pytest
import torch
from tiny_llava import IMAGE_TOKEN, picture, write_tiny_llava

from fastcache import LLM, SamplingParams
from fastcache.cli import main
from fastcache.compression.merge import MergeLayout, make_plan, merge_layer
from fastcache.compression.merge_checkpoint import dummy_checkpoint, read_checkpoint, write_checkpoint
from fastcache.kvcache.pool import KVPool, KVShape
from fastcache.models.config import RopeConfig
from fastcache.models.rope import rotary_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FACTOR, SIZE, CUDA = 4, 64, torch.device("cuda")


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


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
def test_kernels_equal_the_reference_in_bfloat16(size, stored):
    """Three contexts with images, out of a merged projection, into pages: as the reference in float32."""
    layout, heads, lengths = MergeLayout(5, 4, 16, True, "mean"), 8, [1500, 700, 1203]
    spans = [((40, 576), (700, 576)), (), ((0, 576),)]
    torch.manual_seed(0)
    projection = torch.randn(3, 1600, 3 * heads, size, device="cuda").bfloat16()
    keys, values = (projection[:, :, i * heads :][:, :, :heads].transpose(1, 2) for i in (1, 2))
    table = rotary_table(RopeConfig(1e4), size, 2000, CUDA)
    made = dummy_checkpoint(1, size, 5, images=True)
    nets, wide = made.nets(0, torch.bfloat16, CUDA), made.nets(0, torch.float32, CUDA)
    wide = {kind: tuple(part.bfloat16().float() for part in net) for kind, net in wide.items()}
    plan = make_plan(lengths, spans, layout, CUDA)
    want = merge_layer(keys.float(), values.float(), plan, wide, layout, table)
    pages = -(-max(plan.lengths) // 16)
    pool = KVPool(KVShape(1, heads, size, torch.bfloat16, stored), 3 * pages + 1, 16, CUDA)
    fresh = 1 + torch.arange(3 * pages, dtype=torch.int32, device="cuda").view(3, pages)
    from fastcache.compression.merge_triton import merge_into_pages, takes

    assert takes(torch.bfloat16, size, nets)
    one_layer = pool.keys[0], pool.values[0]
    merge_into_pages(keys, values, plan, nets, layout, table.half(), one_layer, fresh)
    loose = 0.02 if stored == torch.bfloat16 else 0.08
    for got, expected in zip(pool.gather(0, fresh, max(plan.lengths)), want, strict=True):
        for row, count in enumerate(plan.lengths):
            ours, theirs = got[row, :, :count].float(), expected[row, :, :count]
            assert (ours - theirs).abs().max() < loose * theirs.abs().max()
            assert (ours - theirs).norm() < 0.7 * loose * theirs.norm()


def test_the_engine_merges_in_bfloat16_as_the_reference_does(tmp_path, monkeypatch):
    folder = write_tiny_llava(tmp_path / "llava", head_dim=SIZE)
    compression = {"method": "mlp", "compression_factor": FACTOR, "params": {"checkpoint": "dummy"}}
    prompts = torch.randint(0, 200, (4, 120), generator=torch.Generator().manual_seed(1)).tolist()

    def run(**options):
        llm = LLM(
            folder,
            load_format="dummy",
            device="cuda",
            dtype="bfloat16",
            num_pages=200,
            max_model_len=256,
            compression=compression,
            **options,
        )
        first = llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
        llm.check_books()
        llm.close()
        return [output.token_ids for output in first], [o.metrics.kv_len_after for o in first]

    tokens, kept = run()
    assert kept == [120 // FACTOR] * 4
    monkeypatch.setattr("fastcache.compression.mlp._kernel", lambda nets, fit: None)
    slow, same = run()
    assert same == kept
    agree = [
        a == b for ours, theirs in zip(tokens, slow, strict=True) for a, b in zip(ours, theirs, strict=True)
    ]
    assert sum(agree) >= 0.6 * len(agree)  # bfloat16 rounds differently in both


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
