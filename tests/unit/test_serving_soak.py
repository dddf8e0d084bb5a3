"""2,000 requests, many broken or abandoned: the server lives, no page leaks, and the others get their tokens."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
from collections import Counter

import httpx
import pytest
from served import serving, with_template

from fastcache import LLM, SamplingParams

REQUESTS, AT_ONCE, PROMPTS = 2_000, 24, 40
# So few pages that the scheduler also has to put requests back.
ENGINE = {
    "num_pages": 48,
    "max_num_seqs": 12,
    "policy": "dynamic",
    "compression": {"method": "knorm", "compression_factor": 2},
}
KINDS = {"whole": 9, "stream": 4, "leave": 4, "give up": 2, "too long": 2, "malformed": 2, "picture": 2}
FOREVER = {"max_tokens": 140}  # more pages than admission expects, so that others are put back
BROKEN = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n broken").decode()


def questions() -> list[dict]:
    rng = random.Random(0)
    return [
        {
            "prompt": [rng.randrange(256) for _ in range(rng.randrange(3, 40))],
            "max_tokens": rng.randrange(1, 24),
            "temperature": rng.choice([0.0, 0.8]),
            "seed": number,
        }
        for number in range(PROMPTS)
    ]


def answers(model, asked: list[dict]) -> list:
    """One at a time, on an engine that nobody else uses."""
    llm = LLM(model, device="cpu", page_size=4, **ENGINE | {"num_pages": 400})
    names = ("max_tokens", "temperature", "seed")
    return [llm.generate(q["prompt"], SamplingParams(**{n: q[n] for n in names}))[0] for q in asked]


async def one(client: httpx.AsyncClient, rng: random.Random, asked: list[dict], right: list) -> str:
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    number = rng.randrange(PROMPTS)
    body, path = asked[number], "/v1/completions"
    if kind == "whole":
        answer = (await client.post(path, json=body | {"return_token_ids": True})).json()
        assert answer["choices"][0]["token_ids"] == right[number].token_ids
        assert answer["choices"][0]["text"] == right[number].text
    elif kind == "stream":
        answer = await client.post(path, json=body | {"stream": True})
        assert answer.text.endswith("data: [DONE]\n\n")
        assert f'"finish_reason": "{right[number].finish_reason}"' in answer.text
    elif kind == "leave":
        async with client.stream("POST", path, json=body | FOREVER | {"stream": True}) as answer:
            async for _ in answer.aiter_lines():
                if rng.random() < 0.3:
                    break
    elif kind == "give up":
        with contextlib.suppress(httpx.TimeoutException):
            await client.post(path, json=body | FOREVER, timeout=rng.uniform(0.001, 0.02))
    else:
        assert (await refused(client, kind)).status_code == 400
    return kind


async def refused(client: httpx.AsyncClient, kind: str) -> httpx.Response:
    if kind == "too long":
        return await client.post("/v1/completions", json={"prompt": "x" * 1100})
    if kind == "malformed":
        return await client.post("/v1/completions", content=b'{"prompt": "x", ')
    content = [{"type": "image_url", "image_url": {"url": BROKEN}}]
    return await client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}
    )


async def flood(url: str, asked: list[dict], right: list) -> Counter:
    places, rng = asyncio.Semaphore(AT_ONCE), random.Random(1)
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def wait_and_ask(seed: int) -> str:
            async with places:
                return await one(client, random.Random(seed), asked, right)

        return Counter(await asyncio.gather(*(wait_and_ask(rng.getrandbits(32)) for _ in range(REQUESTS))))


@pytest.mark.slow
def test_two_thousand_requests_of_which_many_are_broken_or_abandoned(tiny_model, tmp_path):
    model = with_template(tiny_model("llama", 4, 2, 16, 48, 2, False), tmp_path / "m")
    asked = questions()
    right = answers(model, asked)
    with serving(model, ENGINE) as server:
        kinds = asyncio.run(flood(server.url, asked, right))
        assert kinds.total() == REQUESTS and set(kinds) == set(KINDS)
        server.idle()
        server.llm.check_books()  # the engine is idle: its thread only waits
        assert server.http.get("/health").status_code == 200
        assert server.llm.stats().preemptions > 0
