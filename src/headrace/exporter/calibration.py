"""Calibration windows: text as it is, and every second window as a conversation in the model's own turn format.

A chat model on a device is asked in its turn format, whose marks no text holds; SmolLM2's first token is such a mark,
and every later one looks at it. docs/LOG.md has what it gains. Knows no weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.quantize.windows import cut_windows
from headrace.text.conversation import conversation
from headrace.text.tokenizer import Tokenizer
from headrace.text.turns import TurnFormat

__all__ = ["calibration_windows"]


def calibration_windows(
    tokenizer: Tokenizer, turns: TurnFormat, texts: Sequence[str], count: int, length: int
) -> NDArray[np.int64]:
    """Windows of all texts, an equal share of each, int64 (windows, length).

    Args:
        tokenizer: the model's vocabulary.
        turns: its turn format; without one all windows are text.
        texts: one or more.
        count: windows wanted, at least one of each text; fewer when texts are short.
        length: tokens of a window.

    Raises:
        CalibrationError: a text is shorter than a window.
    """
    share = -(-count // len(texts))
    cut = [cut_windows(np.array(tokenizer.encode(text), np.int64), length, share) for text in texts]
    windows = np.concatenate(cut)[: max(count, len(cut))]
    if not turns.is_raw:
        for window in windows[1::2]:
            talk = conversation(tokenizer, turns, window.tolist())
            if len(talk) >= length:
                window[:] = talk[:length]
    return windows
