"""What a reader calls the cells: requests, settings, methods. Pure; figures and page say the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastcache.bench.table import requests_of

Row = dict[str, Any]
BASELINE = "baseline"
# Engine settings that make cells of the same requests different ones, in words; "" is the usual setting.
SHOWN_SETTINGS: dict[str, Callable[[Any], str]] = {
    "kv_dtype": lambda value: "" if value in (None, "auto") else f"{value} KV",
    "num_pages": lambda value: "" if value is None else f"{value:,} pages",
    "enable_prefix_caching": lambda value: "prefix cache" if value else "",
    "policy": lambda value: "" if value in (None, "default") else f"policy {value}",
    "immediate_release": lambda value: "pages held" if value is False else "",
}


def name_of(row: Row) -> str:
    """Its variant, and its policy if that is not the usual one."""
    policy = row["cell"].get("policy", "default")
    return row["variant"] if policy == "default" else f"{row['variant']} {policy}"


def setting(row: Row) -> str:
    """Method and factor as a reader says them; the baseline has neither."""
    return (
        BASELINE
        if row["method"] is None
        else f"{row['method']} \N{MULTIPLICATION SIGN}{row['compression_factor']:g}"
    )


def differing(rows: Sequence[Row]) -> list[str]:
    """Engine settings in which cells of one model differ: what a panel must say beside the requests."""
    values: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name in SHOWN_SETTINGS:
            values.setdefault((name, row["model"]), set()).add(str(row["cell"].get(name)))
    return [name for name in SHOWN_SETTINGS if any(len(v) > 1 for (n, _), v in values.items() if n == name)]


def one_model(rows: Iterable[Row]) -> bool:
    """Whether there is one only, whose name then says nothing."""
    return len({row["model"] for row in rows}) == 1


def requests(row: Row, alone: bool, said: Sequence[str]) -> str:
    """Model (unless it is `alone`), requests and the settings `said`: what cells of a panel have in common."""
    least = [row["cell"]["workload"].get(f"min_{name}") for name in ("context", "output")]
    most = [row["context_requested"], row["output_requested"]]
    lengths = [f"{a} to {b}" if a else str(b) for a, b in zip(least, most, strict=True)]
    words = f"{requests_of(row)}, {' + '.join(lengths)} tokens"
    settings = [SHOWN_SETTINGS[name](row["cell"].get(name)) for name in said]
    return ", ".join(filter(None, ["" if alone else row["model"], words, *settings]))


def series(row: Row) -> str:
    """Its variant, and the split of the SMs it asked for."""
    return f"{row['variant']} {split(row)}" if row["greenctx"] else row["variant"]


def split(row: Row) -> str:
    """The shares of the SMs that compression and everything else are given, the latter all where it is not confined;
    at most so many where the engine may take less."""
    main = row["greenctx_main_ratio"] if row["greenctx_main_stream"] else 1.0
    most = (
        "\N{LESS-THAN OR EQUAL TO}" if row["policy"] == "auto" and row["cell"].get("greenctx_bound") else ""
    )
    return f"{most}{100 * row['greenctx_compress_ratio']:.3g}%/{100 * main:.3g}%"
