"""DeviceRunner: the phone's own graphs on ONNX Runtime's CPU kernels, driven as Genie drives them (device_loop.py).

Meant for checking, not for speed. Knows files and sessions, no text and no compiler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
from numpy.typing import NDArray

from headrace.bundle.encodings import Encoding, port_encodings, read_encodings
from headrace.bundle.folder import Bundle
from headrace.config import ModelConfig
from headrace.errors import BundleError
from headrace.plan import Part, graph_name
from headrace.runtime.runner import Logits, SlotLengths, Span
from headrace.targets.device_loop import DeviceLoop
from headrace.targets.host.sessions import default_threads, make_session

__all__ = ["DEVICE_FOLDER", "DeviceRunner", "exact_session", "run_session"]

DEVICE_FOLDER = "device"


class DeviceRunner:
    """Device graphs of all parts in one process. A `Runner`; unlike Genie it fills the context to its last place.

    Args:
        config: the geometry.
        parts: the plan.
        folder: where the graphs are, `ar128_cl4096_2_of_5.onnx` and so on.
        encodings: of every named result.
        lengths: tokens a step; every length has a graph for every context.
        contexts: context lengths.
        pad: the token that fills a step's unused places.
        threads: size of the shared pool.
        slots: sequences held at once, each with a loop and a cache of its own, made when first needed.

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
        slots: int = 1,
    ) -> None:
        for part in parts:
            for s in lengths:
                for c in contexts:
                    if not (path := folder / f"{graph_name(part, s, c)}.onnx").is_file():
                        raise BundleError(f"{path} is missing; export the device graphs again")
        self.folder = folder
        self.vocab_size = config.vocab_size
        self.context = max(contexts)
        self.prompt_length = max(lengths)
        self.fine_tokens = 0
        self.slots = slots
        self.kv_bytes = 2 * config.num_layers * config.kv_size * self.context * slots
        self._threads = threads or default_threads()
        self._fold = _fits_dequantized(folder, parts, sessions=len(lengths))
        self._sessions: dict[str, Any] = {}
        self._held = SlotLengths(slots, self.context, config.vocab_size)
        self._loops: dict[int, DeviceLoop] = {}
        self._make_loop = partial(
            DeviceLoop,
            config,
            parts,
            lengths,
            contexts,
            port_encodings(parts, encodings),
            self._run,
            pad=pad,
            fill=True,
        )
        self.loop(0)  # an encoding that is missing is told now

    @classmethod
    def open(
        cls, bundle: Bundle, folder: Path | None = None, *, threads: int | None = None, slots: int = 1
    ) -> DeviceRunner:
        """The device graphs of a bundle, kept in its folder `device` or elsewhere.

        Raises:
            BundleError: they were not kept, or the bundle has no encodings.
        """
        folder = folder or bundle.root / DEVICE_FOLDER
        if not folder.is_dir():
            raise BundleError(f"{folder} does not exist; expected device graphs: export with --keep-onnx")
        return cls(
            bundle.config,
            bundle.parts,
            folder,
            read_encodings(bundle.root / "encodings.json"),
            lengths=bundle.step_lengths,
            contexts=bundle.contexts,
            pad=bundle.pad_id,
            threads=threads,
            slots=slots,
        )

    def loop(self, slot: int) -> DeviceLoop:
        """The conversation of a slot."""
        if slot not in self._loops:
            self._loops[slot] = self._make_loop()
        return self._loops[slot]

    def run(self, spans: Sequence[Span]) -> Logits:
        self._held.begin(spans)
        rows = [np.empty((0, self.vocab_size), np.float32)]
        for span in spans:
            loop = self.loop(span.slot)
            loop.rewind(span.start)
            rows.append(loop.feed(span.ids, np.array(span.wanted, np.int64)))
            self._held.done(span)
        return np.concatenate(rows)

    def copy(self, source: int, target: int, count: int) -> None:
        self._held.copied(source, target, count)
        if source == target:
            self.loop(source).rewind(count)
        else:
            self.loop(target).write(0, self.loop(source).read(0, count))

    def read(self, slot: int, start: int, stop: int) -> bytes:
        self._held.check_held(slot, start, stop)
        return self.loop(slot).read(start, stop)

    def write(self, slot: int, start: int, content: bytes) -> None:
        self._held.written(slot, start, len(content), self.loop(slot).position_bytes)
        self.loop(slot).write(start, content)

    def close(self) -> None:
        self._sessions.clear()
        self._loops.clear()  # and their caches

    def _run(self, name: str, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if name not in self._sessions:
            self._sessions[name] = exact_session(self.folder / f"{name}.onnx", self._threads, fold=self._fold)
        return run_session(self._sessions[name], feeds)


def exact_session(path: Path, threads: int, *, fold: bool) -> Any:
    """A session that computes every node as written: ONNX Runtime's fused quantized operators round elsewhere.

    `fold`: dequantize the weights once, at load, which takes float32's memory and makes a token some ten times faster.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if fold:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return make_session(str(path), threads, options)


def run_session(session: Any, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All outputs by name. Contiguous feeds are read in place, not copied."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds))))


def _fits_dequantized(folder: Path, parts: Sequence[Part], sessions: int) -> bool:
    """Whether float32 weights of `sessions` graphs a part fit in half of the free memory; codes are 4 bits or more."""
    stored = sum((folder / f"{part.name}.weights").stat().st_size for part in parts)
    return bool(sessions * stored * 8 < psutil.virtual_memory().available / 2)
