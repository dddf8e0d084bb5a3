"""A conversation, as clients send it, into a prompt: its text by the model's chat template, its pictures as bytes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from fastcache.serving.api_errors import ApiError
from fastcache.serving.config import ServerConfig

DATA_URL = "data:"


def chat_prompt(llm: Any, messages: Sequence[Mapping[str, Any]], limits: ServerConfig) -> Any:
    """What `LLM.add_request` takes. Errors: `ApiError` for messages, `UserError` of the chat template.

    A template for text alone wants each content as one text; one that places pictures wants a list of parts.
    """
    if not messages:
        raise ApiError(400, "`messages` is empty; give at least one message.", param="messages")
    sees = llm.model_config.vision is not None
    pictures: list[bytes] = []
    turns = [_turn(message, number, sees, pictures, limits) for number, message in enumerate(messages)]
    text = llm.tokenizer.apply_chat_template(turns)
    begun = not sees or text.startswith(llm.tokenizer.special_tokens.get("bos_token", "\0"))
    ids = llm.tokenizer.encode(text, add_special_tokens=not begun)
    return {"prompt": ids, "images": pictures} if pictures else ids


def _turn(
    message: Mapping[str, Any], number: int, sees: bool, pictures: list[bytes], limits: ServerConfig
) -> dict[str, Any]:
    where = f"messages[{number}]"
    content = message.get("content")
    if not isinstance(message.get("role"), str) or not isinstance(content, str | list):
        raise ApiError(
            400, f"`{where}` needs a `role` and a `content`, a text or a list of parts.", param="messages"
        )
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    read = [_part(part, f"{where}.content[{i}]", sees, pictures, limits) for i, part in enumerate(parts)]
    if sees:
        return {"role": message["role"], "content": read}
    return {"role": message["role"], "content": "\n".join(part["text"] for part in read)}


def _part(part: Any, where: str, sees: bool, pictures: list[bytes], limits: ServerConfig) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind != "image_url":
        raise ApiError(400, f"`{where}` must be a `text` or an `image_url` part.", param="messages")
    if not sees:
        raise ApiError(
            400, f"`{where}` is a picture, and this model reads text alone; leave it out.", param="messages"
        )
    if len(pictures) == limits.max_images:
        raise ApiError(400, f"`{where}`: at most {limits.max_images} pictures are allowed.", param="messages")
    url = part.get("image_url")
    pictures.append(_picture(url.get("url") if isinstance(url, Mapping) else url, where, limits))
    return {"type": "image"}


def _picture(url: Any, where: str, limits: ServerConfig) -> bytes:
    """The bytes in a data URL; nothing is ever fetched. Whether they are a picture is the engine's to find out."""
    head, _, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (head.startswith(DATA_URL) and head.endswith(";base64")):
        raise ApiError(
            400,
            f"`{where}` must be a data URL, `data:image/png;base64,...`; addresses are not fetched.",
            param="messages",
        )
    if len(data) * 3 // 4 > limits.max_image_bytes:
        raise ApiError(
            400,
            f"`{where}` has {len(data) * 3 // 4:,} bytes; allowed are {limits.max_image_bytes:,}.",
            param="messages",
        )
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ApiError(400, f"`{where}` is not valid base64: {error}.", param="messages") from None
