"""The server over a tiny model: what it answers, what it refuses and how, and that nothing leaks."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time

import httpx
import openai
import pytest
from served import serving, with_template

from fastcache import LLM, SamplingParams
from fastcache.errors import ConfigError

ENGINE = {"compression": {"method": "knorm", "compression_factor": 2}, "policy": "dynamic"}
LONG = {"prompt": "go on", "max_tokens": 900, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    return with_template(tiny_model("llama", 4, 2, 16, 48, 2, False), tmp_path_factory.mktemp("serve") / "m")


@pytest.fixture(scope="module")
def served(model):
    with serving(model, ENGINE, max_body_bytes=100_000, max_prompt_tokens=200) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def offline(model):
    llm = LLM(model, device="cpu", page_size=4, num_pages=400, **ENGINE)

    def texts(prompts, **sampling):
        return [output.text for output in llm.generate(prompts, SamplingParams(**sampling))]

    return texts


def test_a_completion_is_what_the_engine_says_offline(client, offline):
    prompts = ["the first of two", "and here is the second"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=12, temperature=0)
    assert [choice.text for choice in answer.choices] == offline(prompts, max_tokens=12)
    assert answer.usage.completion_tokens <= 24 and answer.usage.prompt_tokens == sum(map(len, prompts))
    assert {choice.finish_reason for choice in answer.choices} <= {"length", "stop"}


def test_token_ids_are_given_on_request(served, model):
    body = {"prompt": [9, 8, 7], "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    choice = served.post(**body).json()["choices"][0]
    llm = LLM(model, device="cpu", page_size=4, num_pages=400, **ENGINE)
    assert choice["token_ids"] == llm.generate([9, 8, 7], SamplingParams(max_tokens=5))[0].token_ids
    assert "return_token_ids" in served.refused(400, **body, stream=True)


def test_a_stream_has_the_same_text_and_ends_with_the_usage(client, offline):
    stream = client.completions.create(
        model="tiny",
        prompt="stream this",
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(stream)
    assert (
        "".join(e.choices[0].text for e in events if e.choices) == offline(["stream this"], max_tokens=20)[0]
    )
    assert len(events) > 3 and events[-1].usage.completion_tokens == 20
    assert events[-2].choices[0].finish_reason == "length"


def test_a_chat_goes_through_the_models_template(client, offline):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    expected = offline(["[system]be brief[user]hi[assistant]"], max_tokens=9)[0]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, temperature=0)
    assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=9, temperature=0, stream=True
    )
    assert "".join(event.choices[0].delta.content or "" for event in stream) == expected


def test_sampling_is_the_engines_and_follows_the_seed(client, offline):
    wanted = offline(["once"], max_tokens=8, temperature=0.9, top_p=0.8, seed=5)[0]
    for _ in range(2):
        answer = client.completions.create(
            model="tiny", prompt="once", max_tokens=8, temperature=0.9, top_p=0.8, seed=5
        )
        assert answer.choices[0].text == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_itself(served, client, offline, stream):
    whole = offline(["stop here"], max_tokens=40, ignore_eos=True)[0]
    stop = whole[10:13]
    answer = client.completions.create(
        model="tiny",
        prompt="stop here",
        max_tokens=40,
        temperature=0,
        stop=["never said", stop],
        stream=stream,
        extra_body={"ignore_eos": True},
    )
    choices = [event.choices[0] for event in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"
    served.idle()


def test_models_health_and_metrics(served, client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert served.http.get("/health").json() == {"status": "ok"}
    client.completions.create(model="tiny", prompt="count me", max_tokens=3, temperature=0)
    text = served.http.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        'vllm:request_success_total{finished_reason="length"',
        "fastcache:compressed_requests_total",
    ):
        assert name in text, name


@pytest.mark.parametrize(
    "body, words",
    [
        ({"prompt": "x" * 300}, "300 tokens"),
        ({"prompt": "x", "max_tokens": 5000}, "max_model_len is 1024"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "allowed is 1 to 64"),
        ({"prompt": [7, 99_999]}, "outside the vocabulary"),
        ({"prompt": 7}, "`prompt`"),
        ({}, "`prompt` is missing"),
        ({"prompt": "x", "temperature": -1}, "`temperature` is -1"),
        ({"prompt": "x", "top_p": 0}, "`top_p` is 0"),
        ({"prompt": "x", "max_tokens": 0}, "`max_tokens` is 0"),
        ({"prompt": "x", "n": 2}, "`n` is 2, which this server does not support"),
        ({"prompt": "x", "logprobs": 0}, "`logprobs` is 0"),
        ({"prompt": "x", "tempratur": 1}, "Did you mean `temperature`?"),
        ({"prompt": "x", "stop": [""]}, "`stop`"),
        ({"prompt": ["a", "b"], "stream": True}, "one prompt"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_says_why(served, body, words):
    assert words in served.refused(400, **body)


def test_what_asks_for_nothing_is_accepted(served):
    neutral = {
        "n": 1,
        "logprobs": None,
        "echo": False,
        "frequency_penalty": 0.0,
        "user": "me",
        "logit_bias": {},
    }
    assert served.post(prompt="x", max_tokens=1, **neutral).status_code == 200


def test_the_wrong_model_a_wrong_address_and_a_body_that_is_too_large(served):
    assert "this server has 'tiny'" in served.refused(404, prompt="x", model="huge")
    assert "Not Found" in served.refused(404, path="/v1/embeddings")
    assert "allowed are 100,000" in served.refused(413, prompt="x" * 200_000)


@pytest.mark.parametrize("raw", [b"", b"{", b'{"prompt": "x"', b"[1]", b"\xff\xfe", b"[" * 90_000])
def test_malformed_json_is_a_400(served, raw):
    answer = served.http.post("/v1/completions", content=raw)
    assert answer.status_code == 400 and "body" in answer.json()["error"]["message"]


def test_a_picture_is_refused_by_a_model_that_reads_text(served):
    url = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    content = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    said = served.refused(400, "/v1/chat/completions", messages=[{"role": "user", "content": content}])
    assert "reads text alone" in said


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_pages(served, stream):
    def ask():
        with served.http.stream(
            "POST", "/v1/completions", json=LONG | {"stream": stream}, timeout=0.3
        ) as answer:
            for _ in answer.iter_lines():
                return

    with contextlib.suppress(httpx.ReadTimeout):  # which is how a whole answer is given up
        ask()
    served.idle(seconds=5)


def test_an_api_key_is_asked_for_before_anything_else(model):
    with serving(model, api_key="sesame") as server:
        assert "API key" in server.refused(401, prompt="x")
        assert server.http.post("/v1/completions", content=b"{").status_code == 401
        right = {"Authorization": "Bearer sesame"}
        body = {"prompt": "x", "max_tokens": 1}
        assert server.http.post("/v1/completions", json=body, headers=right).status_code == 200
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.get("/health").status_code == 200


def test_a_full_queue_is_a_429_and_a_slow_request_a_504(model):
    with serving(model, {"max_num_seqs": 1, "max_waiting": 1}, timeout_s=1.5) as server:
        statuses = []

        def ask():
            statuses.append(server.post(**LONG).status_code)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses.count(429) >= 3 and set(statuses) <= {200, 429, 504}
        server.idle()
        assert (
            'fastcache:refused_requests_total{model_name="tiny",status="429"}'
            in server.http.get("/metrics").text
        )


def test_a_request_that_takes_too_long_is_ended_and_a_stream_says_so(model):
    with serving(model, timeout_s=0.05) as server:
        assert "took longer than allowed" in server.refused(504, **LONG)
        lines = server.post(**LONG, stream=True).text.strip().split("\n\n")
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        server.idle()


def test_an_engine_error_fails_its_requests_with_the_cause_and_marks_the_health(model):
    with serving(model) as server:
        step, steps = server.llm.step, iter(range(3))

        def broken():
            if next(steps, None) is None:
                raise RuntimeError("the device fell off")
            return step()

        server.llm.step = broken
        assert "RuntimeError: the device fell off" in server.refused(503, **LONG)
        health = server.http.get("/health")
        assert health.status_code == 503 and "the device fell off" in health.json()["cause"]
        assert "the device fell off" in server.refused(503, prompt="x")


def test_a_shutdown_ends_what_runs_and_closes_the_engine(model):
    with serving(model) as server:

        def ask():
            with contextlib.suppress(httpx.HTTPError):  # it is cut off, or answered with the reason
                server.post(**LONG)

        stream = threading.Thread(target=ask)
        stream.start()
        while not server.service.load.running:
            time.sleep(0.01)
    stream.join(10)
    assert not stream.is_alive() and server.service.failure == "it was shut down"


def test_a_folder_without_a_tokenizer_cannot_be_served(tiny_model, tmp_path):
    folder = with_template(tiny_model("llama", 4, 2, 16, 48, 2, False), tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="needs the model's tokenizer"), serving(folder):
        pass
