"""logits_by_parts: one part after the other gives what all of them give."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.bundle.folder import open_bundle
from headrace.runtime.runner import Span
from headrace.targets.host.by_parts import logits_by_parts
from headrace.targets.host.runner import HostRunner
from tests.exports import VOCAB, Exports

IDS = [int(i) for i in np.random.default_rng(5).integers(0, VOCAB, 34)]


@pytest.mark.parametrize("options", [{}, {"parts": 3, "kv": "float32"}, {"parts": 1}])
def test_parts_one_after_the_other_are_the_whole(exports: Exports, options: dict[str, object]) -> None:
    bundle = open_bundle(exports.bundle("gqa", **options))
    runner = HostRunner(bundle)
    steps = [IDS[:32], IDS[32:33], IDS[33:]]
    expected, start = [], 0
    for ids in steps:
        expected.append(runner.run([Span(0, start, tuple(ids), tuple(range(len(ids))))]).copy())
        start += len(ids)
    runner.close()
    np.testing.assert_array_equal(logits_by_parts(bundle, steps), np.concatenate(expected))
