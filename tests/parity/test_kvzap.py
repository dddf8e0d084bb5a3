"""Method `kvzap` in the engine against kvpress's press with the same weights: kept sets, and the tokens behind them."""

from __future__ import annotations

import functools
import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from head_budget_files import write_budgets
from kvpress import AdaKVPress, KVzapPress
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from kvpress_oracle import kept_positions, prefill
from safetensors.torch import save_file
from test_head_budgets import MaskedOracle
from test_shared_budgets import evicted
from transformers import AutoModelForCausalLM

from fastcache import LLM, SamplingParams
from fastcache.compression.head_budgets import HeadBudgets
from fastcache.compression.layer import LayerCompressor
from fastcache.errors import CheckpointError, ConfigError, UnsupportedCombination

RATIO, PAGE, LAYERS, HIDDEN = 0.7, 4, 3, 48
# Shape, and width of the networks: a linear one has none.
SHAPES = [("llama", 6, 2, 10), ("qwen3", 8, 2, None), ("llama", 4, 4, 10)]
LENGTHS = (95, 60, 41)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@dataclass
class Press(KVzapPress):
    """The press with weights of our own in place of a download."""

    model: KVzapModel | None = None

    def post_init_from_model(self, model):
        self.kvzap_model = self.model


@dataclass(eq=False)
class Case:
    folder: str
    checkpoint: str
    model: AutoModelForCausalLM
    scorer: KVzapModel
    prompts: list[list[int]]

    def press(self, ratio=RATIO):
        return Press(compression_ratio=ratio, model=self.scorer)

    def compression(self, **more):
        params = {"checkpoint": self.checkpoint, "n_sink": 0}
        return {"method": "kvzap", "compression_ratio": RATIO, "params": params, **more}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: "-".join(map(str, s)))
def case(request, tiny_model, tmp_path_factory):
    arch, heads, kv_heads, width = request.param
    folder = tiny_model(arch, heads, kv_heads, 16, HIDDEN, LAYERS, False)
    config = KVzapConfig(input_dim=HIDDEN, output_dim=kv_heads, n_modules=LAYERS, hidden_dim=width)
    generator = torch.Generator().manual_seed(5)
    scorer = KVzapModel(config)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    file = tmp_path_factory.mktemp("scorer") / "scorer.safetensors"
    save_file(scorer.state_dict(), str(file))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    prompts = [torch.randperm(256, generator=generator)[:n].tolist() for n in LENGTHS]
    return Case(str(folder), str(file), model, scorer, prompts)


@pytest.fixture
def kept_sets(monkeypatch):
    """What the engine keeps: (length, layer) -> (Hk, n) ascending, -1 behind a head's own."""
    found, original = {}, LayerCompressor._kept

    def noting(self, layer, work, *args):
        heads, kept = original(self, layer, work, *args)
        per_layer = len(kept) // (LAYERS if self.num_layers == 1 else 1)  # all at once: layer after layer
        for number, (length, row) in enumerate(zip(work.lengths.tolist(), kept, strict=True)):
            found[length, layer + number // per_layer] = row[:, : int((row >= 0).sum(1).max())]
        return heads, kept

    monkeypatch.setattr(LayerCompressor, "_kept", noting)
    return found


def engine(case, **options):
    compression = options.pop("compression", None) or case.compression()
    options = {"device": "cpu", "page_size": PAGE, "num_pages": 300, "max_model_len": 200, **options}
    return LLM(case.folder, compression=compression, **options)


@functools.cache
def expected(case) -> dict:
    """(length, layer) -> (Hk, n): what kvpress keeps."""
    sets = {}
    for prompt in case.prompts:
        whole = prefill(case.model, prompt, Press(0.0, model=case.scorer))
        left = prefill(case.model, prompt, case.press())
        for layer, (full, cut) in enumerate(zip(whole.layers, left.layers, strict=True)):
            sets[len(prompt), layer] = kept_positions(full.keys[0], cut.keys[0])
    return sets


# A step that holds all prompts, steps that cut them, pages shared with an earlier prompt, and compression afterwards.
WAYS = {
    "packed": {},
    "chunked": {"max_num_batched_tokens": 32},
    "prefix": {"enable_prefix_caching": True},
    "prefix-chunked": {"enable_prefix_caching": True, "max_num_batched_tokens": 32},
    "deferred": {"policy": "p2c1d2"},
    "late-release": {"immediate_release": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_kept_sets_equal_kvpress(case, way, kept_sets):
    llm = engine(case, **WAYS[way])
    rounds = 2 if "prefix" in way else 1
    tokens = []
    for _ in range(rounds):
        kept_sets.clear()
        tokens.append([o.token_ids for o in llm.generate(case.prompts, GREEDY)])
        for place, kept in expected(case).items():
            assert torch.equal(kept_sets[place], kept), place
    llm.check_books()
    assert tokens[0] == tokens[-1]
    assert (llm.stats().prefix_hit_tokens > 100) == ("prefix" in way)


def test_tokens_are_those_of_transformers_without_the_rest(case):
    llm = engine(case)
    masked = MaskedOracle(case.folder)
    masked._gone = lambda keys, rows: torch.ones(keys.shape[:2], dtype=bool).scatter(1, rows, False)
    kept = expected(case)
    for prompt, output in zip(case.prompts, llm.generate(case.prompts, GREEDY), strict=True):
        rows = [kept[len(prompt), layer] for layer in range(LAYERS)]
        assert output.token_ids == masked.tokens(prompt, [], rows, 12)


def test_heads_share_by_score_as_with_adakv_in_kvpress(case, kept_sets):
    engine(case, compression=case.compression(head_budgets="adakv")).generate(case.prompts, GREEDY)
    for prompt in case.prompts:
        for layer, gone in enumerate(evicted(case.model, prompt, AdaKVPress(case.press()))):
            for head, row in enumerate(kept_sets[len(prompt), layer]):
                assert row[row >= 0].tolist() == (~gone[head]).nonzero()[:, 0].tolist()


def test_budgets_of_a_file_and_pages_under_pressure(case, kept_sets, tmp_path):
    """Few pages and seats, cut prompts with questions behind them: ratings of one prompt never reach another's."""
    kv_heads = case.model.config.num_key_value_heads
    write_budgets(tmp_path / "budgets.json", LAYERS, kv_heads, RATIO)
    budgets = HeadBudgets.load(str(tmp_path / "budgets.json"))
    options = {"compression": case.compression(head_budgets=str(tmp_path / "budgets.json")), "num_pages": 60}
    llm = engine(case, max_num_batched_tokens=24, max_num_seqs=3, **options)
    wanted = {
        (len(prompt), layer): best_of(case, prompt, layer, budgets.kept(len(prompt), RATIO)[layer].tolist())
        for prompt in case.prompts
        for layer in range(LAYERS)
    }
    noted = note_slots(llm)
    for i in range(2):
        for prompt in case.prompts:
            llm.add_request(
                [*prompt, i, 7], SamplingParams(max_tokens=6, ignore_eos=True), context_len=len(prompt)
            )
    while llm.has_unfinished():
        llm.step()
        for place, kept in kept_sets.items():
            assert [row[row >= 0].tolist() for row in kept] == wanted[place]
        kept_sets.clear()
    llm.check_books()
    assert any(compressed for compressed, _, _ in noted)
    assert all(rated == (-1 if compressed else slot) for compressed, rated, slot in noted)


def note_slots(llm) -> list[tuple[bool, int, int]]:
    """Of each token that is computed in a prefill: is its cache compressed, the slot of its rating, of its entry."""
    states, noted = llm._runner.states, []
    original = states.watching

    @contextmanager
    def watching(step, batch):
        with original(step, batch):
            compressed = [chunk.seq.compressed for chunk in step.chunks for _ in range(chunk.length)]
            noted.extend(zip(compressed, states._slots.tolist(), batch.host.slots.tolist(), strict=True))
            yield

    states.watching = watching
    return noted


def best_of(case, prompt, layer, counts):
    """The `counts` best positions of each head, by the press's own scores."""
    seen = {}

    class Scoring(Press):
        def score(self, module, *args):
            seen[module.layer_idx] = super().score(module, *args)
            return seen[module.layer_idx]

    prefill(case.model, prompt, Scoring(RATIO, model=case.scorer))
    return [sorted(row.topk(n).indices.tolist()) for row, n in zip(seen[layer][0], counts, strict=True)]


def test_what_is_stored_beside_the_entries_is_counted(case):
    described = engine(case).describe()
    assert described["compressor"]["sha256"] == hashlib.sha256(Path(case.checkpoint).read_bytes()).hexdigest()
    pool = engine(case)._runner.pool
    assert (
        pool.page_bytes - PAGE * described["kv_bytes_per_token"] == PAGE * pool.ratings[:, 0, 0].numel() * 4
    )


def test_what_does_not_go_together_is_refused(case, tmp_path):
    def start(checkpoint, **more):
        engine(
            case,
            compression={
                "method": "kvzap",
                "params": {"checkpoint": checkpoint} if checkpoint else {},
                **more,
            },
        )

    with pytest.raises(ConfigError, match="allowed is that for a model with"):
        start("dummy")
    with pytest.raises(ConfigError, match="needs the parameter checkpoint"):
        start(None)
    with pytest.raises(CheckpointError, match="does not exist"):
        start("nowhere.safetensors")
    with pytest.raises(UnsupportedCombination, match="'global'"):
        start(case.checkpoint, head_budgets="global")
    weights = case.scorer.state_dict()
    file = tmp_path / "wrong.safetensors"
    last = f"layers.{LAYERS - 1}." + ("2.bias" if case.scorer.config.hidden_dim else "bias")
    wrong = {
        "is missing": {name: t for name, t in weights.items() if name != last},
        "has shape": weights | {last: torch.zeros(9)},
        "holds .* tensors": weights | {last.replace(str(LAYERS - 1), str(LAYERS), 1): torch.zeros(2)},
        "no checkpoint of method 'kvzap'": weights | {"compress_tk.0.0.weight": torch.zeros(2)},
    }
    for sentence, tensors in wrong.items():
        save_file(tensors, str(file))
        with pytest.raises(CheckpointError, match=sentence):
            start(str(file))


def test_seeded_networks_for_a_model_with_seeded_weights(kept_sets):
    compression = {"method": "kvzap", "compression_ratio": RATIO, "params": {"checkpoint": "dummy"}}
    options = {"device": "cpu", "load_format": "dummy", "num_pages": 40, "max_model_len": 200}
    kept = []
    for _ in range(2):
        kept_sets.clear()
        llm = LLM("smollm2-135m", compression=compression, **options)
        llm.generate([list(range(100))], SamplingParams(max_tokens=2, ignore_eos=True))
        assert llm.describe()["compressor"] == {"kind": "dummy", "sha256": None, "hidden": 72}
        kept.append(dict(kept_sets))
    assert all(torch.equal(kept[0][place], kept[1][place]) for place in kept[0])
    assert not torch.equal(kept[0][100, 0], kept[0][100, 1])
