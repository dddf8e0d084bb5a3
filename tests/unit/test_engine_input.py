"""What the engine refuses, and that refusing leaves it clean."""

from __future__ import annotations

import json

import pytest

from fastcache import LLM, SamplingParams
from fastcache.errors import (
    ConfigError,
    DeviceOutOfMemory,
    ModelFolderError,
    OutOfPages,
    PromptTooLong,
    UnknownName,
    UnsupportedArchitecture,
    UnsupportedCombination,
)


@pytest.fixture(scope="module")
def llm(tiny_model):
    return LLM(tiny_model("llama", 4, 2, 16, 48, 2, False), device="cpu", page_size=4, num_pages=40)


def copy_of(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_unknown_options_are_named_with_their_neighbour(tiny_model):
    with pytest.raises(UnknownName, match="page_size"):
        LLM(tiny_model("llama", 4, 2, 16, 48, 2, False), pagesize=16)
    with pytest.raises(UnknownName, match="snapkv"):
        LLM(
            tiny_model("llama", 4, 2, 16, 48, 2, False),
            device="cpu",
            num_pages=9,
            compression={"method": "snapvk"},
        )


def test_folders_that_cannot_be_loaded(tmp_path, tiny_model):
    good = tiny_model("llama", 4, 2, 16, 48, 2, False)
    with pytest.raises(ModelFolderError, match="does not exist"):
        LLM(tmp_path / "nowhere", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFolderError, match=r"config\.json"):
        LLM(tmp_path / "empty", device="cpu")
    bare = copy_of(good, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"no \*\.safetensors"):
        LLM(bare, device="cpu")
    corrupt = copy_of(good, tmp_path / "corrupt")
    (corrupt / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelFolderError, match="not a readable safetensors"):
        LLM(corrupt, device="cpu")


def test_a_config_that_does_not_fit_its_weights(tmp_path, tiny_model):
    folder = copy_of(tiny_model("llama", 4, 2, 16, 48, 2, False), tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 3}))
    with pytest.raises(ModelFolderError, match=r"no tensor for layers\.2"):
        LLM(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps({**raw, "intermediate_size": 40}))
    with pytest.raises(ModelFolderError, match="shape"):
        LLM(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps({**raw, "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(UnsupportedArchitecture, match="Qwen3ForCausalLM"):
        LLM(folder, device="cpu")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match="JSON"):
        LLM(folder, device="cpu")


def test_a_gpu_that_is_not_there(tiny_model, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedCombination, match="no GPU"):
        LLM(tiny_model("llama", 4, 2, 16, 48, 2, False), device="cuda")


def test_prompts_that_do_not_fit_leave_nothing_behind(llm):
    with pytest.raises(PromptTooLong, match="max_model_len"):
        llm.generate([[1, 2], [1] * 2000])
    with pytest.raises(OutOfPages, match="num_pages"):
        llm.generate([[1, 2], [1] * 500])
    with pytest.raises(ConfigError, match="vocabulary"):
        llm.generate([[1, 2], [-1]])
    with pytest.raises(ConfigError, match="empty"):
        llm.generate([[1, 2], []])
    with pytest.raises(ConfigError, match="one for all, or one each"):
        llm.generate([[1, 2], [3]], [SamplingParams()])
    assert not llm.has_unfinished()
    llm.check_books()


def test_cancelling_frees_pages_at_once(llm):
    ids = [llm.add_request([1] * 20, SamplingParams(max_tokens=30, ignore_eos=True)) for _ in range(3)]
    llm.step()
    llm.step()
    llm.cancel(ids[1])
    done = []
    while llm.has_unfinished():
        done += [output.request_id for output in llm.step()]
    assert sorted(done) == sorted([ids[0], ids[2]])
    llm.check_books()


def test_a_device_out_of_memory_names_the_remedy(tiny_model, monkeypatch):
    import torch

    def full(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    llm = LLM(tiny_model("llama", 4, 2, 16, 48, 2, False), device="cpu", page_size=4, num_pages=40)
    monkeypatch.setattr(llm._runner.model, "forward", full)
    with pytest.raises(DeviceOutOfMemory, match=r"2 GiB.*gpu_memory_utilization"):
        llm.generate([[1, 2, 3]])


def test_a_request_id_in_use(llm):
    llm.add_request([1], request_id="a")
    with pytest.raises(ConfigError, match="'a' is in use"):
        llm.add_request([2], request_id="a")
    llm.cancel("a")


def test_one_prompt_may_be_given_bare(llm):
    assert len(llm.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))) == 1
    assert llm.generate("abc", SamplingParams(max_tokens=2, ignore_eos=True))[0].prompt_token_ids == (
        97 - 33,
        98 - 33,
        99 - 33,
    )
