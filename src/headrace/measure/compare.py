"""bench --compare: what changed from one measurement to another, beyond what repetitions differ by.

A difference counts when it is larger than `LEAST_CHANGE` and when an exact rank test finds the repetitions of the two
apart (F. Wilcoxon, Biometrics Bulletin 1, 1945). Repetitions of one process say nothing about another day's machine:
compare measurements made alternately on one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from headrace.errors import UserError

__all__ = ["Change", "compare_records", "rank_test"]

LEAST_CHANGE = 0.02  # of a median: smaller changes are not reported
LEAST_P = 0.05
_MOST_SAMPLES = 12  # of both together for which all ways to share the ranks are counted; beyond, the normal limit


@dataclass(frozen=True)
class Change:
    """One number in both measurements.

    Attributes:
        what: its name.
        before, after: medians, seconds.
        ratio: after / before; above 1 is slower.
        p: how likely ranks so far apart are without any difference; None where repetitions are too few to tell any
            difference from noise, fewer than four of each.
        real: beyond noise.
    """

    what: str
    before: float
    after: float
    ratio: float
    p: float | None
    real: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def compare_records(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[Change]]:
    """What is not the same about two bench records (machine, runner, bundle, …), and every number that both have.

    Raises:
        UserError: one of them is no bench record, or they have nothing in common.
    """
    for record in (before, after):
        if record.get("format") != "headrace-bench":
            raise UserError(f"a record of format {record.get('format')!r} has no times; expected headrace-bench")
    changes = []
    try:
        ours, theirs = _numbers(before), _numbers(after)
        differences = _differences(before, after)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"a record lacks what bench writes ({error}); measure again with --save") from None
    for what, samples in ours.items():
        if what in theirs:
            changes.append(_change(what, samples, theirs[what]))
    if not changes:
        raise UserError("the measurements have no prompt length and no depth in common; measure with the same -p, -d")
    return differences, changes


def rank_test(a: Sequence[float], b: Sequence[float]) -> float:
    """How likely ranks at least so uneven are when both come from one distribution, two-sided."""
    both = sorted([*a, *b])
    ranks = [both.index(x) + (both.count(x) + 1) / 2 for x in (*a, *b)]  # of equals, their mean
    found = abs(sum(ranks[: len(a)]) - (middle := len(a) * (len(both) + 1) / 2))
    if len(both) > _MOST_SAMPLES:
        spread = math.sqrt(len(a) * len(b) * (len(both) + 1) / 12)
        return math.erfc((found - 0.5) / spread / math.sqrt(2)) if found > 0.5 else 1.0
    ways = [abs(sum(some) - middle) >= found - 1e-9 for some in combinations(ranks, len(a))]
    return sum(ways) / len(ways)


def _change(what: str, before: Sequence[float], after: Sequence[float]) -> Change:
    x, y = (
        sorted(s)[len(s) // 2] if len(s) % 2 else sum(sorted(s)[len(s) // 2 - 1 :][:2]) / 2 for s in (before, after)
    )
    least = 2 / math.comb(len(before) + len(after), len(before))  # what the test says of ranks that are wholly apart
    p = rank_test(before, after) if least < LEAST_P else None
    far = abs(y / x - 1) > LEAST_CHANGE
    return Change(what, x, y, y / x, p, far and p is not None and p < LEAST_P)


def _numbers(record: Mapping[str, Any]) -> dict[str, list[float]]:
    found = {f"one prompt step of {record['step']['tokens']}": list(record["step"]["samples"])}
    for row in record["prompts"]:
        found[f"first token of {row['tokens']}"] = list(row["samples"])
    for row in record["decode"]:
        found[f"a token after {row['depth']}"] = [seconds / row["tokens"] for seconds in row["samples"]]
    found["load"] = [record["load"]["seconds"]]
    found["cold start"] = [record["load"]["cold_start_seconds"]]
    return found


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    told = []
    for name, x, y in (
        ("runner", before["runner"], after["runner"]),
        ("threads", before["settings"]["threads"], after["settings"]["threads"]),
        ("processor", before["machine"]["processor"], after["machine"]["processor"]),
        ("bundle", before["bundle"]["digest"][:12], after["bundle"]["digest"][:12]),
        ("weights", before["bundle"]["weight_bytes"], after["bundle"]["weight_bytes"]),
        *(
            (package, before["versions"].get(package), after["versions"].get(package))
            for package in {**before["versions"], **after["versions"]}
        ),
    ):
        if x != y:
            told.append(f"{name}: {x} → {y}")
    return told
