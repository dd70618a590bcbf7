"""Work over a cluster: the same results in the same order as here, also when a node is lost in the middle.

The tests marked `ray` start three nodes on this machine and kill some: `pytest -m ray`.
"""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from headrace.batch import answer_file, answer_file_on
from headrace.cli.main import _run
from headrace.cluster import map_over
from headrace.errors import ContextFull, HeadraceError, UserError
from headrace.exporter.many import Export, export_many
from headrace.language_model import load
from headrace.measure.bundle_score import evaluate_on
from headrace.measure.questions import ask_bundle
from headrace.server.generation import Refused
from tests.clusters import Cluster, on_ray
from tests.exports import SMALL, Exports

DATA = Path(__file__).parent / "data" / "choices"
PROMPTS = 150  # more than two shards
ITEMS = 24
SLOWLY = 0.2  # seconds of an item, so that a node is lost while it works


@contextmanager
def squares(log: list[str] | None = None, base: int = 0, slowly: float = 0.0) -> Iterator[Callable[[int], int]]:
    """Work whose opening and end can be seen."""
    if log is not None:
        log.append("opened")

    def square(number: int) -> int:
        time.sleep(slowly)
        if number < 0:
            raise ContextFull(number, base)
        return number * number + base

    yield square
    if log is not None:
        log.append("closed")


def test_without_an_address_it_is_a_loop() -> None:
    log: list[str] = []
    answers = map_over(None, partial(squares, log, 1), iter(range(4)))
    assert log == [] and next(answers) == 1
    assert log == ["opened"] and list(answers) == [2, 5, 10]
    assert log == ["opened", "closed"]


def test_a_missing_extra_is_one_line(
    exports: Exports, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    bundle, out = str(exports.bundle("tied")), str(tmp_path / "out.jsonl")
    for verb in (
        ["generate", bundle, "--input", str(prompts), "--output", out, "--ray", "auto"],
        ["evaluate", bundle, "--text", str(exports.text), "--ray", "auto"],
        ["evaluate", bundle, "--tasks", "mmlu", "--data", str(DATA), "--ray", "auto"],
        ["serve", bundle, "--port", "0", "--ray", "auto"],
    ):
        assert _run(verb) == 2
        told = capfd.readouterr().err.strip().splitlines()[-1]
        assert told == "error: --ray needs ray, which is not installed: pip install 'headrace[ray]'"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--replicas", "2"], "needs a cluster"), (["--ray", "auto", "--sessions", "."], "is not possible with --ray")],
)
def test_serve_options_that_do_not_go_together(
    capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert _run(["serve", "x.bundle", *options]) == 2
    assert message in capfd.readouterr().err


def _errors(kind: type[HeadraceError]) -> Iterator[type[HeadraceError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _errors(below)


@pytest.mark.parametrize("kind", sorted(set(_errors(HeadraceError)), key=lambda kind: kind.__name__))
def test_errors_come_back_from_other_processes_as_they_were(kind: type[HeadraceError]) -> None:
    error: HeadraceError
    if issubclass(kind, ContextFull):
        error = kind(9, 5, "more than ")
    elif issubclass(kind, Refused):
        error = kind("no", status=429, field="n", retry_after=2)
    else:
        error = kind("no")
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


def _made(exports: Exports, folder: Path) -> list[Export]:
    options = {**SMALL, "calibration": [exports.text]}
    return [
        Export(exports.checkpoint(kind), folder / f"{kind}-{recipe}.bundle", {**options, "recipe": recipe})
        for kind in ("gqa", "tied")
        for recipe in ("w4a16", "w4b32")
    ]


def _digests(folder: Path) -> dict[str, dict[str, str]]:
    return {
        path.name: {
            name: file["sha256"] for name, file in json.loads((path / "headrace.json").read_text())["files"].items()
        }
        for path in folder.glob("*.bundle")
    }


def test_many_exports_go_on_and_are_not_made_twice(exports: Exports, tmp_path: Path) -> None:
    asked = _made(exports, tmp_path)[:2]
    wrong = Export(tmp_path / "nowhere", tmp_path / "none.bundle")
    made = export_many([asked[0], wrong, asked[1]])
    assert [one.error is None for one in made] == [True, False, True] and "nowhere" in (made[1].error or "")
    assert made[0].weight_bytes and made[0].quantization_kl is not None
    before = [(one.out / "headrace.json").stat().st_mtime_ns for one in asked]
    assert export_many(asked) == [made[0], made[2]]
    assert [(one.out / "headrace.json").stat().st_mtime_ns for one in asked] == before
    other = Export(asked[0].checkpoint, asked[0].out, {**asked[0].options, "parts": 2})
    export_many([other])
    assert (asked[0].out / "headrace.json").stat().st_mtime_ns != before[0]


@on_ray
def test_results_are_in_order_though_a_node_is_lost(cluster: Cluster) -> None:
    answers = map_over(cluster.address, partial(squares, None, 1, SLOWLY), range(ITEMS))
    found = [next(answers) for _ in range(3)]
    cluster.lose_one()
    assert found + list(answers) == [n * n + 1 for n in range(ITEMS)]


@on_ray
def test_an_error_of_an_item_is_the_one_that_was_raised(cluster: Cluster) -> None:
    with pytest.raises(ContextFull, match="the prompt has -1 tokens, but the context holds 7"):
        list(map_over(cluster.address, partial(squares, None, 7), [1, -1, 2]))


@pytest.mark.ray
def test_no_cluster_is_one_line() -> None:
    """In a process of its own, since this one may be connected already."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        code = f"from headrace.cluster import connect\nconnect({address!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert f"headrace.errors.TargetError: no Ray cluster answers at {address}" in done.stderr


@on_ray
@pytest.mark.kernels  # for ONNX Runtime a token alone is other arithmetic than among others: a near tie may turn
def test_a_file_of_prompts_is_the_same_line_for_line(exports: Exports, cluster: Cluster, tmp_path: Path) -> None:
    bundle, prompts = exports.bundle("tied"), tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": f"River {n}"} if n % 3 else {"messages": [{"role": "user", "content": f"{n}?"}]}
        for n in range(PROMPTS)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "long " * 300}]))
    chosen = {"temperature": 1.2, "seed": 5}
    with load(bundle, runner="native", slots=4) as model:
        options = model.sampling_options(**chosen)
        assert answer_file(model, prompts, tmp_path / "here.jsonl", max_tokens=6, options=options) == 1
    lost = threading.Event()

    def lose(stage: str, done: int, total: int) -> None:
        if not lost.is_set():
            lost.set()
            cluster.lose_one()

    out = tmp_path / "there.jsonl"
    whole = (tmp_path / "here.jsonl").read_bytes()
    there = partial(
        answer_file_on, cluster.address, bundle, prompts, out, max_tokens=6, sampling=chosen, slots=2, runner="native"
    )
    assert there(progress=lose) == 1 and lost.is_set()
    assert out.read_bytes() == whole
    out.write_bytes(whole[: len(whole) // 2])  # as a driver that was killed leaves it
    there()
    assert out.read_bytes() == whole


@on_ray
def test_evaluations_are_the_same(exports: Exports, cluster: Cluster, tmp_path: Path) -> None:
    bundle, checkpoint = exports.bundle("tied", context=512), exports.checkpoint("tied")
    other = tmp_path / "other.txt"
    other.write_text(exports.text.read_text(encoding="utf-8")[300:] * 2, encoding="utf-8")
    tasks, common = ("mmlu", "ceval"), {"checkpoint": checkpoint, "shots": 0, "runner": "host", "threads": 1}
    assert ask_bundle(bundle, tasks, DATA, ray=cluster.address, **common) == ask_bundle(bundle, tasks, DATA, **common)
    texts = [exports.text, other]
    score = {"checkpoint": checkpoint, "length": 32, "windows": 2, "threads": 1}
    assert evaluate_on(cluster.address, bundle, texts, **score) == evaluate_on(None, bundle, texts, **score)


@on_ray
def test_exports_are_the_same_though_a_node_is_lost(exports: Exports, cluster: Cluster, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    export_many(_made(exports, here))
    losing = threading.Timer(1.0, cluster.lose_one)
    losing.start()
    made = export_many(_made(exports, there), address=cluster.address)
    losing.join()
    assert [one.error for one in made] == [None] * 4
    assert _digests(there) == _digests(here) and len(_digests(there)) == 4


@on_ray
def test_a_mistake_of_ours_is_told_as_it_is(cluster: Cluster) -> None:
    with pytest.raises(TypeError):
        list(map_over(cluster.address, squares, ["x"]))  # type: ignore[list-item]


def test_what_cannot_be_asked_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        answer_file_on("auto", tmp_path, tmp_path / "none", tmp_path / "out", max_tokens=1, sampling={}, slots=1)
