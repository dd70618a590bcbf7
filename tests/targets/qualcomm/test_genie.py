"""Qualcomm's own Genie, answering over emulated binaries: the loop's tokens and logits, and how it is interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from headrace.config import RopeScaling
from headrace.errors import ContextFull, TargetError
from headrace.targets.device_loop import DeviceLoop
from headrace.targets.qualcomm.child import Child
from headrace.targets.qualcomm.compiler import Emulator
from headrace.targets.qualcomm.genie import (
    CONFIG_FILE,
    genie_config,
)
from headrace.targets.qualcomm.genie_check import check_genie_config, check_genie_folder
from headrace.targets.qualcomm.genie_dialog import End, GenieRunner
from tests.targets.qualcomm.conftest import CONTEXTS, EOS, LENGTHS, TinyTarget

# Genie and the loop run the same binaries on the same codes: what is left is the order of one dequantization.
SAME_KL = 1e-6


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p ‖ q) of two rows of logits."""
    a, b = (x.astype(np.float64) - x.max() for x in (p, q))
    a, b = a - np.log(np.exp(a).sum()), b - np.log(np.exp(b).sum())
    return float((np.exp(a) * (a - b)).sum())


@pytest.fixture(scope="module")
def genie(target: TinyTarget) -> Iterator[GenieRunner]:
    """A dialog that gives logits."""
    config = check_genie_folder(target.emulation, target.plan, emulation=True)
    with GenieRunner(config, target.emulation, lengths=LENGTHS, contexts=CONTEXTS, own_sampler=True) as runner:
        yield runner


@pytest.fixture
def loop(target: TinyTarget, emulator: Emulator) -> DeviceLoop:
    """headrace's own loop over the same binaries."""
    plan = target.plan
    return DeviceLoop(plan.config, plan.parts, LENGTHS, CONTEXTS, plan.encodings, emulator.run, pad=plan.pad)


def _prompt(count: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 320, count)]


@pytest.mark.qnn
@pytest.mark.parametrize(
    ("prompt", "forced"),
    [(5, 0), (65, 6), (100, 0)],
    ids=["one step", "across contexts while answering", "across contexts within the prompt"],
)
def test_genie_gives_the_loops_tokens_and_logits(
    genie: GenieRunner, loop: DeviceLoop, prompt: int, forced: int
) -> None:
    ids, count = _prompt(prompt, prompt), 6 + forced
    genie.reset()
    answer = list(genie.query_tokens(ids, count, logits=True, forced=_prompt(forced, 1)))
    row, differences = loop.feed(ids)[-1], []
    for i, token in enumerate(answer):
        assert token.logits is not None
        differences.append(_kl(row, token.logits))
        if i >= forced:
            assert token.id == int(row.argmax()), f"token {i}"
        row = loop.feed([token.id])[0]
    assert max(differences) <= SAME_KL
    # The first eos ends an answer, and is not given out.
    assert len(answer) == count or (genie.end is End.DONE and int(row.argmax()) == EOS)


@pytest.mark.qnn
def test_a_second_turn_has_an_eos_before_it(genie: GenieRunner, loop: DeviceLoop) -> None:
    first, second, said = _prompt(20, 7), _prompt(9, 8), [11, 12, 13]
    genie.reset()
    assert [token.id for token in genie.query_tokens(first, 3, forced=said)] == said
    (then,) = genie.query_tokens(second, 1, logits=True)
    expected = loop.feed([*first, *said, EOS, *second])[-1]
    assert then.logits is not None and _kl(expected, then.logits) <= SAME_KL


@pytest.mark.qnn
@pytest.mark.parametrize("ended", ["eos", "cut"])
@pytest.mark.parametrize("history", ["whole", "shorter", "other", "same"])
def test_a_rewound_turn_is_the_conversation_alone(
    genie: GenieRunner, loop: DeviceLoop, ended: str, history: str
) -> None:
    first, said = _prompt(20, 7), [11, 12, 13]
    genie.reset()
    list(genie.query_tokens(first, 3 if ended == "cut" else 9, forced=[*said, EOS]))
    ids = {
        "whole": [*first, *said, 50, 51, 52],
        "shorter": [*first[:10], 50],
        "other": [50, 51],
        "same": [*first, *said[:1]],
    }[history]
    (then,) = genie.query_tokens(ids, 1, logits=True, rewind=True)
    assert then.logits is not None and _kl(loop.feed(ids)[-1], then.logits) <= SAME_KL


@pytest.mark.qnn
def test_text_in_and_out_stops_and_aborts(target: TinyTarget) -> None:
    config = check_genie_folder(target.emulation, target.plan, emulation=True)
    with GenieRunner(config, target.emulation, lengths=LENGTHS, contexts=CONTEXTS) as genie:
        ids = genie.encode("河 hello")
        assert len(ids) == 3 + len(" hello")
        tokens = [token.id for token in genie.query_tokens(ids, 4)]
        genie.reset()
        pieces = list(genie.query("河 hello", 4))
        vocabulary = tokenizers.Tokenizer.from_file(str(target.emulation / "tokenizer.json"))
        assert "".join(pieces) == vocabulary.decode(tokens, skip_special_tokens=False)
        genie.stop_at([pieces[1]])
        genie.reset()
        assert "".join(genie.query("河 hello", 4)) == pieces[0]
        genie.stop_at([])
        with pytest.raises(TargetError, match="expected GenieRunner"):
            next(genie.query_tokens(ids, 1, logits=True))
        genie.reset()
        answer = genie.query_tokens(ids)  # as long as the context lasts
        assert next(answer).id == tokens[0]
        answer.close()
        assert genie.end is End.ABORTED
        genie.reset()
        assert [token.id for token in genie.query_tokens(ids, 2)] == tokens[:2]


class Interrupted:
    """A reader that Ctrl-C meets in the middle of a read: bytes were taken from the pipe and are lost."""

    def __init__(self, reader: FileIO, reads: int) -> None:
        self.reader, self.reads = reader, reads

    def read(self, count: int) -> bytes:
        data = self.reader.read(max(1, count // 2) if self.reads == 0 else count)
        if self.reads == 0:
            raise KeyboardInterrupt
        self.reads -= 1
        return data or b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)


FRAME_READS = 3  # the length, the JSON, the logits


@pytest.mark.qnn
@pytest.mark.parametrize("reads", range(2 * FRAME_READS))
def test_an_interrupt_within_a_frame_does_not_reach_the_next_answer(
    target: TinyTarget, loop: DeviceLoop, reads: int
) -> None:
    config = check_genie_folder(target.emulation, target.plan, emulation=True)
    ids = _prompt(20, 7)
    with GenieRunner(config, target.emulation, lengths=LENGTHS, contexts=CONTEXTS, own_sampler=True) as genie:
        genie.stop_at(["never said"])
        pid = genie._child.pid
        genie._child._pipe.reader = Interrupted(genie._child._pipe.reader, reads)  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            list(genie.query_tokens(ids, logits=True))
        assert not genie._child.alive, "what it would say next cannot be known"
        (then,) = genie.query_tokens(ids, 1, logits=True, rewind=True)
        assert genie._child.pid != pid
    assert then.logits is not None and _kl(loop.feed(ids)[-1], then.logits) <= SAME_KL


@pytest.mark.qnn
def test_an_interrupt_between_frames_keeps_the_dialog(
    genie: GenieRunner, loop: DeviceLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly every Ctrl-C: Genie is computing, and is not loaded anew."""
    genie.reset()
    ids, child, wait = _prompt(20, 7), genie._child, Child.wait
    waits = iter(range(100))

    def interrupted(child: Child, seconds: float) -> None:
        wait(child, seconds)
        if next(waits) == 4:  # a frame is there and none of it was read
            raise KeyboardInterrupt

    monkeypatch.setattr(Child, "wait", interrupted)
    answer = genie.query_tokens(ids)
    with pytest.raises(KeyboardInterrupt):
        list(answer)
    assert genie._child is child and genie.end is End.ABORTED
    (then,) = genie.query_tokens(ids, 1, logits=True, rewind=True)
    assert then.logits is not None and _kl(loop.feed(ids)[-1], then.logits) <= SAME_KL


@pytest.mark.qnn
def test_a_second_interrupt_does_not_wait(genie: GenieRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    genie.reset()
    expected = [token.id for token in genie.query_tokens(_prompt(20, 7), 3)]
    genie.reset()
    answer = genie.query_tokens(_prompt(20, 7))
    next(answer)
    with monkeypatch.context() as patch:
        patch.setattr(Child, "wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            answer.close()
    assert not genie._child.alive
    assert [token.id for token in genie.query_tokens(_prompt(20, 7), 3, rewind=True)] == expected


@pytest.mark.qnn
def test_while_an_answer_runs_nothing_else_is_asked(genie: GenieRunner) -> None:
    genie.reset()
    answer = genie.query_tokens(_prompt(20, 7))
    next(answer)
    for ask in (genie.reset, lambda: genie.encode("a"), lambda: next(genie.query_tokens([3]))):
        with pytest.raises(TargetError, match="is still answering"):
            ask()
    answer.close()
    genie.reset()


@pytest.mark.qnn
def test_a_refused_query_is_an_error_and_no_silence(genie: GenieRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    genie.reset()
    receive = Child.receive

    def refused(child: Child, *, seconds: float) -> Any:
        while "status" not in receive(child, seconds=seconds)[0]:
            pass
        raise TargetError("GenieDialog_tokenQuery gave status -1")

    with monkeypatch.context() as patch:
        patch.setattr(Child, "receive", refused)
        with pytest.raises(TargetError, match="gave status -1"):
            list(genie.query_tokens(_prompt(20, 7), 2))
    genie.reset()
    assert len(list(genie.query_tokens(_prompt(5, 5), 2))) == 2


@pytest.mark.qnn
@pytest.mark.parametrize("scaling", [RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 64)])
def test_stretched_positions(target: TinyTarget, emulator: Emulator, scaling: RopeScaling) -> None:
    """Angles are inputs of the graphs: Genie must stretch them as the loop does."""
    config = replace(target.plan.config, rope_scaling=scaling)
    plan = replace(target.plan, config=config)
    written = genie_config(plan, [graph.binary.name for graph in target.apart])
    check_genie_config(Path(CONFIG_FILE), written, plan)
    loop = DeviceLoop(config, plan.parts, LENGTHS, CONTEXTS, plan.encodings, emulator.run)
    ids = _prompt(70, 4)
    with GenieRunner(written, target.emulation, lengths=LENGTHS, contexts=CONTEXTS, own_sampler=True) as genie:
        (then,) = genie.query_tokens(ids, 1, logits=True)
    assert then.logits is not None and _kl(loop.feed(ids)[-1], then.logits) <= SAME_KL


@pytest.mark.qnn
def test_prompts_that_do_not_fit_are_refused_before(genie: GenieRunner) -> None:
    genie.reset()
    with pytest.raises(ContextFull, match="shorten it to 481 tokens"):
        next(genie.query_tokens(_prompt(482, 0), 1))
    with pytest.raises(TargetError, match="the prompt is empty"):
        next(genie.query_tokens([], 1))
    assert len(list(genie.query_tokens(_prompt(5, 5), 2))) == 2  # it goes on


@pytest.mark.qnn
def test_a_conversation_is_saved_and_restored(genie: GenieRunner, tmp_path: Path) -> None:
    genie.reset()
    list(genie.query_tokens(_prompt(20, 7), 3, forced=[11, 12, 13]))
    genie.save(tmp_path / "saved")
    expected = [token.id for token in genie.query_tokens(_prompt(5, 9), 4)]
    genie.reset()
    genie.restore(tmp_path / "saved")
    assert [token.id for token in genie.query_tokens(_prompt(5, 9), 4)] == expected
    with pytest.raises(TargetError, match="holds no saved Genie dialog"):
        genie.restore(tmp_path)


@pytest.mark.qnn
def test_what_genie_itself_refuses_is_a_message(target: TinyTarget) -> None:
    config = json.loads((target.emulation / CONFIG_FILE).read_text(encoding="utf-8"))
    config["dialog"]["engine"]["backend"]["QnnHtp"]["pos-id-dim"] = 7
    with pytest.raises(TargetError, match="GenieDialog_create gave status"):
        GenieRunner(config, target.emulation, lengths=LENGTHS, contexts=CONTEXTS)
