"""Whether the installed sgl_kernel needs a shim beside this torch, from symbol tables alone: nothing is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from fastcache.device import sgl_install
from fastcache.device.shim_symbols import Forward, matching_wheel, resolve, tag_map

FORWARDERS = Path(__file__).parent / "csrc" / "forwarders.h"


@dataclass(frozen=True)
class TorchFacts:
    """What the shim needs to know of the installed torch."""

    version: str
    cuda: str | None
    libraries: Path
    tags: Mapping[str, int]

    @property
    def cuda_major(self) -> int | None:
        return int(self.cuda.split(".")[0]) if self.cuda else None


@dataclass(frozen=True)
class ShimPlan:
    """`status`: not needed | needed | refused, and the evidence for it.

    `forwards` covers spatial_ops, plus the rest of the package where that can be forwarded as a whole.
    """

    status: str
    reason: str
    sgl_version: str | None = None
    torch_version: str | None = None
    libraries: tuple[sgl_install.LibraryFacts, ...] = ()
    forwards: tuple[Forward, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """16 hex digits over everything the compiled shim depends on."""
        parts = [self.sgl_version, self.torch_version, *(library.sha256 for library in self.libraries)]
        return hashlib.sha256("\0".join([*map(str, parts), self.source()]).encode()).hexdigest()[:16]

    def source(self) -> str:
        """The C++ of the shim, self-contained."""
        tags = "{" + ", ".join(map(str, self.tags)) + "}"
        lines = [f"#define FASTCACHE_TAG_MAP std::vector<int>{tags}", FORWARDERS.read_text()]
        lines += [forward.cpp(number) for number, forward in enumerate(self.forwards)]
        return "\n".join(lines) + "\n"

    def evidence(self) -> dict:
        """JSON-ready record of what was compared and what came out."""
        return {
            "status": self.status,
            "reason": self.reason,
            "sgl_kernel": self.sgl_version,
            "torch": self.torch_version,
            "libraries": [
                {
                    "name": library.path.name,
                    "sha256": library.sha256,
                    "cuda_major": library.cuda_major,
                    "missing": list(library.missing),
                }
                for library in self.libraries
            ],
            "forwarded": {forward.missing: forward.target for forward in self.forwards},
            "refused": dict(self.refused),
        }


@lru_cache(maxsize=1)
def torch_facts() -> TorchFacts:
    """Facts of the torch of this process."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    tags = {name: int(tag) for name, tag in torch.Tag.__members__.items()}
    return TorchFacts(torch.__version__, torch.version.cuda, folder, tags)


def plan(
    install: sgl_install.SglInstall | None,
    torch: TorchFacts,
    exported: Collection[str] | None = None,
    capability: tuple[int, int] | None = None,
) -> ShimPlan:
    """Compare the wheel with this torch (undefined minus exported) and decide. Reads files only."""
    if torch.cuda is None:
        return ShimPlan(
            "not needed", f"torch {torch.version} is a CPU build: sgl_kernel cannot load beside it"
        )
    if install is None:
        return ShimPlan("not needed", "sgl_kernel is not installed")
    if install.spatial is None:
        return ShimPlan("not needed", f"{install.folder} has no spatial_ops library", install.version)
    exported = sgl_install.torch_exports(torch.libraries) if exported is None else exported
    common = install.common(capability)
    paths = [install.spatial, *([common] if common else [])]
    libraries = tuple(sgl_install.inspect(path, exported) for path in paths)
    needs = libraries[0].cuda_major
    pair = f"sgl_kernel {install.version} on torch {torch.version}"
    if needs is not None and needs != torch.cuda_major:
        reason = f"{pair}: the wheel needs CUDA {needs}, this torch has {torch.cuda}. {advice(torch.version)}"
        return ShimPlan("refused", reason, install.version, torch.version, libraries)
    return _decide(pair, install.version, torch, libraries, exported)


def _decide(
    pair: str,
    sgl_version: str,
    torch: TorchFacts,
    libraries: tuple[sgl_install.LibraryFacts, ...],
    exported: Collection[str],
) -> ShimPlan:
    everything = {name for library in libraries for name in library.missing}
    forwards, refused = resolve(everything, exported)
    facts = (sgl_version, torch.version, libraries)
    if refused:
        # The rest of the package cannot be had whole; the green-context op alone is what counts.
        forwards, fatal = resolve(libraries[0].missing, exported)
        if fatal:
            reason = f"{pair}: {len(fatal)} symbols cannot be forwarded: {'; '.join(fatal.values())}"
            return ShimPlan("refused", f"{reason}. {advice(torch.version)}", *facts, tuple(forwards), fatal)
    if not forwards:
        return ShimPlan("not needed", f"{pair}: spatial_ops misses no symbol", *facts, (), refused)
    tags = tuple(tag_map(sgl_version, torch.tags))
    reason = f"{pair}: {len(forwards)} missing symbols can be forwarded"
    return ShimPlan("needed", reason, *facts, tuple(forwards), refused, tags)


def advice(torch_version: str) -> str:
    """What to install so that no shim is needed."""
    wheel = matching_wheel(torch_version)
    if wheel is None:
        return "No sgl_kernel release matches this torch; uninstall it and green contexts come from cuda-bindings."
    return f"Install the matching one: pip install --no-deps '{wheel}'."
