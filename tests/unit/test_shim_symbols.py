"""Which symbols are forwarded and which refused, on tables recorded from the published wheels."""

from __future__ import annotations

import json

import pytest
import symbol_tables
from symbol_tables import RECORDED, SGL, TORCH

from fastcache.device import shim_symbols

TABLES = json.loads(RECORDED.read_text())
# Missing symbols of (spatial_ops, common_ops), by wheel and torch.
MISSING = {
    "0.3.21": {
        "2.9.1": (0, 0),
        "2.10.0": (0, 2),
        "2.11.0": (0, 2),
        "2.12.0": (1, 6),
        "2.13.0": (1, 7),
        "2.14.1": (1, 7),
    },
    "0.4.2": {
        "2.9.1": (0, 7),
        "2.10.0": (0, 3),
        "2.11.0": (0, 0),
        "2.12.0": (1, 4),
        "2.13.0": (1, 5),
        "2.14.1": (1, 6),
    },
    "0.4.10": {
        "2.9.1": (1, 11),
        "2.10.0": (1, 8),
        "2.11.0": (1, 5),
        "2.12.0": (0, 3),
        "2.13.0": (0, 2),
        "2.14.1": (0, 0),
    },
}
PAIRS = [(sgl, torch) for sgl in SGL for torch in TORCH]


def missing(sgl: str, torch: str, library: str) -> set[str]:
    return set(TABLES["sgl"][sgl][library]) & set(TABLES["torch"][torch]["absent"])


def exported(torch: str) -> set[str]:
    """Of the names that matter: everything recorded that this torch does not lack."""
    names = set(symbol_tables.TARGETS)
    for libraries in TABLES["sgl"].values():
        names.update(*libraries.values())
    return names - set(TABLES["torch"][torch]["absent"])


@pytest.mark.parametrize(("sgl", "torch"), PAIRS)
def test_missing_counts(sgl: str, torch: str) -> None:
    counts = tuple(len(missing(sgl, torch, library)) for library in ("spatial_ops", "common_ops"))
    assert counts == MISSING[sgl][torch]


@pytest.mark.parametrize(("sgl", "torch"), PAIRS)
def test_every_missing_symbol_is_decided(sgl: str, torch: str) -> None:
    everything = missing(sgl, torch, "spatial_ops") | missing(sgl, torch, "common_ops")
    forwards, refused = shim_symbols.resolve(everything, exported(torch))
    assert {f.missing for f in forwards} | set(refused) == everything
    assert not {f.missing for f in forwards} & set(refused)
    for forward in forwards:
        assert forward.target in exported(torch) or forward.macro == "FORWARD_NOTHING"
    assert not any(shim_symbols.UNKNOWN in reason for reason in refused.values()), refused


@pytest.mark.parametrize(("sgl", "torch"), PAIRS)
def test_the_green_context_op_can_always_be_had(sgl: str, torch: str) -> None:
    _, refused = shim_symbols.resolve(missing(sgl, torch, "spatial_ops"), exported(torch))
    assert refused == {}


@pytest.mark.parametrize(
    ("sgl", "torch", "name"),
    [
        ("0.3.21", "2.10.0", "MessageLogger"),
        ("0.4.2", "2.9.1", "incref_pyobject"),
        ("0.4.2", "2.13.0", "materialize_cow_storage"),
        ("0.4.10", "2.11.0", "NotImplementedError"),
    ],
)
def test_what_cannot_be_forwarded_is_refused_with_its_reason(sgl: str, torch: str, name: str) -> None:
    _, refused = shim_symbols.resolve(missing(sgl, torch, "common_ops"), exported(torch))
    reasons = [reason for symbol, reason in refused.items() if name in symbol]
    assert reasons and all(len(reason) > 30 for reason in reasons)


def test_the_constants_of_the_original_shim_are_refused() -> None:
    names = [s for s in shim_symbols.REFUSED if "guard_or_false" in s or "maybe_as_int" in s or "sym_ne" in s]
    forwards, refused = shim_symbols.resolve(names, set())
    assert len(names) == 3 and forwards == [] and set(refused) == set(names)


def test_an_exported_symbol_is_never_forwarded() -> None:
    name = shim_symbols.SPELLINGS[0][1][0]
    with pytest.raises(AssertionError, match="is not missing"):
        shim_symbols.resolve([name], {name})


def test_an_unknown_symbol_is_refused_by_name() -> None:
    _, refused = shim_symbols.resolve(["_ZN3c103newEv"], set())
    assert refused["_ZN3c103newEv"].startswith("_ZN3c103newEv: ")


def test_tags_are_renumbered_where_torch_inserted_new_ones() -> None:
    new = {name: number for number, name in enumerate(TABLES["torch"]["2.13.0"]["tags"])}
    moved = shim_symbols.tag_map("0.4.2", new)
    old = TABLES["torch"]["2.11.0"]["tags"]
    assert [TABLES["torch"]["2.13.0"]["tags"][number] for number in moved] == old
    assert moved[old.index("needs_fixed_stride_order")] == 11 and old.index("needs_fixed_stride_order") == 10
    assert shim_symbols.tag_map("0.9.9", new) == [], "an unknown wheel's numbers are not guessed"


def test_a_tag_that_is_gone_has_no_number() -> None:
    assert shim_symbols.tag_map("0.4.10", {"core": 0})[:2] == [0, -1]


@pytest.mark.parametrize(
    ("torch", "wheel"),
    [("2.11.0+cu130", "sglang-kernel==0.4.2"), ("2.14.1", "sglang-kernel==0.4.10"), ("2.12.0", None)],
)
def test_matching_wheel(torch: str, wheel: str | None) -> None:
    assert shim_symbols.matching_wheel(torch) == wheel


@pytest.mark.network
@pytest.mark.timeout(1800)
def test_recorded_tables_are_those_of_the_real_wheels() -> None:
    assert symbol_tables.read_all() == TABLES
