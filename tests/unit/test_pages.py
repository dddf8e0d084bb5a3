"""The page books: property-tested against a model that only counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache.errors import OutOfPages
from fastcache.kvcache.pages import SCRATCH_PAGE, PageAllocator
from fastcache.kvcache.prefix import PrefixCache
from fastcache.kvcache.slots import pages_for


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 40), st.data())
def test_no_page_is_lost_or_handed_out_twice(num_pages, data):
    allocator = PageAllocator(num_pages)
    held: list[list[int]] = []
    for _ in range(data.draw(st.integers(0, 60))):
        if held and data.draw(st.booleans()):
            allocator.free(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            pages = allocator.allocate(data.draw(st.integers(0, allocator.available)))
            assert SCRATCH_PAGE not in pages
            assert not {p for group in held for p in group} & set(pages)
            held.append(pages)
        allocator.check()
        assert allocator.used == sum(map(len, held))
    for pages in held:
        allocator.free(pages)
    assert allocator.available == num_pages - 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_shared_prefixes_keep_the_books(data):
    page_size = 2
    allocator = PageAllocator(14)
    prefix = PrefixCache(allocator, page_size)
    held: list[list[int]] = []
    content: dict[int, tuple[int, ...]] = {}  # what a page of ours really holds
    for _ in range(data.draw(st.integers(1, 40))):
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
        shared = prefix.match(tokens, len(tokens) - 1)
        for index, page in enumerate(shared):
            assert content[page] == tuple(tokens[: (index + 1) * page_size])
        need = pages_for(len(tokens), page_size) - len(shared)
        reusable = sum(allocator.owners(p) == 0 for p in shared)
        while held and allocator.available - reusable < need:
            allocator.free(held.pop(0))
            reusable = sum(allocator.owners(p) == 0 for p in shared)
        allocator.share(shared)
        pages = shared + allocator.allocate(need)
        for index in range(len(shared), len(tokens) // page_size):
            content[pages[index]] = tuple(tokens[: (index + 1) * page_size])
        prefix.register(tokens, pages)
        held.append(pages)
        allocator.check()
    for pages in held:
        allocator.free(pages)
    allocator.check()
    assert allocator.used == 0


def test_double_free_is_caught():
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    allocator.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(pages[:1])


def test_a_lost_page_is_caught():
    allocator = PageAllocator(4)
    allocator._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        allocator.check()


def test_a_pool_needs_two_pages():
    with pytest.raises(OutOfPages, match="at least 2"):
        PageAllocator(1)


def test_eviction_takes_the_oldest_name_first():
    allocator = PageAllocator(4)
    prefix = PrefixCache(allocator, 1)
    for token in (7, 8, 9):
        pages = allocator.allocate(1)
        prefix.register([token], pages)
        allocator.free(pages)
    assert allocator.available == 3
    allocator.allocate(1)
    assert prefix.match([7, 0], 1) == []
    assert len(prefix.match([8, 0], 1)) == len(prefix.match([9, 0], 1)) == 1
