"""What a bundle is worth on text: binds bundle, checkpoint and texts to the scoring of evaluate.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.bundle import Bundle, open_bundle
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.errors import UserError
from headrace.measure.evaluate import TextScore, evaluate_text, first_windows, follow, parse_tasks, read_text
from headrace.progress import Progress, silent
from headrace.quantize.encodings import read_encodings
from headrace.quantize.recipe import Recipe
from headrace.quantize.rotation import Rotated
from headrace.quantize.simulate import Simulated, simulated_logits
from headrace.runtime.engine import Engine
from headrace.runtime.tokenizer import load_tokenizer

__all__ = ["evaluate_bundle"]

Score = Callable[[Sequence[int]], NDArray[np.float32]]
SIMULATIONS = ("a16", "kv8")


def evaluate_bundle(
    path: Path,
    texts: Sequence[Path],
    *,
    tasks: str = "ppl",
    checkpoint: Path | None = None,
    windows: int = 8,
    length: int = 512,
    simulate: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> list[TextScore]:
    """Score a bundle on texts, each apart.

    Args:
        path: the bundle.
        texts: UTF-8 files.
        tasks: "ppl", "kl" or both.
        checkpoint: what it was made of; needed for "kl".
        windows: most windows of a text, from its beginning.
        length: tokens of a window; its second half is scored.
        simulate: "a16", "kv8" or "a16,kv8": the float checkpoint on the device's static grids instead of the bundle.
        threads: of the host runtime.
        progress: told how far it is.

    Raises:
        UserError: a task or simulation is unknown, or has no checkpoint; a text is missing or too short.
    """
    wanted = parse_tasks(tasks)
    if ("kl" in wanted or simulate) and checkpoint is None:
        raise UserError("kl and --simulate compare with the checkpoint; expected --checkpoint PATH")
    bundle = open_bundle(path)
    tokenizer = load_tokenizer(bundle.root)
    # All texts are read and cut before the first is scored.
    cut = [(file.name, first_windows(tokenizer.encode(read_text(file)), str(file), length, windows)) for file in texts]
    source = None if checkpoint is None else open_checkpoint(checkpoint)
    score = _simulated(bundle, source, simulate) if simulate and source else _host(bundle, threads)
    scores = []
    for name, ids in cut:
        reference = follow(source, ids, progress) if source is not None and "kl" in wanted else None
        scores.append(evaluate_text(name, ids, score, reference, progress))
    return scores


def _host(bundle: Bundle, threads: int | None) -> Score:
    from headrace.targets.onnxruntime import HostRunner

    return Engine(HostRunner(bundle, threads=threads)).score


def _simulated(bundle: Bundle, source: Checkpoint, kinds: str) -> Score:
    chosen = {kind.strip() for kind in kinds.split(",")}
    if not chosen <= set(SIMULATIONS):
        raise UserError(f"--simulate {kinds!r} is unknown; expected a16, kv8 or a16,kv8")
    model = Rotated(source) if Recipe.from_dict(bundle.recipe).rotate else source
    run = Simulated(
        bundle.config,
        lambda name: model.tensor(name).load(),
        read_encodings(bundle.root / "encodings.json"),
        activations="a16" in chosen,
        cache="kv8" in chosen,
    )
    return lambda ids: simulated_logits(run, np.asarray(ids), np.arange(len(ids)))
