"""Whether a model fits a phone, and the least change that makes it fit. Arithmetic on sizes; makes nothing.

Changes are tried in the order of what they cost: more parts cost nothing, an 8-bit cache hardly any quality, a shorter
context costs length, fewer bits cost quality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["PHONE_MEMORY", "Fit", "memory_fit", "part_fit"]

PHONE_MEMORY = 12_000_000_000  # bytes: the memory of a common phone with a Snapdragon 8 Elite
PHONE_SHARE = 0.5  # of it for one app: the system, its services and the app in the background hold the rest
PART_LIMIT = (1 << 31) - 1  # bytes of one binary: what a signed 32-bit size can say
CONTEXT_STEP = 256  # shorter contexts are tried in steps of so many tokens


@dataclass(frozen=True)
class Fit:
    """One limit: what is held against it, bytes needed and allowed, and the change that is needed, or None."""

    what: str
    needed: int
    limit: int
    change: str | None

    @property
    def ok(self) -> bool:
        """It fits as it is."""
        return self.needed <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "ok": self.ok}


def part_fit(sizes: Callable[[int], Sequence[int]], parts: int, most: int) -> Fit:
    """Whether the largest part stays a file that phones can map.

    Args:
        sizes: number of parts → bytes of each.
        parts: as planned.
        most: parts that are possible.
    """
    largest = max(sizes(parts))
    change = None
    if largest > PART_LIMIT:
        enough = next((n for n in range(parts + 1, most + 1) if max(sizes(n)) <= PART_LIMIT), None)
        change = f"--parts {enough}" if enough else "no number of parts is enough: one table alone is larger"
    return Fit("largest part", largest, PART_LIMIT, change)


def memory_fit(
    weight_bytes: int, token_bytes: int, contexts: Sequence[int], kv: str, bits: float, memory: int = PHONE_MEMORY
) -> Fit:
    """Whether weights and the longest cache fit in the memory that a phone gives an app.

    Args:
        weight_bytes: of all parts.
        token_bytes: of the cache, a token.
        contexts: context lengths.
        kv: "int8" or "float32".
        bits: of the linears on average.
        memory: of the phone, bytes.
    """
    longest, limit = max(contexts), int(memory * PHONE_SHARE)
    needed = weight_bytes + longest * token_bytes
    return Fit(
        f"weights and a cache of {longest} tokens on a phone of {memory / 1e9:g} GB",
        needed,
        limit,
        None if needed <= limit else _cheapest(weight_bytes, token_bytes, contexts, kv, bits, limit),
    )


def _cheapest(weight_bytes: int, token_bytes: int, contexts: Sequence[int], kv: str, bits: float, limit: int) -> str:
    longest, changes = max(contexts), []
    if kv != "int8":
        changes.append("--kv int8")
        token_bytes //= 4
        if weight_bytes + longest * token_bytes <= limit:
            return changes[0]
    room = (limit - weight_bytes) // token_bytes // CONTEXT_STEP * CONTEXT_STEP
    if room >= CONTEXT_STEP:
        kept = [c for c in contexts if c <= room]
        changes.append(f"--context {','.join(map(str, kept or [room]))}")
        return " ".join(changes)
    if bits > 4:
        changes.append(f"--size {max(limit - CONTEXT_STEP * token_bytes, 0)} (now {weight_bytes} bytes of weights)")
        return " ".join(changes)
    return "a smaller model: 4-bit weights alone are too large"
