"""Link: one comparison of the chain that `verify` checks. Knows no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Link"]


@dataclass(frozen=True)
class Link:
    """One comparison: its name, what was found, what was allowed, and whether that holds."""

    name: str
    found: str
    limit: str
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)
