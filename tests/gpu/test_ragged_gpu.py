"""Heads of different lengths on the GPU: the kernels against the reference, and the engine against its CPU self."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from head_budget_files import write_budgets

from fastcache import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PAGE, SEQS, LAYERS = 16, 5, 3


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (4, 4, 128)])
def test_kernels_store_and_attend_like_the_reference(heads, stored):
    from fastcache.attention.base import HeadShape
    from fastcache.attention.ragged import RaggedAttention, Rows
    from fastcache.attention.ragged_triton import RaggedTriton
    from fastcache.attention.torch_sdpa import TorchSDPA
    from fastcache.kvcache.head_layout import HeadLayout, LayoutTable
    from fastcache.kvcache.pool import KVPool, KVShape

    shape, device, rng = HeadShape(*heads), torch.device("cuda"), np.random.default_rng(0)
    pool = KVPool(KVShape(LAYERS, heads[1], heads[2], torch.bfloat16, stored), 700, PAGE, device)
    for tensor in (pool.keys, pool.values):
        tensor.copy_(torch.randn(tensor.shape, device=device))
    table = LayoutTable(pool, SEQS + 1)
    kept = [rng.integers(0, n, (LAYERS, heads[1])) for n in (2000, 30, 600, 1)]
    layouts = [*(HeadLayout(each, PAGE) for each in kept), None]
    table.sync(range(SEQS), layouts)
    appended, pages = [40, 0, 513, 17, 900], iter(rng.permutation(np.arange(1, 700)).tolist())
    tables = np.zeros((SEQS, 200), np.int32)
    for row, (layout, more) in enumerate(zip(layouts, appended, strict=True)):
        count = layout.pages(more + 1) if layout else -(-(more + 1) // PAGE)
        tables[row, :count] = [next(pages) for _ in range(count)]
    rows = Rows(
        torch.arange(SEQS, device=device),
        torch.tensor(appended, device=device),
        torch.from_numpy(tables).to(device),
        200 * PAGE,
    )
    dense = TorchSDPA(pool, shape)
    slow, fast = RaggedAttention(dense, table), RaggedTriton(dense, table, 16, 200)
    for layer in range(LAYERS):
        q = torch.randn(SEQS, heads[0], heads[2], device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(SEQS, heads[1], heads[2], device=device, dtype=torch.bfloat16) for _ in "kv")
        before = pool.keys.clone(), pool.values.clone()
        slow._store(layer, k, v, rows)
        want = [x.clone().view(torch.uint8) for x in (pool.keys, pool.values)]
        pool.keys.copy_(before[0])
        pool.values.copy_(before[1])
        fast._store(layer, k, v, rows)
        assert torch.equal(pool.keys.view(torch.uint8), want[0])
        assert torch.equal(pool.values.view(torch.uint8), want[1])
        assert relative_error(fast._attend(layer, q, rows), slow._attend(layer, q, rows)) < 1e-2


@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn])
def test_repack_matches_the_reference(stored):
    from fastcache.compression.repack import repack_heads as slow
    from fastcache.compression.repack_heads_triton import repack_heads as fast
    from fastcache.kvcache.head_layout import HeadLayout, HeadRows, upload_layouts
    from fastcache.kvcache.pool import KVPool, KVShape

    heads, size, length, rng, device = 8, 128, 700, np.random.default_rng(1), torch.device("cuda")
    shape = KVShape(LAYERS, heads, size, torch.bfloat16, stored)
    pools = [KVPool(shape, 300, PAGE, device) for _ in range(2)]
    layouts = [HeadLayout(rng.integers(1, n, (LAYERS, heads)), PAGE) for n in (600, 20, 300)]
    packed, pages = upload_layouts(layouts, device), iter(rng.permutation(np.arange(1, 300)).tolist())
    table = np.zeros((3, 60), np.int32)
    for row, layout in enumerate(layouts):
        table[row, : layout.pages(0)] = [next(pages) for _ in range(layout.pages(0))]
    table = torch.from_numpy(table).to(device)
    for layer in range(LAYERS):
        # As a step has them: packed by token, heads inside.
        k, v = (
            torch.randn(3, length, heads, size, device=device, dtype=torch.bfloat16).transpose(1, 2)
            for _ in "kv"
        )
        most = max(int(layout.kept[layer].max()) for layout in layouts)
        kept = torch.full((3, heads, most), -1)
        for row, layout in enumerate(layouts):
            for head, count in enumerate(layout.kept[layer]):
                kept[row, head, :count] = torch.from_numpy(np.sort(rng.permutation(length)[:count]))
        for pool, repack in zip(pools, (slow, fast), strict=True):
            repack(pool, HeadRows(packed, layer, heads), k, v, kept.to(device), table)
    for want, got in ((pools[0].keys, pools[1].keys), (pools[0].values, pools[1].values)):
        assert want.float().abs().sum() > 0
        # The reference sends what is behind a budget to the scratch page.
        assert torch.equal(got[:, 1:].view(torch.uint8), want[:, 1:].view(torch.uint8))


@pytest.fixture(scope="module")
def budgets(tmp_path_factory):
    path = tmp_path_factory.mktemp("budgets") / "budgets.json"
    write_budgets(path, 3, 2, 0.7)
    return {"method": "knorm", "compression_ratio": 0.7, "head_budgets": str(path)}


def prompts_of(lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(256, generator=generator)[:n].tolist() for n in lengths]


@pytest.mark.parametrize("sharing", ["file", "adakv", "global"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_float32_tokens_equal_those_of_the_cpu(tiny_model, budgets, enforce_eager, sharing):
    folder = tiny_model("llama", 4, 2, 64, 128, 3, False)
    prompts, params = prompts_of([90, 133, 75, 1, 200]), SamplingParams(max_tokens=40, ignore_eos=True)
    options = {"dtype": "float32", "num_pages": 300, "max_model_len": 512}
    options["compression"] = budgets if sharing == "file" else budgets | {"head_budgets": sharing}
    if sharing == "global":
        options["compression"]["method"] = "kvzip"
    want = LLM(folder, device="cpu", **options).generate(prompts, params)
    llm = LLM(folder, device="cuda", enforce_eager=enforce_eager, **options)
    got = llm.generate(prompts, params)
    assert (llm._runner.graphs is None) == enforce_eager
    assert [o.token_ids for o in got] == [o.token_ids for o in want]
    assert [o.metrics.pages_freed for o in got] == [o.metrics.pages_freed for o in want]
    llm.check_books()


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_questions_and_new_prompts_share_steps_on_flashinfer(tiny_model, budgets, kv_dtype):
    folder = tiny_model("qwen3", 8, 2, 128, 256, 3, False)
    llm = LLM(
        folder,
        device="cuda",
        dtype="bfloat16",
        num_pages=600,
        max_model_len=512,
        kv_dtype=kv_dtype,
        compression=budgets,
    )
    context, question, other = prompts_of([200, 20, 150])
    params, outputs = SamplingParams(max_tokens=30, ignore_eos=True), []
    for _ in range(4):
        llm.add_request(context + question, params, context_len=len(context))
        outputs += llm.step()
        llm.add_request(other, params)
    while llm.has_unfinished():
        outputs += llm.step()
    assert len(outputs) == 8 and all(len(o.token_ids) == 30 for o in outputs)
    # The same request in other company differs at most where rounding decides.
    assert len({o.token_ids[0] for o in outputs if len(o.prompt_token_ids) == 220}) == 1
    llm.check_books()
