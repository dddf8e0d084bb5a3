"""Workloads: seeded, distinct, clipped, and honest about what a prefix cache would share."""

from __future__ import annotations

import json

import pytest

from fastcache.bench.datasets import read_prompts, read_trace
from fastcache.bench.matrix import WorkloadConfig
from fastcache.bench.prompts import Vocabulary, prose
from fastcache.bench.workload import fit, make_plan, shareable_tokens
from fastcache.errors import ConfigError, DatasetError, PromptTooLong, UnsupportedCombination

WORDS = Vocabulary(50_000, lambda text: [sum(map(ord, word)) % 50_000 for word in text.split()])
BARE = Vocabulary(1000, None)


def plan(
    values: dict, batch_size: int = 3, rounds: int = 2, seed: int = 0, vocabulary=WORDS, limit: int = 4096
):
    return make_plan(WorkloadConfig.from_dict(values), batch_size, rounds, seed, vocabulary, limit)


def prompts(made):
    return [tuple(r.prompt_token_ids) for batches in made.rounds for batch in batches for r in batch]


SYNTHETIC = {"name": "synthetic-long", "context": 40, "output": 8, "num_batches": 2}
PROSE = {"name": "english-prose", "context": 40, "output": 8}


def test_a_plan_has_rounds_of_batches_of_requests():
    made = plan(SYNTHETIC)
    assert [[len(batch) for batch in batches] for batches in made.rounds] == [[3, 3], [3, 3]]
    assert {len(p) for p in prompts(made)} == {made.context_used} == {40}
    assert {r.max_tokens for batches in made.rounds for batch in batches for r in batch} == {8}


@pytest.mark.parametrize("values", [SYNTHETIC, PROSE, {**SYNTHETIC, "dialogue": True}])
def test_prompts_are_distinct_in_all_rounds_and_share_no_page(values):
    made = plan(values)
    assert len(set(prompts(made))) == len(prompts(made))
    assert shareable_tokens([list(p) for p in prompts(made)], 16) == 0


@pytest.mark.parametrize("values", [SYNTHETIC, PROSE, {**SYNTHETIC, "dialogue": True}])
def test_the_seed_alone_decides(values):
    assert prompts(plan(values)) == prompts(plan(values))
    assert prompts(plan(values)) != prompts(plan(values, seed=1))


def test_random_ids_stay_inside_the_vocabulary_and_away_from_its_ends():
    ids = {token for p in prompts(plan({**SYNTHETIC, "context": 2000}, vocabulary=BARE)) for token in p}
    assert min(ids) >= 50 and max(ids) < 950 and len(ids) > 800


@pytest.mark.parametrize(
    "context, output, limit, used", [(4096, 128, 4096, 3968), (100, 10, 110, 100), (100, 10, 109, 99)]
)
def test_a_context_is_clipped_to_what_the_output_leaves(context, output, limit, used):
    assert fit(context, output, limit) == used
    made = plan(
        {"name": "synthetic-long", "context": context, "output": output}, vocabulary=BARE, limit=limit
    )
    assert made.context_used == used
    assert any(f"clipped to {used}" in note for note in made.notes) == (used != context)


def test_an_output_that_leaves_no_room_is_refused():
    with pytest.raises(PromptTooLong, match="max_model_len 64"):
        fit(10, 64, 64)


def test_a_repeated_token_is_counted_as_what_a_prefix_cache_would_share():
    made = plan({"name": "synthetic-long", "context": 64, "output": 8, "token": "Hello there"}, rounds=1)
    assert len(set(prompts(made))) == 1
    assert prompts(made)[0][:2] * 32 == prompts(made)[0]
    # 64 tokens: three pages of 16 end before the last token; two of the three prompts find them.
    assert shareable_tokens([list(p) for p in prompts(made)], 16) == 2 * 48


def test_a_repeated_token_needs_no_tokenizer():
    made = plan({"name": "synthetic-long", "context": 9, "output": 1, "token": "Hello"}, vocabulary=BARE)
    assert len(set(prompts(made)[0])) == 1


def test_sharing_needs_the_whole_chain_not_just_an_equal_page():
    first, second = [1, 1, 2, 2, 9], [3, 3, 2, 2, 9]
    assert shareable_tokens([first, second], 2) == 0
    assert shareable_tokens([first, [1, 1, 4, 4, 9]], 2) == 2
    assert shareable_tokens([first, first], 2) == 4
    assert shareable_tokens([first[:4], first[:4]], 2) == 2  # the last token must be computed


def test_prose_is_a_long_english_text_and_the_plan_names_it():
    made = plan(PROSE)
    assert "pydoc_data.topics" in made.text_source and "sha256" in made.text_source
    text = prose()
    assert len(text) > 300_000 and text.count(" the ") > 2000
    ids = WORDS.encode(text)
    windows = {tuple(ids[i : i + 40]) for i in range(len(ids) - 39)}
    assert set(prompts(made)) <= windows


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(UnsupportedCombination, match="tokenizer"):
        plan(PROSE, vocabulary=BARE)


def test_prose_too_short_for_distinct_windows_is_refused():
    with pytest.raises(DatasetError, match="distinct windows"):
        plan({**PROSE, "context": 10**6}, limit=10**7)


def test_every_common_prompt_format_is_read(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps(
            [
                {"question": "one"},
                {"conversations": [{"from": "gpt", "value": "no"}, {"from": "human", "value": "two"}]},
                {"messages": [{"role": "user", "content": "three"}]},
                {"other": 1},
                "four",
            ]
        )
    )
    (tmp_path / "b.jsonl").write_text('{"prompt": "five"}\n\n{"text": "one"}\n')
    (tmp_path / "c.csv").write_text("id,instruction\n1,six\n2,\n")
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": [{"input": "seven"}]}))
    (tmp_path / "e.txt").write_text("ignored")
    assert read_prompts(str(tmp_path)) == ["one", "two", "three", "four", "five", "six", "seven"]


def test_a_dataset_is_filtered_by_length_and_its_shortage_is_noted(tmp_path):
    lines = [json.dumps({"prompt": " ".join(f"w{i}x{j}" for j in range(i))}) for i in range(1, 20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    values = {
        "name": "light-dataset",
        "dataset_dir": str(tmp_path),
        "context": 12,
        "output": 4,
        "min_prompt_tokens": 8,
    }
    made = plan(values)
    assert {len(p) for p in prompts(made)} <= set(range(8, 13))
    assert "5 of 19" in made.text_source and "repeat" in made.notes[0]
    assert plan({**values, "context": 19, "min_prompt_tokens": 2}).notes == []


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.json", "[]", "0 record"),
        ("a.json", '[{"other": "x"}]', "none of which has a text"),
        ("a.json", "{", "not JSON"),
        ("a.jsonl", '{"text": "x"}\nnope\n', "line 2"),
        ("a.txt", "x", ".json"),
        ("a.jsonl", '{"text": "too short"}', "2 to 2"),
    ],
)
def test_a_dataset_that_yields_nothing_says_why(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError) as caught:
        plan(
            {"name": "light-dataset", "dataset_dir": str(tmp_path), "context": 64, "min_prompt_tokens": 8},
        )
    assert words in str(caught.value)


def test_a_missing_dataset_folder_is_named(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        read_prompts(str(tmp_path / "nope"))


TRACE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.1,30,4\n2024-05-10 00:00:00.2,50,6\n2024-05-10 00:00:01,5,2\n2024-05-10 00:00:02,40,99\n"
)


def test_a_trace_gives_lengths_in_order_and_the_same_in_each_round(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    assert [(r.context, r.output) for r in read_trace(str(file))] == [(30, 4), (50, 6), (5, 2), (40, 99)]
    values = {
        "name": "heavy-trace",
        "trace": str(file),
        "context": 45,
        "output": 8,
        "min_prompt_tokens": 10,
    }
    made = plan(values, batch_size=2, vocabulary=BARE)
    for batches in made.rounds:
        assert [(len(r.prompt_token_ids), r.max_tokens) for r in batches[0]] == [(30, 4), (45, 6)]
    assert len(set(prompts(made))) == 4
    assert "lengths repeat" in plan(values, batch_size=3, vocabulary=BARE).notes[0]


@pytest.mark.parametrize(
    "content, words",
    [
        ("TIMESTAMP,ContextTokens\n1,2\n", "no column GeneratedTokens"),
        ("ContextTokens,GeneratedTokens\n3,x\n", "line 2"),
        ("ContextTokens,GeneratedTokens\n3\n", "line 2"),
        ("ContextTokens,GeneratedTokens\n", "no row"),
        ("ContextTokens,GeneratedTokens\n3,3\n", "at least 100"),
    ],
)
def test_a_trace_that_cannot_be_used_says_where(tmp_path, content, words):
    file = tmp_path / "trace.csv"
    file.write_text(content)
    with pytest.raises(DatasetError) as caught:
        plan({"name": "heavy-trace", "trace": str(file), "min_prompt_tokens": 100}, vocabulary=BARE)
    assert words in str(caught.value)


def test_a_missing_trace_is_named(tmp_path):
    with pytest.raises(DatasetError, match="nope"):
        read_trace(str(tmp_path / "nope.csv"))


SEEING = Vocabulary(1000, None, image_token_id=400, tokens_per_image=16)


def test_pictures_count_in_the_context_and_no_text_token_stands_for_one():
    made = plan({**SYNTHETIC, "context": 200, "images": 2}, vocabulary=SEEING)
    requests = [r for batches in made.rounds for batch in batches for r in batch]
    for request in requests:
        ids = request.prompt_token_ids
        assert len(ids) == 200 and ids.count(400) == 32 and ids[:16] == ids[100:116] == [400] * 16
        assert len(request.images) == 2 and request.prompt == {"prompt": ids, "images": [*request.images]}
    assert len({image.tobytes() for request in requests for image in request.images}) == 2 * len(requests)
    assert shareable_tokens([r.prompt_token_ids for r in requests], 16) == 16 * (len(requests) - 1)
    assert shareable_tokens([r.content for r in requests], 16) == 0
    again = plan({**SYNTHETIC, "context": 200, "images": 2}, vocabulary=SEEING)
    assert prompts(again) == prompts(made)
    assert again.rounds[0][0][0].images[0].tobytes() == requests[0].images[0].tobytes()


def test_text_alone_for_a_model_that_sees_leaves_out_the_placeholder():
    made = plan({**SYNTHETIC, "context": 3000}, vocabulary=SEEING)
    assert not any(400 in p for p in prompts(made)) and any(399 in p for p in prompts(made))


def test_pictures_that_cannot_be_had_are_refused():
    with pytest.raises(UnsupportedCombination, match="reads text alone"):
        plan({**SYNTHETIC, "images": 1}, vocabulary=BARE)
    with pytest.raises(ConfigError, match="more than 48"):
        plan({**SYNTHETIC, "context": 48, "images": 3}, vocabulary=SEEING)
    with pytest.raises(ConfigError, match="images"):
        plan({**SYNTHETIC, "images": -1})


def test_drawn_lengths_stay_in_their_bounds_and_repeat_from_round_to_round():
    workload = WorkloadConfig("synthetic-long", 90, 12, min_context=20, min_output=3, requests=16)
    plan = make_plan(workload, 4, 2, 7, Vocabulary(1000, None), 200)
    first, second = (batches[0] for batches in plan.rounds)
    lengths = [(len(r.prompt_token_ids), r.max_tokens) for r in first]
    assert len(first) == 16 and len(set(lengths)) > 8
    assert all(20 <= context <= 90 and 3 <= output <= 12 for context, output in lengths)
    assert [(len(r.prompt_token_ids), r.max_tokens) for r in second] == lengths
    assert first[0].prompt_token_ids != second[0].prompt_token_ids[: len(first[0].prompt_token_ids)]


@pytest.mark.parametrize(
    "values", [{"min_context": 91}, {"min_output": 13}, {"requests": 0}, {"min_context": 0}]
)
def test_lengths_that_cannot_be_drawn_are_refused(values):
    with pytest.raises(ConfigError):
        WorkloadConfig("synthetic-long", 90, 12, **values)
