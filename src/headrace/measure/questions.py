"""A bundle, and the checkpoint it was made of, on multiple-choice sets: binds files and models to choices.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.folder import open_bundle
from headrace.cluster import map_over
from headrace.errors import UserError
from headrace.language_model import LanguageModel, load
from headrace.measure.choices import Choices, answer_subject, choices_report
from headrace.measure.item_sets import SHOTS, ItemSet, Subject, open_set
from headrace.measure.likelihood import NextLogits
from headrace.measure.original import open_original
from headrace.measure.shared_prefix import next_logits
from headrace.progress import Progress, silent

__all__ = ["ask_bundle", "following"]

Asked: TypeAlias = tuple[ItemSet, Subject]
Found: TypeAlias = tuple[Choices, Choices | None]  # the bundle's, and the checkpoint's where it is asked too


def ask_bundle(
    path: Path,
    tasks: Sequence[str],
    data: Path | None,
    *,
    checkpoint: Path | None = None,
    adapters: Sequence[Path] = (),
    shots: int = SHOTS,
    runner: str | None = None,
    threads: int | None = None,
    ray: str | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Ask a bundle the items of sets, each answer chosen by its likelihood.

    Args:
        path: the bundle.
        tasks: names of `item_sets.SETS`.
        data: a set's folder, or the folder that has one of each set's name.
        checkpoint: what the bundle was made of: asked the same, for flips.
        adapters: LoRA adapters that were merged into the checkpoint.
        shots: worked examples before each question.
        runner: who computes; the fastest that is installed by default.
        threads: of the runner.
        ray: address of a cluster that does the subjects; each takes `threads` of a node's processors, or 1.
        progress: told how many subjects are done.

    Returns:
        `choices_report` of each task.

    Raises:
        UserError: a folder is missing or has another layout.
        ContextFull: an item does not fit the context.
    """
    if data is None:
        raise UserError(f"{tasks[0]} needs its items; expected --data FOLDER in the set's published layout")
    opened = [open_set(task, data) for task in tasks]  # all are read before the first is asked
    cpus = threads or 1
    given = checkpoint and checkpoint.resolve()
    work = partial(_asking, path.resolve(), given, tuple(adapters), shots, runner, threads if ray is None else cpus)
    asked = [(chosen_set, subject) for chosen_set, subjects in opened for subject in subjects]
    answered = map_over(ray, work, asked, cpus=cpus)
    reports = []
    for chosen_set, subjects in opened:
        found = []
        for number in range(len(subjects)):
            progress(chosen_set.name, number, len(subjects))
            found.append(next(answered))
        progress(chosen_set.name, len(subjects), len(subjects))
        before = [reference for _, reference in found if reference is not None]
        reports.append(choices_report(chosen_set.name, [own for own, _ in found], before or None))
    return reports


@contextmanager
def _asking(
    path: Path,
    checkpoint: Path | None,
    adapters: Sequence[Path],
    shots: int,
    runner: str | None,
    threads: int | None,
) -> Iterator[Callable[[Asked], Found]]:
    """The function that answers a subject, with the bundle open."""
    source = None if checkpoint is None else open_original(open_bundle(path), checkpoint, adapters)
    with load(path, runner=runner, threads=threads) as model:
        ask = following(model)

        def answer(asked: Asked) -> Found:
            common = (*asked, model.encode_raw)
            own = answer_subject(*common, ask, model.context - 1, shots=shots)
            if source is None:
                return own, None

            def weights(name: str) -> NDArray[np.float32]:
                return source.tensor(name).load()

            def reference(prompts: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
                return next_logits(source.config, weights, prompts)

            return own, answer_subject(*common, reference, model.context - 1, shots=shots)

        yield answer


def following(model: LanguageModel) -> NextLogits:
    """What may come next after prompts; what a prompt has in common with an earlier one is not computed again."""

    def ask(prompts: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        engine = model.engine
        for ids in prompts:
            sequence = engine.open(ids)
            try:
                yield engine.extend(sequence)
            finally:
                engine.release(sequence)

    return ask
