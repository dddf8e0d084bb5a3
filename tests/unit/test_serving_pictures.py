"""Pictures as data URLs: what a model that sees makes of them, and what is wrong with the ones it refuses."""

from __future__ import annotations

import base64
import io

import pytest
from served import serving
from tiny_llava import picture, write_tiny_llava

from fastcache import LLM, SamplingParams

# Pictures first, as in the template of LLaVA-1.5.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(seed: int, **size: int) -> bytes:
    file = io.BytesIO()
    picture(seed, **size).save(file, "PNG")
    return file.getvalue()


def message(*urls: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_tiny_llava(tmp_path_factory.mktemp("llava"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder, max_image_bytes=20_000, max_images=2) as server:
        yield server


def ask(served, messages, **changes):
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, "return_token_ids": True} | changes
    return served.post("/v1/chat/completions", **body)


@pytest.mark.parametrize("seeds", [(), (1,), (1, 2)])
def test_the_answer_is_what_the_engine_says_offline(served, folder, seeds):
    pictures = [png(seed) for seed in seeds]
    choice = ask(served, message(*map(data_url, pictures))).json()["choices"][0]
    text = "USER: " + "<image>\n" * len(seeds) + "what is it? ASSISTANT:"
    llm = LLM(folder, device="cpu", page_size=4, num_pages=400)
    prompt = {"prompt": text, "images": pictures} if seeds else text
    assert choice["token_ids"] == llm.generate([prompt], SamplingParams(max_tokens=8))[0].token_ids


@pytest.mark.parametrize(
    "urls, words",
    [
        ([data_url(b"\x89PNG\r\n broken")], "cannot be read"),
        ([data_url(png(1)[:200])], "cannot be read"),
        (["data:image/png;base64,!!!"], "not valid base64"),
        (["http://example.org/cat.png"], "addresses are not fetched"),
        (["file:///etc/passwd"], "addresses are not fetched"),
        ([data_url(png(1, width=200, height=200))], "allowed are 20,000"),
        ([data_url(png(1))] * 3, "at most 2 pictures"),
    ],
)
def test_a_picture_that_cannot_be_used_is_a_400_that_says_why(served, urls, words):
    answer = ask(served, message(*urls))
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    served.idle()
