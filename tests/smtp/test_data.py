"""The data scanner against a naive one, exhaustively, and dot-stuffing there and back (RFC 5321 section 4.5.2)."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmta.smtp.data import ChunkScanner, DataScanner, NormalizingScanner, Stuffer, stuff, unstuff

ALPHABET = (b"\r", b"\n", b".", b"a")


def naive(wire: bytes):
    """(message, rest) by the words of the RFC, or None without an end."""
    whole = b"\r\n" + wire
    end = whole.find(b"\r\n.\r\n")
    if end < 0:
        return None
    return whole[: end + 2].replace(b"\r\n.", b"\r\n")[2:], whole[end + 5 :]


def naive_normalizing(wire: bytes, lf_ends: bool):
    """The same where LF ends a line: only CRLF.CRLF ends the data, or with lf_ends a line that is a dot."""
    whole = b"\r\n" + wire
    end = re.search(rb"\n(\.\r?\n)" if lf_ends else rb"\r\n(\.\r\n)", whole)
    if end is None:
        return None
    lines = [line.removesuffix(b"\r") for line in whole[:end.start(1)].split(b"\n")[1:-1]]
    return b"".join(line.removeprefix(b".") + b"\r\n" for line in lines), whole[end.end():]


def scan(pieces, scanner=None):
    scanner = scanner or DataScanner()
    out = b""
    pieces = list(pieces)
    for number, piece in enumerate(pieces):
        out += scanner.feed(piece)
        if scanner.ended:
            return out, scanner.rest + b"".join(pieces[number + 1 :]), scanner
    return None, None, scanner


def test_exhaustive_against_naive():
    for length in range(7):
        for letters in itertools.product(ALPHABET, repeat=length):
            wire = b"".join(letters) + b"\r\n.\r\nREST"
            expected = naive(wire)
            assert scan([wire])[:2] == expected, wire
            for cut in range(1, len(wire) - 4):
                assert scan([wire[:cut], wire[cut:]])[:2] == expected, (wire, cut)
            assert scan(bytes([octet]) for octet in wire)[:2] == expected, wire


@pytest.mark.parametrize("lf_ends", [False, True])
def test_normalizing_exhaustive_against_naive(lf_ends):
    for length in range(6):
        for letters in itertools.product(ALPHABET, repeat=length):
            wire = b"".join(letters) + b"\r\n.\r\nREST"
            expected = naive_normalizing(wire, lf_ends)
            assert scan([wire], NormalizingScanner(lf_ends=lf_ends))[:2] == expected, wire
            assert scan((bytes([octet]) for octet in wire), NormalizingScanner(lf_ends=lf_ends))[:2] == expected, wire
            for cut in range(1, len(wire) - 4):
                assert scan([wire[:cut], wire[cut:]], NormalizingScanner(lf_ends=lf_ends))[:2] == expected, (wire, cut)


def test_normalizing_leaves_good_data_alone():
    for length in range(6):
        for letters in itertools.product((b"\r\n", b".", b"a"), repeat=length):
            wire = b"".join(letters) + b"\r\n.\r\nREST"
            assert scan([wire], NormalizingScanner())[:2] == naive(wire), wire


@pytest.mark.parametrize("normalize", [False, True])
def test_chunks_in_any_pieces(normalize):
    """A chunk's octets come out as they are, or with CRLF for a bare LF; a bare CR or LF is noticed where one is left."""
    for length in range(7):
        for letters in itertools.product((b"\r", b"\n", b"a"), repeat=length):
            wire = b"".join(letters)
            expected = wire.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") if normalize else wire
            left = expected.replace(b"\r\n", b"")
            for pieces in ([wire], [bytes([octet]) for octet in wire]):
                scanner = ChunkScanner(normalize=normalize)
                out = b"".join(map(scanner.feed, pieces))
                scanner.finish()
                assert scanner.bare == (b"\r" in left or b"\n" in left), wire
                assert scanner.bare or out == expected, wire


def test_without_an_end_nothing_ends():
    for length in range(7):
        for letters in itertools.product(ALPHABET, repeat=length):
            wire = b"".join(letters)
            if naive(wire) is None:
                assert scan([wire])[0] is None, wire


@given(st.binary(max_size=60).map(lambda raw: raw + b"\r\n"))
def test_unstuff_undoes_stuff(message):
    assert unstuff(stuff(message)) == message


@given(st.lists(st.sampled_from([b"\r\n", b".", b"a", b"\r", b"\n", b"..", b"\r\n."]), max_size=12))
def test_stuffing_in_pieces_is_stuffing_whole(pieces):
    stuffer = Stuffer()
    assert b"".join(map(stuffer.feed, pieces)) + stuffer.finish() == stuff(b"".join(pieces))


def test_bare_newlines_and_nul_are_noticed_in_any_pieces():
    for wire, bare, nul in ((b"a\nb\r\n.\r\n", True, False), (b"a\rb\r\n.\r\n", True, False), (b"a\0b\r\n.\r\n", False, True),
                            (b"a\r\nb\r\n.\r\n", False, False)):
        for pieces in ([wire], [bytes([octet]) for octet in wire]):
            scanner = scan(pieces)[2]
            assert (scanner.bare, scanner.nul) == (bare, nul), wire


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 9))
def test_a_line_over_the_limit_is_noticed_however_it_comes(lengths: list[int], cuts: list[int], limit: int) -> None:
    wire = b"".join(b"x" * length + b"\r\n" for length in lengths) + b".\r\n"
    scanner = DataScanner(limit)
    position = 0
    while position < len(wire):
        cut = cuts[position % len(cuts)]
        scanner.feed(wire[position:position + cut])
        position += cut
    assert scanner.ended
    assert scanner.too_long == any(length > limit for length in lengths)
    assert not scanner.bare
