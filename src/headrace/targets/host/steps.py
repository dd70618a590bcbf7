"""Steps of the host graphs: buffers and bindings for one shape of work, made once and written in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.plan import Port

__all__ = ["PartSession", "Step", "StepShape"]


@dataclass(frozen=True)
class PartSession:
    """A part's session and its ports."""

    session: Any
    inputs: Sequence[Port]
    outputs: Sequence[Port]


@dataclass(frozen=True)
class StepShape:
    """What bindings are made for.

    Attributes:
        slot, batch: slots slot … slot+batch−1 run together; several tokens over a past need batch 1.
        length: tokens S of each.
        rows: wanted rows R of each.
    """

    slot: int
    batch: int
    length: int
    rows: int


class Step:
    """One shape of work, bound to all parts.

    Args:
        shape: the work.
        parts: the sessions, in order.
        hidden_size, vocab_size: the geometry.
        tables: the rotary tables `cos` and `sin`.
        cache: (name, slot, batch) → the cache's buffer of these slots.

    Attributes:
        hidden: what parts take from the part before and give to the next, (batch, S, H) by port name.
    """

    def __init__(
        self,
        shape: StepShape,
        parts: Sequence[PartSession],
        hidden_size: int,
        vocab_size: int,
        tables: Mapping[str, Any],
        cache: Callable[[str, int, int], Any],
    ) -> None:
        batch, length = shape.batch, shape.length
        self.ids = np.zeros((batch, length), np.int64)
        self.last_position = np.zeros(batch, np.int32)
        self.total_length = np.zeros((), np.int32)
        self.rows = np.zeros(shape.rows, np.int64)
        self.logits = np.zeros((batch, shape.rows, vocab_size), np.float32)
        own: dict[str, NDArray[Any]] = {
            "input_ids": self.ids,
            "last_position": self.last_position,
            "total_length": self.total_length,
            "rows": self.rows,
            "logits": self.logits,
        }
        self.hidden = {
            port.name: np.zeros((batch, length, hidden_size), np.float32)
            for part in parts
            for port in (*part.inputs, *part.outputs)
            if port.shape == ("batch", "length", hidden_size)
        }
        own |= self.hidden
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in own.items()} | dict(tables)

        def value(port: Port) -> Any:
            """The buffer behind a port; a cache's past and present are one buffer."""
            if port.name not in values:
                name = port.name.removesuffix("_in").removesuffix("_out")
                values[port.name] = cache(name, shape.slot, batch)
            return values[port.name]

        self._bound = []
        # Without wanted rows the last part's head would still run on nothing; its layers must run for their cache.
        for part in parts:
            binding = part.session.io_binding()
            for port in part.inputs:
                binding.bind_ortvalue_input(port.name, value(port))
            for port in part.outputs:
                binding.bind_ortvalue_output(port.name, value(port))
            self._bound.append((part.session, binding))
        self._keep = (own, values)

    def run(self, ids: NDArray[np.int64], starts: NDArray[np.int64], rows: Sequence[int]) -> NDArray[np.float32]:
        """Run ids (batch, S), each sequence from its own start.

        Returns:
            float32 (batch, R, V), overwritten by the next run.
        """
        self.ids[:] = ids
        self.last_position[:] = starts + ids.shape[1] - 1
        self.total_length[...] = int(starts.max()) + ids.shape[1]
        self.rows[:] = rows
        for session, binding in self._bound:
            session.run_with_iobinding(binding)
        return self.logits
