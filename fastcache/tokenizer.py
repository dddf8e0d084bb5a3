"""Text to token ids and back, from the files of a Hugging Face folder, without torch or transformers.

`tokenizer.json` is the whole tokenizer; the chat template and the names of the special tokens come from the
JSON files beside it. Everything a template can do runs in jinja2's sandbox, because it came with a download.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastcache.errors import ModelFolderError, UserError

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """The tokenizer of one model folder; its ids are those of transformers' AutoTokenizer."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
        source: str = "the tokenizer",
    ) -> None:
        # A stored padding or truncation would silently change lengths; the engine decides about both.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.eos_token_ids = set(eos_token_ids)
        self.chat_template = chat_template
        self._source = source

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json` and the files beside it.

        Errors: `ModelFolderError` for a folder without `tokenizer.json`, or with a file that cannot be read.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelFolderError(
                f"{folder} has no tokenizer.json. Allowed is a Hugging Face folder that has one "
                "(transformers writes it for a folder with only tokenizer.model or vocab.json: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)), or prompts of token ids."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more specific for a malformed file
            raise ModelFolderError(
                f"{file} cannot be read as a tokenizer ({error}). Copy the folder again."
            ) from error
        config = _read_json(folder / "tokenizer_config.json")
        names = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
        eos = read_eos_token_ids(folder)
        if not eos and (index := backend.token_to_id(names.get("eos_token", ""))) is not None:
            eos = {index}
        return cls(backend, names, eos, _chat_template(folder, config), str(folder))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. `add_special_tokens` puts in what the folder's post-processor prescribes, if any."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token (a padded embedding has some) give nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of a conversation; encode it with `add_special_tokens=False`.

        `messages` are `{"role": ..., "content": ...}`; `variables` reach the template, for instance
        `enable_thinking=False`. Errors: `ModelFolderError` if the folder has no template or a malformed one,
        `UserError` if the template refuses the messages.
        """
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise UserError(
                    f"a chat message is {message!r}; allowed are mappings with the keys 'role' and 'content'."
                )
        known = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **known
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(f"the chat template of {self._source} refused the messages: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included; a model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def _template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise ModelFolderError(
                f"{self._source} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json). Give the prompt as plain text instead."
            )
        # The options, filters and functions are those that templates are written for (Hugging Face's).
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise ModelFolderError(f"the chat template of {self._source} is malformed: {error}") from error


def load_tokenizer(path: str | Path, required: bool) -> Tokenizer | None:
    """The tokenizer of a folder, or None where there is none and `required` is false.

    Dummy weights need no tokenizer as long as prompts are token ids. A tokenizer that is there but cannot be
    read is an error either way.
    """
    if not required and not (Path(path) / "tokenizer.json").exists():
        return None
    return Tokenizer.from_folder(path)


def read_eos_token_ids(folder: str | Path) -> set[int]:
    """The ids that end a generation: those of `generation_config.json`, else of `config.json`, else none.

    The first file that names any decides alone, as in transformers' `generate`.
    """
    for name in ("generation_config.json", "config.json"):
        given = _read_json(Path(folder) / name).get("eos_token_id")
        if given is not None:
            return set(given) if isinstance(given, list) else {given}
    return set()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON or malformed UTF-8
        raise ModelFolderError(f"{path} is not valid JSON ({error}). Copy the folder again.") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds no JSON object. Copy the folder again.")
    return content


def _special_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text, from the first that has it; a token is written as text or as an object with `content`."""
    found = {}
    for name in SPECIAL_NAMES:
        token = next((config[name] for config in configs if config.get(name)), None)
        text = token.get("content") if isinstance(token, Mapping) else token
        if text is not None:
            found[name] = text
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own wins over the configuration's key, which may be a list of named templates."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
