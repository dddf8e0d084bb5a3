"""The models the command line knows by name, and their defaults. Imports no torch.

A name is a label plus defaults, never a location: folders come from the user. Where none is given,
`load_format="dummy"` builds seeded weights in the shapes of `preset` (see `fastcache.models.presets`).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastcache.config import require
from fastcache.errors import UnknownName


@dataclass(frozen=True)
class ModelAlias:
    """`flag` is the command-line option that carries the folder; `batch_sizes` are those of the guide."""

    name: str
    title: str
    flag: str
    preset: str
    batch_sizes: tuple[int, ...]


MODELS: dict[str, ModelAlias] = {
    alias.name: alias
    for alias in (
        ModelAlias("smollm2", "SmolLM2-135M-Instruct", "--smollm2", "smollm2-135m", (1, 4)),
        ModelAlias("qwen3-8b", "Qwen3-8B", "--qwen3-8b", "qwen3-8b", (16, 64)),
        ModelAlias("qwen3-32b", "Qwen3-32B", "--qwen3-32b", "qwen3-32b", (8, 16)),
        ModelAlias("llava-mlp", "LLaVA-1.5-7B", "--llava", "llava-1.5-7b", (1, 4)),
    )
}


def alias(name: str) -> ModelAlias:
    """The table's entry for `name`. Errors: `UnknownName` with the nearest one."""
    if name not in MODELS:
        raise UnknownName("model", name, MODELS)
    return MODELS[name]


def check_source(name: str, path: str | None, load_format: str) -> None:
    """A model needs a folder, or dummy weights in the shapes of a name the table knows."""
    if path is not None:
        return
    known = alias(name)
    require(
        load_format == "dummy",
        f"model {name!r} was named without a folder. Give its path (`{known.flag} PATH`, or `path:` in the "
        "config), or ask for seeded dummy weights in its shapes (`--load-format dummy`).",
    )


def engine_source(name: str, path: str | None) -> str:
    """What `LLM` is given as its model: the user's folder, else the preset's name."""
    return path if path is not None else alias(name).preset
