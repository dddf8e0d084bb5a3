"""sgl_kernel's green-context operator, reached in three ways: the package, its one library, that plus a shim.

The operator lives alone in `spatial_ops`; the package's `__init__` loads far more first (`common_ops`), which is
where nearly all ABI trouble is. All three call the operator itself, because the package's Python wrapper drops
the granted counts. The operator never destroys its contexts, so its pairs live as long as the process unless
the driver is asked for the context behind each stream (see `destroy`).
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable

from fastcache.device import sgl_install, shim, trial
from fastcache.device.providers.base import Pair, ProviderError, cause_chain, classify
from fastcache.device.shim_plan import ShimPlan, plan, torch_facts
from fastcache.device.sms import SmSplit
from fastcache.errors import UserError


class SglProvider:
    """One of the three ways; `load` must register the operator or raise ProviderError."""

    def __init__(self, name: str, load: Callable[[], None]) -> None:
        self.name = name
        self._load = load
        self._loaded = False
        self._refused: tuple[str, str] | None = (
            None  # kind and cause; the error itself would keep its callers' frames
        )

    def create(self, device: int, split: SmSplit) -> Pair:
        """The operator's pair. It gives an aligned group first and the remainder second."""
        self._load_once()
        import torch

        torch.cuda.init()
        group, rest = ("main", "compress") if split.group == "main" else ("compress", "main")
        counts = {"main": split.main, "compress": split.compress}
        call = getattr(torch.ops.sgl_kernel, trial.OPERATOR)
        try:
            result = [int(value) for value in call(counts[group], counts[rest], device)]
        except RuntimeError as error:
            raise ProviderError(*classify(cause_chain(error))) from error
        streams = {
            side: torch.cuda.ExternalStream(result[i], device=torch.device("cuda", device))
            for i, side in enumerate((group, rest))
        }
        granted = dict(zip((group, rest), result[2:4], strict=False))
        return Pair(
            self.name,
            streams["main"],
            streams["compress"],
            granted.get("main"),
            granted.get("compress"),
            "op" if granted else "none",
            exclusive=True,
            handles=tuple(result[:2]),
        )

    def _load_once(self) -> None:
        """Load on the first call; later calls repeat its outcome, so every split of a process records the same."""
        if not self._loaded and self._refused is None:
            try:
                if not operator_registered():
                    self._load()
                self._loaded = True
            except ProviderError as error:
                self._refused = error.kind, str(error)
        if self._refused is not None:
            raise ProviderError(*self._refused)

    def destroy(self, pair: Pair) -> None:
        """Stream first, then the context that the driver names for it. Needs cuda-bindings; else nothing."""
        from fastcache.device.providers import driver_split

        if driver_split.importable() is None:
            driver_split.destroy_by_stream(pair.handles)


def operator_registered() -> bool:
    """Whether this process already has the operator; loading it from a second path would end the process."""
    import torch

    return hasattr(torch.ops.sgl_kernel, trial.OPERATOR)


def _installed() -> sgl_install.SglInstall:
    install = sgl_install.find()
    if install is None:
        raise ProviderError("not_installed", "sgl_kernel is not installed")
    if install.spatial is None:
        raise ProviderError("incomplete_install", f"{install.folder} has no spatial_ops library")
    return install


def _planned(install: sgl_install.SglInstall) -> ShimPlan:
    import torch

    facts = torch_facts()
    exported = sgl_install.torch_exports(facts.libraries) | sgl_install.preloaded_exports()
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return plan(install, facts, exported, capability)


def load_package() -> None:
    """`import sgl_kernel`, after its symbols were checked and a trial import survived in a child process."""
    install = _installed()
    if not install.complete:
        raise ProviderError(
            "incomplete_install", f"{install.folder} holds the green-context op only, no package"
        )
    _refuse(_planned(install), whole_package=True)
    libraries = [path for path in (install.spatial, install.common(_capability())) if path]
    if cause := trial.load_package(install.folder, libraries):
        raise ProviderError(*_trial_failure(cause))
    try:
        importlib.import_module("sgl_kernel")
        spatial = importlib.import_module("sgl_kernel.spatial")
    # An extension module's import can raise anything its authors chose; the attempt is recorded and the next
    # provider is tried, so nothing is hidden.
    except Exception as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sgl_kernel"]:
            del sys.modules[name]
        raise ProviderError(*classify(cause_chain(error))) from error
    if (hidden := getattr(spatial, "_spatial_import_error", None)) is not None:
        raise ProviderError(*classify(cause_chain(hidden)))


def load_spatial() -> None:
    """Load `spatial_ops` alone, without the package's `__init__`."""
    install = _installed()
    _refuse(_planned(install))
    _load(install)


def load_shimmed() -> None:
    """Load the shim (built now if it is not cached), then `spatial_ops`."""
    install = _installed()
    shim_plan = _planned(install)
    if shim_plan.status == "not needed":
        raise ProviderError("shim_not_needed", f"no shim: {shim_plan.reason}")
    if shim_plan.status == "refused":
        raise ProviderError(_refusal_kind(shim_plan), shim_plan.reason)
    try:
        library = shim.build(shim_plan)
    except UserError as error:
        raise ProviderError("shim_build", str(error)) from error
    if cause := trial.load_spatial(install.spatial, library):
        raise ProviderError(*_trial_failure(cause))
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _load(install, tried=True)


def _load(install: sgl_install.SglInstall, tried: bool = False) -> None:
    import torch

    if not tried and (cause := trial.load_spatial(install.spatial)):
        raise ProviderError(*_trial_failure(cause))
    try:
        torch.ops.load_library(str(install.spatial))
    except (OSError, RuntimeError) as error:
        raise ProviderError(*classify(cause_chain(error))) from error


def _refuse(shim_plan: ShimPlan, whole_package: bool = False) -> None:
    """Raise when a symbol table already says that the load must fail."""
    if shim_plan.status == "refused":
        raise ProviderError(_refusal_kind(shim_plan), shim_plan.reason)
    libraries = shim_plan.libraries if whole_package else shim_plan.libraries[:1]
    missing = sorted({name for library in libraries for name in library.missing})
    if missing:
        kind = "abi_refused" if set(missing) & set(shim_plan.refused) else "abi_forwardable"
        where = "the package" if whole_package else "spatial_ops"
        raise ProviderError(
            kind, f"{where} misses {len(missing)} symbols of this torch: {', '.join(missing)}"
        )


def _refusal_kind(shim_plan: ShimPlan) -> str:
    return "abi_refused" if shim_plan.refused else "cuda_major_mismatch"


def _trial_failure(cause: str) -> tuple[str, str]:
    kind, _ = classify(cause)
    return ("trial_failed" if kind == "unexpected" else kind), cause


def _capability() -> tuple[int, int] | None:
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


PACKAGE = SglProvider("sgl_kernel", load_package)
SPATIAL = SglProvider("sgl_kernel:spatial_ops", load_spatial)
SHIMMED = SglProvider("sgl_kernel:spatial_ops+shim", load_shimmed)
