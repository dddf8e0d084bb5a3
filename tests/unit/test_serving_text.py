"""Tokens to text piece by piece, and stop strings: whatever the pieces, the whole is what it must be."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache.serving.text import Detokenizer, StopScanner
from fastcache.tokenizer import Tokenizer

TEXTS = ["naïve café, 東京 — ok?", "a\n\n  b\t🙂🙂‍↔️ c", "İstanbul ﬁn", "x = [1, 2]\n    return x"]


def pieces(tokenizer, ids, sizes=(1, 2, 3, 1)):
    text, given, start, turn = Detokenizer(tokenizer), [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        given.append(text.push(ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*given, text.finish()]


def test_the_pieces_of_real_text_join_to_it_and_hold_no_half_character(smollm2):
    tokenizer = Tokenizer.from_folder(smollm2)
    for text in TEXTS:
        given = pieces(tokenizer, tokenizer.encode(text))
        assert "".join(given) == text and "\ufffd" not in "".join(given)
        assert sum(bool(piece) for piece in given) > 1


def test_the_pieces_of_any_ids_join_to_what_the_tokenizer_makes_of_all_of_them(tiny_model):
    tokenizer = Tokenizer.from_folder(tiny_model("llama", 4, 2, 16, 48, 2, False))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 319), max_size=40), st.lists(st.integers(1, 5), min_size=1, max_size=4))
    def check(ids, sizes):
        assert "".join(pieces(tokenizer, ids, sizes)) == tokenizer.decode(ids)

    check()


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_a_scanner_gives_what_is_before_the_first_stop_however_the_text_is_cut(text, stops, data):
    scanner, given, rest = StopScanner(stops), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        given, rest = given + scanner.push(rest[:size]), rest[size:]
    given += scanner.finish()
    # The first stop string to be complete ends the text; of several in one piece, the one that begins first.
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert scanner.stopped == bool(places)
    if places:
        assert text.startswith(given) and min(places) <= len(given) <= max(places)
        assert not any(stop in given for stop in stops)
    else:
        assert given == text
