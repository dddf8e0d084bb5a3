"""The engine against transformers on tiny random models: logits, tokens, and every way a batch can be cut."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fastcache import LLM, SamplingParams
from fastcache.errors import ConfigError

SHAPES = [  # arch, heads, kv_heads, head_dim, hidden, tied
    ("llama", 4, 4, 16, 64, True),
    ("llama", 4, 2, 16, 48, False),
    ("llama", 8, 2, 8, 48, True),
    ("qwen3", 4, 4, 16, 48, True),
    ("qwen3", 4, 2, 32, 64, False),
    ("qwen3", 8, 2, 16, 64, False),
]


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """No token twice in a prompt: in the first layer equal tokens have equal key norms, and ties prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(256, generator=generator)[:n].tolist() for n in lengths]


@torch.no_grad()
def oracle_tokens(model, prompt: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True)


def run(folder, prompts, count=24, **options):
    options = {"device": "cpu", "page_size": 4, "num_pages": 400, "max_num_seqs": 8, **options}
    llm = LLM(folder, **options)
    outputs = llm.generate(prompts, greedy(count))
    llm.check_books()
    return llm, outputs


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_logits_agree(tiny_model, shape):
    arch, heads, kv_heads, head_dim, hidden, tied = shape
    folder = tiny_model(arch, heads, kv_heads, head_dim, hidden, 3, tied)
    prompts = prompts_of([5, 33])
    llm = LLM(folder, device="cpu", page_size=4, num_pages=64)
    seen = []
    logits = llm._runner.model.logits
    llm._runner.model.logits = lambda hidden_rows: seen.append(logits(hidden_rows)) or seen[-1]
    llm.generate(prompts, greedy(1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            want = model(torch.tensor([prompt])).logits[0, -1]
        assert (seen[0][row] - want).abs().max() < 1e-4


def test_the_last_layer_goes_on_with_the_sampled_rows_alone(tiny_model):
    """Their states are those of a pass over all rows, and the feed-forward of the last layer sees no others."""
    llm = LLM(tiny_model("qwen3", 4, 2, 32, 64, 3, False), device="cpu", page_size=4, num_pages=64)
    model, calls, widths = llm._runner.model, [], []
    forward = model.forward

    def both(*inputs, rows=None, **options):
        some = forward(*inputs, rows=rows, **options)
        if rows is not None:
            calls.append(len(rows))
            assert torch.allclose(some, forward(*inputs, **options)[rows], atol=1e-6)
        return some

    model.forward = both
    for layer in (model.layers[0], model.layers[-1]):
        layer.feed_forward.register_forward_pre_hook(lambda _, inputs: widths.append(len(inputs[0])))
    llm.generate(prompts_of([5, 33]), greedy(1))
    assert calls == [2] and widths == [38, 2, 38, 38]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_tokens_equal_in_a_mixed_batch_across_page_edges(tiny_model, shape):
    arch, heads, kv_heads, head_dim, hidden, tied = shape
    folder = tiny_model(arch, heads, kv_heads, head_dim, hidden, 3, tied)
    prompts = prompts_of([1, 3, 4, 5, 8, 31])
    _, outputs = run(folder, prompts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == oracle_tokens(model, prompt, 24)


@pytest.fixture(scope="module")
def llama(tiny_model):
    folder = tiny_model("llama", 4, 2, 16, 48, 3, False)
    prompts = prompts_of([30, 7, 41, 12, 22, 3], seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return folder, prompts, [oracle_tokens(model, prompt, 24) for prompt in prompts]


def test_chunked_prefill(llama):
    folder, prompts, want = llama
    llm, outputs = run(folder, prompts, max_num_batched_tokens=7)
    assert [o.token_ids for o in outputs] == want
    assert llm.stats().prefill_steps >= sum(map(len, prompts)) // 7


def test_preemption_recomputes_the_same_tokens(llama):
    folder, prompts, want = llama
    llm = LLM(folder, device="cpu", page_size=4, num_pages=28, max_num_seqs=6)
    # Unknown output lengths, so that admission is optimistic and pages run out.
    stop_never = SamplingParams(max_tokens=24)
    llm._parts.eos = frozenset()
    outputs = llm.generate(prompts, stop_never)
    assert [o.token_ids for o in outputs] == want
    assert llm.stats().preemptions > 0
    llm.check_books()


def test_prefix_caching_computes_less_and_changes_nothing(llama):
    folder, prompts, want = llama
    shared = prompts[2]
    llm = LLM(folder, device="cpu", page_size=4, num_pages=200, enable_prefix_caching=True)
    first = llm.generate([shared], greedy(24))
    assert llm.stats().prefix_hit_tokens == 0
    again = llm.generate([shared, [*shared, 9, 9, 9], *prompts], greedy(24))
    assert first[0].token_ids == again[0].token_ids == again[4].token_ids == want[2]
    assert [o.token_ids for o in again[2:]] == want
    assert again[0].metrics.cached_tokens == 40  # ten full pages of the 41 tokens; the last token is computed
    assert llm.stats().prefix_hit_tokens >= 120
    llm.check_books()


def test_off_by_default_no_prefix_is_shared(llama):
    folder, prompts, _ = llama
    llm, outputs = run(folder, [prompts[0]] * 3)
    assert llm.stats().prefix_hit_tokens == 0
    assert llm.stats().prefill_tokens == 3 * len(prompts[0])
    assert len({tuple(o.token_ids) for o in outputs}) == 1


def test_eos_stops_and_ignore_eos_does_not(llama):
    folder, prompts, want = llama
    llm = LLM(folder, device="cpu", page_size=4, num_pages=100)
    llm._parts.eos = frozenset({want[0][5]})
    position = want[0].index(want[0][5])
    stopped, ignored = llm.generate(
        [prompts[0]] * 2, [SamplingParams(max_tokens=24), SamplingParams(max_tokens=24, ignore_eos=True)]
    )
    assert (stopped.token_ids, stopped.finish_reason) == (want[0][: position + 1], "stop")
    assert (ignored.token_ids, ignored.finish_reason) == (want[0], "length")
    llm.check_books()


def test_sharded_checkpoint_equals_single_file(tiny_model, llama):
    _, prompts, want = llama
    sharded = tiny_model("llama", 4, 2, 16, 48, 3, False, max_shard_size="50KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    _, outputs = run(sharded, prompts)
    assert [o.token_ids for o in outputs] == want


@pytest.mark.parametrize("method", ["snapkv", "knorm", "streaming_llm"])
@pytest.mark.parametrize("arch,heads,kv_heads", [("llama", 4, 4), ("llama", 6, 2), ("qwen3", 8, 2)])
@torch.no_grad()
def test_decode_from_the_compressed_cache_equals_the_oracle(tiny_model, method, arch, heads, kv_heads):
    """kvpress compresses transformers' cache; transformers decodes from it; our tokens are the same."""
    from kvpress_oracle import PRESSES, prefill

    folder = tiny_model(arch, heads, kv_heads, 16, 48, 3, False)
    prompts = prompts_of([90, 133, 75], seed=2)
    ratio, count = 0.1 if method == "snapkv" else 0.7, 20  # snapkv must keep its window of 64
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    options = {"compression": {"method": method, "compression_ratio": ratio}}
    llm, outputs = run(folder, prompts, count, **options)
    chunked = run(folder, prompts, count, max_num_batched_tokens=75, **options)[1]
    for prompt, output, cut in zip(prompts, outputs, chunked, strict=True):
        cache = prefill(model, prompt, PRESSES[method](ratio))
        kept = cache.layers[0].keys.shape[2]  # before decoding appends to it
        first = model(torch.tensor([prompt])).logits[0, -1].argmax().item()
        want = decode(model, cache, first, len(prompt), count)
        assert output.token_ids == want
        assert cut.token_ids == want
        assert (output.metrics.kv_len_before, output.metrics.kv_len_after) == (len(prompt), kept)
    assert llm.stats().compressed_sequences == 3


@pytest.mark.parametrize("method", ["expected_attention", "observed_attention", "h2o"])
@pytest.mark.parametrize("arch,heads,kv_heads", [("llama", 6, 2), ("qwen3", 8, 2)])
@torch.no_grad()
def test_methods_that_watch_all_queries_equal_the_oracle(tiny_model, method, arch, heads, kv_heads):
    """As above, in batches that a step holds in part only. kvpress has no h2o: there its layers are recorded and
    transformers' cache is cut to what the method keeps of them."""
    from kvpress_oracle import PRESSES, keep, layer_kv, prefill, record_prefill

    from fastcache.compression.base import budget
    from fastcache.compression.registry import create
    from fastcache.config import CompressionConfig

    folder = tiny_model(arch, heads, kv_heads, 16, 48, 3, False)
    prompts, ratio, count = prompts_of([90, 133, 75], seed=7), 0.7, 20
    options = {"compression": {"method": method, "compression_ratio": ratio}}
    _, outputs = run(folder, prompts, count, **options)
    apart = run(folder, prompts, count, max_num_batched_tokens=140, policy="dynamic", **options)[1]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for prompt, output, other in zip(prompts, outputs, apart, strict=True):
        if PRESSES[method] is not None:
            cache = prefill(model, prompt, PRESSES[method](ratio))
        else:
            cache, ours = DynamicCache(), create(CompressionConfig(method=method))
            model(torch.tensor([prompt]), past_key_values=cache)
            for layer, record in zip(cache.layers, record_prefill(model, prompt), strict=True):
                kept = keep(ours, layer_kv([record], ours, [budget(len(prompt), ratio)]))[1]
                index = kept[..., None].expand(-1, -1, -1, 16)
                layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        first = model(torch.tensor([prompt])).logits[0, -1].argmax().item()
        assert output.token_ids == other.token_ids == decode(model, cache, first, len(prompt), count)


@pytest.mark.parametrize(
    "method", ["expected_attention", "expected_attention_eps", "h2o", "observed_attention", "snapkv"]
)
def test_layers_of_small_steps_are_compressed_at_once_as_memory_allows(tiny_model, monkeypatch, method):
    """All in one part, two at a time, each alone and without waiting: the same tokens. Steps hold riders too."""
    from fastcache.compression import layer
    from fastcache.engine import compressor

    folder = tiny_model("qwen3", 8, 2, 16, 48, 3, False)
    prompts, parts = prompts_of([90, 133, 80, 75, 140], seed=4), []
    packed_all, waiting = layer.LayerCompressor.packed_all, layer.LayerCompressor.waiting

    def noting(self, layers, *given):
        parts.append((layers.start, layers.stop))
        packed_all(self, layers, *given)

    monkeypatch.setattr(layer.LayerCompressor, "packed_all", noting)

    def tokens():
        parts.clear()
        compression = {"method": method, "compression_ratio": 0.1 if method == "snapkv" else 0.7}
        options = {"policy": "dynamic", "max_num_batched_tokens": 230, "compression": compression}
        llm, outputs = run(folder, prompts, 12, max_num_seqs=3, **options)
        assert llm.stats().compressed_sequences == len(prompts)
        return [o.token_ids for o in outputs], set(parts)

    want, whole = tokens()
    assert whole == {(0, 3)}
    for most, expected in ((2, {(0, 2), (2, 3)}), (1, {(0, 1), (1, 2), (2, 3)})):
        monkeypatch.setattr(layer.LayerCompressor, "waiting", lambda self, work, step, most=most: most)
        assert tokens() == (want, expected)
    monkeypatch.setattr(layer.LayerCompressor, "waiting", waiting)
    monkeypatch.setattr(compressor, "SMALL_STEP", 0)
    assert tokens() == (want, set())


def test_a_context_longer_than_a_step_is_refused_where_all_queries_are_watched(tiny_model):
    folder = tiny_model("qwen3", 8, 2, 16, 48, 3, False)
    options = {"device": "cpu", "num_pages": 100, "max_num_batched_tokens": 64}
    llm = LLM(folder, **options, compression={"method": "h2o", "compression_ratio": 0.5})
    with pytest.raises(ConfigError, match=r"see 100 tokens .* max_num_batched_tokens is 64"):
        llm.generate(prompts_of([100]), greedy(2))
    assert llm.generate(prompts_of([64]), greedy(2))[0].metrics.compressed


def decode(model, cache: DynamicCache, token: int, position: int, count: int) -> list[int]:
    """Greedy tokens from an edited cache: positions go on from the prompt's length, not the cache's."""
    tokens = [token]
    while len(tokens) < count:
        out = model(
            torch.tensor([[tokens[-1]]]), past_key_values=cache, position_ids=torch.tensor([[position]])
        )
        tokens.append(out.logits[0, -1].argmax().item())
        position += 1
    return tokens


@torch.no_grad()
def test_a_question_after_the_context_reads_the_compressed_cache(tiny_model):
    from kvpress_oracle import PRESSES, prefill

    folder = tiny_model("qwen3", 8, 2, 16, 48, 3, False)
    context, question = prompts_of([100, 9], seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    llm = LLM(
        folder,
        device="cpu",
        page_size=4,
        num_pages=100,
        compression={"method": "knorm", "compression_ratio": 0.8},
    )
    llm.add_request(context + question, greedy(12), context_len=len(context))
    outputs = []
    while llm.has_unfinished():
        outputs += llm.step()
    cache = prefill(model, context, PRESSES["knorm"](0.8))
    positions = torch.arange(len(context), len(context) + len(question))[None]
    logits = model(torch.tensor([question]), past_key_values=cache, position_ids=positions).logits
    want = decode(model, cache, logits[0, -1].argmax().item(), len(context) + len(question), 12)
    assert outputs[0].token_ids == want
    llm.check_books()


def test_preempted_compressed_sequences_resume_exactly(tiny_model):
    folder = tiny_model("llama", 4, 2, 16, 48, 3, False)
    prompts = prompts_of([60, 50, 70, 40, 64], seed=4)
    compression = {"method": "knorm", "compression_ratio": 0.6}
    ample = LLM(folder, device="cpu", page_size=4, num_pages=400, compression=compression)
    want = ample.generate(prompts, greedy(40))
    tight = LLM(folder, device="cpu", page_size=4, num_pages=60, max_num_seqs=5, compression=compression)
    tight._parts.eos = frozenset()
    got = tight.generate(prompts, SamplingParams(max_tokens=40))
    assert tight.stats().preemptions > 0
    assert [o.token_ids for o in got] == [o.token_ids for o in want]
    tight.check_books()


def test_a_pool_too_small_for_the_batch_runs_it_at_once_with_compression(tiny_model):
    folder = tiny_model("llama", 4, 2, 16, 48, 3, False)
    prompts = prompts_of([64] * 8, seed=5)
    pool = {"device": "cpu", "page_size": 4, "num_pages": 74, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    full = LLM(folder, **pool)
    full.generate(prompts, greedy(8))
    assert full.stats().peak_running < 8
    small = LLM(folder, **pool, compression={"method": "streaming_llm", "compression_ratio": 0.8})
    outputs = small.generate(prompts, greedy(8))
    assert small.stats().peak_running == 8
    assert small.stats().pages_freed == sum(o.metrics.pages_freed for o in outputs) == 8 * (16 - 3)
    small.check_books()


def test_compressed_pages_are_never_matched_by_the_prefix_cache(tiny_model):
    folder = tiny_model("llama", 4, 2, 16, 48, 3, False)
    prompt = prompts_of([64], seed=6)[0]
    compression = {"method": "knorm", "compression_ratio": 0.5}
    plain = LLM(folder, device="cpu", page_size=4, num_pages=200, compression=compression)
    want = plain.generate([prompt], greedy(16))[0].token_ids
    cached = LLM(
        folder,
        device="cpu",
        page_size=4,
        num_pages=200,
        compression=compression,
        enable_prefix_caching=True,
    )
    for _ in range(3):
        assert cached.generate([prompt], greedy(16))[0].token_ids == want
    assert cached.stats().prefix_hit_tokens == 2 * 60  # all but the last page, which must be computed again
    assert cached.stats().compressed_sequences == 3
    cached.check_books()


@pytest.mark.parametrize("method", ["knorm", "tova"])
def test_contexts_that_start_beside_questions_are_never_stored_whole(tiny_model, method):
    """Steps mix questions behind compressed contexts, read from pages, with contexts compressed on the spot."""
    folder = tiny_model("qwen3", 8, 2, 16, 48, 3, False)
    prompts = prompts_of([70, 61, 66, 64, 70, 59], seed=8)
    options = {"device": "cpu", "page_size": 4, "num_pages": 200, "max_num_batched_tokens": 100}
    compression = {"method": method, "compression_ratio": 0.8}

    def serve(texts: list[list[int]]) -> tuple[LLM, list[list[int]]]:
        llm, done = LLM(folder, **options, compression=compression), {}
        for number, text in enumerate(texts):
            llm.add_request(text, greedy(5), request_id=str(number), context_len=len(text) - 7)
        while llm.has_unfinished():
            done.update((o.request_id, o.token_ids) for o in llm.step())
        llm.check_books()
        return llm, [done[str(number)] for number in range(len(texts))]

    llm, together = serve(prompts)
    assert together == [serve([prompt])[1][0] for prompt in prompts]
    assert llm.stats().peak_pages <= sum(-(-((n - 7) // 5 + 1 + 7 + 4) // 4) for n in map(len, prompts))
