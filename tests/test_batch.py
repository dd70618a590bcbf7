"""A file of prompts: answered in order, as each alone, resumed after a kill, and told what is wrong with a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.batch import answer_file, read_prompts
from headrace.cli.main import _run
from headrace.errors import UserError
from headrace.files import try_lock
from headrace.language_model import load
from tests.exports import Exports

ASKED: list[Any] = [
    {"prompt": "The river"},
    {"messages": [{"role": "user", "content": "Water?"}]},
    {"prompt": "long " * 300},
    {"prompt": "长江"},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"prompt": "One two"},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ASKED), encoding="utf-8")
    return path


def _answer(
    exports: Exports, prompts: Path, out: Path, slots: int, runner: str = "host", **options: Any
) -> list[dict[str, Any]]:
    with load(exports.bundle("tied"), runner=runner, slots=slots) as model:
        sampling = model.sampling_options(**(options or {"temperature": 0}))
        failed = answer_file(model, prompts, out, max_tokens=8, options=sampling)
    rows = [json.loads(row) for row in out.read_text(encoding="utf-8").splitlines()]
    assert failed <= sum("error" in row for row in rows)
    return rows


def test_answers_are_in_order_and_as_each_alone(exports: Exports, prompts: Path, tmp_path: Path) -> None:
    rows = _answer(exports, prompts, tmp_path / "many.jsonl", 3)
    assert [row["index"] for row in rows] == list(range(len(ASKED)))
    assert "the prompt has" in rows[2]["error"] and "a message's role is 'robot'" in rows[4]["error"]
    assert rows == _answer(exports, prompts, tmp_path / "one.jsonl", 1)
    assert all(row["finish"] and row["usage"]["tokens"] for row in rows if "error" not in row)


@pytest.mark.kernels  # for ONNX Runtime a token alone is other arithmetic than among others: a near tie may turn
def test_seeds_do_not_depend_on_the_neighbours(exports: Exports, prompts: Path, tmp_path: Path) -> None:
    rows = _answer(exports, prompts, tmp_path / "many.jsonl", 4, "native", temperature=1.5, seed=3)
    assert rows == _answer(exports, prompts, tmp_path / "one.jsonl", 1, "native", temperature=1.5, seed=3)


@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_a_killed_run_goes_on(exports: Exports, prompts: Path, tmp_path: Path, kept: int) -> None:
    whole = tmp_path / "whole.jsonl"
    rows = _answer(exports, prompts, whole, 2)
    lines = whole.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(lines[:kept]) + (lines[kept][:7] if kept < len(lines) else b""))
    assert _answer(exports, prompts, cut, 2) == rows
    assert cut.read_bytes() == whole.read_bytes()


def test_the_verb(exports: Exports, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["--input", str(prompts), "--output", str(out), "-n", "4", "--greedy", "--runner", "host", "--json"]
    assert _run(["generate", str(exports.bundle("tied")), *arguments]) == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (told["prompts"], told["failed"]) == (len(ASKED), 2)
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(ASKED)


def test_answers_that_stay_are_told(
    exports: Exports, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["generate", str(exports.bundle("tied")), "--input", str(prompts), "--output", str(out), "--greedy"]
    assert _run([*arguments, "-n", "4"]) == 0
    assert "stay as they are" not in capfd.readouterr().err
    before = out.read_bytes()
    assert _run([*arguments, "-n", "9"]) == 0
    told = f"{len(ASKED)} of {len(ASKED)} answers are in {out} and stay as they are; remove it to have them made anew"
    assert told in capfd.readouterr().err
    assert out.read_bytes() == before


def test_a_second_run_does_not_write_into_the_first_ones_file(exports: Exports, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with out.open("ab") as file:
        file.write(b'{"index": 0, "te')
        file.flush()
        assert try_lock(file)
        with pytest.raises(UserError, match=r"another run writes .*out\.jsonl; wait until it has ended"):
            _answer(exports, prompts, out, 2)
        assert out.read_bytes() == b'{"index": 0, "te', "half a line of a run that goes on is left alone"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"line 1, is not JSON"),
        ('{"prompt": "a"}\n[1]', r"line 2, is '\[1\]'; expected"),
        ('{"prompt": 3}', r"expected \{\"prompt\": TEXT\}"),
        ('{"messages": []}', "expected"),
        ('{"messages": [{"role": "user"}]}', "expected"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 1: content is 3; expected text or a list of text"),
        (
            '{"prompt": "a\u2028\x85b"}\n{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "line 2: content has a part of type 'image_url'; expected text",
        ),
    ],
)
def test_lines_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_prompts(path)


def test_content_is_text_or_parts_of_it(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "river.\u2029"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    path.write_text(json.dumps({"messages": messages}, ensure_ascii=False), encoding="utf-8")
    assert read_prompts(path) == [
        [{"role": "user", "content": "Name a river.\u2029"}, {"role": "assistant", "content": ""}]
    ]
    path.write_text("", encoding="utf-8")
    assert read_prompts(path) == []


def test_the_prompts_are_not_the_answers_place(exports: Exports, tmp_path: Path) -> None:
    path, link = tmp_path / "p.jsonl", tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "a"}')
    link.symlink_to(path)
    for out in (path, link):
        with pytest.raises(UserError, match="holds something else than the answers"):
            _answer(exports, path, out, 2)
    assert path.read_text() == '{"prompt": "a"}'


def test_somebody_elses_file_is_left_alone(exports: Exports, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    foreign = (
        "my notes\n",
        '{"index": 5}\n',
        '{"index": 0}\n' * 9,
        "my notes",
        '{"index": 5, "te',
        '{"weights": [1]}',
        "{\n",
    )
    for content in foreign:
        out.write_text(content)
        with pytest.raises(UserError, match="holds something else"):
            _answer(exports, prompts, out, 1)
        assert out.read_text() == content


def test_a_line_does_not_depend_on_what_ran_before(exports: Exports, tmp_path: Path) -> None:
    """Prompts that begin alike share the cache, which a run that goes on does not have: the file is the same."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"The river flows {n}"}) + "\n" for n in range(6)))
    rows = _answer(exports, prompts, tmp_path / "whole.jsonl", 1)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert set(rows[0]["usage"]) == {"prompt_tokens", "tokens"}
    for kept in range(6):
        out = tmp_path / f"{kept}.jsonl"
        out.write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]))
        _answer(exports, prompts, out, 1)
        assert out.read_bytes() == whole
