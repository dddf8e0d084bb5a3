"""Caches whose KV heads keep different numbers of entries, against transformers with one mask per layer and head.

The oracle keeps the whole cache and masks what was evicted; the engine has freed it.
"""

from __future__ import annotations

import pytest
import torch
from head_budget_files import write_budgets
from transformers import AutoModelForCausalLM, DynamicCache

from fastcache import LLM, SamplingParams
from fastcache.compression.head_budgets import HeadBudgets
from fastcache.errors import ConfigError
from fastcache.kvcache.head_layout import HeadLayout

RATIO, PAGE = 0.7, 4
SHAPES = [("llama", 6, 2), ("qwen3", 8, 2), ("llama", 4, 4)]


def greedy(count):
    return SamplingParams(max_tokens=count, ignore_eos=True)


def random_prompts(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(256, generator=generator)[:n].tolist() for n in lengths]


class MaskedOracle:
    """transformers with what each (layer, KV head) evicted masked out of its attention."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self.group = self.model.config.num_attention_heads // self.model.config.num_key_value_heads
        self.gone = None  # per layer (kv_heads, context) bool
        for number, layer in enumerate(self.model.model.layers):
            layer.self_attn.register_forward_pre_hook(self._masking(number), with_kwargs=True)

    def _masking(self, number):
        def hook(module, args, kwargs):
            if self.gone is None:
                return None
            gone = self.gone[number].repeat_interleave(self.group, 0)  # (heads, context)
            queries, before = kwargs["hidden_states"].shape[1], self.before
            mask = torch.full((queries, before + queries), -torch.inf).triu(before + 1)
            mask = mask.expand(1, len(gone), -1, -1).clone()
            mask[..., : gone.shape[1]].masked_fill_(gone[None, :, None], -torch.inf)
            return args, kwargs | {"attention_mask": mask}

        return hook

    @torch.no_grad()
    def tokens(self, context, question, kept, count):
        """Greedy tokens after `context`, evicted to `kept` (layers, kv_heads) entries of smallest key norm."""
        cache, self.gone = DynamicCache(), None
        logits = self.model(torch.tensor([context]), past_key_values=cache).logits[0, -1]
        self.gone = [
            self._gone(layer.keys[0], counts) for layer, counts in zip(cache.layers, kept, strict=True)
        ]
        said, tokens, feed = len(context), [], question
        while len(tokens) < count:
            if feed:
                self.before = said
                positions = torch.arange(said, said + len(feed))[None]
                logits = self.model(
                    torch.tensor([feed]), past_key_values=cache, position_ids=positions
                ).logits[0, -1]
                said += len(feed)
            tokens.append(logits.argmax().item())
            feed = tokens[-1:]
        return tokens

    @staticmethod
    def _gone(keys, counts):
        gone = torch.ones(keys.shape[:2], dtype=torch.bool)
        for head, count in enumerate(counts):
            gone[head, keys[head].norm(dim=-1).argsort()[:count]] = False
        return gone


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: "-".join(map(str, s)))
def case(request, tiny_model, tmp_path_factory):
    arch, heads, kv_heads = request.param
    folder = tiny_model(arch, heads, kv_heads, 16, 48, 3, False)
    path = tmp_path_factory.mktemp("budgets") / "budgets.json"
    write_budgets(path, 3, kv_heads, RATIO)
    return folder, str(path), MaskedOracle(folder)


def engine(folder, path, **options):
    compression = {"method": "knorm", "compression_ratio": RATIO, "head_budgets": path}
    options = {"device": "cpu", "page_size": PAGE, "num_pages": 300, "max_num_seqs": 6, **options}
    return LLM(folder, compression=compression, **options)


def test_tokens_equal_those_of_the_masked_cache_in_a_batch(case):
    folder, path, oracle = case
    prompts = random_prompts([90, 133, 75, 1], seed=2)  # the last is too short to compress
    llm = engine(folder, path)
    outputs = llm.generate(prompts, greedy(24))
    llm.check_books()
    chunked = engine(folder, path, max_num_batched_tokens=75).generate(prompts, greedy(24))
    budgets = HeadBudgets.load(path)
    for prompt, output, cut in zip(prompts, outputs, chunked, strict=True):
        kept = budgets.kept(len(prompt), RATIO)
        want = oracle.tokens(prompt, [], kept, 24)
        assert output.token_ids == want
        assert cut.token_ids == want
    assert llm.stats().compressed_sequences == 3


def test_a_question_beside_new_prompts_reads_each_heads_own_entries(case):
    folder, path, oracle = case
    context, question, other = random_prompts([100, 9, 60], seed=3)
    llm = engine(folder, path)
    llm.add_request(context + question, greedy(12), context_len=len(context))
    outputs = llm.step()
    llm.add_request(other, greedy(12))  # its prefill shares the step of the question
    while llm.has_unfinished():
        outputs += llm.step()
    budgets = HeadBudgets.load(path)
    want = {
        "0": oracle.tokens(context, question, budgets.kept(len(context), RATIO), 12),
        "1": oracle.tokens(other, [], budgets.kept(len(other), RATIO), 12),
    }
    assert {o.request_id: o.token_ids for o in outputs} == want
    llm.check_books()


def test_pages_are_freed_and_hold_no_more_than_the_heads_need(case):
    folder, path, _ = case
    prompt, count = random_prompts([200], seed=4)[0], 30
    llm = engine(folder, path)
    output = llm.generate([prompt], greedy(count))[0]
    kept = HeadBudgets.load(path).kept(len(prompt), RATIO)
    full, units = -(-len(prompt) // PAGE), int((-(-kept // PAGE)).sum())
    after = -(-units // kept.size)
    assert output.metrics.pages_freed == full - after
    assert output.metrics.kv_len_after == round(kept.mean()) == 60
    peak = HeadLayout(kept, PAGE).pages(count - 1)  # the context itself is never stored whole
    assert llm.stats().peak_kv_bytes == peak * PAGE * llm.describe()["kv_bytes_per_token"]
    small = engine(folder, path, num_pages=peak + 1)
    assert small.generate([prompt], greedy(count))[0].token_ids == output.token_ids
    small.check_books()


def test_preempted_sequences_resume_exactly(tiny_model, case):
    folder, path, _ = case
    prompts = random_prompts([60, 50, 70, 40, 64], seed=5)
    want = [o.token_ids for o in engine(folder, path).generate(prompts, greedy(60))]
    tight = engine(folder, path, num_pages=62)
    tight._parts.eos = frozenset()
    got = tight.generate(prompts, SamplingParams(max_tokens=60))
    assert tight.stats().preemptions > 0
    assert [o.token_ids for o in got] == want
    tight.check_books()


def test_with_fp8_and_prefix_caching(case):
    folder, path, _ = case
    prompt = random_prompts([64], seed=6)[0]
    want = engine(folder, path, kv_dtype="fp8").generate([prompt], greedy(16))[0].token_ids
    cached = engine(folder, path, kv_dtype="fp8", enable_prefix_caching=True)
    assert cached.generate([prompt], greedy(16))[0].token_ids == want
    cached.generate([prompt], greedy(16))
    assert cached.stats().prefix_hit_tokens == 60
    cached.check_books()


def test_budgets_of_another_model_are_refused(tiny_model, tmp_path):
    write_budgets(tmp_path / "other.json", 4, 2, RATIO)
    with pytest.raises(ConfigError, match="calibrate"):
        engine(tiny_model("llama", 6, 2, 16, 48, 3, False), str(tmp_path / "other.json"))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match="calibrate"):
        engine(tiny_model("llama", 6, 2, 16, 48, 3, False), str(tmp_path / "broken.json"))
