"""Prefixes: the caches of conversations that gave up their slots, kept in memory so that what they begin with in common
with a later prompt is not computed again.

Cached tokens are cut into blocks; a block is known by the block before it and its own tokens, so conversations that
begin alike share blocks (a tree). At the byte limit the least recently used block without a successor goes. Holds
bytes as a runner reads and writes them; knows no runner.

    system prompt ─► block ─► block ─┬─► block ─► …   one conversation
                                     └─► block        another
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from headrace.runtime.sequence import common_prefix

__all__ = ["BLOCK", "Prefixes"]

BLOCK = 64  # tokens; a conversation's last block may be shorter


class _Block:
    def __init__(self, parent: _Block | None, ids: tuple[int, ...], content: bytes) -> None:
        self.parent, self.ids, self.content = parent, ids, content
        self.children: dict[tuple[int, ...], _Block] = {}


class Prefixes:
    """A tree of cached blocks under a byte limit.

    Args:
        limit: most bytes held; 0 holds nothing.

    Attributes:
        limit: as given.
        nbytes: bytes held.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._root = _Block(None, (), b"")
        self._used: dict[_Block, None] = {}  # the most recently used last

    def match(self, ids: Sequence[int]) -> int:
        """How many of the first tokens are held."""
        return sum(count for _, count in self._walk(ids))

    def take(self, ids: Sequence[int]) -> Iterator[bytes]:
        """The bytes of the longest prefix held, block by block; the last may reach beyond it."""
        found = [block for block, _ in self._walk(ids)]
        self._touch(found)
        for block in found:
            yield block.content

    def put(self, ids: Sequence[int], read: Callable[[int, int], bytes]) -> None:
        """Hold the cache of these tokens, as far as it is not held already.

        Args:
            ids: the tokens.
            read: (start, stop) → the bytes of these positions.
        """
        if not self.limit:
            return
        parent, path = self._root, []
        for start in range(0, len(ids), BLOCK):
            key = tuple(ids[start : start + BLOCK])
            block = parent.children.get(key)
            if block is None:
                block = _Block(parent, key, read(start, start + len(key)))
                parent.children[key] = block
                self.nbytes += len(block.content)
            path.append(block)
            parent = block
        self._touch(path)
        self._shrink()

    def check_integrity(self) -> None:
        """Raise AssertionError where the counts and the tree disagree; for tests."""
        found, blocks = list(self._root.children.values()), []
        while found:
            block = found.pop()
            assert block.parent is not None and block.parent.children[block.ids] is block
            blocks.append(block)
            found += block.children.values()
        assert set(blocks) == set(self._used)
        assert self.nbytes == sum(len(block.content) for block in blocks) <= self.limit

    def _walk(self, ids: Sequence[int]) -> Iterator[tuple[_Block, int]]:
        """Blocks along the ids, with how many of each block's tokens are in common; only the last has fewer."""
        parent, at = self._root, 0
        while at < len(ids):
            block = parent.children.get(tuple(ids[at : at + BLOCK]))
            if block is not None and len(block.ids) == BLOCK:
                yield block, BLOCK
                parent, at = block, at + BLOCK
                continue
            rest = ids[at : at + BLOCK]
            best = max(parent.children.values(), key=lambda child: common_prefix(child.ids, rest), default=None)
            if best is not None and (count := common_prefix(best.ids, rest)):
                yield best, count
            return

    def _touch(self, path: Sequence[_Block]) -> None:
        for block in reversed(path):  # a block is used at least as recently as those behind it
            self._used.pop(block, None)
            self._used[block] = None

    def _shrink(self) -> None:
        while self.nbytes > self.limit:
            block = next(block for block in self._used if not block.children)
            assert block.parent is not None
            del block.parent.children[block.ids], self._used[block]
            self.nbytes -= len(block.content)
