"""What the engine says to pictures that it cannot use, and which checkpoints and configs of LLaVA it reads."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llava import IMAGE_TOKEN, picture, write_tiny_llava

from fastcache import LLM, SamplingParams
from fastcache.bench.cell import measure_cell
from fastcache.bench.matrix import CellConfig
from fastcache.cli import main
from fastcache.engine.prompts import Prepared
from fastcache.errors import (
    ConfigError,
    ImageError,
    ModelFolderError,
    UnknownName,
    UnsupportedArchitecture,
    UnsupportedCombination,
)
from fastcache.models.config import load_model_config
from fastcache.models.pictures import load_processor, open_picture

T = IMAGE_TOKEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, device="cpu", page_size=4, num_pages=60)


def file_bytes(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def refused(llm, error, match, prompt, images):
    with pytest.raises(error, match=match):
        llm.add_request({"prompt": prompt, "images": images})
    assert not llm.has_unfinished()


def test_pictures_that_cannot_be_read(llm, tmp_path):
    whole = file_bytes(picture(1))
    broken, text = tmp_path / "broken.png", tmp_path / "text.png"
    broken.write_bytes(whole[: len(whole) // 2])
    text.write_text("no picture")
    refused(llm, ImageError, r"nowhere\.png does not exist", [T], [tmp_path / "nowhere.png"])
    refused(llm, ImageError, r"broken\.png cannot be read", [T], [broken])
    refused(llm, ImageError, r"text\.png cannot be read.*PNG", [T], [str(text)])
    refused(llm, ImageError, r"0 bytes cannot be read", [T], [b""])
    refused(llm, ImageError, r"int; allowed are a path", [T], [3])
    refused(llm, ImageError, r"cannot be read", [T], [tmp_path])
    postscript = file_bytes(picture(1), "EPS")  # its reader would start another program
    refused(llm, ImageError, r"cannot be read", [T], [postscript])


def test_pictures_that_are_too_large_are_not_decoded(llm):
    bomb = file_bytes(Image.new("1", (12_000, 7_000)))
    assert len(bomb) < 20_000
    refused(llm, ImageError, r"12000 x 7000 pixels; allowed is 1 to 67,108,864", [T], [bomb])
    sliver = file_bytes(Image.new("L", (1, 60_000_000 // 28)), "TIFF", compression="tiff_lzw")
    refused(llm, ImageError, r"once resized", [T], [sliver])


def test_placeholders_and_images_must_match(llm):
    one = picture(1)
    refused(llm, ImageError, r"0 placeholders.*1 images", [1, 2], [one])
    refused(llm, ImageError, r"2 placeholders.*1 images", [T, T], [one])
    refused(llm, ImageError, r"1 placeholders.*0 images", [T], [])
    refused(llm, ImageError, r"16 in a row", [*[T] * 8, 1, *[T] * 8], [one])
    refused(llm, ImageError, r"0 placeholders", "no image here", [one])
    with pytest.raises(UnknownName, match="images"):
        llm.add_request({"prompt": [T], "image": [one]})
    with pytest.raises(ConfigError, match="prompt"):
        llm.add_request({"images": [one]})
    refused(llm, ConfigError, "list", [T], one)


def test_a_model_that_reads_text_alone_takes_no_picture(tiny_model, capsys):
    folder = tiny_model("llama", 4, 2, 16, 48, 2, False)
    llm = LLM(folder, device="cpu", page_size=4, num_pages=40)
    refused(llm, UnsupportedCombination, "reads text alone", [1, 2], [picture(1)])
    for more in (["hi"], ["--chat", "hi"]):
        assert main(["generate", "--model", str(folder), "--image", "a.png", *more]) == 2
        assert "reads text alone" in capsys.readouterr().err


def test_paths_bytes_and_pil_are_the_same_picture(llm, tmp_path):
    image = picture(1)
    path = tmp_path / "picture.png"
    image.save(path)
    prompts = [{"prompt": [T, 1], "images": [given]} for given in (image, path, str(path), path.read_bytes())]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
    assert len({tuple(output.token_ids) for output in outputs}) == 1
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was on its side
    lying = open_picture(file_bytes(image, "PNG", exif=turned))
    assert lying.size == image.size[::-1]


def test_pictures_of_many_prompts_are_prepared_at_once(llm, tmp_path):
    """In order, as `read` would one after another; what has none is left alone."""
    path = tmp_path / "five.png"
    path.write_bytes(file_bytes(picture(5)))
    prompts = [
        {"prompt": [9, T, T], "images": [picture(1), file_bytes(picture(2))]},
        [9, 10],
        {"prompt": [9]},
    ]
    prompts += [{"prompt": [T, 9], "images": (each,)} for each in (picture(4), path)]
    ahead = llm._reader.ahead(prompts)
    assert ahead[1:3] == prompts[1:3]
    assert all(isinstance(each, Prepared) for prompt in ahead[3:] for each in prompt["images"])
    for prompt, prepared in zip(prompts, ahead, strict=True):
        want, got = llm._reader.read(prompt), llm._reader.read(prepared)
        assert got.tokens == want.tokens and len(got.images) == len(want.images)
        for a, b in zip(got.images, want.images, strict=True):
            assert torch.equal(a.pixels, b.pixels) and (a.start, a.digest) == (b.start, b.digest)
    with pytest.raises(ImageError, match=r"nowhere\.png does not exist"):
        llm.generate([*prompts, {"prompt": [T], "images": [tmp_path / "nowhere.png"]}])
    assert not llm.has_unfinished()


def test_a_cell_with_pictures_says_how_many_and_measures_without_them_too(folder):
    for images, tokens in ((2, 3 * 2 * 16), (0, 0)):
        workload = {"name": "synthetic-long", "context": 60, "output": 4, "images": images}
        cell = {"model": "llava-mlp", "model_path": str(folder), "workload": workload, "batch_size": 3}
        cell |= {
            "variant": "compression-only",
            "method": "knorm",
            "compression_factor": 1.5,
            "device": "cpu",
        }
        row = measure_cell(CellConfig.from_dict({**cell, "repeats": 1, "warmup": 0}))
        assert row["status"] == "ok", row["error"]
        assert (row["images"], row["image_tokens"], row["prompt_tokens"]) == (3 * images, tokens, 180)
        assert row["kv_len_before"] == 60 and row["shareable_prefix_tokens"] == 0


@pytest.mark.slow
def test_generate_takes_pictures_for_its_placeholders(folder, tmp_path, capsys):
    path = tmp_path / "a.png"
    picture(1).save(path)
    arguments = [
        "generate",
        "--model",
        str(folder),
        "--max-tokens",
        "3",
        "--device",
        "cpu",
        "--image",
        str(path),
    ]
    assert main([*arguments, "a<image>b"]) == 0
    assert main([*arguments, "--image", str(path), "a<image>b", "c<image>"]) == 0
    capsys.readouterr()
    assert main([*arguments, "no place"]) == 2
    assert "0 <image> and 1 --image" in capsys.readouterr().err
    chat = shutil.copytree(folder, tmp_path / "chat")
    (chat / "chat_template.jinja").write_text(
        "{% for part in messages[0]['content'] %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    )
    arguments[2] = str(chat)
    assert main([*arguments, "--chat", "what?"]) == 0


@pytest.mark.parametrize("spelling", ["nested modules", "without vision_model"])
def test_other_spellings_of_the_weights(folder, llm, tmp_path, spelling):
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    rename = {
        "nested modules": lambda name: (
            "lm_head.weight"
            if "lm_head" in name
            else "model." + name.replace("language_model.model.", "language_model.")
        ),
        "without vision_model": lambda name: name.replace("vision_model.", ""),
    }[spelling]
    tensors = {rename(name): tensor for name, tensor in tensors.items()}
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, other / "model.safetensors")
    prompt = {"prompt": [T, 1, 2], "images": [picture(4)]}
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    got = LLM(other, device="cpu", page_size=4, num_pages=60).generate([prompt], sampling)
    assert got[0].token_ids == llm.generate([prompt], sampling)[0].token_ids


def test_a_tensor_of_the_tower_that_is_missing_or_too_many(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    save_file({n: t for n, t in tensors.items() if n != name}, other / "model.safetensors")
    with pytest.raises(ModelFolderError, match=r"no tensor for vision\.layers\.0\.up\.bias"):
        LLM(other, device="cpu")
    save_file({**tensors, name.replace(".0.", ".9."): tensors[name].clone()}, other / "model.safetensors")
    with pytest.raises(ModelFolderError, match="has no place"):
        LLM(other, device="cpu")


def test_configs_that_are_not_implemented(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    raw = json.loads((other / "config.json").read_text())
    for change, error, match in (
        ({"vision_feature_layer": 9}, ModelFolderError, "4 layers"),
        ({"vision_feature_select_strategy": "half"}, UnsupportedArchitecture, "default, full"),
        ({"projector_hidden_act": "relu"}, UnsupportedArchitecture, "gelu"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, UnsupportedArchitecture, "clip"),
        ({"text_config": {"model_type": "mistral"}}, UnsupportedArchitecture, "llama"),
    ):
        (other / "config.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(error, match=match):
            load_model_config(str(other), "auto")


def test_the_published_config_leaves_out_defaults(tmp_path):
    """As llava-hf/llava-1.5-7b-hf has it: what equals transformers' defaults is not written."""
    raw = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "text_config": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064},
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, preset = load_model_config(str(tmp_path), "auto"), load_model_config("llava-1.5-7b", "dummy")
    assert config.dtype == "float16" and config.vision.tokens_per_image == 576 and config.vision.depth == 23
    assert config.eos_token_ids == {2}
    for name in ("vision", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        assert getattr(config, name) == getattr(preset, name)
    assert config.vocab_size == preset.vocab_size and config.rms_norm_eps == preset.rms_norm_eps


def test_preprocessors_that_do_not_fit(folder, tmp_path):
    vision = load_model_config(str(folder), "auto").vision
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    for change, error, match in (
        ({"crop_size": 30}, ModelFolderError, "30 x 30"),
        ({"size": {"longest_edge": 3}}, ModelFolderError, "height"),
        ({"do_pad": True}, UnsupportedArchitecture, "padding"),
        ({"image_processor_type": "SiglipImageProcessor"}, UnsupportedArchitecture, "Siglip"),
    ):
        path.write_text(json.dumps({**raw, **change}))
        with pytest.raises(error, match=match):
            load_processor(str(other), vision)
    (other / "processor_config.json").write_text(
        json.dumps({"image_processor": {**raw, "rescale_factor": 1}})
    )
    path.unlink()
    assert load_processor(str(other), vision).rescale == 1
    path.write_text(json.dumps({**raw, "do_resize": False, "do_center_crop": False}))
    with pytest.raises(ImageError, match="28 x 28"):
        load_processor(str(other), vision).pixels(picture(1))
