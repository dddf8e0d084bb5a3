"""A server in a thread of the test's own process, on a free port, and plain HTTP to talk to it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from fastcache import LLM
from fastcache.serving.config import ServerConfig
from fastcache.serving.run import make_server

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def with_template(folder: Path, target: Path) -> Path:
    """A copy of a tiny model that has a chat template."""
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return target


class Served:
    """`url` of a running server, its engine, and what the server knows about it."""

    def __init__(self, llm: Any, **config: Any) -> None:
        self.llm = llm
        self.server = make_server(llm, ServerConfig(model_name="tiny", port=0, shutdown_s=1, **config))
        self.service = self.server.config.app.state.service
        self._thread = threading.Thread(target=self.server.run)

    def start(self) -> None:
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        self.http.close()
        assert not self._thread.is_alive()

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def refused(self, status: int, path: str = "/v1/completions", **body: Any) -> str:
        """The message of a request that must be answered with `status`."""
        answer = self.post(path, **body)
        assert answer.status_code == status, answer.text
        return answer.json()["error"]["message"]

    def idle(self, seconds: float = 20) -> None:
        """Wait until the engine owns no page for anybody."""
        end = time.monotonic() + seconds
        while self.service.load.running or self.service.load.waiting or self.service.load.pages_used:
            assert time.monotonic() < end, f"still busy: {self.service.load}"
            time.sleep(0.01)


@contextmanager
def serving(model: Path, engine: dict[str, Any] | None = None, **config: Any) -> Iterator[Served]:
    options = {"device": "cpu", "page_size": 4, "num_pages": 400, "max_num_seqs": 16}
    served = Served(LLM(model, **options | (engine or {})), **config)
    served.start()
    try:
        yield served
    finally:
        served.stop()
