"""The command line: what it prints where, and its exit status."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import unicodedata
from pathlib import Path

import pytest

import headrace
from headrace.bundle.folder import open_bundle
from headrace.cli import main as cli
from headrace.errors import UserError
from tests.bundle.test_folder import FILES, flip
from tests.cli.calling import HEADRACE, LIMIT, Run, child, export_arguments, one_line
from tests.exports import CONTEXT, Exports

# Export, and what a person sees of a bundle


def test_export(run: Run, exports: Exports, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = run("export", exports.checkpoint(), "-o", out, *export_arguments(exports))
    assert result.status == 0
    assert result.out.startswith(f"{out}: ")
    assert "in 5 parts" in result.out
    assert "quantizing layers: done" in result.err
    assert "calibration:" not in result.err
    report = run("export", exports.checkpoint(), "-o", out, "--json", "--block", "32", *export_arguments(exports)).json
    assert report["bundle"] == str(out)
    assert report["weight_bytes"] == open_bundle(out).weight_bytes
    assert report["seconds"] >= 0


def test_the_default_text_is_told(run: Run, exports: Exports, tmp_path: Path) -> None:
    result = run(
        "export", exports.checkpoint(), "-o", tmp_path / "b", "--windows=1", "--window-length=16", "--block=16"
    )
    assert result.status == 0
    assert "calibration: the English topics that come with Python; --calibration FILE" in result.err


def test_inspect(run: Run, exports: Exports) -> None:
    result = run("inspect", exports.bundle())
    assert result.status == 0
    for text in ("bundle", "llama", "w4a16", "int4 channel", "int8 channel", "int8, 256 bytes a token"):
        assert text in result.out
    tensors = run("inspect", exports.checkpoint(), "--tensors").out
    assert "layers.3.mlp.down_proj.weight" in tensors
    assert "64×96" in tensors
    assert run("inspect", exports.bundle(), "--json").json["summary"]["kind"] == "bundle"
    assert run("inspect", exports.checkpoint(), "--json").json["summary"]["kind"] == "checkpoint"


def test_inspect_program(run: Run, exports: Exports) -> None:
    listing = run("inspect", exports.bundle(), "--program")
    assert (listing.status, listing.err) == (0, "")
    assert "attention" in listing.out
    instructions = run("inspect", exports.bundle(), "--program", "--json").json["instructions"]
    assert len(listing.out.splitlines()) == len(instructions) + 5
    one_line(run("inspect", exports.checkpoint(), "--program"), "is a checkpoint; expected a bundle of it")


def test_bench(run: Run, exports: Exports) -> None:
    small = ("-p", "8,40", "-n", "4", "-d", "8", "-r", "2")
    report = run("bench", exports.bundle(), *small, "--json").json
    assert {"load", "step", "prompts", "decode", "memory", "machine", "versions"} <= set(report)
    assert [p["tokens"] for p in report["prompts"]] == [8, 40]
    shown = run("bench", exports.bundle(), *small).out
    for text in ("prompt", "first token", "ms between tokens", "load", "KV cache", "peak memory"):
        assert text in shown


# verify


def test_verify(run: Run, exports: Exports) -> None:
    result = run("verify", exports.bundle("calm", block=16), "--checkpoint", exports.checkpoint("calm"))
    assert result.status == 0, result.out + result.err
    for text in ("checkpoint → quantized weights", "one graph → 5 parts", "token by token", "KL", "≤"):
        assert text in result.out
    report = run("verify", exports.bundle("calm", block=16), "--json").json
    assert report["ok"] is True
    assert all(link["ok"] for link in report["links"])


@pytest.mark.parametrize("name", FILES)
def test_verify_names_an_altered_file(run: Run, exports: Exports, tmp_path: Path, name: str) -> None:
    path = exports.copy(tmp_path / "bundle")
    flip(path / name, bit=5)
    for options in ([], ["--files-only"]):
        result = run("verify", path, *options)
        assert result.status == 1
        assert name in result.err
        assert result.err.splitlines()[-1].startswith("failed: files: ")
        assert name in result.out
    report = run("verify", path, "--files-only", "--json")
    assert report.json["ok"] is False
    assert report.status == 1


def test_verify_does_not_mind_the_card(run: Run, exports: Exports, tmp_path: Path) -> None:
    path = exports.copy(tmp_path / "bundle")
    (path / "README.md").write_text("the model card")
    assert run("verify", path, "--files-only").status == 0
    (path / "README.txt").write_text("something else")
    result = run("verify", path, "--files-only")
    assert result.status == 1
    assert "README.txt" in result.err
    (path / "README.txt").unlink()
    (path / "tokenizer.model").unlink()
    assert "tokenizer.model is missing" in run("verify", path, "--files-only").err


# chat


def test_an_answer_and_nothing_else(run: Run, exports: Exports) -> None:
    arguments = ("chat", exports.bundle(), "-p", "The river", "-n", "8", "--greedy", "--raw")
    result = run(*arguments)
    assert result.status == 0
    assert result.err == ""
    with headrace.load(exports.bundle()) as model:
        tokens = list(model.generate("The river", max_tokens=8, temperature=0))
    assert result.out == "".join(t.text for t in tokens) + "\n"
    assert run(*arguments).out == result.out


def test_a_seed_repeats_and_options_reach_the_sampler(run: Run, exports: Exports) -> None:
    def sampled(*more: object) -> str:
        return run("chat", exports.bundle(), "-p", "a", "-n", "12", "--raw", "--temp", "1.5", *more).out

    assert sampled("-s", "7") == sampled("-s", "7")
    assert len({sampled("-s", seed) for seed in range(4)}) > 1
    greedy = run("chat", exports.bundle(), "-p", "a", "-n", "12", "--raw", "--greedy").out
    assert sampled("--top-k", "1") == greedy
    assert sampled("--top-p", "0.000001") == greedy


def test_a_model_without_turns_says_so_once(run: Run, exports: Exports) -> None:
    result = run("chat", exports.bundle(), "-p", "The", "-n", "2")
    assert result.err == "this model has no turn format: it continues your text\n"
    for kind in ("tied", "mha"):
        assert run("chat", exports.bundle(kind), "-p", "The", "-n", "2").err == ""


def test_a_prompt_from_a_pipe(exports: Exports) -> None:
    done = child("chat", exports.bundle(), "-n", "4", "--greedy", "--raw", input="The river")
    again = child("chat", exports.bundle(), "-n", "4", "--greedy", "--raw", "-p", "The river")
    assert done.returncode == again.returncode == 0, done.stderr
    assert done.stdout == again.stdout
    assert done.stderr == ""


def test_a_prompt_that_is_too_long(run: Run, exports: Exports) -> None:
    one_line(run("chat", exports.bundle(), "--raw", "-p", "x " * 500), "tokens, but the context holds", str(CONTEXT))


def test_a_reader_that_goes_away(exports: Exports) -> None:
    child_process = subprocess.Popen(
        [*HEADRACE, "chat", str(exports.bundle()), "--raw", "-p", "The", "-n", "100"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child_process.stdout is not None
    assert child_process.stderr is not None
    child_process.stdout.close()
    err = child_process.stderr.read()
    child_process.stderr.close()
    assert child_process.wait(LIMIT) in (0, 1)
    assert b"Traceback" not in err


def test_ctrl_c_that_a_library_makes_another_error_of(exports: Exports) -> None:
    # numpy does, while it is imported: an ImportError, without a word of what was before.
    code = """
        import signal, sys, headrace.measure.inspection as inspection
        from headrace.cli import main as cli

        def fail(path):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("could not import module datetime") from None

        inspection.inspect_path = fail
        sys.argv = ["headrace", "inspect", "x"]
        cli.main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_the_program_is_read() -> None:
    code = """
        import sys

        class Pressed:
            def find_spec(self, name, *rest):
                if name == "headrace.cli.command":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Pressed())
        from headrace.__main__ import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_that_is_ignored_stays_so(exports: Exports) -> None:
    # A shell starts what runs in the background so.
    code = """
        import signal, sys, headrace.measure.inspection as inspection
        from headrace.cli import main as cli

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        inspection.inspect_path = lambda path: signal.raise_signal(signal.SIGINT) or {"summary": {}, "precisions": []}
        sys.argv = ["headrace", "inspect", "x", "--json"]
        cli.main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, "")


# Leaving


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 130, ""),
        (UserError("a; b"), 2, "error: a; b\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
        (MemoryError(), 2, "error: MemoryError\n"),
        (PermissionError(13, "Permission denied", "x"), 2, "error: x: Permission denied\n"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)
def test_how_a_verb_ends(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, text: str
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr("headrace.measure.inspection.inspect_path", fail)
    result = run("inspect", "x")
    assert (result.status, result.err, result.out) == (status, text, "")


def test_ctrl_c_in_a_child(exports: Exports, tmp_path: Path) -> None:
    """SIGINT in the middle of an export: 130, no traceback, nothing under the final name, --resume possible."""
    code = (
        "import sys, time; from headrace.cli import main as cli; import headrace.exporter.job as e\n"
        "def slow(*a): print('HERE', flush=True); time.sleep(60)\n"
        "e._emit_graphs = slow; sys.exit(cli._run(sys.argv[1:]))"
    )
    arguments = ["export", exports.checkpoint(), "-o", tmp_path / "out", *export_arguments(exports)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "HERE\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "Traceback" not in err
    kept = tmp_path / "out.partial"
    assert err.endswith(f"stopped; what is done stays in {kept}: go on with the same command and --resume\n")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "state.json").exists()


def test_real_processes(exports: Exports, tmp_path: Path) -> None:
    done = child("--version")
    assert (done.returncode, done.stdout) == (0, f"{headrace.__version__}\n")
    done = child()
    assert done.returncode == 0
    for verb in ("pull", "inspect", "export", "verify", "chat", "bench"):
        assert verb in done.stdout
    done = child("export", tmp_path, "-o", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path} has no config.json and no .gguf file")
    assert done.stderr.count("\n") == 1


# A real model


@pytest.fixture(scope="module")
def baichuan2(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared tiny Baichuan2, exported as the README does it, on Chinese and English text."""
    out = tmp_path_factory.mktemp("baichuan2") / "bundle"
    texts = [a for f in ("zh", "en") for a in ("--calibration", str(shared_data / f"calibration_{f}.txt"))]
    arguments = [
        "export",
        str(shared_data / "tiny-baichuan2"),
        "-o",
        str(out),
        *texts,
        "--windows",
        "4",
        "--window-length",
        "128",
    ]
    assert cli._run(arguments) == 0
    return out


def scripts(text: str) -> tuple[int, int]:
    """Letters that are Chinese characters, and Latin ones."""
    names = [unicodedata.name(c, "") for c in text if c.isalpha()]
    return sum(n.startswith("CJK") for n in names), sum(n.startswith("LATIN") for n in names)


@pytest.mark.shared
@pytest.mark.parametrize("prompt", ["这个软件包提供了", "您可以使用以下命令来"])
def test_chinese_goes_on_in_chinese(run: Run, baichuan2: Path, prompt: str) -> None:
    result = run("chat", baichuan2, "--raw", "--greedy", "-n", "32", "-p", prompt)
    assert result.status == 0
    chinese, latin = scripts(result.out)
    assert chinese >= 8, result.out
    assert chinese > latin / 2, "names of programs are Latin"
    assert "�" not in result.out


@pytest.mark.shared
@pytest.mark.parametrize("prompt", ["If you want to install a package, you", "This package provides"])
def test_english_goes_on_in_english(run: Run, baichuan2: Path, prompt: str) -> None:
    result = run("chat", baichuan2, "--raw", "--greedy", "-n", "32", "-p", prompt)
    assert result.status == 0
    chinese, latin = scripts(result.out)
    assert chinese == 0, result.out
    assert latin >= 40
    assert result.out.startswith(" "), "what goes on from a word keeps its space"


@pytest.mark.shared
def test_the_chain_holds_for_a_real_model(run: Run, baichuan2: Path, shared_data: Path) -> None:
    result = run("verify", baichuan2, "--checkpoint", shared_data / "tiny-baichuan2", "--json")
    assert result.status == 0, result.out
    names = [link["name"] for link in result.json["links"]]
    assert names[0] == "files"
    assert len(names) >= 7
    assert [p.name for p in baichuan2.parent.iterdir()] == ["bundle"], "what verify wrote beside the bundle is gone"
