"""Runs device graphs token by token, the way Genie does: the loop that Genie's answers are held against.

Whoever executes a graph is handed in: ONNX Runtime on the CPU, or the HTP emulator. This file does not know which, nor
what tokens mean.

    one step of S tokens over context C, n tokens past:

    cache    0 … n−1 past │ n … C−S−1 empty (zero point)      mask columns 0 … n−1 and C−S … C−S+s: attend
    columns  0 …                        C−S−1 │ C−S … C−1 the step's own
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrace.config import ModelConfig
from headrace.errors import ContextFull, TargetError
from headrace.plan import Part, graph_name
from headrace.rope import rope_angles
from headrace.targets.qnn_check import PortEncoding

__all__ = ["DeviceLoop", "Run", "choose_context", "longest_prompt", "prompt_steps"]

Codes: TypeAlias = NDArray[Any]
Run: TypeAlias = Callable[[str, Mapping[str, Codes]], Mapping[str, Codes]]

ATTEND = 65535
EMPTY = 128  # the cache's zero point: such keys and values are 0


def choose_context(past: int, length: int, contexts: Sequence[int]) -> int | None:
    """The smallest context for a step of `length` tokens after `past`; None when all are full. The sum is strictly
    below the context, as measured in Genie."""
    return next((context for context in sorted(contexts) if past + length < context), None)


def prompt_steps(count: int, past: int, lengths: Sequence[int], contexts: Sequence[int]) -> list[tuple[int, int, int]]:
    """How Genie cuts `count` tokens into steps: chunks of the largest length, the rest with the smallest that fits.

    Returns:
        (tokens used, length S, context C) of each step.

    Raises:
        ContextFull: the last step does not fit: Genie would end with status 4 after having run the others.
    """
    steps, done = [], 0
    while done < count:
        left = count - done
        length = next((s for s in sorted(lengths) if s >= left), max(lengths))
        context = choose_context(past + done, length, contexts)
        if context is None:
            raise ContextFull(past + count, past + longest_prompt(past, lengths, contexts) + 1)
        steps.append((min(left, length), length, context))
        done += min(left, length)
    return steps


def longest_prompt(past: int, lengths: Sequence[int], contexts: Sequence[int]) -> int:
    """The most tokens that `prompt_steps` takes after `past`: the last step, padding included, must end below the
    largest context. 3969 for S 128 and 1 at context 4096."""
    chunk, last = max(lengths), max(contexts) - 1
    best = 0
    for length in lengths:
        room = last - past - length  # tokens before the last step, at most
        if room >= 0:
            best = max(best, room // chunk * chunk + length)
    return best


class DeviceLoop:
    """A conversation over device graphs.

    Args:
        config, parts: the geometry and its parts.
        lengths, contexts: every S and C there are graphs for.
        encodings: of every quantized port, by port name.
        run: executes a graph by name: codes in, codes out.
        pad: the id that fills a step's unused places.

    Raises:
        TargetError: an encoding is missing.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: Sequence[Part],
        lengths: Sequence[int],
        contexts: Sequence[int],
        encodings: Mapping[str, PortEncoding],
        run: Run,
        *,
        pad: int = 0,
    ) -> None:
        for name in ("position_ids_cos", "position_ids_sin", "attention_mask", "logits"):
            if name not in encodings:
                raise TargetError(f"the encodings lack {name!r}; expected every port of the device graphs")
        self.config = config
        self.parts = tuple(parts)
        self.lengths = tuple(lengths)
        self.contexts = tuple(contexts)
        self.run = run
        self.pad = pad
        self.past = 0
        self._logits = encodings["logits"]
        angles = rope_angles(config, max(contexts))
        self._tables = [
            _floored(table, encodings[f"position_ids_{kind}"])
            for table, kind in ((np.cos(angles), "cos"), (np.sin(angles), "sin"))
        ]
        kv, d, room = config.num_kv_heads, config.head_dim, max(contexts)
        self._keys = {i: np.full((kv, 1, d, room), EMPTY, np.uint8) for part in parts for i in part.layers}
        self._values = {i: np.full((kv, 1, room, d), EMPTY, np.uint8) for part in parts for i in part.layers}

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Take in tokens → the logits after each of them, (len(ids), V).

        Raises:
            ContextFull: they do not fit; nothing was taken in.
        """
        rows, done = [], 0
        for used, length, context in prompt_steps(len(ids), self.past, self.lengths, self.contexts):
            codes = self._step(ids[done : done + used], length, context)[0, :used]
            rows.append(
                (codes.astype(np.float32) - np.float32(self._logits.zero_point)) * np.float32(self._logits.scale)
            )
            done += used
        return np.concatenate(rows)

    def rewind(self, past: int) -> None:
        """Forget all but the first `past` tokens."""
        if not 0 <= past <= self.past:
            raise ValueError(f"cannot rewind {self.past} tokens to {past}")
        for i in self._keys:
            self._keys[i][..., past:] = EMPTY
            self._values[i][:, :, past:] = EMPTY
        self.past = past

    def _step(self, ids: Sequence[int], length: int, context: int) -> Codes:
        n, own = self.past, context - length
        tokens = np.full((1, length), self.pad, np.int32)
        tokens[0, : len(ids)] = ids
        mask = np.zeros((1, 1, length, context), np.uint16)
        mask[..., :n] = ATTEND
        mask[0, 0, :, own:] = np.tri(length, dtype=np.uint16) * ATTEND
        values: dict[str, Codes] = {"input_ids": tokens, "attention_mask": mask}
        for kind, table in zip(("cos", "sin"), self._tables):
            rows = np.minimum(np.arange(n, n + length), len(table) - 1)  # places past the end are padding
            values[f"position_ids_{kind}"] = table[rows][None, None]
        for part in self.parts:
            for i in part.layers:
                values[f"past_key_{i}_in"] = self._keys[i][..., :own]
                values[f"past_value_{i}_in"] = self._values[i][:, :, :own]
            made = self.run(graph_name(part, length, context), {name: values[name] for name in _inputs(part)})
            values |= made
        used = len(ids)
        for i in self._keys:
            self._keys[i][..., n : n + used] = values[f"past_key_{i}_out"][..., :used]
            self._values[i][:, :, n : n + used] = values[f"past_value_{i}_out"][:, :, :used]
        self.past += used
        return values["logits"]


def _inputs(part: Part) -> list[str]:
    names = ["input_ids" if part.embeds else f"hidden_{part.number - 1}"]
    if part.layers:
        names += ["position_ids_cos", "position_ids_sin", "attention_mask"]
    for i in part.layers:
        names += [f"past_key_{i}_in", f"past_value_{i}_in"]
    return names


def _floored(table: NDArray[np.float64], encoding: PortEncoding) -> NDArray[np.uint16]:
    """Codes of a rotary table as Genie makes them: floored, not rounded, and all in double precision (measured; in
    single precision 1 position of 20 differs by a code)."""
    codes = np.floor(table / float(np.float32(encoding.scale))) + encoding.zero_point
    limited: NDArray[np.uint16] = np.clip(codes, 0, 65535).astype(np.uint16)
    return limited
