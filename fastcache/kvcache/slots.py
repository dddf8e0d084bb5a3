"""Pure index arithmetic between stored positions, pages and slots. slot = page * page_size + offset."""

from __future__ import annotations

import numpy as np


def pages_for(kv_len: int, page_size: int) -> int:
    """Pages that `kv_len` stored entries occupy."""
    return -(-kv_len // page_size)


def slots_of(page_table: np.ndarray, rows: np.ndarray, indices: np.ndarray, page_size: int) -> np.ndarray:
    """Slots of stored entries.

    page_table: (B, max_pages) page numbers. rows: (T,) which sequence each entry belongs to.
    indices: (T,) stored index of the entry within its sequence (not its position). Returns (T,) int64.
    """
    pages = page_table[rows, indices // page_size].astype(np.int64)
    return pages * page_size + indices % page_size
