"""What a server allows. Imports no web framework and no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fastcache.config import StrictConfig, positive_int, require


@dataclass(frozen=True)
class ServerConfig(StrictConfig):
    """`model_name` is what clients call the model. Sizes are bytes and tokens, times seconds.

    `max_prompt_tokens` None leaves the limit to the engine. `api_key` None lets everybody in. `timeout_s` ends a
    request that takes longer, `shutdown_s` is how long running ones may go on once the server is told to stop.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_prompt_tokens: int | None = None
    max_body_bytes: int = 16 * 2**20
    max_image_bytes: int = 8 * 2**20
    max_images: int = 8
    default_max_tokens: int = 256
    timeout_s: float = 600.0
    shutdown_s: float = 30.0

    def __post_init__(self) -> None:
        require(bool(self.model_name), "model_name is empty; give the name that clients call the model by.")
        for name in ("max_body_bytes", "max_image_bytes", "max_images", "default_max_tokens"):
            positive_int(name, getattr(self, name))
        if self.max_prompt_tokens is not None:
            positive_int("max_prompt_tokens", self.max_prompt_tokens)
        require(0 <= self.port < 2**16, f"port is {self.port}; allowed is 0 (any free one) to 65535.")
        require(self.api_key != "", "the API key is empty; give one, or none to let everybody in.")
        for name in ("timeout_s", "shutdown_s"):
            require(
                getattr(self, name) > 0, f"{name} is {getattr(self, name)}; allowed is a positive number."
            )
