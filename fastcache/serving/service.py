"""A thread that owns an engine: requests in from an event loop, tokens back to it as they arrive.

Only the thread touches the engine. Everything else leaves a command in its inbox, which is emptied between two
steps, so a cancelled request's pages are free before the next step is planned.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from fastcache.config import SamplingParams
from fastcache.errors import EngineStopped, UserError
from fastcache.results import RequestOutput
from fastcache.stats import EngineLoad, EngineStats

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delta:
    """Tokens of one request that a step delivered; `output` comes with the last of them."""

    token_ids: list[int]
    output: RequestOutput | None = None


class Stream:
    """One request's tokens, as they come. Made by `EngineService.submit`; belongs to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id: str | None = None  # known to the engine's thread from its acceptance to its end
        self.cancelled = False
        self.ended = False  # its last delta or error has been taken
        self.accepted: asyncio.Future[None] = loop.create_future()
        self._arrived: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    def put(self, item: Delta | Exception) -> None:
        """Called on the event loop. An error before acceptance is the submission's, later the stream's."""
        if self.accepted.done():
            self._arrived.put_nowait(item)
        elif isinstance(item, Exception):
            self.accepted.set_exception(item)
        else:
            self.accepted.set_result(None)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas until the last. Errors: `EngineStopped` if the engine ends first."""
        while True:
            item = await self._arrived.get()
            self.ended = isinstance(item, Exception) or item.output is not None
            if isinstance(item, Exception):
                raise item
            yield item
            if self.ended:
                return


ACCEPTED = Delta([])


class EngineService:
    """Requests for `llm` from an event loop. The thread starts with `start` and ends with `close` or an error.

    `failure` says why the engine ended (None while it lives). `load` and `stats` are those after the last step.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.failure: str | None = None
        self.load: EngineLoad = llm.load()
        self.stats: EngineStats = llm.stats()
        self.on_finish: Callable[[RequestOutput], None] = lambda output: None
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._lock = threading.Lock()  # between the last look at the inbox and the thread's end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="fastcache-engine", daemon=True)

    # -- on the event loop -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Call on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self.llm.on_tokens = partial(self._publish, [])
        self._thread.start()

    async def submit(self, prompt: Any, params: SamplingParams, timeout_s: float | None = None) -> Stream:
        """A request that the engine has accepted. `prompt` is what `LLM.add_request` takes.

        Errors: those of `LLM.add_request` (`PromptTooLong`, `QueueFull`, ...), and `EngineStopped`.
        """
        stream = Stream(asyncio.get_running_loop())
        self._send(partial(self._add, stream, prompt, params, timeout_s))
        try:
            await stream.accepted
        except asyncio.CancelledError:
            self.cancel(stream)
            raise
        return stream

    def cancel(self, stream: Stream, reason: str = "abort") -> None:
        """End a request; harmless after its end. Its pages are free before the next step.

        `reason` is the finish reason that `on_finish` sees: the user went away, or has all that was wanted.
        """
        if stream.ended:
            return
        try:
            self._send(partial(self._cancel, stream, reason))
        except EngineStopped:
            log.debug("cancelled after the engine's end, which freed everything")

    async def close(self) -> None:
        """Cancel what is left, end the thread and give the engine's memory back."""
        with self._lock:
            self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _send(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self.failure is not None:
                raise EngineStopped(f"the engine is not running: {self.failure}. Start the server again.")
            self._inbox.put(command)

    # -- in the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        reason = "it was shut down"
        try:
            while self._obey():
                if self.llm.has_unfinished():
                    self._publish(self.llm.step())
                self.load, self.stats = self.llm.load(), self.llm.stats()
        except Exception as error:  # whatever ends the engine must reach everybody who waits for it
            log.exception("the engine failed")
            reason = f"{type(error).__name__}: {error}"
        self._end(reason)

    def _obey(self) -> bool:
        """Carry out the commands that have come, or wait for one if there is nothing to compute. False: stop."""
        idle = not self.llm.has_unfinished()
        try:
            while (command := self._inbox.get(block=idle)) is not None:
                command()
                idle = False
        except Empty:
            return True
        return False

    def _add(self, stream: Stream, prompt: Any, params: SamplingParams, timeout_s: float | None) -> None:
        if stream.cancelled:
            return
        try:
            request_id = self.llm.add_request(prompt, params, timeout_s=timeout_s)
        except UserError as error:
            self._hand_over([(stream, error)])
            return
        stream.request_id = request_id
        self._streams[request_id] = stream
        self._hand_over([(stream, ACCEPTED)])

    def _cancel(self, stream: Stream, reason: str) -> None:
        stream.cancelled = True
        if stream.request_id is not None and self._streams.pop(stream.request_id, None) is not None:
            output = self.llm.cancel(stream.request_id)
            self._hand_over([], [dataclasses.replace(output, finish_reason=reason)])

    def _publish(self, finished: list[RequestOutput]) -> None:
        """What has come since the last time, which may be in the midst of a step; requests end behind it."""
        ended = {output.request_id: output for output in finished}
        (new, self.llm.new_tokens), items = (self.llm.new_tokens, {}), []
        for request_id in dict.fromkeys((*new, *ended)):
            output = ended.get(request_id)
            stream = self._streams[request_id] if output is None else self._streams.pop(request_id)
            items.append((stream, Delta(new.get(request_id, []), output)))
        self._hand_over(items, finished)

    def _hand_over(self, items: list[tuple[Stream, Any]], finished: list[RequestOutput] = ()) -> None:
        """One wake-up of the event loop for all that came at once."""
        if items or finished:
            self._loop.call_soon_threadsafe(self._receive, items, finished)

    def _receive(self, items: list[tuple[Stream, Any]], finished: list[RequestOutput]) -> None:
        for output in finished:
            self.on_finish(output)
        for stream, item in items:
            if not stream.accepted.cancelled():
                stream.put(item)

    def _end(self, reason: str) -> None:
        with self._lock:
            self.failure = reason
        error = EngineStopped(f"the engine ended before the request did: {reason}.")
        self._hand_over([(stream, error) for stream in self._streams.values()])
        self._streams.clear()
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, partial) and command.func == self._add:
                self._hand_over([(command.args[0], error)])
        self.load = EngineLoad(0, 0, 0, self.load.num_pages)
        self.llm.close()
