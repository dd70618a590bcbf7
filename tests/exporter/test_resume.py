"""An export that was stopped or killed goes on to the very same bytes, and nothing is thrown away unasked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from headrace.bundle.folder import FORMAT, check_files, open_bundle
from headrace.errors import BundleError
from headrace.exporter import settings
from headrace.exporter.job import export
from headrace.progress import Progress
from tests.exports import LAYERS, SMALL, Exports, contents, write_checkpoint


class Stop(Exception):
    """Stands for whatever kills an export."""


class StopAt:
    """A progress that dies at the `count`-th report."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count
        self.seen: list[tuple[str, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.append((stage, done))
        if len(self.seen) == self.count:
            raise Stop


def stop_at(stage: str, done: int) -> Progress:
    """A progress that dies at a report."""

    def progress(now: str, finished: int, total: int) -> None:
        if (now, finished) == (stage, done):
            raise Stop

    return progress


def test_a_bundle_is_replaced_only_when_the_new_one_is_complete(run: Any, tmp_path: Path) -> None:
    before = contents(run())
    with pytest.raises(Stop):
        run(block=32, progress=StopAt(5))
    assert contents(tmp_path / "out") == before
    run(block=32, resume=True)
    assert open_bundle(tmp_path / "out").recipe.rules[1].block == 32
    assert check_files(tmp_path / "out") == []


@pytest.fixture(scope="module")
def reports(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """Every report of an undisturbed export."""
    progress = StopAt()
    out = tmp_path_factory.mktemp("reports") / "out"
    export(exports.checkpoint(), out, **{**SMALL, "method": "gptq"}, calibration=[exports.text], progress=progress)
    return progress.seen


@pytest.mark.parametrize(
    ("stage", "done"),
    [
        ("embedding and head", 0), ("embedding and head", 1), ("quantizing layers", 0), ("quantizing layers", 1),
        ("quantizing layers", 3), ("quantizing layers", LAYERS), ("host graphs", 2), ("writing the bundle", 0),
        ("writing the bundle", 1),
    ],
)  # fmt: skip
def test_a_stopped_export_goes_on_to_the_same_bytes(
    run: Any, exports: Exports, tmp_path: Path, reports: list[tuple[str, int]], stage: str, done: int
) -> None:
    expected = contents(exports.bundle(method="gptq"))
    with pytest.raises(Stop):
        run(method="gptq", progress=StopAt(reports.index((stage, done)) + 1))
    again = StopAt()
    run(method="gptq", resume=True, progress=again)
    assert contents(tmp_path / "out") == expected
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_finished_layers_are_not_quantized_again(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.quantize import pipeline

    numbers: list[int] = []
    real = pipeline.quantize_layer

    def counted(*arguments: Any, **options: Any) -> Any:
        numbers.append(next(a for a in arguments if type(a) is int))
        return real(*arguments, **options)

    monkeypatch.setattr(pipeline, "quantize_layer", counted)
    with pytest.raises(Stop):
        run(progress=stop_at("quantizing layers", 2))
    assert numbers == [0, 1]
    run(resume=True)
    assert numbers == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["gptq", "best"])
def test_finished_layers_are_not_computed_again(
    run: Any, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from headrace.quantize import layer as quantized_layer
    from headrace.quantize import pipeline

    with pytest.raises(Stop):
        run(method=method, progress=stop_at("quantizing layers", 3))
    walked: list[int] = []
    real = pipeline.LayerWalk

    def counted(config: Any, weights: Any, layer: int, *rest: Any) -> Any:
        walked.append(layer)
        return real(config, weights, layer, *rest)

    for module in (pipeline, quantized_layer):
        monkeypatch.setattr(module, "LayerWalk", counted)
    run(method=method, resume=True)
    assert set(walked) == {3}
    assert contents(tmp_path / "out") == contents(exports.bundle(method=method))


def test_finished_gradients_are_not_measured_again(
    run: Any, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace.exporter import job

    def measured_twice(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("measured twice")

    with pytest.raises(Stop):
        run(method="best", progress=stop_at("quantizing layers", 0))
    monkeypatch.setattr(job, "gradient_energy", measured_twice)
    run(method="best", resume=True)
    assert contents(tmp_path / "out") == contents(exports.bundle(method="best"))


@pytest.mark.parametrize("kept", ["by grid", "by block"])
def test_finished_costs_are_not_measured_again(
    run: Any, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """Costs of grids, and of 4-bit blocks alone as an earlier headrace kept them."""
    from headrace.exporter import job

    def measured_twice(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("measured twice")

    budget = {"recipe": "w4b32", "size": open_bundle(exports.bundle(recipe="w4b32")).weight_bytes + 15000}
    expected = exports.bundle(**budget)
    with pytest.raises(Stop):
        run(**budget, progress=stop_at("quantizing layers", 0))
    costs = tmp_path / "out.partial" / "sensitivity.json"
    if kept == "by block":
        rows = json.loads(costs.read_text())
        by_block = {name: {block: kl for bits, block, _, kl in own if bits == 4} for name, own in rows.items()}
        costs.write_text(json.dumps(by_block))
    monkeypatch.setattr(job, "measure_sensitivity", measured_twice)
    run(**budget, resume=True)
    bits = {rule.bits for rule in open_bundle(tmp_path / "out").recipe.rules}
    if kept == "by grid":
        assert contents(tmp_path / "out") == contents(expected) and bits == {4, 5, 6, 8}
    else:
        assert bits == {4, 8}, "the choice is that of the export that was begun"


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_lost_states_are_computed_again(run: Any, exports: Exports, tmp_path: Path, damage: str) -> None:
    with pytest.raises(Stop):
        run(method="gptq", progress=stop_at("quantizing layers", 3))
    states = tmp_path / "out.partial" / "states.bin"
    states.write_bytes(states.read_bytes()[:-5]) if damage == "short" else states.unlink()
    run(method="gptq", resume=True)
    assert contents(tmp_path / "out") == contents(exports.bundle(method="gptq"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


OTHER_SETTINGS = [
    ({"block": 32}, "--block by default → 32"),
    ({"method": "gptq"}, "--method nearest → gptq"),
    ({"kv": "float32"}, "--kv int8 → float32"),
    ({"windows": 1}, "--windows 2 → 1"),
    ({"window_length": 40}, "--window-length 48 → 40"),
    ({"parts": 3}, "--parts 5 → 3"),
    ({"context": 100}, "--context 200 → 100"),
    ({"prompt_length": 16}, "--prompt-length 32 → 16"),
    ({"recipe": "w4b32"}, "--recipe w4a16 → w4b32"),
]


def stop_at_graphs(stage: str, done: int, total: int) -> None:
    if (stage, done) == ("host graphs", 1):
        raise Stop


@pytest.mark.parametrize(("other", "difference"), OTHER_SETTINGS, ids=str)
def test_other_settings_throw_no_work_away(
    run: Any, exports: Exports, tmp_path: Path, other: dict[str, Any], difference: str
) -> None:
    with pytest.raises(Stop):
        run(progress=stop_at_graphs)
    for resume in (True, False):
        with pytest.raises(BundleError) as error:
            run(**other, resume=resume)
        assert str(error.value) == (
            f"{tmp_path / 'out.partial'} holds an interrupted export (4 layers done) that differs: {difference}; "
            "ask as before with --resume to go on, or begin anew with --restart"
        )
    run(**other, resume=True, restart=True)
    assert contents(tmp_path / "out") == contents(exports.bundle(**other))


def test_other_text_and_other_rules_are_named(run: Any, exports: Exports, tmp_path: Path) -> None:
    text, recipe = tmp_path / "text.txt", tmp_path / "mine.json"
    text.write_bytes(exports.text.read_bytes())
    rules = [{"match": "embed|lm_head", "bits": 8}, {"match": "_proj", "bits": 4}]
    recipe.write_text(json.dumps({"name": "mine", "rules": rules}))
    options = {"calibration": [text], "recipe": str(recipe)}
    with pytest.raises(Stop):
        run(**options, progress=stop_at_graphs)
    text.write_text(text.read_text(encoding="utf-8") * 2, encoding="utf-8")
    recipe.write_text(json.dumps({"name": "mine", "rules": [rules[0], {**rules[1], "block": 32}]}))
    with pytest.raises(BundleError, match=r"the content of --recipe mine; the content of --calibration text\.txt; ask"):
        run(**options, resume=True)


def test_weights_that_were_stored_otherwise_are_not_gone_on_with(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        run(progress=stop_at_graphs)
    monkeypatch.setattr(settings, "FORMAT", FORMAT + 1)
    with pytest.raises(BundleError, match=rf"that differs: bundle format {FORMAT} → {FORMAT + 1}; ask"):
        run(resume=True)


def test_without_resume_an_interrupted_export_is_kept(run: Any, exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(progress=stop_at_graphs)
    before = contents(tmp_path / "out.partial")
    with pytest.raises(BundleError, match=r"\(4 layers done\); go on with --resume, or begin anew with --restart"):
        run()
    assert contents(tmp_path / "out.partial") == before
    (tmp_path / "out.partial" / "bundle" / "rubbish").write_text("of an older run")
    run(restart=True)
    assert contents(tmp_path / "out") == contents(exports.bundle())


def test_an_export_that_finished_nothing_leaves_nothing(run: Any, exports: Exports, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        run(progress=stop)
    assert not list(tmp_path.iterdir())
    run(block=32)
    assert contents(tmp_path / "out") == contents(exports.bundle(block=32))


def test_another_checkpoint_is_told(exports: Exports, tmp_path: Path) -> None:
    options = {**SMALL, "calibration": [exports.text]}
    one, other = (write_checkpoint(tmp_path / f"c{seed}", seed=seed) for seed in (1, 2))

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantizing layers", 3):
            raise Stop

    with pytest.raises(Stop):
        export(one, tmp_path / "out", progress=stop, **options)
    with pytest.raises(BundleError, match=r"\(3 layers done\) that differs: the checkpoint's config\.json, "):
        export(other, tmp_path / "out", resume=True, **options)
    resumed = export(other, tmp_path / "out", resume=True, restart=True, **options)
    fresh = export(other, tmp_path / "fresh", **options)
    assert contents(resumed) == contents(fresh)


def test_a_template_in_a_folder_of_its_own_is_the_checkpoints(exports: Exports, tmp_path: Path) -> None:
    options = {**SMALL, "calibration": [exports.text]}
    folder = write_checkpoint(tmp_path / "c")
    template = folder / "additional_chat_templates" / "default.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages[0]['content'] }}")
    with pytest.raises(Stop):
        export(folder, tmp_path / "out", progress=stop_at("quantizing layers", 3), **options)
    template.write_text("{{ messages[-1]['content'] }}")
    with pytest.raises(BundleError, match=r"differs: the checkpoint's additional_chat_templates/default\.jinja; ask"):
        export(folder, tmp_path / "out", resume=True, **options)


def test_killed_with_nine_and_resumed(run: Any, exports: Exports, tmp_path: Path) -> None:
    """A child process that kills itself while the bytes of a layer are being written."""
    code = f"""
        import os, signal
        from headrace.exporter.job import export
        from headrace.bundle.weights import WeightStore

        write = WeightStore.write
        def half(self, name, value):
            if name == "layers.2.mlp.up_proj.weight":
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, name, value)
        WeightStore.write = half
        options = {SMALL | {"calibration": [str(exports.text)]}!r}
        export({str(exports.checkpoint())!r}, {str(tmp_path / "out")!r}, **options)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    assert list(json.loads((tmp_path / "out.partial" / "state.json").read_text())["layers"]) == ["0", "1"]
    run(resume=True)
    assert contents(tmp_path / "out") == contents(exports.bundle())
