"""Which missing torch symbols can be forwarded correctly, and why the others cannot. Pure data, no torch.

A missing name is forwarded only where the installed torch has a function of the same meaning and the same
argument layout under another name. Everything else is refused with its reason: returning a constant in place
of a torch function is never an answer. Read off the wheels of torch 2.9.1 to 2.14.1 and sgl_kernel 0.3.21 to
0.4.10; `tests/data/shim_symbols.json` holds the tables.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

# A mangled name that mentions a namespace of torch. Others (libstdc++, the driver) are the loader's business.
OF_TORCH = re.compile(r"^_Z.*(?<![0-9])(?:3c10|2at|5torch|6caffe2)")

_DEF_SCHEMA = (
    "_ZNR5torch7Library4_defEON3c1014FunctionSchemaEPNS1_12OperatorNameERKSt6vectorI{}_17_RegisterOrVerifyE"
)
_DEF_VARIANT = (
    "_ZNR5torch7Library4_defEOSt7variantIJN3c1012OperatorNameENS2_14FunctionSchemaEEEONS_11CppFunctionE"
    "RKSt6vectorI{}"
)
_CHECK = "_ZN3c104cuda29c10_cuda_check_implementationEiPKcS2_"
CHECKS = (_CHECK + "ib", _CHECK + "jb", _CHECK + "jbPNS0_19CUDAErrorLogCaptureE")
LOG_CAPTURE = "_ZN3c104cuda19CUDAErrorLogCaptureC1Ev"
BLAS_HANDLE = "_ZN2at4cuda24getCurrentCUDABlasHandle"

# (macro of csrc/forwarders.h, spellings of one function): a missing one is forwarded to one that exists.
SPELLINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "FORWARD_DEF_SCHEMA",
        (_DEF_SCHEMA.format("N2at3TagESaIS8_EENS"), _DEF_SCHEMA.format("NS_10headeronly3TagESaIS8_EENS")),
    ),
    (
        "FORWARD_DEF_VARIANT",
        (_DEF_VARIANT.format("N2at3TagESaISB_EE"), _DEF_VARIANT.format("NS_10headeronly3TagESaISB_EE")),
    ),
    ("FORWARD_CUDA_CHECK", CHECKS),
)
# (macro, missing, target): only in this direction; the other one would drop an argument that matters.
ONE_WAY: tuple[tuple[str, str, str], ...] = (
    ("FORWARD_BLAS_HANDLE", BLAS_HANDLE + "Ev", BLAS_HANDLE + "Eb"),
    (
        "FORWARD_SELF_POINTER",
        "_ZNK2at10TensorBase14const_data_ptrIiLi0EEEPKT_v",
        "_ZNK2at10TensorBase14const_data_ptrIiEEPKT_v",
    ),
)

_LAYOUT = "the class changed its layout between these torch versions, so a forwarder would corrupt the caller's stack"
_REFCOUNT = (
    "torch 2.10 changed the reference count of intrusive_ptr to one word with a Python bit; "
    "code compiled for it miscounts here"
)
REFUSED: dict[str, str] = {
    "_ZN3c1013MessageLogger6streamB5cxx11Ev": f"c10::MessageLogger::stream: {_LAYOUT}",
    "_ZN3c1013MessageLoggerC1ENS_14SourceLocationEib": f"c10::MessageLogger constructor: {_LAYOUT}",
    "_ZN3c1013MessageLoggerC1EPKcii": f"c10::MessageLogger constructor: {_LAYOUT}",
    "_ZNK3c1010TensorImpl15incref_pyobjectEv": f"c10::TensorImpl::incref_pyobject: {_REFCOUNT}",
    "_ZNK3c1010TensorImpl15decref_pyobjectEv": f"c10::TensorImpl::decref_pyobject: {_REFCOUNT}",
    "_ZN3c104impl3cow23materialize_cow_storageERNS_11StorageImplE": (
        "c10::impl::cow::materialize_cow_storage: torch 2.13 replaced it together with a member of StorageImpl "
        "that the caller must clear"
    ),
    "_ZN3c1019NotImplementedErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE": (
        "c10::NotImplementedError constructor: it is inline in this torch, so there is nothing to forward to"
    ),
    "_ZNK3c104cuda10CUDAStream5queryEv": "c10::cuda::CUDAStream::query: inline in torch before 2.11",
    "_ZNK3c104cuda10CUDAStream11synchronizeEv": "c10::cuda::CUDAStream::synchronize: inline in torch before 2.11",
    "_ZNK3c107SymBool14guard_or_falseEPKcl": (
        "c10::SymBool::guard_or_false: torch before 2.9 has no equivalent (guard_bool raises where it returns false)"
    ),
    "_ZNK3c106SymInt22maybe_as_int_slow_pathEv": "c10::SymInt::maybe_as_int_slow_path: new in torch 2.9",
    "_ZNK3c106SymInt16sym_ne_slow_pathERKS0_": "c10::SymInt::sym_ne_slow_path: new in torch 2.9",
    "_ZN3c104cuda9SetDeviceEab": "c10::cuda::SetDevice(device, force): torch before 2.8 has no `force`",
}
UNKNOWN = "no function of the same meaning is known in this torch"

# fmt: off
_TAGS_2_9 = [
    "core", "cudagraph_unsafe", "data_dependent_output", "dynamic_output_shape", "flexible_layout", "generated",
    "inplace_view", "maybe_aliasing_or_mutating", "needs_contiguous_strides", "needs_exact_strides",
    "needs_fixed_stride_order", "nondeterministic_bitwise", "nondeterministic_seeded", "pointwise",
    "pt2_compliant_tag", "view_copy",
]
# fmt: on
_TAGS_2_11 = [*_TAGS_2_9[:13], "out_variant", "pointwise", "pt2_compliant_tag", "reduction", "view_copy"]
_TAGS_2_13 = [*_TAGS_2_11[:6], "inplace", *_TAGS_2_11[6:13], "out", *_TAGS_2_11[13:]]
# at::Tag as numbered by the torch that each wheel was compiled against.
TAGS_OF_SGL: dict[str, Sequence[str]] = {"0.3.21": _TAGS_2_9, "0.4.2": _TAGS_2_11, "0.4.10": _TAGS_2_13}

# torch release -> the sgl_kernel wheel compiled for it: nothing is missing there.
EXACT_PAIRS: dict[str, str] = {
    "2.9": "sgl-kernel==0.3.21",
    "2.11": "sglang-kernel==0.4.2",
    "2.14": "sglang-kernel==0.4.10",
}


@dataclass(frozen=True)
class Forward:
    """One missing symbol and the function of this torch that takes its place."""

    macro: str
    missing: str
    target: str

    def cpp(self, number: int) -> str:
        return f'{self.macro}({number}, "{self.missing}", "{self.target}")'


def resolve(missing: Collection[str], exported: Collection[str]) -> tuple[list[Forward], dict[str, str]]:
    """Split `missing` into forwarders that are correct against `exported`, and refusals with their reasons.

    A symbol that `exported` already holds is an error of the caller: a forwarder for it would take the place of
    torch's own function in the whole process, which aborts.
    """
    forwards, refused = [], {}
    for symbol in sorted(missing):
        assert symbol not in exported, f"{symbol} is not missing"
        forward = _forward(symbol, exported)
        if forward is None:
            refused[symbol] = REFUSED.get(symbol, f"{symbol}: {UNKNOWN}")
        else:
            forwards.append(forward)
    return forwards, refused


def _forward(symbol: str, exported: Collection[str]) -> Forward | None:
    if symbol == LOG_CAPTURE and CHECKS[2] not in exported:
        return Forward("FORWARD_NOTHING", symbol, "")
    for macro, names in SPELLINGS:
        if symbol in names:
            target = next((name for name in names if name in exported), None)
            return Forward(macro, symbol, target) if target else None
    for macro, name, target in ONE_WAY:
        if symbol == name and target in exported:
            return Forward(macro, symbol, target)
    return None


def tag_map(sgl_version: str, torch_tags: Mapping[str, int]) -> list[int]:
    """For each tag number in the wheel, its number in this torch (-1: none). Empty for an unknown wheel."""
    return [torch_tags.get(name, -1) for name in TAGS_OF_SGL.get(sgl_version, ())]


def matching_wheel(torch_version: str) -> str | None:
    """The pip requirement of the sgl_kernel compiled for this torch, or None where no release is known."""
    return EXACT_PAIRS.get(".".join(torch_version.split("+")[0].split(".")[:2]))
