"""Saved conversations: restored is never left, bit for bit; what does not belong is refused in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import headrace
from headrace.cli.main import _run
from headrace.errors import UserError
from headrace.language_model import LanguageModel
from headrace.runtime.chat import Chat
from headrace.runtime.sampling import SamplingOptions
from headrace.runtime.session import MAGIC, Session, read_session, write_session
from headrace.text.turns import Message
from tests.exports import Exports

SAMPLED = SamplingOptions(temperature=1.0, seed=7)


def begin(model: LanguageModel) -> Chat:
    chat = model.chat("Be brief.")
    for text in ("The river runs to the sea", "百川东到海，何时复西归？"):
        list(chat.say(text, max_tokens=12, options=SAMPLED))
    return chat


@pytest.mark.parametrize("kind", ["mha", "tied"])
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("runner", [pytest.param("native", marks=pytest.mark.kernels), "host"])
def test_restored_is_never_left(exports: Exports, tmp_path: Path, kind: str, busy: bool, runner: str) -> None:
    """The next answer and the logits behind what was saved are the same to the last bit, in another slot too."""
    path = tmp_path / "talk.session"
    with headrace.load(exports.bundle(kind), runner=runner, slots=2) as model:
        begin(model).save(path)
    with (
        headrace.load(exports.bundle(kind), runner=runner, slots=2) as never,
        headrace.load(exports.bundle(kind), runner=runner, slots=2) as later,
    ):
        if busy:  # other conversations were here, and came between
            list(later.generate("the sea", max_tokens=5))
            list(later.generate("a river", max_tokens=5))
        chats = begin(never), later.chat(session=path)
        assert chats[0].messages == chats[1].messages
        # Not all that the one holds: where an answer's text is not its tokens again, the rest was not saved, and
        # several tokens computed again are other arithmetic than each alone.
        tokens = [*chats[1]._tokens, 5]
        assert len(tokens) > 20
        logits = [model.engine.extend(model.engine.open(tokens)) for model in (never, later)]
        np.testing.assert_array_equal(*logits)
        answers = [list(chat.say("And the sea?", max_tokens=12, options=SAMPLED)) for chat in chats]
        assert answers[0] == answers[1]
        usage = [chat.usage for chat in chats]
        assert usage[0] == usage[1] and usage[1].cached_tokens > 0.5 * usage[1].prompt_tokens


def test_saving_does_not_disturb(exports: Exports, tmp_path: Path) -> None:
    with headrace.load(exports.bundle("mha"), runner="host") as model:
        plain, saved = begin(model), begin(model)
        saved.save(tmp_path / "a")
        saved.save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        answers = [list(chat.say("And the sea?", max_tokens=12, options=SAMPLED)) for chat in (plain, saved)]
        assert answers[0] == answers[1]


def test_another_model_or_runner_is_refused(exports: Exports, tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    with headrace.load(exports.bundle("mha"), runner="host") as model:
        begin(model).save(path)
        with pytest.raises(UserError, match="cannot be joined to one that has begun; expected no --system"):
            model.chat("Be long.", session=path)
        session = read_session(path)
        write_session(path, Session(session.model, "device", session.messages, session.tokens, session.cache))
        with pytest.raises(UserError, match="holds the cache of the runner 'device', this is 'host'; use --runner dev"):
            model.chat(session=path)
        write_session(path, Session(session.model, "host", session.messages, session.tokens, session.cache[:-1]))
        with pytest.raises(UserError, match="does not fit this model"):
            model.chat(session=path)
        write_session(path, Session(session.model, "host", session.messages, session.tokens[:-1], session.cache))
        with pytest.raises(UserError, match="does not fit this model"):
            model.chat(session=path)
        write_session(path, session)
    with (
        headrace.load(exports.bundle("tied"), runner="host") as other,
        pytest.raises(UserError, match="a conversation with another model or recipe"),
    ):
        other.chat(session=path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is no session"),
        (lambda data: b"{}", "is no session"),
        (lambda data: data[:-1], "is damaged"),
        (lambda data: data[: len(MAGIC) + 3], "is damaged"),
        (lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:], "is damaged"),
        (lambda data: data + b"x", "is damaged"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "talk.session"
    write_session(path, Session("m", "host", (Message("user", "a" * 300),), (1, 2), b"cache"))
    assert read_session(path).cache == b"cache"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        read_session(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_session(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be written"):
        write_session(tmp_path / "no" / "folder", Session("m", "host", ()))


CALL = {"type": "function", "id": "c1", "function": {"name": "depth", "arguments": {"river": "长江"}}}


def test_tool_calls_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    talk = (
        Message("user", "How deep?"),
        Message("assistant", "", calls=(CALL,)),
        Message("tool", "6 m", tool_call_id="c1"),
    )
    write_session(path, Session("m", "host", talk))
    assert read_session(path).messages == talk


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),  # as files were before calls were kept
        ({"calls": [{}]}, "lacks or misstates 'function'"),
        ({"calls": [{"function": {"name": 1}}]}, "lacks or misstates the name of a call"),
        ({"calls": 1}, "lacks or misstates"),
        ({"ids": [float("inf")]}, "lacks or misstates"),
        ({"role": "robot"}, "role is 'robot'"),
    ],
)
def test_a_message_of_a_file(tmp_path: Path, change: dict[str, object], message: str | None) -> None:
    path = tmp_path / "talk.session"
    said = {"role": "user", "content": "Hi", "ids": None} | change
    told = {"model": "m", "runner": "host", "messages": [said], "tokens": [], "cache_bytes": 0}
    header = json.dumps(told).encode()
    data = MAGIC + len(header).to_bytes(8, "little") + header
    path.write_bytes(data + hashlib.sha256(data).digest())
    if message is None:
        assert read_session(path).messages == (Message("user", "Hi"),)
        return
    with pytest.raises(UserError, match=message) as error:
        read_session(path)
    assert "\n" not in str(error.value)


def test_chat_keeps_a_session(exports: Exports, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two runs of the program are one conversation."""
    path, bundle = tmp_path / "talk.session", str(exports.bundle("mha"))
    options = ["--greedy", "-n", "8", "--runner", "host"]
    for text in ("The river", "And the sea?"):
        assert _run(["chat", bundle, "-p", text, "--session", str(path), *options]) == 0
    heard = capfd.readouterr().out.splitlines()
    with headrace.load(bundle, runner="host") as model:
        chat = model.chat()
        for text in ("The river", "And the sea?"):
            list(chat.say(text, max_tokens=8, options=SamplingOptions()))
        restored = model.chat(session=path)
        assert restored.used == chat.used > 0, "what the terminal tells of the context"
    assert "\n".join(heard) == "\n".join(m.content for m in chat.messages if m.role == "assistant")
    assert [m.content for m in read_session(path).messages] == [m.content for m in chat.messages]
