"""Grammars that would end their process, each as it was found: a line instead, soon, and the process goes on."""

from __future__ import annotations

import json
import os
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import UserError
from headrace.runtime import grammar_trial
from headrace.runtime.grammar import LIMITS, Grammars
from headrace.runtime.grammar_source import _ways, _ways_of_terminals, check_lark, check_regex, check_schema
from tests.text.vocabularies import byte_level_tokenizer


def _chain(length: int, step: Any) -> str:
    """Schemas of which each has the next one in it."""
    steps = {f"a{i}": step({"$ref": f"#/$defs/a{i + 1}"}) for i in range(length)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": steps | {f"a{length}": {"type": "string"}}})


def _doubling(times: int, last: str) -> str:
    return "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(times)) + f"\nA{times}: {last}"


PATTERNS = [{"type": "string", "pattern": f".*{letter}.*"} for letter in string.ascii_letters]
NAMED = {f"^c{i}_[a-z]+$": {} for i in range(2_000)}
# What was found, and what it did: fixed text counted (165 to 300 MB), parts that may be absent in a row (1.8 and 2.9
# GB), terminals of terminals (1.1 GB), classes (0.6 GB), patterns that must all fit (for ever), names that are patterns
# (for ever), schemas and rules that name each other (a stack that overflows: SIGSEGV), remainders (0.2 GB, or
# 2 s: the machine's speed decides which runs out first).
KINDS = {
    "fixed text, counted": ("regex", r"((\x{10FFFF}){99999}){5,}", "cannot be followed|too many expressions"),
    "fixed text, counted twice": ("regex", "((a){99999}){1000}", "cannot be followed|too many expressions"),
    "fixed text of a schema": ("json_schema", json.dumps({"const": "x" * 250_000}), "too many expressions"),
    "absent parts": ("regex", ".*" * 10_000, "parts that may be absent"),
    "absent parts behind others": ("regex", "a" * 300 + r"\w?" * 6_000, "parts that may be absent"),
    "absent parts of a schema": ("json_schema", json.dumps({"items": {"pattern": "b?" * 3_000}}), "may be absent"),
    "absent parts as a separator": ("json_schema", json.dumps({"x-guidance": {"item_separator": "a?" * 3_000}}),
                                    "may be absent"),
    "absent parts of Lark": ("lark", "start: A\nA: " + '"b"? ' * 3_000, "may be absent"),
    "absent texts of Lark": ("lark", "start: A\nA: " + '(""|"b") ' * 3_000, "may be absent"),
    "terminals of terminals": ("lark", _doubling(14, '"x"?'), "may be absent"),
    "terminals of terminals behind others": ("lark", 'start: B\nB: /b{300}/ A0 "z"\n' + _doubling(13, r"/\w?/")[10:],
                                             "may be absent"),
    "classes": ("regex", r"\W" * 30_000, "takes more than 128 MB"),
    "patterns that must all fit": ("json_schema", json.dumps({"allOf": PATTERNS}), "takes more than"),
    "names that are patterns": ("json_schema", json.dumps({"patternProperties": NAMED}), "takes more than 2 s"),
    "remainders": ("json_schema", json.dumps({"allOf": [{"type": "integer", "multipleOf": k} for k in (997, 991)]}),
                   "takes more than 128 MB|takes more than 2 s"),
    "schemas in a chain": ("json_schema", _chain(3_000, lambda next: {"properties": {"x": next}}), "nests too deep"),
    "references in a chain": ("json_schema", _chain(6_000, lambda next: next), "nests too deep"),
    "choices in a chain": ("json_schema", _chain(3_500, lambda next: {"anyOf": [next, {"type": "null"}]}), "too deep"),
    "rules in a chain": ("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1} |" for i in range(8_000)) + '\nr8000: "x"',
                         "nests too deep"),
}  # fmt: skip
MEMORY = 400 << 20  # bytes of address space beyond what a process has that has compiled a grammar


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    byte_level_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_no_grammar_ends_its_process(vocabulary: Path, tmp_path: Path, kind: str) -> None:
    """In a process with limits of memory and time, which has to be there afterwards and still compile."""
    name, source, message = KINDS[kind]
    (tmp_path / "source").write_text(source, encoding="utf-8")
    code = """if True:
        import resource, sys
        from pathlib import Path
        import numpy as np
        from headrace.errors import HeadraceError
        from headrace.runtime.grammar import Grammars
        from headrace.text.tokenizer_folder import load_tokenizer
        tokenizer = load_tokenizer(Path(sys.argv[1]))
        grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
        grammars.compile("regex", "a+")
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + int(sys.argv[4])
        resource.setrlimit(resource.RLIMIT_AS, (held, held))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        try:
            state = grammars.compile(sys.argv[2], Path(sys.argv[3]).read_text()).start()
            for _ in range(400):
                if state.take(int(np.flatnonzero(state.allowed())[0])):
                    break
            print("followed")
        except HeadraceError as error:
            print(error)
        assert grammars.compile("regex", "ab").accepts("ab")
    """
    words = [sys.executable, "-c", code, str(vocabulary), name, str(tmp_path / "source"), str(MEMORY)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "RUST_BACKTRACE": "0"})
    assert done.returncode == 0, done.stderr[-500:]
    assert len(done.stdout.splitlines()) == 1
    assert any(part in done.stdout for part in message.split("|")), done.stdout


def test_what_real_schemas_have_is_let_through() -> None:
    words = "|".join(f"word{i}" for i in range(20_000))
    check_regex(rf"({words})(, ({words}))*\?")
    check_schema({"properties": {f"p{i}": {"pattern": r"^https?://[^\s]+(\.[a-z]+)*$"} for i in range(500)}})
    check_schema({"description": "Is it? *Yes*? " * 1000})  # no expression
    check_lark('start: call\ncall: %json {"description": "' + "?" * 5000 + '"} "?"')


@pytest.mark.parametrize(
    "row",
    ["a?", "a*", "a*?", "a{0,3}", "a{,3}", "(a|)", "(|a)", "(a||b)", "()", "(?:)", "~(a)", "(a&b)", "(?:a|)", "a{ 0 }"],
)
def test_every_way_to_be_absent_is_counted(row: str) -> None:
    with pytest.raises(UserError, match="may be absent"):
        check_regex(row * 1500)
    with pytest.raises(UserError, match="may be absent"):
        check_lark(f"start: A\nA: /{row * 1500}/")


@st.composite
def terminals(draw: st.DrawFn) -> dict[str, str]:
    """Definitions of terminals, each made of some of those before."""
    parts = ['"b"', '"b"?', "/[c-e]*/", '("x"|"y")', '""', '"A0:"', "/A1 ?/", "B~0..2"]
    made: dict[str, str] = {}
    for i in range(draw(st.integers(1, 6))):
        body = draw(st.lists(st.sampled_from([*parts, *made, *made]), min_size=1, max_size=5))
        made[f"A{i}"] = draw(st.sampled_from([" ", "\n  | "])).join(body)
    return made


@given(terminals())
def test_a_terminal_is_counted_as_what_it_is_made_of(made: dict[str, str]) -> None:
    """As many ways as the grammar has in which all is written out."""
    written: dict[str, str] = {}
    for name, body in made.items():  # names in texts and expressions are none
        written[name] = re.sub(r'"[^"]*"|/[^/]*/|A\d', lambda found: written.get(found[0], found[0]), body)
    source, whole = (
        "start: A0\n" + "\n".join(f"{name}: {body}" for name, body in bodies.items()) + "\nB: /x/"
        for bodies in (made, written)
    )
    assert _ways_of_terminals(source, False) == _ways_of_terminals(whole, False) == sum(map(_ways, written.values()))


def test_terminals_as_grammars_have_them_are_let_through() -> None:
    check_lark(
        "start: value+\nvalue: NUMBER | STRING | NAME\n"
        'NUMBER.2: INT ("." DIGITS)? EXP?\nINT: "-"? DIGITS\nEXP: ("e"|"E") ("+"|"-")? DIGITS\nDIGITS: /[0-9]+/\n'
        'STRING[capture]: "\\"" /[^"]*/ "\\""\n_SPACE: /[ \\t]+/\nNAME: _SPACE? /[a-z]+/ _SPACE?\n'
    )
    check_lark("start: " + " ".join(f"T{i}" for i in range(500)) + "".join(f'\nT{i}: "t"? X "{i}"' for i in range(500))
               + "\nX: /x?y*z{0,2}/")  # fmt: skip
    with pytest.raises(UserError, match=r"the terminal 'A1?' is made of itself; expected a rule"):
        check_lark('start: A\nA: A1\nA1: "b" A?')


def test_where_spaces_mean_nothing_brackets_count() -> None:
    check_regex("( )" * 1500)
    for source in ("(?x)" + "( )" * 1500, "(?sx:" + "(#\n)" * 1500 + ")"):
        with pytest.raises(UserError, match="may be absent"):
            check_regex(source)
    check_lark('start: "/x" /( )/' + "( )" * 1500)
    with pytest.raises(UserError, match="may be absent"):
        check_lark(f"start: /{'( )' * 1500}/sx")


def test_a_schema_in_lark_is_looked_at() -> None:
    with pytest.raises(UserError, match="multipleOf is 2147483647"):
        check_lark('start: %json {"type": "integer", "multipleOf": 2147483647}')
    with pytest.raises(UserError, match="may be absent"):
        check_lark('start: "a" %json ' + json.dumps({"pattern": "b?" * 1500}) + ' "c"')
    with pytest.raises(UserError, match="%json in a grammar is followed by what is no JSON"):
        check_lark("start: %json {")


def test_a_grammar_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = grammar_trial._Trials()
    tried: list[bytes] = []
    monkeypatch.setattr(trials, "_tried", lambda asked: tried.append(asked) or "")
    for _ in range(3):
        assert trials.why_not("one", {}) is None
    assert trials.why_not("one", {"max_lexer_states": 3}) is None and len(tried) == 2
    for i in range(grammar_trial.REMEMBERED):
        trials.why_not(str(i), {})
    trials.why_not("one", {})
    assert len(tried) == grammar_trial.REMEMBERED + 3, "the oldest is forgotten"


@pytest.mark.parametrize(
    ("ended", "why", "times"),
    [
        ("SIGABRT", "takes more than 128 MB to compile", 1),
        ("SIGXCPU", "takes more than 2 s to compile", 1),
        ("SIGSEGV", "nests too deep", 1),
        ("SIGALRM", "takes more than 50 s to compile", 3),
        ("SIGKILL", "ends its process (SIGKILL)", 3),
    ],
)
def test_what_ended_a_trial_is_remembered_where_it_would_again(
    monkeypatch: pytest.MonkeyPatch, ended: str, why: str, times: int
) -> None:
    """What a grammar takes is its own; how long a clock goes meanwhile, and who else ends a process, is not."""
    trials = grammar_trial._Trials()
    tried: list[bytes] = []
    monkeypatch.setattr(trials, "_tried", lambda asked: tried.append(asked) or ended)
    assert [trials.why_not("one", {}) for _ in range(3)] == [why] * 3 and len(tried) == times
    for i in range(grammar_trial.REMEMBERED):
        trials.why_not(str(i), {})
    assert len(trials._ended) <= grammar_trial.REMEMBERED


def test_the_child_is_started_again(vocabulary: Path) -> None:
    pytest.importorskip("llguidance")
    from llguidance import LLMatcher

    trials = grammar_trial._Trials()
    grammar = LLMatcher.grammar_from_regex("a+")
    assert trials.why_not(grammar, LIMITS) is None
    child = trials._child
    assert child is not None
    child.kill()
    child.wait()
    assert trials.why_not(LLMatcher.grammar_from_regex("b+"), LIMITS) is None
    again = trials._child
    assert again is not None and again is not child
    del trials
    assert again.returncode == 0, "it ends with whom it serves"


def test_a_child_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="tried in a child process first, which ended by itself with status 1"):
        grammar_trial._Trials().why_not("start: /a/", LIMITS)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(
        UserError, match=r"in a child process first, and /nowhere/python cannot be started \(No such file"
    ):
        grammar_trial._Trials().why_not("start: /a/", LIMITS)


def test_without_fork_the_child_itself_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on Windows: it is started again for the next one."""
    code = Path(grammar_trial.grammar_child.__file__).read_text(encoding="utf-8")
    alone = tmp_path / "alone.py"
    alone.write_text(code.replace("import os\n", "import os\ndel os.fork\n", 1), encoding="utf-8")
    monkeypatch.setattr(grammar_trial.grammar_child, "__file__", str(alone))
    trials = grammar_trial._Trials()
    chain = "start: r0\n" + "\n".join(f"r{i}: r{i + 1} |" for i in range(8_000)) + '\nr8000: "x"'
    assert trials.why_not(chain, LIMITS) == "nests too deep"
    assert trials.why_not("start: /a/", LIMITS) is None
    assert trials.why_not("start: /b/", LIMITS) is None


def test_a_child_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_trial, "PATIENCE", 0.0)
    trials = grammar_trial._Trials()
    assert trials.why_not("start: /a/", LIMITS) == "takes more than 50 s to compile"


def test_a_fork_has_a_child_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = grammar_trial._Trials()
    assert trials.why_not('start: "a"', LIMITS) is None
    own = trials._child
    assert own is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)  # as a fork of this process would be
        assert trials.why_not('start: "b"', LIMITS) is None
        assert trials._child is not own and own.poll() is None
        trials._ending()
    grammar_trial._end(own, os.getpid())  # as the process that started it does
    assert own.returncode == 0


def test_grammars_of_all_kinds_still_compile(vocabulary: Path) -> None:
    from headrace.text.tokenizer_folder import load_tokenizer

    tokenizer = load_tokenizer(vocabulary)
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    tools = [
        {"properties": {"name": {"const": f"t{i}"}, "of": {"type": "string", "maxLength": 99}}} for i in range(128)
    ]
    for kind, source in (
        ("json_schema", json.dumps({"anyOf": tools})),
        ("json_schema", json.dumps({"enum": [f"value {i}" for i in range(1_000)]})),
        ("json_schema", json.dumps({"type": "string", "minLength": 2_000, "maxLength": 100_000})),
        ("json_schema", json.dumps({"const": "x" * 8_000})),
        ("json_schema", _chain(60, lambda next: {"properties": {"x": next}})),
        ("regex", r"[a-z]{0,99999}"),
        ("lark", 'start: "a"~99999'),
    ):
        assert grammars.compile(kind, source).start().allowed().any()
