"""Reuse of KV pages by content: a full page is named by the hash of all tokens up to its end.

Only full pages written by prefill or decode of an UNCOMPRESSED cache are ever named. A compressed page does
not hold what its tokens would suggest, so it is never registered and never matched.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Tokens

from fastcache.kvcache.pages import PageAllocator


class PrefixCache:
    """Maps chained content hashes to pages of one `PageAllocator`."""

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self.allocator = allocator
        self.page_size = page_size
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        allocator.on_evict = self._forget

    def page_hashes(self, tokens: Tokens[int]) -> list[bytes]:
        """One chained hash per full page of `tokens`."""
        hashes, parent = [], b""
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            digest = hashlib.blake2b(parent, digest_size=16)
            digest.update(array("q", tokens[end - self.page_size : end]).tobytes())
            parent = digest.digest()
            hashes.append(parent)
        return hashes

    def match(self, tokens: Tokens[int], limit: int) -> list[int]:
        """Pages holding the longest known prefix of `tokens`, at most `limit` tokens; not shared yet."""
        pages: list[int] = []
        for digest in self.page_hashes(tokens[: max(limit, 0)]):
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def register(self, tokens: Tokens[int], pages: list[int]) -> None:
        """Name the full pages of an uncompressed sequence; the first page with a given content wins."""
        for digest, page in zip(self.page_hashes(tokens), pages, strict=False):
            if digest not in self._page_of and page not in self._hash_of:
                self._page_of[digest] = page
                self._hash_of[page] = digest
                self.allocator.name(page)

    def _forget(self, page: int) -> None:
        del self._page_of[self._hash_of.pop(page)]
