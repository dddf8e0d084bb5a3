"""When a prefill may be launched beside decode steps, while others are under way there."""

from __future__ import annotations

from fastcache.core import Step
from fastcache.engine.asides import MOST_UNDER_WAY, Asides
from fastcache.engine.stages import PREFILL, Turn


class NothingLeft:
    """No sequence ended while it was under way."""

    def abandoned(self, seq, fresh) -> bool:
        return False


def prefill(split: str | None = "100+32") -> Turn:
    return Turn(PREFILL, split=split)


def launched(asides: Asides) -> Step:
    step = Step((), decode=False, split="100+32")
    asides.launched(step)
    return step


def test_each_prefill_is_followed_by_a_step_of_the_other_side():
    """So that it has work while the host launches the next prefill."""
    asides = Asides(NothingLeft())
    assert asides.admit(prefill())
    launched(asides)
    assert not asides.admit(prefill())
    asides.step_launched()
    assert asides.admit(prefill()) and not asides.admit(prefill("64+68")) and not asides.admit(prefill(None))


def test_what_is_under_way_is_bounded_and_nothing_under_way_keeps_nobody_waiting():
    asides = Asides(NothingLeft())
    steps = []
    for _ in range(MOST_UNDER_WAY):
        assert asides.admit(prefill())
        steps.append(launched(asides))
        asides.step_launched()
    assert not asides.admit(prefill())
    asides.received(steps.pop())
    assert asides.admit(prefill())
    launched(asides)
    for step in list(asides.steps):
        asides.received(step)
    assert asides.split is None and asides.admit(prefill(None)) and asides.admit(prefill())
