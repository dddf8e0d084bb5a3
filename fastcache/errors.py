"""One class per failure a user can meet, and the sentence each of them speaks.

Every class here derives from `UserError`: the command line prints its message and exits 2, without a
traceback. A message says what was given, what is allowed and what to do. Broken invariants of our own are
`assert`, never one of these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be honoured. The message is the whole explanation."""


class ConfigError(UserError):
    """A configuration value is out of range, of the wrong type, or contradicts another one."""


class UnknownName(UserError):
    """A name (model, variant, workload, method, key, ...) that does not exist."""

    def __init__(self, kind: str, given: object, allowed: Iterable[str]) -> None:
        names = sorted(str(name) for name in allowed)
        near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {given!r}.{hint} Allowed: {', '.join(names)}.")
        self.kind, self.given, self.allowed, self.nearest = kind, given, names, near[0] if near else None


class ModelFolderError(UserError):
    """A model folder is missing, has no weights, or holds a file that cannot be read."""


class UnsupportedArchitecture(UserError):
    """The folder is fine but no model file of ours implements its architecture."""


class PromptTooLong(UserError):
    """A prompt plus its requested output exceeds what the engine was configured for."""


class ImageError(UserError):
    """A picture cannot be read, is too large, or has no place in its prompt."""


class UnsupportedCombination(UserError):
    """Each part is valid, but this device, backend or method cannot do them together."""


class DatasetError(UserError):
    """A data file is missing, unreadable, or yields nothing usable."""


class OutputPathError(UserError):
    """A result cannot be written where the user asked for it."""


class ResultFileError(UserError):
    """An existing result file cannot be parsed, so it is neither resumed nor overwritten."""


class OutOfPages(UserError):
    """The KV pool cannot hold even one of the sequences it was asked to serve."""


class DeviceOutOfMemory(UserError):
    """The device has too little memory; the message names what would fit."""


class QueueFull(UserError):
    """The engine has as many requests waiting as it was configured to hold; try again later."""


class CheckpointError(UserError):
    """A compressor's checkpoint is missing, unreadable, or made for another model or factor."""


class EngineStopped(UserError):
    """The engine behind a service has ended, by an error or by a shutdown; it takes no more requests."""
