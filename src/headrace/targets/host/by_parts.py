"""A bundle's host graphs run one part after the other, for a computer that need not hold them all.

ONNX Runtime keeps a copy of each weight in a form of its own, so an open 7B model takes 4 GB beside its files. A part
needs only what the part before gives: each is opened, takes all steps of one sequence, and is let go.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.bundle.folder import Bundle
from headrace.model.rope import rope_tables
from headrace.plan import GraphStyle, ports
from headrace.targets.host.cache import HostCache
from headrace.targets.host.sessions import default_threads, make_session
from headrace.targets.host.steps import PartSession, Step, StepShape

__all__ = ["logits_by_parts"]


def logits_by_parts(bundle: Bundle, steps: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Logits of every token of one sequence, float32 (tokens, V).

    Args:
        bundle: with its graphs and weights; it need not be published.
        steps: the sequence's token ids, cut into the steps that are run.
    """
    config = bundle.config
    starts = np.cumsum([0, *map(len, steps)])
    cache = HostCache(config, bundle.kv_dtype, 1, int(starts[-1]))
    cos, sin = rope_tables(config, int(starts[-1]))
    tables = {"cos": ort.OrtValue.ortvalue_from_numpy(cos), "sin": ort.OrtValue.ortvalue_from_numpy(sin)}
    given: list[NDArray[np.float32] | None] = [None] * len(steps)
    logits: list[NDArray[np.float32]] = []
    for part in bundle.parts:
        session = make_session(str(bundle.graph(part)), default_threads())
        opened = PartSession(session, *ports(config, part, GraphStyle.HOST, kv_dtype=bundle.kv_dtype))
        for number, ids in enumerate(steps):
            shape = StepShape(0, 1, len(ids), len(ids))
            step = Step(shape, [opened], config.hidden_size, config.vocab_size, tables, cache.value)
            if (before := given[number]) is not None:
                step.hidden[opened.inputs[0].name][:] = before
            found = step.run(np.array([ids], np.int64), starts[number : number + 1], range(len(ids)))
            if part.heads:
                logits.append(found[0])
            else:
                given[number] = step.hidden[opened.outputs[-1].name]
    return np.concatenate(logits)
