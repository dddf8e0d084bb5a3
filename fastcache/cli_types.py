"""Text from the command line as values, with messages that say what is allowed."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable

from fastcache.errors import ConfigError


def positive_int(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def count(text: str) -> int:
    if not text.strip().isdecimal():
        raise ArgumentTypeError(f"{text!r} is not 0 or a positive integer")
    return int(text)


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None


def names(flag: str, text: str) -> list[str]:
    """A comma-separated list. Errors: `ConfigError` for an empty entry, which is a slip of the finger."""
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise ConfigError(f"{flag} is {text!r}; allowed is a comma-separated list without empty entries.")
    return entries


def values(flag: str, text: str, convert: Callable[[str], float]) -> list[float]:
    """A comma-separated list of numbers. Errors: `ConfigError` naming the flag and the entry."""
    try:
        return [convert(entry) for entry in names(flag, text)]
    except ArgumentTypeError as error:
        raise ConfigError(f"{flag}: {error}.") from None
