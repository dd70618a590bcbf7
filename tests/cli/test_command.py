"""Signatures as command lines: every way to write them, what is refused and how, and the help."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cli.command import Argument, Option, call, parameters
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
    pair: Annotated[tuple[Path, Path] | None, Option("--pair", help="Two files.")] = None,
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
        ("f --stop a --stop=b -xx --stop --stop", {"stop": ["a", "b", "--stop"]}),
        ("f --pair a b -xx", {"pair": (Path("a"), Path("b"))}),
        ("f --plots --no-plots -xx", {"plots": False}),
        ("f --no-plots --plots -xx", {"plots": True}),
        ("f -x -r", {"name": "-r"}),
        ("f -x --help", {"name": "--help"}),
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
        ("f", "--name is missing; see: program verb --help"),
        ("-xx", "FOLDER is missing"),
        ("f -x", "--name needs a value"),
        ("f -xx --pair a", "--pair needs 2 values"),
        ("f -xx --cuont 3", "there is no option --cuont; did you mean '--count'?"),
        ("f -xx -q", "there is no option -q"),
        ("f -xx -rq", "there is no option -q"),
        ("f -xx --raw=1", "--raw takes no value, but '1' was given"),
        ("f -xx -n x", "--count 'x' is not possible; expected a whole number from 1 to 99"),
        ("f -xx -n 0", "--count '0' is not possible"),
        ("f -xx -n 100", "--count '100' is not possible"),
        ("f -xx -n 1.5", "--count '1.5' is not possible"),
        ("f -xx --warmth hot", "--warmth 'hot' is not possible; expected a number"),
        ("f -xx --warmth nan", "--warmth 'nan' is not possible"),
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
    with pytest.raises(UserError, match="'g' is one argument too many"):
        call(single, "program", ["f", "g"])


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
PATHS = TEXT.map(Path)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {"folders": st.lists(PATHS, min_size=1, max_size=4), "name": TEXT},
        optional={
            "count": st.integers(1, 99),
            "warmth": st.floats(allow_nan=False),
            "stop": st.lists(TEXT, min_size=1, max_size=3),
            "pair": st.tuples(PATHS, PATHS),
            "raw": st.just(True),
            "sure": st.just(True),
            "plots": st.booleans(),
        },
    ),
    st.randoms(use_true_random=False),
)
def test_whatever_is_written_is_read(values: Values, chance: random.Random) -> None:
    short = {"count": "-n", "name": "-x", "raw": "-r", "sure": "-s"}
    groups: list[list[str]] = []
    for key, value in values.items():
        if key == "folders":
            continue
        for one in value if key == "stop" else [value]:
            spelling = short[key] if key in short and chance.random() < 0.5 else f"--{key}"
            texts = [] if one is True else [*map(str, one)] if key == "pair" else [str(one)]
            if isinstance(one, bool):
                groups.append([spelling if one else "--no-plots"])
            elif len(texts) == 1 and chance.random() < 0.5 and not (spelling[1] != "-" and texts == [""]):
                groups.append([f"{spelling}{'=' if spelling.startswith('--') else ''}{texts[0]}"])
            else:
                groups.append([spelling, *texts])
    stops = [group for group in groups if group[0].startswith("--stop")]  # these keep their order
    others = [group for group in groups if group not in stops]
    chance.shuffle(others)
    words = [word for group in [*others, *stops] for word in group]
    assert read(*words, "--", *map(str, values["folders"])) == DEFAULTS | values


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for words in (["--help"], ["f", "-h"], ["-rh"]):
        _called.clear()
        call(verb, "program verb", words)
        assert not _called
        out = capsys.readouterr().out
        assert out.startswith("Usage: program verb [OPTIONS] FOLDER…\n\n  Do something with folders.\n")
        for text in (
            "-n, --count N",
            "[default: 5]",
            "-x, --name NAME",
            "[required]",
            "--pair PATH PATH",
            "--plots, --no-plots",
        ):
            assert text in out
        assert max(map(len, out.splitlines())) <= 60


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_a_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = parameters(find_verb(name))
    spellings = [s for p in known if not p.is_argument for s in (*p.given.spellings, p.given.off) if s]
    assert len(spellings) == len(set(spellings)), "an option is spelled once"
    assert all(s.startswith("--") or (s[0] == "-" and len(s) == 2) for s in spellings)
    assert all(p.given.help.endswith((".", ")", "…", "}", "]")) or p.is_argument for p in known), "help is a sentence"
    call(find_verb(name), f"headrace {name}", ["--help"])
    out = capsys.readouterr().out
    assert all(spelling in out for spelling in spellings)
