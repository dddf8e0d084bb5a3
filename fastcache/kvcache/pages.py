"""Who owns which page. Knows numbers, not tensors, and keeps books that can be checked.

A page is in exactly one of three states: free, in use (one or more owners), or reusable (no owner, but the
prefix cache can still name its content; it is handed out again, oldest first, when free pages run out).
Page 0 is never handed out: padded rows of a batch write there.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from fastcache.errors import OutOfPages

SCRATCH_PAGE = 0


class PageAllocator:
    """Reference-counted allocator over `num_pages` pages, of which `num_pages - 1` can be owned."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise OutOfPages(
                f"num_pages is {num_pages}; at least 2 are needed, one of them is reserved for padding."
            )
        self.num_pages = num_pages
        self._free: deque[int] = deque(range(1, num_pages))
        self._owners = [0] * num_pages
        self._named: set[int] = set()  # pages whose content the prefix cache knows
        self._reusable: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.on_evict: Callable[[int], None] = lambda page: None
        self.peak_used = 0

    @property
    def available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._free) + len(self._reusable)

    @property
    def used(self) -> int:
        """Pages that have an owner."""
        return self.num_pages - 1 - self.available

    def owners(self, page: int) -> int:
        return self._owners[page]

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each. The caller has checked `available`."""
        assert count <= self.available, f"{count} pages wanted, {self.available} available"
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        self.peak_used = max(self.peak_used, self.used)
        return pages

    def _evict(self) -> int:
        page, _ = self._reusable.popitem(last=False)
        self._named.discard(page)
        self.on_evict(page)
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Add an owner to pages that are in use or reusable."""
        for page in pages:
            assert page in self._named, f"page {page} is shared but its content has no name"
            self._reusable.pop(page, None)
            self._owners[page] += 1
        self.peak_used = max(self.peak_used, self.used)

    def name(self, page: int) -> None:
        """Its content is known to the prefix cache: keep it reusable when its last owner leaves."""
        assert self._owners[page] > 0, f"page {page} has no owner"
        self._named.add(page)

    def free(self, pages: Iterable[int]) -> None:
        """Remove one owner from each page. Freeing a page nobody owns is a bug, and says so."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} freed twice"
            self._owners[page] -= 1
            if self._owners[page] == 0:
                if page in self._named:
                    self._reusable[page] = None
                else:
                    self._free.append(page)

    def check(self) -> None:
        """Assert that every page is in exactly one state. Costs O(num_pages); for tests and after errors."""
        free, reusable = set(self._free), set(self._reusable)
        owned = {page for page in range(1, self.num_pages) if self._owners[page] > 0}
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert not free & reusable and not free & owned and not reusable & owned, "a page has two states"
        assert free | reusable | owned == set(range(1, self.num_pages)), "a page is lost"
        assert reusable <= self._named, "a reusable page has no name"
        assert self._owners[SCRATCH_PAGE] == 0, "the scratch page has an owner"
