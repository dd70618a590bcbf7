"""evaluate: scores a bundle on texts, against its checkpoint where there is one; text_score.py does the scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.encodings import read_encodings
from headrace.bundle.folder import Bundle, open_bundle
from headrace.bundle.weights import WeightStore
from headrace.cluster import map_over
from headrace.errors import UserError
from headrace.measure.original import open_original
from headrace.measure.text_score import TextScore, evaluate_text, first_windows, follow, parse_tasks, read_text
from headrace.progress import Progress, silent
from headrace.quantize.simulate import Simulated, simulated_logits
from headrace.runners import Options, open_runner
from headrace.runtime.engine import Engine
from headrace.text.conversation import conversation
from headrace.text.tokenizer import Tokenizer, check_ids
from headrace.text.tokenizer_folder import load_tokenizer
from headrace.text.turns import turn_format

__all__ = ["evaluate_bundle", "evaluate_on"]

Score = Callable[[Sequence[int]], NDArray[np.float32]]
SIMULATIONS = ("a16", "kv8")


def evaluate_bundle(
    path: Path,
    texts: Sequence[Path],
    *,
    tasks: str | None = None,
    checkpoint: Path | None = None,
    adapters: Sequence[Path] = (),
    windows: int = 8,
    length: int = 512,
    simulate: str | None = None,
    runner: str | None = "host",
    threads: int | None = None,
    progress: Progress = silent,
) -> list[TextScore]:
    """Score a bundle on texts, each apart.

    Args:
        path: the bundle.
        texts: UTF-8 files.
        tasks: of "ppl", "kl" and "chat"; by default the first two where there is something to compare with, else
            "ppl". With "chat" each text is scored a second time, as conversations in the model's turn format.
        checkpoint: what it was made of; needed for "kl", unless there is something to simulate.
        adapters: LoRA adapters that were merged into the checkpoint.
        windows: most windows of a text, from its beginning.
        length: tokens of a window; its second half is scored.
        simulate: "a16", "kv8" or "a16,kv8": instead of the host runtime, the bundle's weights in float arithmetic with
            results, or keys and values, on the device's static grids. Without a checkpoint they are compared with the
            same weights on no grid: what a16 and KV8 cost each on their own.
        runner: who computes.
        threads: of the runner.
        progress: told how far it is.

    Raises:
        UserError: a task or simulation is unknown, or has no reference; a text is missing or too short; the model has
            no turn format.
        BundleError: a simulation needs encodings and the bundle has none.
    """
    compares = checkpoint is not None or bool(simulate)
    wanted = parse_tasks(tasks if tasks is not None else "ppl,kl" if compares else "ppl")
    if "kl" in wanted and not compares:
        raise UserError("kl compares with the checkpoint; expected --checkpoint PATH")
    bundle = open_bundle(path)
    tokenizer = load_tokenizer(bundle.root)
    # All texts are read and cut before the first is scored.
    cut = [(file.name, first_windows(tokenizer.encode(read_text(file)), str(file), length, windows)) for file in texts]
    for _, ids in cut:
        check_ids(ids.ravel().tolist(), bundle.config.vocab_size)
    if "chat" in wanted:
        cut = [kind for name, ids in cut for kind in ((name, ids), (f"{name} as chat", _chats(bundle, tokenizer, ids)))]
    store = bundle.weights()
    score = _simulated(bundle, store, simulate) if simulate else _runs(bundle, runner, threads)
    config, weights = bundle.config, store.read
    if checkpoint is not None:
        source = open_original(bundle, checkpoint, adapters)
        config, weights = source.config, lambda name: source.tensor(name).load()
    scores = []
    for name, ids in cut:
        reference = follow(config, weights, ids, progress) if "kl" in wanted else None
        scores.append(evaluate_text(name, ids, score, reference, progress))
    return scores


def evaluate_on(
    address: str | None, path: Path, texts: Sequence[Path], *, threads: int | None = None, **options: Any
) -> list[TextScore]:
    """`evaluate_bundle`, on a Ray cluster whose nodes see the same files: a text each.

    Args:
        address: of the cluster; None: here.
        path, texts: as for `evaluate_bundle`.
        threads: on a cluster each text takes as many of its node's processors, 1 by default.
        options: the others of `evaluate_bundle`.

    Raises:
        UserError: as for `evaluate_bundle`.
        TargetError: there is no cluster, or it lost a piece of the work too often.
    """
    if address is None:
        return evaluate_bundle(path, texts, threads=threads, **options)
    cpus, progress = threads or 1, options.pop("progress", silent)
    checkpoint = options.pop("checkpoint", None)
    work = partial(_scoring, path.resolve(), threads=cpus, checkpoint=checkpoint and checkpoint.resolve(), **options)
    scores: list[TextScore] = []
    for number, told in enumerate(map_over(address, work, [text.resolve() for text in texts], cpus=cpus)):
        scores += told
        progress("texts", number + 1, len(texts))
    return scores


@contextmanager
def _scoring(path: Path, **options: Any) -> Iterator[Callable[[Path], list[TextScore]]]:
    yield lambda text: evaluate_bundle(path, [text], **options)


def _runs(bundle: Bundle, runner: str | None, threads: int | None) -> Score:
    return Engine(open_runner(bundle, runner, Options(threads=threads))).score


def _chats(bundle: Bundle, tokenizer: Tokenizer, windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same windows as conversations, as long as before: turn marks push some text out."""
    turns = turn_format(tokenizer, bundle.read_json("generation_config.json"))
    if turns.is_raw:
        raise UserError(f"chat needs a turn format, and {bundle.root} has none; expected --tasks ppl,kl")
    length = windows.shape[1]
    talks = [conversation(tokenizer, turns, ids.tolist())[:length] for ids in windows]
    kept = [talk for talk in talks if len(talk) == length]
    if not kept:
        raise UserError(f"the turn format of {bundle.root} takes no questions and answers in turns; leave chat out")
    return np.array(kept)


def _simulated(bundle: Bundle, store: WeightStore, kinds: str) -> Score:
    chosen = {kind.strip() for kind in kinds.split(",")}
    if not chosen <= set(SIMULATIONS):
        raise UserError(f"--simulate {kinds!r} is unknown; expected a16, kv8 or a16,kv8")
    run = Simulated(
        bundle.config,
        store.read,
        read_encodings(bundle.root / "encodings.json"),
        activations="a16" in chosen,
        cache="kv8" in chosen,
    )
    return lambda ids: simulated_logits(run, np.asarray(ids), np.arange(len(ids)))
