"""LLaVA in the engine against transformers' LlavaForConditionalGeneration, on tiny random models, in float32."""

from __future__ import annotations

import pytest
import torch
from tiny_llava import IMAGE_SIZE, IMAGE_TOKEN, picture, write_tiny_llava
from tiny_models import EOS
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

from fastcache import LLM, SamplingParams
from fastcache.models.config import load_model_config
from fastcache.models.pictures import load_processor, open_picture

SHAPES = {
    "patches that leave a rest": {"patch_size": 8},
    "1.5": {},
    "full, last layer, gelu": {"feature_layer": -1, "strategy": "full", "hidden_act": "gelu"},
    "two layers, tied, no bias": {"feature_layer": [1, -2], "tied": True, "bias": False, "head_dim": 8},
}
PICTURES = [picture(1), picture(2, 33, 61), picture(3, 28, 28)]
T = IMAGE_TOKEN
PROMPTS = [  # token ids with one T for each picture, and which pictures these are
    ([T, 5, 6, 7], [0]),
    ([9, 8, 7, T, 6, 5], [1]),
    ([40, 41, T], [2]),
    ([11, 12, 13, 14, 15], []),
    ([21, T, 22, T, T, 23, 24], [2, 0, 1]),
    ([T], [1]),
    (list(range(60, 90)), []),
]


@pytest.fixture(scope="module", params=SHAPES, ids=list(SHAPES))
def folder(request, tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("llava"), **SHAPES[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("llava"), seed=3)


def asked(prompts=PROMPTS):
    return [{"prompt": ids, "images": [PICTURES[i] for i in which]} for ids, which in prompts]


class Oracle:
    """transformers, one request at a time; its own image processor, our expansion done by hand."""

    def __init__(self, folder):
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.processor = CLIPImageProcessor.from_pretrained(folder)
        strategy = self.model.config.vision_feature_select_strategy
        self.each = (IMAGE_SIZE // self.model.config.vision_config.patch_size) ** 2 + (strategy == "full")

    def inputs(self, ids, which):
        full = [token for i in ids for token in ([i] * self.each if i == T else [i])]
        ids = torch.tensor([full])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if which:
            images = [PICTURES[i] for i in which]
            given["pixel_values"] = self.processor(images, return_tensors="pt")["pixel_values"]
        return given

    @torch.no_grad()
    def logits(self, ids, which):
        return self.model(**self.inputs(ids, which)).logits[0, -1]

    @torch.no_grad()
    def tokens(self, ids, which, count=12):
        given = self.inputs(ids, which)
        out = self.model.generate(
            **given, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return out[0, given["input_ids"].shape[1] :].tolist()


def run(folder, prompts, count=12, **options):
    llm = LLM(folder, **{"device": "cpu", "page_size": 4, "num_pages": 500, "max_num_seqs": 8, **options})
    outputs = llm.generate(prompts, SamplingParams(max_tokens=count, ignore_eos=True))
    llm.check_books()
    return llm, outputs


def test_logits_and_tokens_of_a_mixed_batch(folder):
    oracle = Oracle(folder)
    llm = LLM(folder, device="cpu", page_size=4, num_pages=500, max_num_seqs=8)
    seen, logits = [], llm._runner.model.logits
    llm._runner.model.logits = lambda rows: seen.append(logits(rows)) or seen[-1]
    outputs = llm.generate(asked(), SamplingParams(max_tokens=12, ignore_eos=True))
    for row, (ids, which) in enumerate(PROMPTS):
        assert (seen[0][row] - oracle.logits(ids, which)).abs().max() < 1e-4
        assert outputs[row].token_ids == oracle.tokens(ids, which)
        assert outputs[row].metrics.prompt_tokens == len(ids) + len(which) * (oracle.each - 1)
        assert outputs[row].metrics.image_tokens == len(which) * oracle.each


def count_pictures(llm):
    """How many pictures each pass through the vision tower had."""
    passes, embed = [], llm._runner.model.embed_pictures
    llm._runner.model.embed_pictures = lambda pixels: passes.append(len(pixels)) or embed(pixels)
    return passes


@pytest.fixture(scope="module")
def want(plain):
    oracle = Oracle(plain)
    return [oracle.tokens(ids, which) for ids, which in PROMPTS]


def test_the_pictures_of_a_step_pass_the_tower_together_and_text_alone_never_does(plain, want):
    llm = LLM(plain, device="cpu", page_size=4, num_pages=500)
    passes = count_pictures(llm)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    assert [o.token_ids for o in llm.generate(asked(), sampling)] == want
    assert passes == [7]
    text = [ids for ids, which in PROMPTS if not which]
    assert [o.token_ids for o in llm.generate(text, sampling)] == [want[3], want[6]]
    assert passes == [7]


@pytest.mark.parametrize("budget", [1, 5, 21])
def test_chunks_that_cut_pictures_embed_each_picture_once(plain, want, budget):
    llm = LLM(plain, device="cpu", page_size=4, num_pages=500, max_num_batched_tokens=budget)
    passes = count_pictures(llm)
    for prompt in asked():
        llm.add_request(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    live, done = list(llm._live.values()), []
    while llm.has_unfinished():
        done += llm.step()
    assert [o.token_ids for o in sorted(done, key=lambda o: int(o.request_id))] == want
    assert sum(passes) == 7
    assert not any(seq.image_embeddings for seq in live), "embeddings outlive the prefill"


@pytest.mark.parametrize("policy", ["dynamic", "p2c2d3"])
def test_stage_policies_leave_pictures_where_they_are(plain, want, policy):
    llm = LLM(plain, device="cpu", page_size=4, num_pages=500, max_num_batched_tokens=40, policy=policy)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    done = []
    for prompt in asked():  # one after another, so that pictures arrive while others decode
        llm.add_request(prompt, sampling)
        done += llm.step()
    while llm.has_unfinished():
        done += llm.step()
    assert [o.token_ids for o in sorted(done, key=lambda o: int(o.request_id))] == want


def test_preemption_recomputes_the_same_tokens(plain, want):
    llm = LLM(plain, device="cpu", page_size=4, num_pages=25, max_num_seqs=8)
    llm._parts.eos = frozenset()
    outputs = llm.generate(asked(), SamplingParams(max_tokens=12))
    assert [o.token_ids for o in outputs] == want
    assert llm.stats().preemptions > 0
    llm.check_books()


def test_the_prefix_cache_tells_pictures_apart(plain, want):
    llm = LLM(plain, device="cpu", page_size=4, num_pages=500, enable_prefix_caching=True)
    ids = [T, *range(30, 50)]
    oracle = Oracle(plain)
    for which in (0, 1, 0, 2):
        prompt = {"prompt": ids, "images": [PICTURES[which]]}
        output = llm.generate([prompt], SamplingParams(max_tokens=12, ignore_eos=True))[0]
        assert output.token_ids == oracle.tokens(ids, [which])
    assert llm.stats().prefix_hit_tokens == 32  # the third request has all full pages but the last
    llm.check_books()


def test_compression_sees_the_expanded_context(plain):
    """A picture counts with all its tokens in what is stored and in what is kept."""
    _, (output,) = run(
        plain,
        asked([([*range(8), T, *range(30, 70)], [0])]),
        compression={"method": "streaming_llm", "compression_ratio": 0.5, "params": {"n_sink": 4}},
    )
    assert output.metrics.kv_len_before == 8 + 16 + 40 and output.metrics.kv_len_after == 32


def test_a_context_before_the_question_is_counted_in_placeholders(plain):
    llm = LLM(plain, device="cpu", page_size=4, num_pages=100)
    name = llm.add_request({"prompt": [1, T, 2, T, 3], "images": PICTURES[:2]}, context_len=3)
    request = llm._live[name].request
    assert request.compress_at == 18 and request.image_spans == ((1, 16), (18, 16))


def test_text_and_expanded_ids_mean_the_same_prompt(plain):
    llm = LLM(plain, device="cpu", page_size=4, num_pages=500)
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    text, expanded = llm.generate(
        [
            {"prompt": "ab<image>c<image>", "images": PICTURES[:2]},
            {"prompt": [64, 65, *[T] * 16, 66, *[T] * 16], "images": PICTURES[:2]},
        ],
        sampling,
    )
    assert text.prompt_token_ids == expanded.prompt_token_ids and text.token_ids == expanded.token_ids
    assert EOS not in text.prompt_token_ids


@pytest.mark.parametrize("size", [(28, 28), (29, 200), (200, 29), (13, 11), (64, 48), (31, 30)], ids=str)
def test_pixels_are_those_of_the_original_processor(plain, size):
    given = picture(7, *size)
    processor = load_processor(str(plain), load_model_config(str(plain), "auto").vision)
    got = processor.normalise(processor.pixels(open_picture(given))[None])
    want = CLIPImageProcessor.from_pretrained(plain)(given, return_tensors="pt")["pixel_values"]
    assert torch.equal(got, want)
