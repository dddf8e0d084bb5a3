"""LLaVA on the GPU: the tokens of the CPU, graphs beside pictures, and the real shapes within their memory."""

from __future__ import annotations

import pytest
import torch
from tiny_llava import IMAGE_TOKEN, picture, write_tiny_llava

from fastcache import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
T = IMAGE_TOKEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("llava"), head_dim=64)


def prompts():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 256, (6, 40), generator=generator).tolist()
    return [
        {"prompt": [T, *text[0]], "images": [picture(1)]},
        {"prompt": [*text[1][:7], T, *text[1][7:]], "images": [picture(2, 33, 61)]},
        text[2],
        {"prompt": [*text[3], T, T], "images": [picture(3), picture(1)]},
        text[4][:3],
        {"prompt": [5, T, *text[5], T], "images": [picture(2), picture(3)]},
    ]


def run(folder, **options):
    llm = LLM(folder, num_pages=400, max_model_len=1024, **options)
    outputs = llm.generate(prompts(), SamplingParams(max_tokens=24, ignore_eos=True))
    llm.check_books()
    return llm, [output.token_ids for output in outputs]


def test_float32_on_the_gpu_equals_the_cpu(folder):
    _, want = run(folder, device="cpu")
    for options in ({}, {"max_num_batched_tokens": 21}, {"policy": "dynamic"}):
        assert run(folder, device="cuda", dtype="float32", **options)[1] == want


def test_graph_replay_beside_pictures_gives_the_tokens_of_eager(folder):
    graph, tokens = run(folder, device="cuda", dtype="bfloat16")
    _, want = run(folder, device="cuda", dtype="bfloat16", enforce_eager=True)
    assert graph._runner.graphs is not None
    assert tokens == want


def test_the_tower_in_bfloat16_is_near_the_tower_in_float32(folder):
    slow, fast = (
        LLM(folder, device=device, dtype=dtype, num_pages=50, max_model_len=512)
        for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16"))
    )
    processor = slow._parts.processor
    pixels = torch.stack([processor.pixels(picture(i)) for i in range(40)])
    want = slow._runner.model.embed_pictures(processor.normalise(pixels))
    got = fast._runner.model.embed_pictures(processor.normalise(pixels.cuda())).cpu().float()
    assert got.shape == want.shape == (40, 16, 48)
    assert (got - want).norm() / want.norm() < 3e-2


@pytest.mark.slow
def test_seeded_weights_in_the_real_shapes_keep_to_their_memory():
    """A step full of pictures, on top of a pool that was sized for it."""
    share = 0.7
    llm = LLM(
        "llava-1.5-7b", load_format="dummy", device="cuda", gpu_memory_utilization=share, max_num_seqs=16
    )
    images = [picture(i, 640, 480) for i in range(16)]
    asked = [{"prompt": [32000, *range(1000 + i, 1400 + i)], "images": [images[i]]} for i in range(16)]
    torch.cuda.reset_peak_memory_stats()
    outputs = llm.generate(asked, SamplingParams(max_tokens=4, ignore_eos=True))
    assert all(o.metrics.prompt_tokens == 976 and o.metrics.image_tokens == 576 for o in outputs)
    total = torch.cuda.get_device_properties(0).total_memory
    assert torch.cuda.max_memory_allocated() <= share * total
    llm.check_books()
    llm.close()
