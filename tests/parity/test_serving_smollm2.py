"""`fastcache serve` as users run it: a process with SmolLM2, driven by OpenAI's client and by a load generator."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from fastcache import LLM, SamplingParams

NAME = "SmolLM2-135M-Instruct"
COMPRESSION = ["--method", "snapkv", "--compression-factor", "2"]
QUESTION = [{"role": "user", "content": "Name three colours of the rainbow, and nothing else."}]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(smollm2) -> Iterator[str]:
    command = [sys.executable, "-m", "fastcache.cli", "serve", "--model", str(smollm2), "--port", "0"]
    command += [*COMPRESSION, "--max-model-len", "512", "--max-num-seqs", "8", "--served-model-name", NAME]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"FASTCACHE_API_KEY": "k"}
    )
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"running on (http://[\d.]+:\d+)", line):
                yield found[1]
                break
        else:
            pytest.fail("".join(said))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert "Application shutdown complete" in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()


def test_the_client_gets_what_the_engine_says_offline(url, smollm2):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    llm = LLM(
        smollm2,
        device="cpu",
        max_model_len=512,
        max_num_seqs=8,
        policy="dynamic",
        compression={"method": "snapkv", "compression_factor": 2},
    )
    text = llm.tokenizer.apply_chat_template(QUESTION)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    expected = llm.generate(ids, SamplingParams(max_tokens=16))[0]
    llm.close()
    asked = {"model": NAME, "messages": QUESTION, "max_tokens": 16, "temperature": 0}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == expected.text and answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].finish_reason == expected.finish_reason
    stream = client.chat.completions.create(**asked, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in stream) == expected.text
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="max_model_len is 512"):
        client.completions.create(model=NAME, prompt="x", max_tokens=600)


def test_a_load_generator_from_pypi_can_drive_it(url, smollm2, tmp_path):
    report = tmp_path / "load.json"
    command = [str(Path(sys.executable).with_name("guidellm")), "benchmark", "--target", url, "--model", NAME]
    command += [
        "--processor",
        str(smollm2),
        "--data",
        "prompt_tokens=48,output_tokens=6",
        "--rate-type",
        "constant",
    ]
    command += ["--rate", "2", "--max-requests", "6", "--output-path", str(report), "--disable-progress"]
    offline = {"HF_HUB_OFFLINE": "1", "GUIDELLM__OPENAI__API_KEY": "k"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    [benchmark] = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    done = benchmark["requests"]["successful"]
    assert len(done) == 6 and not benchmark["requests"]["errored"]
    assert all(request["output_tokens"] == 6 for request in done)
    assert benchmark["metrics"]["time_to_first_token_ms"]["successful"]["median"] > 0
