"""chat through the device graphs and through Qualcomm's own Genie: the tokens of their loops, turns, stops, Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import headrace
from headrace.bundle.derived import derived_folder
from headrace.bundle.folder import open_bundle
from headrace.cli.main import _run
from headrace.errors import TargetError
from headrace.language_model import LanguageModel
from headrace.measure.device_parity import emulated_loop
from headrace.runtime.answer import Limits, Token
from headrace.runtime.runner import Span
from headrace.runtime.sampling import SamplingOptions
from headrace.targets.device import DeviceRunner
from headrace.targets.device_loop import DeviceLoop
from headrace.targets.qualcomm.emulation import emulate
from headrace.text.turns import Message
from tests.exports import PHONE, Exports

GREEDY = SamplingOptions(temperature=0.0)
COUNT = 8
ASK = "The river runs to the sea."


def test_chat_through_the_device_graphs_is_greedy_over_them(
    exports: Exports, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = exports.copy(tmp_path / "b", "phone", parts=3)
    assert _run(["chat", str(path), "--runner", "device", "--greedy", "-n", str(COUNT), "-p", ASK]) == 0
    said = capfd.readouterr().out
    with headrace.load(path, runner="device") as model:
        ids = model.turns.render([Message("user", ASK)], model.context)
        stop_ids = model.turns.stop_ids
        decode = model.tokenizer.decode
    runner = DeviceRunner.open(open_bundle(path), derived_folder(open_bundle(path), "device"))
    expected: list[int] = []
    at, row = 0, np.empty(0)
    for start in range(0, len(ids), runner.prompt_length):
        chunk = np.array(ids[start : start + runner.prompt_length])
        row = runner.run([Span(0, start, tuple(chunk.tolist()), (len(chunk) - 1,))])[0]
        at = start + len(chunk)
    while len(expected) < COUNT and (token := int(row.argmax())) not in stop_ids:
        expected.append(token)
        row = runner.run([Span(0, at, (token,), (0,))])[0]
        at += 1
    runner.close()
    assert expected and said == decode(expected) + "\n"


# Genie.


@pytest.fixture(scope="module")
def phone(exports: Exports) -> Path:
    return exports.bundle("phone", **PHONE)


@pytest.fixture(scope="module")
def genie(phone: Path) -> Iterator[LanguageModel]:
    with headrace.load(phone, runner="genie") as model:
        yield model


@pytest.fixture(scope="module")
def loop(genie: LanguageModel, phone: Path) -> Iterator[DeviceLoop]:
    """headrace's own loop over the very binaries that Genie runs."""
    bundle = open_bundle(phone)
    with emulated_loop(emulate(bundle, derived_folder(bundle, "emulation"))) as opened:
        yield opened


def looped(loop: DeviceLoop, ids: list[int], count: int, stop_ids: frozenset[int]) -> list[int]:
    """Greedy tokens, with the end token if there is one."""
    loop.rewind(0)
    row, said = loop.feed(ids)[-1], []
    while len(said) < count:
        said.append(int(row.argmax()))
        if said[-1] in stop_ids:
            break
        row = loop.feed(said[-1:])[0]
    return said


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


@pytest.mark.qnn
@pytest.mark.parametrize("text", [ASK, "百川东到海，何时复西归？", "a hundred rivers 12345 " * 5])
def test_greedy_is_the_likeliest_token_every_time(genie: LanguageModel, loop: DeviceLoop, text: str) -> None:
    # Temperature 0 once sampled over the whole vocabulary: Genie reads over `"greedy": true`.
    ids = genie.turns.render([Message("user", text)], genie.context)
    stop_ids = genie.turns.stop_ids
    expected = looped(loop, ids, COUNT, stop_ids)
    for _ in range(2):
        assert ids_of(list(genie.answer(ids, GREEDY, Limits(COUNT, stop_ids)))) == expected


@pytest.mark.qnn
def test_a_second_turn_rewinds_and_no_end_token_comes_between(genie: LanguageModel, loop: DeviceLoop) -> None:
    chat = genie.chat()
    first = list(chat.say(ASK, max_tokens=5, options=GREEDY))
    second = list(chat.say("何时复西归？", max_tokens=5, options=GREEDY))
    spoken = [token.id for token in first if token.id not in genie.turns.stop_ids]
    encode = genie.tokenizer.encode
    ids = [195, *encode(ASK), 196, *spoken, 195, *encode("何时复西归？"), 196]
    assert ids_of(second) == looped(loop, ids, 5, genie.turns.stop_ids)
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 2


@pytest.mark.qnn
def test_an_end_token_ends_the_answer(genie: LanguageModel, loop: DeviceLoop) -> None:
    ids = genie.turns.render([Message("user", ASK)], genie.context)
    tokens = list(genie.answer(ids, GREEDY, Limits(COUNT)))
    stop = tokens[2].id
    cut = list(genie.answer(ids, GREEDY, Limits(COUNT, {stop})))
    at = ids_of(tokens).index(stop)
    assert ids_of(cut) == ids_of(tokens)[: at + 1]
    assert cut[-1].finish == "stop" and {token.finish for token in cut[:-1]} <= {None}
    assert tokens[-1].finish == "length"


@pytest.mark.qnn
def test_a_stop_string_ends_the_answer(genie: LanguageModel) -> None:
    whole = "".join(t.text for t in genie.chat().say(ASK, max_tokens=COUNT, options=GREEDY))
    stop = whole[3:5]
    tokens = list(genie.chat().say(ASK, max_tokens=COUNT, stop=[stop], options=GREEDY))
    assert "".join(t.text for t in tokens) == whole[: whole.index(stop)]
    assert tokens[-1].finish == "stop"


@pytest.mark.qnn
@pytest.mark.parametrize("how", ["closed", "Ctrl-C"])
def test_a_stopped_answer_leaves_a_usable_model(genie: LanguageModel, how: str) -> None:
    expected = ids_of(list(genie.chat().say(ASK, max_tokens=COUNT, options=GREEDY)))
    chat = genie.chat()
    answer = chat.say(ASK, max_tokens=100, options=GREEDY)
    heard = next(answer)
    if how == "closed":
        answer.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert heard.id == expected[0]
    assert [message.role for message in chat.messages] == ["user", "assistant"], "what was said stays"
    assert ids_of(list(genie.chat().say(ASK, max_tokens=COUNT, options=GREEDY))) == expected


@pytest.mark.qnn
def test_what_genie_cannot_do_is_said(genie: LanguageModel) -> None:
    with pytest.raises(TargetError, match="Genie chooses tokens by itself and gives no logits"):
        genie.logits([1, 2])
    with pytest.raises(TargetError, match="Genie has no min_p"):
        list(genie.generate(ASK, min_p=0.1))
    with pytest.raises(TargetError, match="Genie tells no logprobs"):
        list(genie.generate(ASK, logprobs=1))
    first, second = genie.generate(ASK, max_tokens=4), genie.generate(ASK, max_tokens=4, temperature=0)
    next(first)
    with pytest.raises(TargetError, match="Genie is still giving another answer"):
        next(second)
    assert len(list(first)) == 3, "the first answer goes on"


@pytest.mark.qnn
def test_sampling_is_genies_own_and_repeatable(genie: LanguageModel) -> None:
    def say(**options: float) -> list[int]:
        chosen = genie.sampling_options(**options)
        return ids_of(list(genie.chat(raw=True).say(ASK, max_tokens=COUNT, options=chosen)))

    one = say(temperature=5.0, seed=1)
    greedy = say(temperature=0.0)
    assert say(temperature=5.0, seed=2) != one != greedy
    assert say(temperature=5.0, seed=1) == one
    assert say(temperature=5.0, seed=2, top_k=1) == greedy


@pytest.mark.qnn
def test_chat_on_the_command_line(genie: LanguageModel, phone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = derived_folder(open_bundle(phone), "emulation")
    made = (folder / "complete").stat().st_mtime_ns
    expected = "".join(t.text for t in genie.chat().say(ASK, max_tokens=4, options=GREEDY))
    assert _run(["chat", str(phone), "--runner", "genie", "--greedy", "-n", "4", "-p", ASK]) == 0
    assert capfd.readouterr().out == f"{expected}\n"
    assert (folder / "complete").stat().st_mtime_ns == made, "compiled once"
    assert _run(["chat", str(phone), "--runner", "gennie", "-p", ASK]) == 2
    assert "did you mean 'genie'" in capfd.readouterr().err
