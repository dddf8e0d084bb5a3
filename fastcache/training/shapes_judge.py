"""How often the shapes model is right about albums it never saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastcache.training.shapes_data import batch, by_kind, right

if TYPE_CHECKING:
    from fastcache.training.shapes_trainer import ShapesTrainer

HELD_OUT_ALBUMS, AT_ONCE, ASKED = 100, 10, 6  # albums for each number of pictures, questions about each


@torch.no_grad()
def accuracy(trainer: ShapesTrainer) -> dict[str, Any]:
    """Share of right answers about held-out albums, by number of pictures and kind of question, in float32."""
    trainer.model.eval().float()
    found: dict[str, Any] = {}
    for pictures in range(1, trainer.config.most_pictures + 1):
        outcomes: dict[str, list[bool]] = {}
        for start in range(0, HELD_OUT_ALBUMS, AT_ONCE):
            made = batch("heldout", f"judge/{start}", AT_ONCE, pictures, ASKED, trainer.side)
            made = made.to(trainer.device)
            for kind, values in by_kind(right(trainer.answers(made), made.targets), made.asked).items():
                outcomes.setdefault(kind, []).extend(values)
        everything = [value for values in outcomes.values() for value in values]
        shares = {kind: sum(values) / len(values) for kind, values in sorted(outcomes.items())}
        found[str(pictures)] = {
            "questions": len(everything),
            "all": sum(everything) / len(everything),
        } | shares
    return found
