"""Every example of docs/serving.md, run as it stands against a real server over a tiny bundle."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from headrace.language_model import load
from headrace.server.door import ServerOptions
from headrace.server.metrics import Metrics
from headrace.server.worker import ModelWorker, WorkerOptions
from tests.exports import Exports
from tests.server.scripted import running

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```(sh|python)\n(.*?)```", TEXT, re.DOTALL)
EXPECTED = ("chat.completion", "[DONE]", '"prompt":', "CompletionUsage", "", '"messages":')


@pytest.fixture(scope="module")
def address(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    metrics = Metrics()
    worker = ModelWorker("tied", load(exports.bundle("tied"), runner="host", slots=2), WorkerOptions(), metrics)
    worker.start()
    options = ServerOptions(sessions=tmp_path_factory.mktemp("sessions"))
    with running(worker, options=options, metrics=metrics) as at:
        yield at
    worker.close()


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number: int, address: str) -> None:
    language, code = EXAMPLES[number]
    code = code.replace("http://127.0.0.1:8080", address)
    if language == "python":
        # In this process: clients' packages take many seconds to import on a busy machine, and other tests have them.
        with redirect_stdout(StringIO()) as out:
            exec(compile(code, f"example {number}", "exec"), {"__name__": "__main__"})
        said = out.getvalue()
    else:
        done = subprocess.run(["bash", "-ec", code], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    assert EXPECTED[number] in said and '"error"' not in said, said
