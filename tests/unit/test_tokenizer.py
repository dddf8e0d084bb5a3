"""The tokenizer gives the ids, texts and prompts that transformers gives for the same folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastcache.errors import ModelFolderError, UserError
from fastcache.tokenizer import Tokenizer, load_tokenizer, read_eos_token_ids

TEXTS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "Prices rose 12,345.67% in 2024; call +49 30 901820 or 0x1F4A9.",
    "  leading, trailing  and   inner    spaces   ",
    "tabs\tand\n\nnewlines\r\n  then\n\t\tindent",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # café\n",
    "naïve café, Zürich, Ελληνικά, русский, العربية, हिन्दी, 日本語, 한국어",
    "emoji 🎉👩‍👩‍👧‍👦🏳️‍🌈 and math ∑∫√≠ and ½ ² ① ٣",
    "I'll, you've, we're, it's 'quoted' and DON'T",
    "<|im_start|>user\nhi<|im_end|> text around <|endoftext|>specials <|im_start",
    "\u00a0no-break\u200bzero width\ufeffbom \u2028line",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 00000000000000000000",
    '{"json": [1, 2.5e-3, null], "html": "<b>&amp;</b>"}',
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  2+2?\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "<c> & 'd'"},
    ],
]


@pytest.fixture(scope="module")
def pair(smollm2: Path):
    """Ours and transformers' tokenizer of SmolLM2."""
    from transformers import AutoTokenizer

    return Tokenizer.from_folder(smollm2), AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_transformers(pair, text: str) -> None:
    ours, theirs = pair
    for special in (True, False):
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(
            ids, skip_special_tokens=special
        )
    assert ours.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_any_unicode_text_equals_transformers(pair, text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_known_ids_of_smollm2(pair) -> None:
    """Ids that do not depend on any reader of tokenizer.json: digits are single, specials are whole."""
    ours, _ = pair
    assert ours.encode("Gravity is") == [22007, 6463, 314]
    assert ours.encode("<|im_start|>12<|im_end|>") == [1, 33, 34, 2]
    assert ours.vocab_size == 49152
    assert ours.eos_token_ids == {2}
    assert ours.special_tokens["bos_token"] == "<|im_start|>"
    assert ours.special_tokens["pad_token"] == "<|im_end|>"


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("generation", [True, False])
def test_chat_prompts_equal_transformers(pair, messages, generation: bool) -> None:
    ours, theirs = pair
    expected = theirs.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
    assert ours.apply_chat_template(messages, add_generation_prompt=generation) == expected


def folder_with(tiny_model, tmp_path: Path, **files: object) -> Path:
    """A copy of a tiny model's folder in which `name` (without .json) is replaced; None removes it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, content in files.items():
        path = folder / f"{name}.json"
        if content is None:
            path.unlink()
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_stored_padding_and_truncation_are_ignored(tiny_model, tmp_path: Path) -> None:
    folder = folder_with(tiny_model, tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(folder)
    assert len(tokenizer.encode("longer than three")) == len("longer than three")


def test_ids_beyond_the_tokenizer_decode_to_nothing(tiny_model) -> None:
    tokenizer = Tokenizer.from_folder(tiny_model())
    assert tokenizer.vocab_size == 259
    assert tokenizer.decode([*tokenizer.encode("ab"), 319, *tokenizer.encode("c")]) == "abc"


def test_end_ids_come_from_the_first_file_that_names_them(tiny_model, tmp_path: Path) -> None:
    folder = folder_with(tiny_model, tmp_path, generation_config={"eos_token_id": [7, 9]})
    assert Tokenizer.from_folder(folder).eos_token_ids == {7, 9} == read_eos_token_ids(folder)
    (folder / "generation_config.json").unlink()
    assert Tokenizer.from_folder(folder).eos_token_ids == {257}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    assert Tokenizer.from_folder(folder).eos_token_ids == {5}
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert read_eos_token_ids(folder) == set()
    assert Tokenizer.from_folder(folder).eos_token_ids == {257}, "the tokenizer's own <|eos|>"


def test_a_template_file_wins_and_gets_the_variables(tiny_model, tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<|bos|>"}, "chat_template": "from the config"}
    folder = folder_with(tiny_model, tmp_path, tokenizer_config=config)
    assert Tokenizer.from_folder(folder).apply_chat_template([]) == "from the config"
    template = (
        "{{ bos_token }}\n{% for m in messages %}\n{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{{ enable_thinking }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    message = {"role": "user", "content": "<é>"}
    prompt = Tokenizer.from_folder(folder).apply_chat_template([message, message], enable_thinking=False)
    assert prompt == '<|bos|>\n{"role": "user", "content": "<é>"}False'


def test_a_list_of_templates_means_the_default_one(tiny_model, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = folder_with(tiny_model, tmp_path, tokenizer_config={"chat_template": named})
    assert Tokenizer.from_folder(folder).apply_chat_template([]) == "D"


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        (None, ModelFolderError, "no chat template"),
        ("{% for %}", ModelFolderError, "malformed"),
        ("{{ raise_exception('roles must alternate') }}", UserError, "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", UserError, "unsafe"),
    ],
)
def test_templates_that_cannot_be_used(tiny_model, tmp_path: Path, template, error, words: str) -> None:
    config = {} if template is None else {"chat_template": template}
    tokenizer = Tokenizer.from_folder(folder_with(tiny_model, tmp_path, tokenizer_config=config))
    with pytest.raises(error, match=words):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("message", ["hi", {"content": "hi"}, {"role": "user"}])
def test_messages_without_role_and_content_are_refused(tiny_model, message) -> None:
    with pytest.raises(UserError, match="'role' and 'content'"):
        Tokenizer.from_folder(tiny_model()).apply_chat_template([message])


def test_a_folder_without_tokenizer(tiny_model, tmp_path: Path) -> None:
    folder = folder_with(tiny_model, tmp_path, tokenizer=None)
    assert load_tokenizer(folder, required=False) is None
    with pytest.raises(ModelFolderError, match=r"no tokenizer\.json.*token ids"):
        load_tokenizer(folder, required=True)
    assert load_tokenizer(tmp_path / "nowhere", required=False) is None


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer": "{"},
        {"tokenizer": "{}"},
        {"tokenizer_config": "{"},
        {"generation_config": "[1]"},
    ],
)
def test_unreadable_files_are_errors_even_when_not_required(tiny_model, tmp_path: Path, files) -> None:
    folder = folder_with(tiny_model, tmp_path, **files)
    with pytest.raises(ModelFolderError, match=next(iter(files))):
        load_tokenizer(folder, required=False)


def test_reading_a_tokenizer_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, fastcache.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
