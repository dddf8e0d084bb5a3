"""Which dynamic symbols a shared library needs and offers: a reader for the few ELF tables that say so.

Only 64-bit little-endian ELF with section headers is read, which is what every wheel on x86-64 and aarch64
Linux holds. Nothing is loaded or executed, so a broken library cannot harm the process that asks.
Source: the System V ABI, "Object Files", and the GNU symbol-versioning extension.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

SHT_STRTAB, SHT_DYNAMIC, SHT_DYNSYM, SHT_VERSYM = 3, 6, 11, 0x6FFFFFFF
DT_NEEDED, DT_SONAME = 1, 14
STB_LOCAL, STB_WEAK = 0, 2
SECTION = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")
DYNAMIC = struct.Struct("<qQ")


class ElfError(ValueError):
    """The file is not a shared library this reader understands; the message says why."""


@dataclass(frozen=True)
class DynamicSymbols:
    """One library's dynamic linking facts.

    `undefined` are the strong names it must find elsewhere and that carry no version (a versioned name, such as
    libstdc++'s, is bound to one library by the loader); `exported` are the names it offers.
    """

    path: Path
    soname: str | None
    needed: tuple[str, ...]
    undefined: frozenset[str]
    exported: frozenset[str]


@dataclass(frozen=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int


def read(path: str | Path) -> DynamicSymbols:
    """Read the dynamic symbol table of `path`. Errors: ElfError when it is not 64-bit little-endian ELF."""
    path = Path(path)
    with path.open("rb") as file:
        if file.read(6) != b"\x7fELF\x02\x01":
            raise ElfError(f"{path} is not a 64-bit little-endian ELF file.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, data)
            except (struct.error, IndexError, ValueError) as error:
                raise ElfError(f"{path} has a damaged or missing dynamic symbol table: {error}.") from error


def _parse(path: Path, data: mmap.mmap) -> DynamicSymbols:
    sections = _sections(data)
    symbols = _only(sections, SHT_DYNSYM)
    if symbols is None:
        raise ElfError("no .dynsym section")
    strings = sections[symbols.link]
    undefined, exported = _symbols(data, symbols, strings, _only(sections, SHT_VERSYM))
    soname, needed = None, []
    dynamic = _only(sections, SHT_DYNAMIC)
    if dynamic is not None:
        names = sections[dynamic.link]
        for tag, value in DYNAMIC.iter_unpack(data[dynamic.offset : dynamic.offset + dynamic.size]):
            if tag == DT_NEEDED:
                needed.append(_string(data, names, value))
            elif tag == DT_SONAME:
                soname = _string(data, names, value)
    return DynamicSymbols(path, soname, tuple(needed), undefined, exported)


def _sections(data: mmap.mmap) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = []
    for i in range(count):
        _, kind, _, _, offset, size, link, *_ = SECTION.unpack_from(data, table + i * entry_size)
        sections.append(_Section(kind, offset, size, link))
    return sections


def _only(sections: list[_Section], kind: int) -> _Section | None:
    return next((section for section in sections if section.kind == kind), None)


def _symbols(
    data: mmap.mmap, symbols: _Section, strings: _Section, versions: _Section | None
) -> tuple[frozenset[str], frozenset[str]]:
    table = data[symbols.offset : symbols.offset + symbols.size]
    count = symbols.size // SYMBOL.size
    version = [1] * count
    if versions is not None:
        version = list(struct.unpack_from(f"<{count}H", data, versions.offset))
    names = data[strings.offset : strings.offset + strings.size]
    undefined, exported = set(), set()
    for i, (name, info, _, section, _, _) in enumerate(SYMBOL.iter_unpack(table)):
        binding = info >> 4
        if name == 0 or binding == STB_LOCAL:
            continue
        text = names[name : names.index(b"\0", name)].decode()
        if section != 0:
            exported.add(text)
        # Version indices 0 and 1 mean "no version"; a weak name may stay unresolved.
        elif binding != STB_WEAK and version[i] & 0x7FFF <= 1:
            undefined.add(text)
    return frozenset(undefined), frozenset(exported)


def _string(data: mmap.mmap, strings: _Section, offset: int) -> str:
    start = strings.offset + offset
    return data[start : data.find(b"\0", start)].decode()
