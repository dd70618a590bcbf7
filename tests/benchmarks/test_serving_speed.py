"""serving_speed.py measures a real server: streams, and a second turn."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path

from headrace.language_model import load
from headrace.server.metrics import Metrics
from headrace.server.worker import ModelWorker, WorkerOptions
from tests.exports import Exports
from tests.server.scripted import running

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving_speed.py"
HISTORY = 0  # tokens before the question: the tiny model has little room


def test_streams_and_turns_of_a_real_server(exports: Exports) -> None:
    script, metrics = runpy.run_path(str(SCRIPT)), Metrics()
    worker = ModelWorker("tied", load(exports.bundle("tied"), runner="host", slots=2), WorkerOptions(), metrics)
    worker.start()
    with running(worker, metrics=metrics) as at:
        found = asyncio.run(script["measure"](int(at.rsplit(":", 1)[1]), 2, 32, 1, HISTORY))
    worker.close()
    assert found["one_stream_tok_s"] > 0 and found["2_streams_tok_s"] > 0
    turn = found["second_turn"]
    assert turn["talk"][-1]["role"] == "user"
    assert 0 < turn["cached_tokens"] < turn["prompt_tokens"][1]
    assert turn["ratio"] > 0
