"""Prefixes: the longest one is found, its bytes are right, and the byte limit holds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace.runtime.prefixes import BLOCK, Prefixes

WIDTH = 2  # bytes a position: its token and its place, as a cache depends on both


def cache_of(ids: list[int]) -> bytes:
    return np.array([[token % 256, place % 256] for place, token in enumerate(ids)], np.uint8).tobytes()


def put(prefixes: Prefixes, ids: list[int]) -> list[tuple[int, int]]:
    """Which stretches were read."""
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return cache_of(ids)[start * WIDTH : stop * WIDTH]

    prefixes.put(ids, read)
    return asked


def common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


talk = st.builds(
    lambda start, tail: [start] * BLOCK + tail, st.integers(0, 1), st.lists(st.integers(0, 1), max_size=BLOCK + 5)
)


@given(talks=st.lists(talk, max_size=6), asked=talk)
def test_the_longest_prefix_is_found_and_its_bytes_are_right(talks: list[list[int]], asked: list[int]) -> None:
    prefixes = Prefixes(1 << 30)
    for ids in talks:
        put(prefixes, ids)
        prefixes.check_integrity()
    count = prefixes.match(asked)
    assert count == max((common(ids, asked) for ids in talks), default=0)
    content = b"".join(prefixes.take(asked[:count]))
    assert content[: count * WIDTH] == cache_of(asked)[: count * WIDTH]


@given(talks=st.lists(talk, max_size=12), limit=st.integers(0, 6 * BLOCK * WIDTH))
def test_the_limit_holds_and_what_is_held_is_right(talks: list[list[int]], limit: int) -> None:
    prefixes = Prefixes(limit)
    for ids in talks:
        put(prefixes, ids)
        prefixes.check_integrity()
        count = prefixes.match(ids)
        assert b"".join(prefixes.take(ids[:count]))[: count * WIDTH] == cache_of(ids)[: count * WIDTH]
        if len(ids) * WIDTH <= limit:
            assert count == len(ids), "what was put last is what goes last"


def test_conversations_share_what_they_begin_with() -> None:
    prefixes = Prefixes(1 << 20)
    system = list(range(BLOCK))
    assert put(prefixes, [*system, 1, 2]) == [(0, BLOCK), (BLOCK, BLOCK + 2)]
    assert put(prefixes, [*system, 3]) == [(BLOCK, BLOCK + 1)]
    assert prefixes.nbytes == (BLOCK + 3) * WIDTH


def test_the_least_recently_used_goes_first() -> None:
    prefixes = Prefixes(2 * BLOCK * WIDTH)
    one, two, three = ([n] * BLOCK for n in range(3))
    put(prefixes, one)
    put(prefixes, two)
    list(prefixes.take(one))
    put(prefixes, three)
    assert [prefixes.match(ids) for ids in (one, two, three)] == [BLOCK, 0, BLOCK]
