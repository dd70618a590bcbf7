"""From a bundle to a chip's folder: binaries there and checked, resumed, refused, and what Genie's tokenizer reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from headrace.bundle.derived import derived_folder
from headrace.bundle.folder import Bundle, check_files, open_bundle
from headrace.cli.main import _run
from headrace.errors import BundleError, RecipeError, TargetError
from headrace.exporter import snapdragon
from headrace.exporter.job import export
from headrace.exporter.snapdragon import (
    compile_target,
    device_graphs,
    genie_plan,
    genie_sampling,
    kept_device_graphs,
    sample_prompt,
    tokenizer_json,
)
from headrace.runtime.sampling import SamplingOptions
from headrace.targets.qualcomm.compiler import Compiled
from headrace.targets.qualcomm.context_binary import read_context_binary
from headrace.targets.qualcomm.genie import Sampling, genie_config
from headrace.targets.qualcomm.soc import find_soc
from headrace.text.tokenizer_folder import load_tokenizer
from headrace.text.turns import Message, turn_format
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
    return replace(open_bundle(phone), root=copy)


@pytest.mark.qnn
def test_an_export_leaves_what_the_phone_needs(phone: Path) -> None:
    folder = phone / TARGET
    assert {path.name for path in folder.iterdir()} == {
        *BINARIES, "genie_config.json", "htp_backend_ext_config.json", "metadata.yaml", "README.md", "tokenizer.json",
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
    first = Compiler(dies=True)
    monkeypatch.setattr(snapdragon, "compile_shared", first)
    with pytest.raises(TargetError, match="SIGKILL"):
        compile_target(unfinished, TARGET, tmp_path / "work")
    folder = unfinished.root / TARGET
    kept = (folder / BINARIES[0]).read_bytes()
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
    assert compile_target(unfinished, TARGET, tmp_path / "work", lambda _s, done, _t: seen.append(done)) == folder
    assert second.made == BINARIES[2:] and seen == [0, 1, 2, 3]
    assert (folder / BINARIES[0]).read_bytes() == kept
    report = json.loads(log.read_text(encoding="utf-8"))
    assert set(report) == set(BINARIES) and report[BINARIES[2]]["peak_bytes"] > 1 << 20
    # What is kept is held against the plan all the same.
    (folder / BINARIES[0]).write_bytes(kept[: len(kept) // 2])
    with pytest.raises(TargetError, match=f"{BINARIES[0]} is not a readable QNN context binary"):
        compile_target(unfinished, TARGET, tmp_path / "work")
    shutil.copy(folder / BINARIES[1], folder / BINARIES[0])
    with pytest.raises(TargetError, match=r"ar32_cl96_1_of_3"):
        compile_target(unfinished, TARGET, tmp_path / "work")
    assert second.made == BINARIES[2:]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ["snapdragon-8-elit"]}, TargetError, "'snapdragon-8-elit'; did you mean 'snapdragon-8-elite'"),
        ({"targets": [TARGET], "block": 32}, RecipeError, "blocks of 32, .*--block channel"),
        ({"keep_onnx": True, "block": 32}, RecipeError, "blocks of 32"),
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


def test_a_context_of_twice_a_step_is_refused(exports: Exports) -> None:
    bundle = replace(open_bundle(exports.bundle("mha")), contexts=(64, 256))
    with pytest.raises(TargetError, match=r"context 64 is twice a step of 32 tokens, .* --context 72"):
        genie_plan(bundle, find_soc(TARGET))


def test_a_model_without_an_end_is_refused(exports: Exports, tmp_path: Path) -> None:
    copy = exports.copy(tmp_path / "b", "phone", parts=3)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (copy / name).unlink(missing_ok=True)
    bundle = replace(open_bundle(exports.bundle("phone", parts=3)), root=copy)
    plan = genie_plan(bundle, find_soc(TARGET))
    assert plan.eos == (2,) and plan.pad == 2, "SentencePiece names its own"


@pytest.mark.parametrize("kind", ["phone", "mha", "tied"])
def test_the_sample_prompt_is_read_back_to_the_ids_of_the_turn_format(exports: Exports, kind: str) -> None:
    bundle = open_bundle(exports.bundle(kind, **({"parts": 3} if kind == "phone" else {})))
    ours = load_tokenizer(bundle.root)
    turns = turn_format(ours, bundle.read_json("generation_config.json"), ours.chat_template)
    assert turns.name == ("template" if kind == "tied" else "ids")
    genies = tokenizers.Tokenizer.from_str(tokenizer_json(bundle))
    text = sample_prompt(bundle)
    expected = turns.render([Message("user", snapdragon._ASK)], bundle.context)
    assert genies.encode(text, add_special_tokens=False).ids == expected
    assert genies.get_vocab_size() <= bundle.config.vocab_size


def test_tokenizer_json_is_the_bundles_vocabulary(exports: Exports) -> None:
    for kind in ("gqa", "mha", "tied"):
        bundle = open_bundle(exports.bundle(kind))
        ours, genies = load_tokenizer(bundle.root), tokenizers.Tokenizer.from_str(tokenizer_json(bundle))
        for text in ("The river runs to the sea.", "百川东到海 😀", "  12345\n\tdef add(a, b):", "", " "):
            assert genies.encode(text, add_special_tokens=False).ids == ours.encode(text), (kind, text)


def test_greedy_is_spelled_as_genie_understands_it() -> None:
    greedy = genie_sampling(SamplingOptions(temperature=0.0, repetition_penalty=1.1, seed=3))
    assert greedy == Sampling(temperature=1.0, top_k=1, top_p=1.0, seed=3, repetition_penalty=1.1)
    assert genie_sampling(SamplingOptions(temperature=0.7, top_k=1)).top_k == 1
    sampled = genie_sampling(SamplingOptions(temperature=0.3, top_k=5, top_p=0.85))
    assert sampled == Sampling(temperature=0.3, top_k=5, top_p=0.85)


def test_the_folders_own_sampling_is_the_models(exports: Exports, tmp_path: Path) -> None:
    bundle = replace(open_bundle(exports.bundle("phone", parts=3)), root=exports.copy(tmp_path / "b", "phone", parts=3))
    plan = genie_plan(bundle, find_soc(TARGET))
    assert genie_config(plan, [])["dialog"]["sampler"]["top-k"] == 1, "greedy when the model does not ask to sample"
    settings = bundle.read_json("generation_config.json")
    settings |= {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05}
    (bundle.root / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    sampler = genie_config(genie_plan(bundle, find_soc(TARGET)), [])["dialog"]["sampler"]
    assert (sampler["temp"], sampler["top-k"], sampler["top-p"]) == (0.3, 5, 0.85)
    assert sampler["token-penalty"]["repetition-penalty"] == 1.05


def test_device_graphs_are_made_once_a_bundle(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(exports.copy(tmp_path / "b", "phone", parts=3))
    made: list[Path] = []

    def counted(bundle: Bundle, folder: Path) -> Any:
        made.append(folder)
        return device_graphs(bundle, folder)

    monkeypatch.setattr(snapdragon, "device_graphs", counted)
    folder = kept_device_graphs(bundle)
    assert folder == derived_folder(bundle, "device") == tmp_path / "b.device"
    assert kept_device_graphs(bundle) == folder and len(made) == 1
    other = replace(bundle, files={**bundle.files, "weights/part_2_of_3.safetensors": {"sha256": "other"}})
    assert kept_device_graphs(other) == folder and len(made) == 2
    # What headrace did not make is not taken away.
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"b\.device exists and headrace did not make it; move it away"):
        kept_device_graphs(other)
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


@pytest.mark.qnn
def test_kept_graphs_are_the_bundles_own(phone: Path) -> None:
    assert kept_device_graphs(open_bundle(phone)) == phone / "device"


@pytest.mark.qnn
def test_push_prints_what_it_would_do(phone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["push", str(phone), "--dry-run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    place = f"/data/local/tmp/headrace/{phone.name}"
    assert lines[0] == f"adb shell mkdir -p {place}"
    assert sum(line.startswith("adb push") and line.endswith(".serialized.bin") for line in lines) == 3
    assert lines[-1].startswith("adb shell") and "genie-t2t-run -c genie_config.json" in lines[-1]


def test_push_of_a_chip_that_is_not_there(exports: Exports, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = str(exports.bundle("phone", parts=3))
    assert _run(["push", bundle]) == 2
    assert "expected a Genie folder: export with --target snapdragon-8-elite" in capfd.readouterr().err
    assert _run(["push", bundle, "--target", "exynos"]) == 2
    assert "unknown target 'exynos'" in capfd.readouterr().err
