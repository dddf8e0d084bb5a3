"""The bodies of OpenAI's completion requests: what of them is understood, and what is refused by name."""

from __future__ import annotations

import difflib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastcache.config import SamplingParams
from fastcache.serving.api_errors import ApiError

# Fields that are known and not implemented, and the values that ask for nothing (None always does).
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}
IGNORED = ("user", "metadata", "store", "service_tier")  # about the caller's account, not about the answer
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False

    def sampling(self, default_max_tokens: int) -> SamplingParams:
        """OpenAI's defaults: temperature 1, nothing filtered. `top_k` -1 or 0 is off, as in vLLM."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            max_tokens=self.max_tokens or self.max_completion_tokens or default_max_tokens,
            ignore_eos=self.ignore_eos,
            seed=self.seed,
        )

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in given):
            raise ApiError(
                400,
                f"`stop` is {len(given)} strings; allowed are at most {MAX_STOPS}, each of 1 to "
                f"{MAX_STOP_CHARACTERS} characters.",
                param="stop",
            )
        return given

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(_Body):
    prompt: str | list[int] | list[str] | list[list[int]]

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt of a batch."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return self.prompt


class ChatBody(_Body):
    messages: list[dict[str, Any]]


Body = TypeVar("Body", CompletionBody, ChatBody)


def parse(kind: type[Body], raw: bytes) -> Body:
    """A request's body. Errors: `ApiError` 400 with the field, what it is, and what is allowed."""
    try:
        content = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ApiError(400, f"the request's body is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"the request's body is a JSON {type(content).__name__}; it must be an object.")
    asked = {key: value for key, value in content.items() if key not in IGNORED}
    for name, neutral in NOT_SUPPORTED.items():
        value = asked.pop(name, None)
        if not _asks_for_nothing(value, neutral):
            raise ApiError(
                400, f"`{name}` is {_short(value)}, which this server does not support; leave it out.", name
            )
    try:
        return kind.model_validate(asked)
    except ValidationError as error:
        raise _refusal(kind, error) from None


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """`False == 0` in Python, and a client that says `logprobs: 0` does ask for something."""
    return value is None or any(
        value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral
    )


def _refusal(kind: type[BaseModel], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    name = place[0] if place else "the body"
    if first["type"] == "extra_forbidden":
        known = [*kind.model_fields, *NOT_SUPPORTED, *IGNORED]
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.6)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        return ApiError(400, f"unknown field `{'.'.join(place)}`.{hint}", param=name)
    if first["type"] == "missing":
        return ApiError(400, f"the field `{name}` is missing.", param=name)
    return ApiError(400, f"`{name}` is {_short(first['input'])}: {first['msg']}.", param=name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
