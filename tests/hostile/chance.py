"""Chance that lies on purpose: numbers and names of note, damaged bytes, any JSON, JSON changed in some places.

Everything is drawn from a random.Random: one with a seed for a long run, hypothesis's for one that shrinks. Knows no
format.
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from functools import cache
from typing import Any

__all__ = ["NAMES", "NUMBERS", "Good", "Rng", "any_json", "changed_json", "damaged", "parsed"]

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    64,
    255,
    256,
    1 << 16,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    1 << 61,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
NAMES = (
    "a",
    "model.norm.weight",
    "lm_head.weight",
    "a\nb",
    "\x1b[2J",
    "\u202e",
    "x" * 5000,
    "",
    "..",
    "\ud800",
    "/etc/passwd",
    "blk.0.attn_q.weight",
)
Rng = random.Random
Good = dict[str, bytes]


def damaged(rng: Rng, data: bytes) -> bytes:
    """The file with some bytes changed, cut, doubled or replaced by a number of note."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        # Headers are where the lies matter.
        place = rng.randrange(max(1, min(len(out), rng.choice((64, 400, 4000, len(out) or 1)))))
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[place] = rng.randrange(256)
        elif kind == 1:
            out[place : place + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif kind == 2:
            out[place : place + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
        elif kind == 3:
            del out[place : place + rng.randint(1, 40)]
        elif kind == 4:
            out[place:place] = out[place : place + rng.randint(1, 40)]
        else:
            del out[place:]
    return bytes(out)


@cache
def parsed(good: bytes) -> Any:
    """The value of a good JSON file, read once; nobody may change it."""
    return json.loads(good)


def any_json(rng: Rng, depth: int = 0) -> Any:
    """Any JSON value, with those that hurt more often."""
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice(NUMBERS) * rng.choice((1, -1))
    if kind == 2:
        return rng.choice((0.5, -1.5, 1e-9, 1e308, math.inf, -math.inf, math.nan, 10**400))
    if kind <= 5:
        return rng.choice((*NAMES, "F32", "BF16", "F4", "llama", "yarn", "linear", "gelu", "7"))
    if kind == 6:
        return [any_json(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {
        rng.choice((*NAMES, "rope_type", "factor", "dtype")): any_json(rng, depth + 1) for _ in range(rng.randrange(4))
    }


def changed_json(rng: Rng, value: Any, keys: tuple[str, ...] = ()) -> Any:
    """A JSON value with one to four places of any depth changed: another value, one more, one less.

    The value itself stays as it was; what did not change is shared with it.

    `keys`: further names that an object may get.
    """
    out = copy.copy(value)
    for _ in range(rng.randint(1, 4)):
        place = out
        while isinstance(place, (dict, list)) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.randrange(4) == 0:
                _change(rng, place, key, keys)
                break
            place[key] = copy.copy(place[key])  # only what is on the way to a change is copied: files can be large
            place = place[key]
    return out


def _change(rng: Rng, place: Any, key: Any, keys: tuple[str, ...]) -> None:
    kind = rng.randrange(8)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, list):
        place.insert(key, rng.choice(place))
    elif kind == 1:
        place[rng.choice((*NAMES, *keys))] = any_json(rng)
    elif kind == 2 and isinstance(place[key], str):
        text = place[key]
        place[key] = rng.choice((text * 2, text[1:], text + rng.choice(NAMES), text.upper(), text[::-1]))
    elif kind == 2 and isinstance(place[key], (int, float)) and not isinstance(place[key], bool):
        place[key] = rng.choice((-place[key], place[key] + 1, place[key] * 2, place[key] // 3, place[key] - 1))
    elif kind == 3:
        others = list(place.values()) if isinstance(place, dict) else place
        place[key] = rng.choice(others)
    else:
        place[key] = any_json(rng)
