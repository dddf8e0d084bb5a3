"""From an engine's stream to the objects that OpenAI's clients read, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastcache.results import RequestOutput
from fastcache.serving.api_errors import ApiError
from fastcache.serving.service import EngineService, Stream
from fastcache.serving.text import Detokenizer, StopScanner

DONE = "data: [DONE]\n\n"


@dataclass
class Answer:
    """One prompt's answer while it grows. `prompt_tokens` is known from the start, the rest as it comes."""

    service: EngineService
    stream: Stream
    tokenizer: Any
    stops: list[str]
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0

    async def pieces(self) -> AsyncIterator[str]:
        """Texts, the last of them maybe empty; afterwards `finish_reason` is set. Cancels what is left to do.

        Errors: `EngineStopped`, and `ApiError` 504 for a request that took too long.
        """
        text, scanner = Detokenizer(self.tokenizer), StopScanner(self.stops)
        try:
            async for delta in self.stream:
                self.token_ids += delta.token_ids
                ready = scanner.push(text.push(delta.token_ids))
                if delta.output is not None:
                    self._ended(delta.output)
                    ready += scanner.push(text.finish())
                    ready += scanner.finish()
                if scanner.stopped:
                    self.finish_reason = "stop"
                yield ready
                if self.finish_reason is not None:
                    return
        finally:
            self.service.cancel(self.stream, "stop" if scanner.stopped else "abort")

    async def whole(self) -> str:
        return "".join([piece async for piece in self.pieces()])

    def _ended(self, output: RequestOutput) -> None:
        if output.finish_reason == "timeout":
            raise ApiError(
                504,
                f"the request took longer than allowed and was ended after {len(self.token_ids)} tokens; ask for "
                "fewer tokens, or try again when the server is less busy.",
                code="timeout",
            )
        self.finish_reason = output.finish_reason


def usage(answers: list[Answer]) -> dict[str, int]:
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(len(answer.token_ids) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


@dataclass(frozen=True)
class Shape:
    """How a completion or a chat completion is written down."""

    chat: bool
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: list[Answer], texts: list[str], with_ids: bool) -> dict[str, Any]:
        choices = []
        for index, (answer, text) in enumerate(zip(answers, texts, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            said |= {"token_ids": answer.token_ids} if with_ids else {}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": answer.finish_reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": usage(answers)}

    def first(self) -> str:
        """The event that opens a chat's stream; a completion's has none."""
        return (
            self._event([{"index": 0, "delta": {"role": "assistant", "content": ""}, **_OPEN}])
            if self.chat
            else ""
        )

    def piece(self, text: str, finish_reason: str | None) -> str:
        said = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return self._event([{"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}])

    def last(self, answer: Answer) -> str:
        return self._event([], {"usage": usage([answer])})

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return sse(self._head(kind) | {"choices": choices, **(more or {})})

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


_OPEN = {"logprobs": None, "finish_reason": None}


def sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
