"""A scripted model behind a real server, and workers over a real engine, for all tests of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from headrace.language_model import load
from headrace.server.metrics import Metrics
from headrace.server.worker import ModelWorker, WorkerOptions
from tests.exports import Exports
from tests.server.scripted import ScriptedModel, running


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ScriptedModel, str]]:
    model = ScriptedModel()
    with running(model) as address:
        yield model, address


@pytest.fixture
def model(served: tuple[ScriptedModel, str]) -> ScriptedModel:
    """The served model, as new."""
    vars(served[0]).update(vars(ScriptedModel()))
    return served[0]


@pytest.fixture
def address(served: tuple[ScriptedModel, str], model: ScriptedModel) -> str:
    return served[1]


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def serving(exports: Exports) -> Iterator[Callable[..., ModelWorker]]:
    """Makes workers over a bundle with a chat template; they are closed behind the test."""
    made: list[ModelWorker] = []

    def start(slots: int = 4, **limits: Any) -> ModelWorker:
        model = load(exports.bundle("tied"), runner="host", slots=slots)
        worker = ModelWorker("tied", model, WorkerOptions(**limits), Metrics())
        worker.start()
        made.append(worker)
        return worker

    yield start
    for worker in made:
        worker.close()
