"""torch's own GreenContext, as a cap on the compression side only.

Each GreenContext of torch 2.10 to 2.14 splits the whole device anew, so two of them take overlapping SMs: a
disjoint pair cannot be made (pytorch issue 195378). It also cannot say how many SMs it was granted.
"""

from __future__ import annotations

import inspect

from fastcache.device.providers.base import Pair, ProviderError, cause_chain, classify
from fastcache.device.sms import SmSplit


class TorchGreen:
    name = "torch_green"

    def create(self, device: int, split: SmSplit) -> Pair:
        green = _green_context()
        positional = "num_sms" in inspect.signature(green.create).parameters and not _keyword_only(
            green.create
        )
        try:
            context = (
                green.create(split.compress, device)
                if positional
                else green.create(num_sms=split.compress, device_id=device)
            )
            stream = context.Stream()
        except (RuntimeError, TypeError, ValueError) as error:
            raise ProviderError(*classify(cause_chain(error))) from error
        # The context is kept with the pair: newer torch destroys the stream together with the object.
        return Pair(
            self.name,
            None,
            stream,
            None,
            None,
            "none",
            exclusive=False,
            handles=context,
            note="a cap on the compression side only; torch cannot say how many SMs it granted",
        )

    def destroy(self, pair: Pair) -> None:
        """Nothing to do: torch owns the context and the stream."""


def _green_context() -> type:
    try:
        from torch.cuda import green_contexts
    except ImportError as error:
        raise ProviderError(
            "too_old", "this torch has no torch.cuda.green_contexts (2.10 or newer)"
        ) from error
    if not getattr(green_contexts, "SUPPORTED", True):
        raise ProviderError("too_old", "this torch was built without green contexts")
    if not hasattr(green_contexts.GreenContext, "Stream"):
        raise ProviderError("too_old", "this torch's GreenContext has no Stream() (2.11 or newer)")
    return green_contexts.GreenContext


def _keyword_only(function: object) -> bool:
    return inspect.signature(function).parameters["num_sms"].kind is inspect.Parameter.KEYWORD_ONLY


PROVIDER = TorchGreen()
