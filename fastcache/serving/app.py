"""The HTTP server: OpenAI's endpoints over an `EngineService`."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fastcache.errors import UserError
from fastcache.serving.answers import DONE, Answer, Shape, sse
from fastcache.serving.api_errors import ApiError
from fastcache.serving.chat import chat_prompt
from fastcache.serving.config import ServerConfig
from fastcache.serving.metrics import CONTENT_TYPE, ServerMetrics
from fastcache.serving.protocol import ChatBody, CompletionBody, parse
from fastcache.serving.service import EngineService

MAX_PROMPTS = 64  # of one completion request
NOBODY_LISTENS = 499  # nginx's code: the client closed the connection, so no one reads this


def make_app(llm: Any, config: ServerConfig) -> FastAPI:
    """An application that owns `llm` from its start to its shutdown. Errors: `ConfigError` without a tokenizer."""
    return _Server(llm, config).app


class _Server:
    def __init__(self, llm: Any, config: ServerConfig) -> None:
        self.llm, self.config = llm, config
        self.service = EngineService(llm)
        self.metrics = ServerMetrics(self.service, config.model_name)
        self.started = int(time.time())
        self.app = app = FastAPI(title="FastCache", lifespan=self._lifespan, openapi_url=None)
        app.state.service = self.service
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.read_metrics, methods=["GET"])
        app.add_exception_handler(ApiError, self._refuse)
        app.add_exception_handler(UserError, self._refuse)
        app.add_exception_handler(HTTPException, self._refuse)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.service.start()
        yield
        await self.service.close()

    # -- endpoints ---------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> dict[str, Any]:
        self._authorise(request)
        model = {
            "id": self.config.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "fastcache",
        }
        return {"object": "list", "data": [model]}

    async def health(self) -> Response:
        failure = self.service.failure
        if failure is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unhealthy", "cause": failure}, status_code=503)

    async def read_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._body(request))
        self._check_model(body.model)
        prompts = body.prompts
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise ApiError(
                400, f"`prompt` has {len(prompts)} entries; allowed is 1 to {MAX_PROMPTS}.", "prompt"
            )
        if body.stream and len(prompts) > 1:
            raise ApiError(400, "a streamed request takes one prompt; send one request for each.", "prompt")
        encoded = [await asyncio.to_thread(self._encode, prompt) for prompt in prompts]
        return await self._answer(request, body, encoded, Shape(False, self.config.model_name))

    async def chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self._body(request))
        self._check_model(body.model)
        prompt = await asyncio.to_thread(chat_prompt, self.llm, body.messages, self.config)
        return await self._answer(request, body, [prompt], Shape(True, self.config.model_name))

    # -- a request's way ---------------------------------------------------------------------------------------

    async def _answer(self, request: Request, body: Any, prompts: list[Any], shape: Shape) -> Response:
        if body.stream and body.return_token_ids:
            raise ApiError(
                400, "`return_token_ids` is for whole answers; leave out `stream`.", "return_token_ids"
            )
        sampling, stops = body.sampling(self.config.default_max_tokens), body.stops
        answers: list[Answer] = []
        try:
            for prompt in prompts:
                self._check_length(prompt)
                stream = await self.service.submit(prompt, sampling, self.config.timeout_s)
                answers.append(
                    Answer(self.service, stream, self.llm.tokenizer, stops, prompt_tokens=_length(prompt))
                )
        except BaseException:  # all or none, whatever ends this; it is raised again
            self._cancel(answers)
            raise
        if body.stream:
            events = self._events(answers[0], shape, body.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            texts = await _unless_gone(request, asyncio.gather(*(answer.whole() for answer in answers)))
        finally:
            self._cancel(answers)
        if texts is None:
            return Response(status_code=NOBODY_LISTENS)
        return JSONResponse(shape.whole(answers, texts, body.return_token_ids))

    async def _events(self, answer: Answer, shape: Shape, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events. What goes wrong after the first is an event too: the status has been sent."""
        try:
            if shape.chat:
                yield shape.first()
            async for text in answer.pieces():
                if text or answer.finish_reason is not None:
                    yield shape.piece(text, answer.finish_reason)
            if include_usage:
                yield shape.last(answer)
        except (ApiError, UserError) as error:
            refusal = error if isinstance(error, ApiError) else ApiError.of(error)
            self.metrics.refused(refusal.status)
            yield sse(refusal.body)
        finally:
            self._cancel([answer])
        yield DONE

    def _cancel(self, answers: list[Answer]) -> None:
        for answer in answers:
            self.service.cancel(answer.stream)

    # -- checks ------------------------------------------------------------------------------------------------

    def _authorise(self, request: Request) -> None:
        if self.config.api_key is None:
            return
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.config.api_key}".encode()):
            raise ApiError(401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`.")

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than the limit. Nobody without the key gets that far."""
        self._authorise(request)
        most, body = self.config.max_body_bytes, bytearray()
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise ApiError(413, f"the request has {int(declared):,} bytes; allowed are {most:,}.")
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"the request has more than the {most:,} bytes that are allowed.")
        return bytes(body)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.config.model_name):
            raise ApiError(
                404,
                f"there is no model {name!r} here; this server has {self.config.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def _encode(self, prompt: str | list[int]) -> list[int]:
        return self.llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _check_length(self, prompt: Any) -> None:
        most = self.config.max_prompt_tokens
        if most is not None and _length(prompt) > most:
            raise ApiError(
                400,
                f"the prompt has {_length(prompt)} tokens; this server allows {most}. Shorten it.",
                code="context_length_exceeded",
            )

    async def _refuse(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # no such address, or the wrong method
            error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
        refusal = error if isinstance(error, ApiError) else ApiError.of(error)
        self.metrics.refused(refusal.status)
        return JSONResponse(refusal.body, refusal.status, refusal.headers)


def _length(prompt: Any) -> int:
    return len(prompt["prompt"] if isinstance(prompt, dict) else prompt)


async def _unless_gone(request: Request, work: asyncio.Future[Any]) -> Any:
    """The result of `work`, or None if the client hangs up first; then it is cancelled."""
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work


async def _disconnect(request: Request) -> None:
    with suppress(ClientDisconnect):
        while (await request.receive())["type"] != "http.disconnect":
            pass
