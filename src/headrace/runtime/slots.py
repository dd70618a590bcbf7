"""Slots: which sequence has which slot of a runner, and what of a new one is held already, anywhere.

    a sequence without a slot ─► whose cache begins like it?
        a finished one that has little more    its slot is taken over
        another slot                           what is shared is copied
        memory (prefixes.py)                   what is shared is written back
        nobody                                 an empty slot, a finished one's, or that of whoever waited longest

Whoever loses a slot is put into memory first, so that it can go on where it was. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Items

from headrace.runtime.prefixes import BLOCK, Prefixes
from headrace.runtime.runner import Runner
from headrace.runtime.sequence import Sequence, common_prefix

__all__ = ["Slots"]

# A finished conversation's slot is taken over by a prompt that shares all but so many of its tokens; where more would
# be lost, what is shared is copied to another slot.
_LOST = 16


class Slots:
    """The slots of a runner.

    Args:
        runner: whose.
        prefix_bytes: most bytes of caches kept in memory; 0 keeps none.

    Attributes:
        prefixes: these caches.
    """

    def __init__(self, runner: Runner, prefix_bytes: int) -> None:
        self.runner = runner
        self.prefixes = Prefixes(prefix_bytes)
        self._owners: list[Sequence | None] = [None] * runner.slots
        self._waited: list[int] = list(range(runner.slots))  # the longest unused first

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def vacancy(self) -> bool:
        """There is a slot that no running sequence needs."""
        return any(other is None or other.released for other in self._owners)

    def place(self, sequence: Sequence, keep: Collection[int]) -> int:
        """The sequence's slot, the most recently used one from now on. One without a slot is given one, but none of
        `keep`, and in it what is held anywhere of its tokens."""
        if sequence.slot is None:
            self._settle(sequence, keep)
        assert sequence.slot is not None
        self._waited.remove(sequence.slot)
        self._waited.append(sequence.slot)
        return sequence.slot

    def _settle(self, sequence: Sequence, keep: Collection[int]) -> None:
        ids = sequence.tokens
        # The last token's logits have to be computed, and of a prompt so many beside it that the arithmetic is a
        # prompt's: an answer is the same whether or not its prompt's beginning was held.
        most = max(len(ids) - 1 - (0 if sequence.answered else self.runner.fine_tokens), 0)
        best, shared = self._longest(ids) if sequence.reuses else (None, 0)
        stored = self.prefixes.match(ids) if sequence.reuses else 0
        if best is not None and shared >= stored:
            other = self._owners[best]
            assert other is not None
            if other.released and best not in keep and other.held - shared <= _LOST:
                self._give(best, sequence, min(shared, most))
                return
            if shared >= _LOST and (another := self._vacant(keep, best)) is not None:
                self.runner.copy(best, another, min(shared, most))
                self._give(another, sequence, min(shared, most))
                return
        taken = self._vacant(keep)
        if taken is None:  # all run: the one that waited longest makes room
            taken = next((slot for slot in self._waited if slot not in keep), None)
            if taken is None:
                raise ValueError(f"{len(self._owners)} slots are too few for so many sequences in one step")
            self._save(taken)
        stored = self.prefixes.match(ids) if sequence.reuses else 0  # with what was just saved
        if taken == best and shared >= stored:
            stored = shared
        else:
            for number, content in enumerate(self.prefixes.take(ids[:stored])):
                self.runner.write(taken, number * BLOCK, content)
        self._give(taken, sequence, min(stored, most))

    def _longest(self, ids: Items[int]) -> tuple[int | None, int]:
        """The slot that holds most of these first tokens, and how many."""
        best, shared = None, 0
        for slot, other in enumerate(self._owners):
            if other is not None and other.reuses and (n := common_prefix(other.tokens[: other.held], ids)) > shared:
                best, shared = slot, n
        return best, shared

    def _vacant(self, keep: Collection[int], but: int | None = None) -> int | None:
        """A slot that no running sequence needs, its cache saved: an empty one, else the one unused for longest."""
        choices = [slot for slot in self._waited if slot != but and slot not in keep]
        for slot in sorted(
            choices, key=lambda slot: self._owners[slot] is not None
        ):  # stable: the longest unused first
            other = self._owners[slot]
            if other is None or other.released:
                self._save(slot)
                return slot
        return None

    def _save(self, slot: int) -> None:
        """Keep what a slot holds before it is given to somebody else."""
        other = self._owners[slot]
        if other is not None and other.reuses and other.held:
            self.prefixes.put(other.tokens[: other.held], lambda start, stop: self.runner.read(slot, start, stop))

    def _give(self, slot: int, sequence: Sequence, held: int) -> None:
        other = self._owners[slot]
        if other is not None:
            other.slot, other.held, other.last = None, 0, None
        self._owners[slot] = sequence
        sequence.slot, sequence.held = slot, held

    def held(self, ids: Items[int]) -> tuple[int, bytes]:
        """How many of these first tokens are held anywhere, and their cache as the runner reads it."""
        best, shared = self._longest(ids)
        if best is not None and shared >= self.prefixes.match(ids):
            return shared, self.runner.read(best, 0, shared)
        sequence = Sequence([*ids, 0])  # one more, so that all of them may be held
        sequence.answered = True
        slot = self.place(sequence, keep=())
        sequence.released = True
        return sequence.held, self.runner.read(slot, 0, sequence.held)

    def hold(self, ids: Items[int], content: bytes) -> None:
        """Put the cache of these tokens, as `held` gave it, into a slot, for a prompt that begins with them.

        Raises:
            ValueError: it is no cache of so many tokens.
        """
        sequence = Sequence(reuses=False)
        slot = self.place(sequence, keep=())
        sequence.released = True
        self.runner.write(slot, 0, content)
        if len(ids) and len(ids) * len(self.runner.read(slot, len(ids) - 1, len(ids))) != len(content):
            raise ValueError(f"{len(content)} bytes are no cache of {len(ids)} tokens")
        sequence.extend(ids)
        sequence.held, sequence.reuses = len(ids), True

    def release_all(self) -> None:
        """Nobody needs anything any more."""
        for sequence in self._owners:
            if sequence is not None:
                sequence.released = True
