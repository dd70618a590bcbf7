"""Signatures as command lines: every way to write them, what is refused and how, and the help."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest

from headrace.cli.command import Argument, Option, call, parser
from headrace.cli.main import VERBS, find_verb
from headrace.errors import UserError

Values = dict[str, Any]
_called: list[Values] = []


def verb(
    folders: Annotated[list[Path], Argument(metavar="FOLDER…", help="Folders.")],
    *,
    count: Annotated[int, Option("-n", "--count", min=1, max=99, help="How many.")] = 5,
    warmth: Annotated[float | None, Option("--warmth", help="How warm.")] = None,
    name: Annotated[str, Option("-x", "--name", metavar="NAME", help="What it is called.")],
    stop: Annotated[list[str] | None, Option("--stop", help="Words; repeatable.")] = None,
    pair: Annotated[list[Path] | None, Option("--pair", count=2, help="Two files.")] = None,
    raw: Annotated[bool, Option("-r", "--raw", help="As it is.")] = False,
    sure: Annotated[bool, Option("-s", "--sure", help="Ask nothing.")] = False,
    plots: Annotated[bool | None, Option("--plots/--no-plots", help="Draw.")] = None,
) -> None:
    """Do something with folders."""
    _called.append(
        {"folders": folders, "count": count, "warmth": warmth, "name": name, "stop": stop, "pair": pair, "raw": raw,
         "sure": sure, "plots": plots}
    )  # fmt: skip


DEFAULTS: Values = {
    "folders": [Path("f")], "count": 5, "warmth": None, "name": "x", "stop": None, "pair": None, "raw": False,
    "sure": False, "plots": None,
}  # fmt: skip


def read(*words: str) -> Values:
    _called.clear()
    call(verb, "program verb", words)
    (values,) = _called
    return values


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("f -x x", {}),
        ("-xx f", {}),
        ("--name=x f", {}),
        ("--name x f --count 7", {"count": 7}),
        ("f -xx -n7", {"count": 7}),
        ("f -xx -n 7 --count=8", {"count": 8}),
        ("f -xx --warmth -1.5", {"warmth": -1.5}),
        ("f -xx --warmth=1e3", {"warmth": 1000.0}),
        ("-rsx x f", {"raw": True, "sure": True}),
        ("-srnn1 --name x f", None),
        ("-rn3 f g -xx", {"raw": True, "count": 3, "folders": [Path("f"), Path("g")]}),
        ("f --stop a --stop=b -xx --stop=--stop", {"stop": ["a", "b", "--stop"]}),
        ("f --pair a b -xx", {"pair": [Path("a"), Path("b")]}),
        ("f --plots --no-plots -xx", {"plots": False}),
        ("f --no-plots --plots -xx", {"plots": True}),
        ("f --name=-r", {"name": "-r"}),
        ("f -x--help", {"name": "--help"}),
        ("f --name=", {"name": ""}),
        ("f --name=a=b", {"name": "a=b"}),
        ("-xx -- f -r --help", {"folders": [Path("f"), Path("-r"), Path("--help")]}),
        ("- -xx", {"folders": [Path("-")]}),
    ],
)
def test_ways_to_write_it(words: str, changed: Values | None) -> None:
    if changed is None:
        with pytest.raises(UserError):
            read(*words.split())
    else:
        assert read(*words.split()) == DEFAULTS | changed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("f", "the following arguments are required: -x/--name"),
        ("-xx", "the following arguments are required: FOLDER"),
        ("f -x", "argument -x/--name: expected one argument"),
        ("f -xx --pair a", "argument --pair: expected 2 arguments"),
        ("f -xx --cuont 3", "'--cuont' is not expected; did you mean '--count'?"),
        ("f -xx -q", "'-q' is not expected"),
        ("f -xx -rq", "ignored explicit argument 'q'"),
        ("f -xx --raw=1", "argument -r/--raw: ignored explicit argument '1'"),
        ("f -xx -n x", "argument -n/--count: 'x' is not possible; expected a whole number from 1 to 99"),
        ("f -xx -n 0", "argument -n/--count: '0' is not possible"),
        ("f -xx -n 100", "argument -n/--count: '100' is not possible"),
        ("f -xx -n 1.5", "argument -n/--count: '1.5' is not possible"),
        ("f -xx --warmth hot", "argument --warmth: 'hot' is not possible; expected a number"),
        ("f -xx --warmth nan", "argument --warmth: 'nan' is not possible"),
    ],
)
def test_what_does_not_fit_is_told(words: str, message: str) -> None:
    with pytest.raises(UserError) as told:
        read(*words.split())
    assert message in str(told.value)
    assert str(told.value).endswith("; see: program verb --help")


def test_one_argument_too_many() -> None:
    def single(folder: Annotated[Path | None, Argument(metavar="[FOLDER]", help="A folder.")] = None) -> None:
        _called.append({"folder": folder})

    _called.clear()
    call(single, "program", [])
    call(single, "program", ["f"])
    assert _called == [{"folder": None}, {"folder": Path("f")}]
    with pytest.raises(UserError, match="'g' is not expected"):
        call(single, "program", ["f", "g"])


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for words in (["--help"], ["f", "-h"], ["-rh"]):
        _called.clear()
        with pytest.raises(SystemExit) as left:
            call(verb, "program verb", words)
        assert not left.value.code
        assert not _called
        out = capsys.readouterr().out
        assert out.startswith("usage: program verb [OPTIONS] FOLDER…\n\nDo something with folders.\n")
        for text in ("-n N", "[default: 5]", "-x NAME", "[required]", "--pair PATH PATH", "--plots, --no-plots"):
            assert text in out
        assert max(map(len, out.splitlines())) <= 60


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_a_command_line(name: str) -> None:
    assert "options:" in parser(find_verb(name), f"headrace {name}").format_help()  # argparse refuses a spelling twice
    for parameter in inspect.signature(find_verb(name), eval_str=True).parameters.values():
        _, option = get_args(parameter.annotation)
        if not isinstance(option, Argument):
            assert all(s.startswith("--") or (s[0] == "-" and len(s) == 2) for s in option.spellings)
            assert option.help.endswith((".", ")", "…", "}", "]")), "help is a sentence"
