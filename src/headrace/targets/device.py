"""DeviceRunner: the phone's own graphs on ONNX Runtime's CPU kernels, driven as Genie drives them.

    ids ─ padded to S ─► part 1 ─► part 2 … ─► logits        of the smallest context C with past + S < C
                           ▲  │
      past slots 0 … n−1 ──┘  └──► the step's keys and values ─► the cache, then the next step's slots

The past of a graph has C − S slots, filled from 0; empty ones hold 128, which is zero. The step's own tokens are the
last S columns of the mask: 65535 attends, 0 does not. cos and sin are rounded down. Meant for checking, not for speed.
Knows sessions and buffers, no text and no compiler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
from numpy.typing import NDArray

from headrace.bundle import Bundle
from headrace.config import ModelConfig
from headrace.errors import BundleError, ContextFull
from headrace.plan import GraphStyle, Part, graph_name, ports
from headrace.quantize.encodings import ANGLE, Encoding, port_encodings, read_encodings
from headrace.rope import rope_angles
from headrace.runtime.engine import Logits
from headrace.targets.onnxruntime import default_threads, make_session

__all__ = ["DEVICE_FOLDER", "DeviceRunner", "choose_graph", "exact_session"]

DEVICE_FOLDER = "device"
ATTEND = 65535
EMPTY = 128  # the zero point of keys and values

Codes = NDArray[np.uint8]


def choose_graph(lengths: Sequence[int], contexts: Sequence[int], tokens: int, past: int) -> tuple[int, int] | None:
    """(S, C) of the graph that runs next: the smallest S that takes all tokens, or the largest S; the smallest C with
    past + S < C, as Genie has it. Near the end of the last context, where Genie gives up, smaller steps go on while
    they fit at all; None when nothing does.

    Args:
        lengths: tokens a step, of the graphs there are.
        contexts: their contexts; every length has every context.
        tokens: how many are left to run.
        past: how many are in the cache.
    """
    rising = sorted(lengths)
    wanted = next((s for s in rising if s >= tokens), rising[-1])
    for s in [s for s in reversed(rising) if s <= wanted]:
        for c in sorted(contexts):
            if past + s < c:
                return s, c
    return next(((s, max(contexts)) for s in reversed(rising) if s <= wanted and past + s <= max(contexts)), None)


class DeviceRunner:
    """Device graphs of all parts in one process. A `Runner`.

    Args:
        config: the geometry.
        parts: the plan.
        folder: where the graphs are, `ar128_cl4096_2_of_5.onnx` and so on.
        encodings: of every named result.
        lengths: tokens a step; every length has a graph for every context.
        contexts: context lengths.
        pad: the token that fills a step's unused places.
        threads: size of the shared pool.

    Raises:
        BundleError: a graph is missing.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: Sequence[Part],
        folder: Path,
        encodings: Mapping[str, Encoding],
        *,
        lengths: Sequence[int],
        contexts: Sequence[int],
        pad: int = 0,
        threads: int | None = None,
    ) -> None:
        self.config = config
        self.parts = tuple(parts)
        self.folder = folder
        self.vocab_size = config.vocab_size
        self.context = max(contexts)
        self.prompt_length = max(lengths)
        self.pad = pad
        self._lengths, self._contexts = tuple(lengths), tuple(contexts)
        self._threads = threads or default_threads()
        self._logits = port_encodings(parts, encodings)["logits"]
        for part in parts:
            for s in lengths:
                for c in contexts:
                    if not (path := folder / f"{graph_name(part, s, c)}.onnx").is_file():
                        raise BundleError(f"{path} is missing; export the device graphs again")
        heads, width = config.num_kv_heads, config.head_dim
        self._cache: dict[str, Codes] = {}
        for layer in range(config.num_layers):
            self._cache[f"past_key_{layer}"] = np.zeros((heads, 1, width, self.context), np.uint8)
            self._cache[f"past_value_{layer}"] = np.zeros((heads, 1, self.context, width), np.uint8)
        self.kv_bytes = sum(a.nbytes for a in self._cache.values())
        angles = rope_angles(config, self.context + self.prompt_length)  # padding may stand beyond the context
        self._tables = {
            "position_ids_cos": ANGLE.floor(np.cos(angles)),
            "position_ids_sin": ANGLE.floor(np.sin(angles)),
        }
        self._fold = _fits_dequantized(folder, parts, sessions=len(lengths))
        self._filled = 0
        self._graphs: dict[tuple[int, int], _Graph] = {}

    @classmethod
    def open(cls, bundle: Bundle, folder: Path | None = None, *, threads: int | None = None) -> DeviceRunner:
        """The device graphs of a bundle, kept in its folder `device` or elsewhere.

        Raises:
            BundleError: they were not kept, or the bundle has no encodings.
        """
        folder = folder or bundle.root / DEVICE_FOLDER
        if not folder.is_dir():
            raise BundleError(f"{folder} does not exist; expected device graphs: export with --keep-onnx")
        pad = bundle.read_json("generation_config.json").get("pad_token_id")
        return cls(
            bundle.config,
            bundle.parts,
            folder,
            read_encodings(bundle.root / "encodings.json"),
            lengths=(bundle.prompt_length, 1),
            contexts=bundle.contexts,
            pad=pad if isinstance(pad, int) else 0,
            threads=threads,
        )

    def step(self, ids: NDArray[np.int64], start: int, wanted: NDArray[np.int64]) -> Logits:
        if start > self._filled:
            raise ValueError(f"a step at {start} after {self._filled} tokens leaves a gap")
        self._filled = start
        for graph in self._graphs.values():
            graph.synced = min(graph.synced, start)
        out = np.empty((len(wanted), self.vocab_size), np.float32)
        at = 0
        while at < len(ids):
            chosen = choose_graph(self._lengths, self._contexts, len(ids) - at, start + at)
            if chosen is None:
                raise ContextFull(start + len(ids), self.context)
            count = min(chosen[0], len(ids) - at)
            logits = self._graph(*chosen).run(ids[at : at + count], start + at)
            here = (wanted >= at) & (wanted < at + count)
            out[here] = self._logits.dequantize(logits[0, wanted[here] - at])
            at += count
            self._filled = start + at
        return out

    def close(self) -> None:
        self._graphs.clear()
        self._cache.clear()

    def _graph(self, length: int, context: int) -> _Graph:
        """Made when first needed: a long context costs nothing until a conversation gets there."""
        key = (length, context)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self, length, context)
        return self._graphs[key]


class _Graph:
    """All parts for one S and C: sessions, and buffers that they read and write in place.

    Attributes:
        synced: leading slots of the past that hold the sequence's keys and values.
    """

    def __init__(self, runner: DeviceRunner, length: int, context: int) -> None:
        self.runner, self.length, self.context = runner, length, context
        self.synced = 0
        self._touched = 0
        self._buffers: dict[str, NDArray[Any]] = {}
        self._values: dict[str, Any] = {}
        self._bound = []
        for part in runner.parts:
            path = runner.folder / f"{graph_name(part, length, context)}.onnx"
            session = exact_session(path, runner._threads, fold=runner._fold)
            binding = session.io_binding()
            inputs, outputs = ports(runner.config, part, GraphStyle.DEVICE, length=length, context=context)
            for port in inputs:
                binding.bind_ortvalue_input(port.name, self._value(port.name, port.shape, port.dtype))
            for port in outputs:
                binding.bind_ortvalue_output(port.name, self._value(port.name, port.shape, port.dtype))
            self._bound.append((session, binding))

    def run(self, ids: NDArray[np.int64], past: int) -> NDArray[np.uint16]:
        """Run ids (≤ S,) after `past` tokens; their keys and values go to the runner's cache.

        Returns:
            the codes of the logits, (1, S, V): a buffer, overwritten by the next step.
        """
        count, first = len(ids), self.context - self.length
        buffers = self._buffers
        buffers["input_ids"][0, :count], buffers["input_ids"][0, count:] = ids, self.runner.pad
        mask = buffers["attention_mask"][0, 0]
        mask[:, :past], mask[:, past:first] = ATTEND, 0
        mask[:, first:] = np.tri(self.length, dtype=np.uint16) * np.uint16(ATTEND)
        for name, table in self.runner._tables.items():
            buffers[name][0, 0] = table[past : past + self.length]
        self._sync(past)
        for session, binding in self._bound:
            session.run_with_iobinding(binding)
        for name, cache in self.runner._cache.items():
            _slots(cache, name, past, past + count)[...] = _slots(buffers[f"{name}_out"], name, 0, count)
        logits: NDArray[np.uint16] = buffers["logits"]
        return logits

    def _sync(self, past: int) -> None:
        """Bring slots 0 … past−1 up to date and empty those beyond."""
        for name, cache in self.runner._cache.items():
            slots = self._buffers[f"{name}_in"]
            _slots(slots, name, self.synced, past)[...] = _slots(cache, name, self.synced, past)
            _slots(slots, name, past, max(past, self._touched))[...] = EMPTY
        self.synced = self._touched = past

    def _value(self, name: str, shape: Sequence[int | str], dtype: str) -> Any:
        """The buffer behind a port; ports of the same name in two parts are one."""
        if name not in self._values:
            empty = EMPTY if name.startswith("past_") else 0
            self._buffers[name] = np.full([int(n) for n in shape], empty, dtype)
            self._values[name] = ort.OrtValue.ortvalue_from_numpy(self._buffers[name])
        return self._values[name]


def _slots(cache: Codes, name: str, start: int, stop: int) -> Codes:
    """Positions start … stop−1: the last axis of keys, the one before of values."""
    return cache[..., start:stop] if name.startswith("past_key") else cache[..., start:stop, :]


def exact_session(path: Path, threads: int, *, fold: bool) -> Any:
    """A session that computes every node as written: ONNX Runtime's fused quantized operators round elsewhere.

    `fold`: dequantize the weights once, at load, which takes float32's memory and makes a token some ten times faster.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if fold:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return make_session(str(path), threads, options)


def _fits_dequantized(folder: Path, parts: Sequence[Part], sessions: int) -> bool:
    """Whether float32 weights of `sessions` graphs a part fit in half of the free memory; codes are 4 bits or more."""
    stored = sum((folder / f"{part.name}.weights").stat().st_size for part in parts)
    return bool(sessions * stored * 8 < psutil.virtual_memory().available / 2)
