"""Multiple-choice questions by the likelihood of their answers: which letter a model finds likeliest after a prompt.

A subject's worked examples are the same for all its items: they are computed once, since prompts that begin alike
share what is in the cache. Where a prompt is too long for the context, worked examples are left out, the last first.
Knows no file and no runner: only "what may come next after these tokens".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ContextFull
from headrace.measure.intervals import bootstrap_macro, mcnemar, wilson
from headrace.measure.item_sets import LETTERS, SHOTS, ItemSet, Subject
from headrace.measure.likelihood import Encode, NextLogits, likelihoods, split_pair

__all__ = ["Choices", "answer_subject", "choices_report"]


@dataclass(frozen=True)
class Choices:
    """What a model chose in a subject.

    Attributes:
        subject: its name.
        answers: the right options, (items,).
        chosen: the likeliest ones, (items,).
        log_likelihoods: of all options, float64 (items, 4).
        shots: worked examples that there was room for.
    """

    subject: str
    answers: NDArray[np.int64]
    chosen: NDArray[np.int64]
    log_likelihoods: NDArray[np.float64]
    shots: int = SHOTS

    @property
    def right(self) -> NDArray[np.bool_]:
        """Of each item."""
        return np.asarray(self.answers == self.chosen)


def answer_subject(
    chosen_set: ItemSet,
    subject: Subject,
    encode: Encode,
    following: NextLogits,
    room: int,
    *,
    shots: int = SHOTS,
) -> Choices:
    """Ask a model all items of a subject.

    Args:
        chosen_set: how prompts are written.
        subject: the items.
        encode: text → ids, with the begin token where the model wants one.
        following: the model.
        room: most tokens of a prompt.
        shots: worked examples.

    Raises:
        ContextFull: an item does not fit even without worked examples.
    """
    beginning, used = _beginning(chosen_set, subject, encode, room, shots)
    pairs = [
        split_pair(encode, beginning + chosen_set.ask(item), answer)
        for item in subject.items
        for answer in chosen_set.answers()
    ]
    found = np.array([one.log for one in likelihoods(pairs, following)]).reshape(-1, len(LETTERS))
    answers = np.array([item.answer for item in subject.items])
    return Choices(subject.name, answers, found.argmax(1), found, used)


def _beginning(chosen_set: ItemSet, subject: Subject, encode: Encode, room: int, shots: int) -> tuple[str, int]:
    """Worked examples, as many as leave room for the longest item, and how many they are."""
    asked = [chosen_set.ask(item) + chosen_set.answers()[0] for item in subject.items]
    for count in range(min(shots, len(subject.examples)), -1, -1):
        beginning = chosen_set.examples(subject, count)
        needed = max(len(encode(beginning + text)) for text in asked)
        if needed <= room:
            return beginning, count
    raise ContextFull(needed, room)


def choices_report(
    task: str, subjects: Sequence[Choices], reference: Sequence[Choices] | None = None
) -> dict[str, Any]:
    """Accuracy per subject and together, with 95 % intervals, beside a reference if there is one.

    Returns:
        {task, shots (the fewest of a subject), subjects [{subject, shots, items, right, accuracy, low, high}], items,
        right, accuracy, low, high (over items, Wilson), macro {accuracy, low, high} (mean over subjects, bootstrap)};
        with a reference, everywhere `reference` {right, accuracy, low, high} and `flips` {lost, gained, changed, p}
        (McNemar).
    """
    rows = []
    for number, one in enumerate(subjects):
        other = None if reference is None else reference[number]
        rows.append({"subject": one.subject, "shots": one.shots, **_told([one], None if other is None else [other])})
    return {
        "task": task,
        "shots": min(one.shots for one in subjects),
        **_told(subjects, reference),
        "macro": _macro(subjects) | ({} if reference is None else {"reference": _macro(reference)}),
        "subjects": rows,
    }


def _told(subjects: Sequence[Choices], reference: Sequence[Choices] | None) -> dict[str, Any]:
    report: dict[str, Any] = {"items": sum(len(s.answers) for s in subjects), **_share(subjects)}
    if reference is not None:
        right, before = (np.concatenate([s.right for s in some]) for some in (subjects, reference))
        lost, gained = int((before & ~right).sum()), int((~before & right).sum())
        changed = sum(int((a.chosen != b.chosen).sum()) for a, b in zip(subjects, reference, strict=True))
        report["reference"] = _share(reference)
        report["flips"] = {"lost": lost, "gained": gained, "changed": changed, "p": mcnemar(lost, gained)}
    return report


def _share(subjects: Sequence[Choices]) -> dict[str, Any]:
    right, total = sum(int(s.right.sum()) for s in subjects), sum(len(s.answers) for s in subjects)
    low, high = wilson(right, total)
    return {"right": right, "accuracy": right / total, "low": low, "high": high}


def _macro(subjects: Sequence[Choices]) -> dict[str, float]:
    low, high = bootstrap_macro([s.right for s in subjects])
    return {"accuracy": float(np.mean([s.right.mean() for s in subjects])), "low": low, "high": high}
