"""The config is judged here, before any job: its cells, or one sentence for what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from fastcache.bench.matrix import MATRIX_KEYS, Expansion, expand
from fastcache.bench.serving.cells import expand_serving
from fastcache.config import check_kv_dtype
from fastcache.errors import ConfigError, UnknownName

WORKFLOW_KEYS = ("quality", "serving", "expected_failures", "report", "recorded")


def check_config(config: Mapping[str, Any], schema_path: Path) -> Expansion:
    """The cells of a config that is valid by schema and by meaning.

    Errors: `UnknownName` for a key or a name that does not exist, with its nearest neighbour; `ConfigError`
    for any other value, with where it stands and what is allowed.
    """
    schema = yaml.safe_load(schema_path.read_text(encoding="utf-8"))
    assert set(schema["properties"]) == {*MATRIX_KEYS, *WORKFLOW_KEYS}
    checker = jsonschema.Draft202012Validator(schema)
    errors = sorted(checker.iter_errors(config), key=lambda e: (_is_about_a_name(e), len(e.absolute_path)))
    if errors:
        raise _as_user_error(_deepest(errors[-1]))
    if expand_serving(config) and "workloads" not in config:
        return Expansion([], [])  # a config may have open-loop load alone
    return expand(config, other_keys=WORKFLOW_KEYS)


def _is_about_a_name(error: jsonschema.ValidationError) -> bool:
    """A misspelt key also makes its right spelling missing; the misspelling is the thing to say."""
    return error.validator == "additionalProperties"


def _deepest(error: jsonschema.ValidationError) -> jsonschema.ValidationError:
    return jsonschema.exceptions.best_match([error]) or error


def _as_user_error(error: jsonschema.ValidationError) -> ValueError:
    where = _dotted(error.absolute_path)
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        unknown = next(key for key in error.instance if key not in known)
        return UnknownName(f"config key of {where}" if where else "config key", unknown, known)
    if error.validator == "enum":
        if where.endswith("kv_dtype"):
            check_kv_dtype(error.instance)  # it has more to say about some values than that they do not exist
        return UnknownName(f"value of {where}", error.instance, error.validator_value)
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        return ConfigError(f"config: {where or 'the config'} needs the key `{missing}`.")
    about = error.schema.get("description")
    return ConfigError(
        f"config: {where} is {error.instance!r}: {error.message}." + (f" {about}" if about else "")
    )


def _dotted(path: Iterator[str | int]) -> str:
    return ".".join(str(part) for part in path)
