"""What must not be, as it is found."""

from __future__ import annotations

FAULTS: list[str] = []


def fault(text: str) -> None:
    """Note what must not be."""
    FAULTS.append(text)
    print(f"  failed: {text}", flush=True)
