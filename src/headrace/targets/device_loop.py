"""Runs device graphs token by token, the way Genie does: the one walk that everything over device graphs takes.

Whoever executes a graph is handed in: ONNX Runtime on the CPU (device.py), or the HTP emulator (qnn.py). This file does
not know which, nor what tokens mean.

    ids ─ padded to S ─► part 1 ─► part 2 … ─► logits        of the smallest context C with past + S < C
                           ▲  │
      past slots 0 … n−1 ──┘  └──► the step's keys and values ─► the next step's slots

    cache slots    0 … n−1 past │ n … C−S−1 empty (zero point)      mask: columns 0 … n−1 and C−S … C−S+s attend
    mask columns   0 …                        C−S−1 │ C−S … C−1 the step's own
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.encodings import Encoding
from headrace.config import ModelConfig
from headrace.errors import ContextFull, TargetError
from headrace.model.rope import rope_angles
from headrace.plan import GraphStyle, Part, graph_name, ports
from headrace.runtime.runner import Logits

__all__ = ["DeviceLoop", "Run", "choose_graph", "longest_prompt", "prompt_steps"]

Codes: TypeAlias = NDArray[Any]
Run: TypeAlias = Callable[[str, Mapping[str, Codes]], Mapping[str, Codes]]

ATTEND = 65535
EMPTY = 128  # the cache's zero point: such keys and values are 0


def choose_graph(
    tokens: int, past: int, lengths: Sequence[int], contexts: Sequence[int], *, fill: bool = False
) -> tuple[int, int] | None:
    """(S, C) of the graph that runs next: the smallest S that takes all tokens, or the largest there is; the smallest C
    with past + S strictly below C, as measured in Genie. None: all contexts are full.

    Args:
        tokens: how many are left to run.
        past: how many are in the cache.
        lengths, contexts: of the graphs there are; every S has every C.
        fill: where Genie gives up, go on with smaller S while they fit at all, and up to the very last place.
    """
    rising = sorted(lengths)
    wanted = next((s for s in rising if s >= tokens), rising[-1])
    sizes = [s for s in reversed(rising) if s <= wanted] if fill else [wanted]
    for s in sizes:
        for c in sorted(contexts):
            if past + s < c:
                return s, c
    return next(((s, max(contexts)) for s in sizes if fill and past + s == max(contexts)), None)


def prompt_steps(
    count: int, past: int, lengths: Sequence[int], contexts: Sequence[int], *, fill: bool = False
) -> list[tuple[int, int, int]]:
    """How Genie cuts `count` tokens into steps: chunks of the largest length, the rest with the smallest that fits.

    Returns:
        (tokens used, length S, context C) of each step. `fill`: see `choose_graph`.

    Raises:
        ContextFull: the last step does not fit: Genie would end with status 4 after having run the others.
    """
    steps, done = [], 0
    while done < count:
        chosen = choose_graph(count - done, past + done, lengths, contexts, fill=fill)
        if chosen is None:
            room = max(contexts) if fill else past + longest_prompt(past, lengths, contexts) + 1
            raise ContextFull(past + count, room)
        used = min(count - done, chosen[0])
        steps.append((used, *chosen))
        done += used
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
        run: executes a graph by name: codes in, codes out. Arrays given to it are contiguous and change with the next
            step; what it gives back is read before that.
        pad: the id that fills a step's unused places.
        fill: use the context to its last place, which Genie does not (see `choose_graph`).

    Attributes:
        past: tokens taken in.

    Raises:
        TargetError: an encoding is missing.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: Sequence[Part],
        lengths: Sequence[int],
        contexts: Sequence[int],
        encodings: Mapping[str, Encoding],
        run: Run,
        *,
        pad: int = 0,
        fill: bool = False,
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
        self.fill = fill
        self.past = 0
        self._logits = encodings["logits"]
        angles = rope_angles(config, max(contexts))
        # Floored, not rounded, and all in double precision, as measured in Genie: in single precision 1 position of 20
        # differs by a code.
        self._tables = {
            "position_ids_cos": encodings["position_ids_cos"].floor(np.cos(angles)),
            "position_ids_sin": encodings["position_ids_sin"].floor(np.sin(angles)),
        }
        self._graphs: dict[tuple[int, int], _Graphs] = {}
        # The longest past that a graph reads is the cache, which the others follow. Beyond `past` it is empty.
        self._cache = self._open(min(lengths), max(contexts)).slots
        self._room = max(contexts) - min(lengths)

    def feed(self, ids: Sequence[int] | NDArray[np.int64], wanted: NDArray[np.int64] | None = None) -> Logits:
        """Take in tokens → the logits after the wanted ones among them, or after each: float32 (len(wanted), V).

        Raises:
            ContextFull: they do not fit; nothing was taken in.
        """
        steps = prompt_steps(len(ids), self.past, self.lengths, self.contexts, fill=self.fill)
        wanted = np.arange(len(ids)) if wanted is None else wanted
        out = np.empty((len(wanted), self.config.vocab_size), np.float32)
        done = 0
        for used, length, context in steps:
            codes = self._step(ids[done : done + used], self._open(length, context))
            here = (wanted >= done) & (wanted < done + used)
            out[here] = self._logits.dequantize(codes[0, wanted[here] - done])
            done += used
        return out

    def rewind(self, past: int) -> None:
        """Forget all but the first `past` tokens."""
        if not 0 <= past <= self.past:
            raise ValueError(f"cannot rewind {self.past} tokens to {past}")
        for name, slots in self._cache.items():
            _places(slots, name, past, self.past)[...] = EMPTY
        for graphs in self._graphs.values():
            graphs.synced = min(graphs.synced, past)
        self.past = past

    @property
    def position_bytes(self) -> int:
        """Bytes of one position's keys and values over all layers."""
        return 2 * self.config.num_layers * self.config.kv_size

    def read(self, start: int, stop: int) -> bytes:
        """Keys and values of positions start … stop−1 as they lie in the cache, port after port."""
        return b"".join(_places(slots, name, start, stop).tobytes() for name, slots in self._cache.items())

    def write(self, start: int, content: bytes) -> None:
        """Put back what `read` gave, at `start`; everything behind it is forgotten."""
        self.rewind(min(start, self.past))
        count, at = len(content) // self.position_bytes, 0
        for name, slots in self._cache.items():
            places = _places(slots, name, start, start + count)
            part = np.frombuffer(content, slots.dtype, places.size, at)
            places[...] = part.reshape(places.shape)
            at += part.nbytes
        self.past = start + count

    def _step(self, ids: Sequence[int] | NDArray[np.int64], graphs: _Graphs) -> Codes:
        n, used, length, own = self.past, len(ids), graphs.length, graphs.context - graphs.length
        tokens = np.full((1, length), self.pad, np.int32)
        tokens[0, :used] = ids
        mask = np.zeros((1, 1, length, graphs.context), np.uint16)
        mask[..., :n] = ATTEND
        mask[..., own:] = np.tri(length, dtype=np.uint16) * np.uint16(ATTEND)
        graphs.follow(self._cache, n)
        values: dict[str, Codes] = {"input_ids": tokens, "attention_mask": mask, **graphs.slots}
        values |= {name: table[None, None, n : n + length] for name, table in self._tables.items()}
        for name, inputs in graphs.parts:
            values |= self.run(name, {port: values[port] for port in inputs})
        self.past += used  # first: a step that is interrupted below is forgotten whole by `rewind`
        kept = min(used, self._room - n)  # the token at the very last place is nobody's past
        for name, slots in self._cache.items():
            made = values[f"{name.removesuffix('_in')}_out"]
            _places(slots, name, n, n + kept)[...] = _places(made, name, 0, kept)
        return values["logits"]

    def _open(self, length: int, context: int) -> _Graphs:
        """Made when first needed: a long context costs nothing until a conversation gets there."""
        key = (length, context)
        if key not in self._graphs:
            self._graphs[key] = _Graphs(self.config, self.parts, length, context)
        return self._graphs[key]


class _Graphs:
    """The graphs of all parts for one S and C.

    Attributes:
        parts: each graph's name and its inputs.
        slots: the past they read, by port name. Slots below `synced` hold what the cache holds, those from `touched` on
            are empty.
    """

    def __init__(self, config: ModelConfig, parts: Sequence[Part], length: int, context: int) -> None:
        self.length, self.context = length, context
        self.parts: list[tuple[str, list[str]]] = []
        self.slots: dict[str, Codes] = {}
        self.synced = self.touched = 0
        for part in parts:
            inputs, _ = ports(config, part, GraphStyle.DEVICE, length=length, context=context)
            self.parts.append((graph_name(part, length, context), [port.name for port in inputs]))
            for port in inputs:
                if port.name.startswith("past_"):
                    self.slots[port.name] = np.full([int(n) for n in port.shape], EMPTY, port.dtype)

    def follow(self, cache: Mapping[str, Codes], past: int) -> None:
        """Bring slots 0 … past−1 up to date and empty those beyond."""
        self.touched = max(past, self.touched)
        for name, slots in self.slots.items():
            _places(slots, name, self.synced, self.touched)[...] = _places(cache[name], name, self.synced, self.touched)
        self.synced = self.touched = past


def _places(cache: Codes, name: str, start: int, stop: int) -> Codes:
    """Positions start … stop−1: the last axis of keys, the one before of values."""
    return cache[..., start:stop] if name.startswith("past_key") else cache[..., start:stop, :]
