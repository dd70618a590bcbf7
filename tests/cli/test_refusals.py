"""What a user can get wrong, before any work: one line for each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.bundle.test_folder import flip
from tests.cli.calling import Run, one_line
from tests.exports import Exports, write_checkpoint


def bad_checkpoint(tmp_path: Path, kind: str) -> Path:
    folder = write_checkpoint(tmp_path / "c")
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "unknown":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    elif kind == "truncated":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "hostile":
        (folder / "model.safetensors").unlink()
        import zipfile

        with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
            archive.writestr("x/data.pkl", b"cos\nsystem\n(S'touch hacked'\ntR.")
            archive.writestr("x/version", b"3")
    elif kind == "huge":
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little") * 2)
        return path
    return folder


@pytest.mark.parametrize("verb", ["inspect", "export"])
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("no config", ["no config.json and no .gguf file", "expected a Hugging Face model folder"]),
        ("unknown", ["model_type 'lama' is not known; known are baichuan, llama, ", "did you mean 'llama'?"]),
        ("truncated", ["model.safetensors"]),
        ("hostile", ["os.system"]),
        ("huge", ["1152921504606846976"]),
    ],
)
def test_bad_checkpoints(run: Run, tmp_path: Path, verb: str, kind: str, parts: Sequence[str]) -> None:
    path = bad_checkpoint(tmp_path, kind)
    more = ("-o", tmp_path / "out") if verb == "export" else ()
    one_line(run(verb, path, *more), *parts)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    assert not Path("hacked").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--context", "100000"], ["--context 100000 is not possible; this model was made for 1 to 512 tokens"]),
        (["--context", "4k"], ["--context '4k' is not possible; expected whole numbers above 0"]),
        (["--block", "128"], ["block 128 does not divide the rows of layers.0.self_attn.q_proj.weight (64 columns)"]),
        (["--block", "33"], ["block 33 is not possible; expected channel, 16, 32, 64, 128 or 256"]),
        (["--block", "row"], ["block 'row' is not possible"]),
        (["--recipe", "w4b23"], ["recipe 'w4b23' is neither a shipped one", "did you mean 'w4b32'?"]),
        (["--method", "gtpq"], ["method 'gtpq' is unknown; did you mean 'gptq'?"]),
        (["--kv", "fp16"], ["kv 'fp16' is unknown; expected int8 or float32"]),
        (["--parts", "9"], ["--parts 9 is not possible; expected 1 to 5"]),
        (["--parts", "five"], ["--parts five is not possible; expected a whole number, 1 or more"]),
        (["--windows", "0"], ["--windows"]),
        (["--calibration", "absent.txt"], ["calibration text absent.txt cannot be read"]),
        (["--no-such"], ["--no-such"]),
        (["--bloc", "32"], ["--bloc"]),
    ],
    ids=lambda v: " ".join(v) if v and v[0].startswith("-") else "",
)
def test_bad_export_options(run: Run, exports: Exports, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    small = ["--prompt-length", "32"]
    one_line(run("export", exports.checkpoint(), "-o", tmp_path / "out", *small, *options), *parts)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists(), "nothing is begun that cannot be done"
    one_line(run("plan", exports.checkpoint(), *small, *options), *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["bundle"], ["bundle"]),
        (["exprot"], ["exprot"]),
        (["chat"], ["BUNDLE"]),
        (["chat", "absent"], ["absent is no folder; expected one made by: headrace export"]),
        (["verify", "absent"], ["absent is no folder; expected one made by: headrace export"]),
        (["bench", "absent"], ["absent is no folder"]),
        (["inspect", "absent"], ["absent does not exist; expected a checkpoint, a bundle, a Genie folder"]),
        (["plan", "absent"], ["absent does not exist; expected a folder with config.json, or a .gguf file"]),
        (["pull", "smollm3"], ["model 'smollm3' is unknown; did you mean 'smollm2-135m'?"]),
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_arguments(run: Run, arguments: list[str], parts: list[str]) -> None:
    one_line(run(*arguments), *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--runner", "hots"], ["runner 'hots' is unknown; did you mean 'host'?"]),
        (["--temp", "-1"], ["temperature"]),
        (["--top-p", "2"], ["top_p"]),
        (["--top-k", "-3"], ["top_k"]),
        (["--repeat-penalty", "0"], ["repetition_penalty"]),
        (["-n", "0"], ["--max-tokens", "1"]),
        (["-t", "0"], ["--threads", "1"]),
        (["--temp", "warm"], ["--temp", "number"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_bad_chat_options(run: Run, exports: Exports, options: list[str], parts: list[str]) -> None:
    one_line(run("chat", exports.bundle(), "--raw", "-p", "x", *options), *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["-p", "100000"], ["a prompt of 100000 tokens does not fit the context of"]),
        (["-p", "x"], ["--prompts 'x' is not possible"]),
        (["-p", "0,8", "-d", "8", "-n", "4"], ["--prompts '0,8' is not possible; expected whole numbers above 0"]),
        (["-p", "8,-5"], ["--prompts '8,-5' is not possible"]),
        (["-p", "8", "-d", "190", "-n", "100"], ["100 tokens behind 190 do not fit the context of"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_bad_bench_options(run: Run, exports: Exports, options: list[str], parts: list[str]) -> None:
    one_line(run("bench", exports.bundle(), *options), *parts)


def test_plan_tells_short_times_in_short_units(run: Run, exports: Exports) -> None:
    plan = ("plan", exports.checkpoint(), "--prompt-length", "32")
    shown = run(*plan).out
    assert " ms, " in shown and "e+" not in shown
    assert "about 0 s, " in shown and "0.0 min" not in shown
    one_line(run(*plan, "--phone-memory", "12"), "--phone-memory 12 is 12 bytes; expected a phone's memory")


def test_a_checkpoint_for_a_bundle_and_the_other_way_round(run: Run, exports: Exports, tmp_path: Path) -> None:
    checkpoint, bundle = exports.checkpoint(), exports.bundle()
    made = f"expected a bundle of it: headrace export {checkpoint} -o {checkpoint.stem}.bundle"
    for verb in ("chat", "bench", "verify", "serve"):
        one_line(run(verb, checkpoint), f"{checkpoint} is a checkpoint; {made}")
    for verb in (["plan"], ["export", "-o", tmp_path / "out"]):
        one_line(run(*verb, bundle), f"{bundle} is a bundle that export has made; expected the checkpoint")
    one_line(run("chat", bundle / "headrace.json"), f"is one file of a bundle; name its folder: {bundle}")


def test_work_is_not_begun_whose_result_has_no_place(
    run: Run, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, nowhere = exports.copy(tmp_path / "bundle"), tmp_path / "absent" / "x"
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "The"}\n')
    (bundle / "measurements").write_text("a file")
    generate = ("generate", bundle, "--input", prompts, "--output")
    there_is_none = f"{nowhere}: there is no folder {nowhere.parent}; make it first"
    one_line(run("chat", bundle, "-p", "The", "--session", nowhere), f"--session {there_is_none}")
    one_line(run("chat", bundle, "-p", "The", "--session", tmp_path), "is a folder; expected a file")
    with monkeypatch.context() as patch:  # a test may run as root, who may write everywhere
        patch.setattr("headrace.cli.options.os.access", lambda path, how: False)
        one_line(run(*generate, tmp_path / "x"), f"nothing can be written in the folder {tmp_path}; choose another")
    one_line(run(*generate, nowhere), f"--output {there_is_none}")
    one_line(run(*generate, tmp_path), "is a folder; expected a file")
    one_line(run(*generate, "/dev/null"), "/dev/null is no regular file; expected one, or a name that is free")
    one_line(run("bench", bundle, "--plots", prompts), f"--plots {prompts} cannot be made (File exists)")
    for verb in (["bench"], ["evaluate", "--text", exports.text]):
        one_line(run(*verb, bundle, "--save"), "measurements cannot be written (File exists); measure without --save")


def test_damaged_bundles(run: Run, exports: Exports, tmp_path: Path) -> None:
    path = exports.copy(tmp_path / "bundle")
    flip(path / "part_3_of_5.onnx")
    for verb in ("chat", "bench", "inspect"):
        one_line(run(verb, path), "part_3_of_5.onnx was changed", f"headrace verify {path} --files-only")
