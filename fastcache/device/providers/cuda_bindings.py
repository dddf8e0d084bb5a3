"""Green contexts of our own through cuda-bindings: counts from the driver, teardown in our hands."""

from __future__ import annotations

from fastcache.device.providers import driver_split
from fastcache.device.providers.base import Pair
from fastcache.device.sms import SmSplit


class CudaBindings:
    """torch depends on cuda-bindings, so this works wherever the driver does (12.5 or newer)."""

    name = "cuda_bindings"

    def create(self, device: int, split: SmSplit) -> Pair:
        import torch

        # The green contexts are made on the primary context, which torch must have retained first.
        torch.cuda.init()
        torch.zeros(1, device=torch.device("cuda", device))
        main, compress = driver_split.create(device, split)
        streams = [
            torch.cuda.ExternalStream(s.stream, device=torch.device("cuda", device)) for s in (main, compress)
        ]
        return Pair(
            self.name,
            *streams,
            main.sms,
            compress.sms,
            "driver",
            exclusive=True,
            handles=(main, compress),
        )

    def destroy(self, pair: Pair) -> None:
        driver_split.destroy(pair.handles)


PROVIDER = CudaBindings()
