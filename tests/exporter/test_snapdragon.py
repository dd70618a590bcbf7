"""From a bundle to a chip's folder: binaries there and checked, resumed, refused, pushed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headrace.bundle.folder import Bundle, check_files, open_bundle
from headrace.bundle.work_folder import MARK, SCRATCH
from headrace.cli.main import _run
from headrace.errors import RecipeError, TargetError
from headrace.exporter import snapdragon
from headrace.exporter.job import export
from headrace.exporter.snapdragon import compile_target
from headrace.graph.device_folder import bundle_device_graphs
from headrace.targets.qualcomm.compiler import Compiled
from headrace.targets.qualcomm.context_binary import read_context_binary
from headrace.targets.qualcomm.soc import SOCS
from tests.exports import PHONE, SMALL, Exports

TARGET = "snapdragon-8-elite"
BINARIES = [f"weight_sharing_model_{n}_of_3.serialized.bin" for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def phone(exports: Exports) -> Path:
    """A bundle with a chip's folder and the device graphs; not to be changed."""
    return exports.bundle("phone", **PHONE)


@pytest.fixture
def unfinished(phone: Path, tmp_path: Path) -> Bundle:
    """A copy in the making, without binaries."""
    copy = Path(shutil.copytree(phone, tmp_path / "bundle"))
    shutil.rmtree(copy / TARGET)
    return open_bundle(phone)._replace(root=copy)


@pytest.mark.qnn
def test_an_export_leaves_what_the_phone_needs(phone: Path) -> None:
    folder = phone / TARGET
    assert {path.name for path in folder.iterdir()} == {
        *BINARIES, "genie_config.json", "htp_backend_ext_config.json", "metadata.json", "metadata.yaml", "README.md",
        "tokenizer.json",
        "sample_prompt.txt",
    }  # fmt: skip
    assert check_files(phone) == [], "the binaries are in the manifest"
    for name in BINARIES:
        info = read_context_binary(folder / name)
        assert (info.soc_model, len(info.graphs), info.shared) == (69, 6, True)
    config = json.loads((folder / "genie_config.json").read_text(encoding="utf-8"))["dialog"]
    assert config["context"] == {
        "version": 1, "size": 256, "n-vocab": 420, "bos-token": -1, "eos-token": [2, 195], "pad-token": 0,
    }  # fmt: skip
    assert config["engine"]["model"]["binary"]["ctx-bins"] == BINARIES
    graphs = [f"ar{s}_cl{c}_{n}_of_3.onnx" for s in (32, 8, 1) for c in (96, 256) for n in (1, 2, 3)]
    assert {path.name for path in (phone / "device").glob("*.onnx")} == set(graphs)


class Compiler:
    """Counts the binaries that the real one makes; dies after the first when told."""

    def __init__(self, dies: bool = False) -> None:
        self.made: list[str] = []
        self.dies = dies
        self.real = snapdragon.compile_shared

    def __call__(self, graphs: Sequence[Any], soc: Any, binary: Path) -> Compiled:
        if self.dies and self.made:
            raise TargetError("the HTP compiler was ended by SIGKILL")
        self.made.append(binary.name)
        return self.real(graphs, soc, binary)


@pytest.mark.qnn
def test_a_compile_goes_on_where_it_stopped(
    unfinished: Bundle, phone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = bundle_device_graphs(unfinished, tmp_path / "work")
    first = Compiler(dies=True)
    monkeypatch.setattr(snapdragon, "compile_shared", first)
    with pytest.raises(TargetError, match="SIGKILL"):
        compile_target(unfinished, TARGET, graphs, tmp_path / "work")
    folder = unfinished.root / TARGET
    kept = (folder / BINARIES[0]).read_bytes()
    left = folder / f"{SCRATCH}killed"  # where the compiler was writing when it was killed
    left.mkdir()
    (left / MARK).touch()
    (left / "half.bin").write_bytes(b"x")
    # The rest is there already, from another export of the same model: only one is left to compile.
    shutil.copy(phone / TARGET / BINARIES[1], folder)
    log = tmp_path / "work" / f"{TARGET}.json"
    made = json.loads(log.read_text(encoding="utf-8"))
    assert list(made) == first.made == BINARIES[:1]
    log.write_text(json.dumps({**made, BINARIES[1]: {}}), encoding="utf-8")
    second = Compiler()
    second.real = first.real
    monkeypatch.setattr(snapdragon, "compile_shared", second)
    seen: list[int] = []
    assert (
        compile_target(unfinished, TARGET, graphs, tmp_path / "work", lambda _s, done, _t: seen.append(done)) == folder
    )
    assert second.made == BINARIES[2:] and seen == [0, 1, 2, 3]
    assert not left.exists(), "it would become part of the bundle"
    assert (folder / BINARIES[0]).read_bytes() == kept
    report = json.loads(log.read_text(encoding="utf-8"))
    assert set(report) == set(BINARIES) and report[BINARIES[2]]["peak_bytes"] > 1 << 20
    # What is kept is held against the plan all the same.
    (folder / BINARIES[0]).write_bytes(kept[: len(kept) // 2])
    with pytest.raises(TargetError, match=f"{BINARIES[0]} is not a readable QNN context binary"):
        compile_target(unfinished, TARGET, graphs, tmp_path / "work")
    shutil.copy(folder / BINARIES[1], folder / BINARIES[0])
    with pytest.raises(TargetError, match=r"ar32_cl96_1_of_3"):
        compile_target(unfinished, TARGET, graphs, tmp_path / "work")
    assert second.made == BINARIES[2:]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ["snapdragon-8-elit"]}, TargetError, "'snapdragon-8-elit'; did you mean 'snapdragon-8-elite'"),
        ({"targets": [TARGET], "block": 32, "keep_grid": True}, RecipeError, "blocks of 32 with scales of their own"),
        ({"keep_onnx": True, "block": 32, "keep_grid": True}, RecipeError, "blocks of 32 with scales of their own"),
        ({"targets": [TARGET], "kv": "float32"}, RecipeError, "an 8-bit cache .* has float32: --kv int8"),
        ({"targets": [TARGET], "context": (64, 200)}, TargetError, "context 64 is twice a step of 32"),
    ],
    ids=["unknown chip", "blocks", "blocks in kept graphs", "float cache", "contexts"],
)
def test_refused_before_any_work(
    exports: Exports, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    seen: list[str] = []
    with pytest.raises(error, match=message):
        export(
            exports.checkpoint("phone"), tmp_path / "out", **{**SMALL, "parts": 3, **options},
            progress=lambda stage, _d, _t: seen.append(stage),
        )  # fmt: skip
    assert not seen and not list(tmp_path.iterdir())


@pytest.mark.qnn
def test_push_prints_what_it_would_do(phone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["push", str(phone), "--dry-run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    place = f"/data/local/tmp/headrace/{phone.name}"
    assert lines[0] == f"adb shell mkdir -p {place}"
    assert sum(line.startswith("adb push") and line.endswith(".serialized.bin") for line in lines) == 3
    assert lines[-1].startswith("adb shell") and "genie-t2t-run -c genie_config.json" in lines[-1]


def test_push_names_the_chips(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["push", "--list"]) == 0
    shown = capfd.readouterr().out
    assert all(f"{soc.name} " in shown and f" {soc.model} " in shown for soc in SOCS)
    assert _run(["push", "--list", "--json"]) == 0
    chips = json.loads(capfd.readouterr().out.splitlines()[-1])["chips"]
    assert {chip["name"] for chip in chips} == {soc.name for soc in SOCS}
    assert _run(["push"]) == 2
    assert "push needs a bundle, or --list" in capfd.readouterr().err


@pytest.mark.qnn
def test_the_configuration_holds_against_the_bundle(
    phone: Path, exports: Exports, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = phone / TARGET
    assert _run(["verify", str(folder), "--genie"]) == 0
    assert _run(["verify", str(folder), "--genie", "--checkpoint", str(exports.checkpoint("phone"))]) == 0
    content = json.loads((folder / "genie_config.json").read_text())
    content["dialog"]["engine"]["backend"]["QnnHtp"]["kv-dim"] += 1
    (tmp_path / "genie_config.json").write_text(json.dumps(content))
    assert _run(["verify", str(tmp_path), "--genie", "--checkpoint", str(phone), "--json"]) == 1
    links = json.loads(capfd.readouterr().out.splitlines()[-1])["links"]
    broken = {link["name"] for link in links if not link["ok"]}
    assert broken == {"dialog.engine.backend.QnnHtp.kv-dim", "files that it names"}


def test_push_of_a_chip_that_is_not_there(exports: Exports, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = str(exports.bundle("phone", parts=3))
    assert _run(["push", bundle]) == 2
    assert "expected a Genie folder: export with --target snapdragon-8-elite" in capfd.readouterr().err
    assert _run(["push", bundle, "--target", "exynos"]) == 2
    assert "unknown target 'exynos'" in capfd.readouterr().err
