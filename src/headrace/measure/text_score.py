"""Perplexity of a model on text, and how near its predictions stay to those of a float reference.

Text is cut into windows from its beginning; each window is scored over its second half, where every token has at
least half a window of past. The reference is followed by the eager decoder, a layer at a time for all windows; of it
only the last hidden states are kept, from which the logits of a window are made when they are needed, so that the
divergence is over the whole vocabulary without a whole text's logits anywhere. Knows no quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from headrace.config import ModelConfig
from headrace.errors import CalibrationError, UserError, did_you_mean, reason
from headrace.model.decoder import Residual, block, embed, head
from headrace.model.fidelity import Fidelity, FidelityMeter, log_softmax, no_target
from headrace.model.ops import Array
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD, layer_weights
from headrace.progress import Progress, silent
from headrace.quantize.windows import LeanEager, causal_positions

__all__ = [
    "TASKS",
    "Reference",
    "TextScore",
    "evaluate_text",
    "first_windows",
    "follow",
    "parse_tasks",
    "read_text",
]

TASKS = ("ppl", "kl", "chat")
WINDOWS = 8
LENGTH = 512


@dataclass(frozen=True)
class TextScore:
    """What one text gave.

    Attributes:
        text: its name.
        windows, length: how it was cut.
        perplexity: of the model under test, over the second halves.
        fidelity: beside its reference; None without one.
    """

    text: str
    windows: int
    length: int
    perplexity: float
    fidelity: Fidelity | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        base = {"text": self.text, "windows": self.windows, "length": self.length, "perplexity": self.perplexity}
        return base if self.fidelity is None else {**base, **self.fidelity.to_dict()}


@dataclass(frozen=True)
class Reference:
    """The float model's last hidden states over the scored tokens, and what makes logits of them.

    Attributes:
        hidden: float32 (W, length/2, H), before the final norm.
        logits: a window's number → its logits, float32 (length/2, V).
    """

    hidden: Array
    logits: Callable[[int], Array]


def first_windows(ids: Sequence[int], name: str, length: int = LENGTH, count: int = WINDOWS) -> NDArray[np.int64]:
    """The text's first windows, int64 (at most count, length).

    Raises:
        CalibrationError: the text is shorter than one window.
        UserError: a window is shorter than 4 tokens, or none is wanted.
    """
    if length < 4 or count < 1:
        raise UserError(f"{count} windows of {length} tokens are not possible; expected 1 or more of 4 or more")
    have = min(count, len(ids) // length)
    if have < 1:
        raise CalibrationError(
            f"{name} has {len(ids)} tokens, which is less than one window of {length}; "
            "give more text or a shorter window"
        )
    return np.asarray(ids[: have * length], np.int64).reshape(have, length)


def follow(
    config: ModelConfig, weights: Callable[[str], Array], windows: NDArray[np.int64], progress: Progress = silent
) -> Reference:
    """Walk a float model over all windows (W, S), one layer of weights in memory.

    Args:
        config: the geometry.
        weights: gives a weight by canonical name, float32.
        windows: token ids, int64.
        progress: told how many layers are done.
    """
    at = causal_positions(config, windows.shape[1])
    table = {EMBEDDING: weights(EMBEDDING)}
    stream: Residual[Array] = embed(LeanEager(config, table), cast(Array, windows))
    del table
    for layer in range(config.num_layers):
        progress("reference", layer, config.num_layers)
        ops = LeanEager(config, {name: weights(name) for name in layer_weights(config, layer)})
        stream, _ = block(ops, layer, stream, at, None)
        stream = Residual(stream.settle(ops))
    progress("reference", config.num_layers, config.num_layers)
    hidden = stream.x[:, windows.shape[1] // 2 :].copy()
    last = LeanEager(config, {FINAL_NORM: weights(FINAL_NORM), HEAD: weights(HEAD)})
    return Reference(hidden, lambda window: cast(Array, head(last, Residual(hidden[window : window + 1]))[0]))


def evaluate_text(
    name: str,
    windows: NDArray[np.int64],
    logits: Callable[[Sequence[int]], NDArray[np.float32]],
    reference: Reference | None = None,
    progress: Progress = silent,
) -> TextScore:
    """Score a model on windows.

    Args:
        name: of the text, for the result.
        windows: token ids (W, S).
        logits: a window's ids → its logits (S, V), such as `LanguageModel.logits`.
        reference: a float model on the same windows, as `follow` gives it.
        progress: told how many windows are done.
    """
    meter = FidelityMeter()
    half = windows.shape[1] // 2
    losses = []
    for number, ids in enumerate(windows):
        progress(name, number, len(windows))
        scored = logits(ids.tolist())[half:]
        targets = np.append(ids[half + 1 :], no_target)
        if reference is not None:
            meter.add(reference.logits(number), scored, targets)
        else:
            losses.append(-log_softmax(scored[:-1])[np.arange(len(targets) - 1), targets[:-1]])
    progress(name, len(windows), len(windows))
    fidelity = None if reference is None else meter.result()
    perplexity = float(np.exp(np.concatenate(losses).mean())) if fidelity is None else fidelity.perplexity
    return TextScore(name, windows.shape[0], windows.shape[1], perplexity, fidelity)


def parse_tasks(tasks: str, known: Sequence[str] = TASKS) -> tuple[str, ...]:
    """ "ppl,kl" → ("ppl", "kl").

    Raises:
        UserError: a task is unknown.
    """
    wanted = tuple(task.strip() for task in tasks.split(",") if task.strip())
    for task in wanted:
        if task not in known:
            raise UserError(f"task {task!r} is unknown{did_you_mean(task, known)}; expected {', '.join(known)}")
    if not wanted:
        raise UserError(f"--tasks is empty; expected {', '.join(known)}")
    return wanted


def read_text(path: Path) -> str:
    """A text file, UTF-8.

    Raises:
        CalibrationError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"text {path} cannot be read ({reason(error)}); expected a UTF-8 text file") from None
