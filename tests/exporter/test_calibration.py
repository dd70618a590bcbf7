"""Calibration windows: every second one is what a chat would send, and holds the same text."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.errors import CalibrationError, UserError
from headrace.exporter.calibration import calibration_windows
from headrace.quantize.windows import cut_windows
from headrace.text.tokenizer import Tokenizer
from headrace.text.turns import IdTurns, RawTurns, TurnFormat, turn_format

USER, ASSISTANT = 195, 196
SEA = "the sea river is 百川东到海 the sea is full of rivers\n\n" * 60
POEM = "何时复西归？ the river\n\n" * 120
COUNT, LENGTH = 6, 160


def plain(tokenizer: Tokenizer, text: str, count: int) -> np.ndarray:
    return cut_windows(np.array(tokenizer.encode(text)), LENGTH, count)


def test_each_text_has_its_share_and_both_forms(baichuan: Tokenizer) -> None:
    turns = IdTurns(baichuan, USER, ASSISTANT)
    windows = calibration_windows(baichuan, turns, [SEA, POEM], COUNT, LENGTH)
    texts = np.concatenate([plain(baichuan, text, COUNT // 2) for text in (SEA, POEM)])
    assert windows.shape == texts.shape == (COUNT, LENGTH) and windows.dtype == np.int64
    assert np.array_equal(windows[0::2], texts[0::2])
    for talk, text in zip(windows[1::2].tolist(), texts[1::2].tolist(), strict=True):
        assert talk[0] == USER
        marks = [token for token in talk if token in (USER, ASSISTANT)]
        assert marks == [USER, ASSISTANT] * (len(marks) // 2) + [USER] * (len(marks) % 2) and len(marks) >= 3
        words = "".join(baichuan.decode([token for token in talk if token not in (USER, ASSISTANT)]).split())
        assert "".join(baichuan.decode(text).split()).startswith(words)


def test_a_template_s_marks_are_tokens(chatml: Tokenizer) -> None:
    windows = calibration_windows(chatml, turn_format(chatml, {}), [SEA], COUNT, LENGTH)
    begins, ends = (chatml.token_id(mark) for mark in ("<|im_start|>", "<|im_end|>"))
    assert (windows[1::2, 0] == begins).all() and (windows[1::2] == ends).any(axis=1).all()
    assert not np.isin(windows[0::2], [begins, ends]).any()


def test_without_a_turn_format_or_where_it_refuses_all_is_text(baichuan: Tokenizer) -> None:
    class Refusing(RawTurns):
        is_raw = False

        def render(self, messages: object, room: int) -> list[int]:
            raise UserError("wants a system message")

    formats: list[TurnFormat] = [RawTurns(baichuan), Refusing(baichuan)]
    for turns in formats:
        windows = calibration_windows(baichuan, turns, [SEA], COUNT, LENGTH)
        assert np.array_equal(windows, plain(baichuan, SEA, COUNT))


def test_a_short_text_is_refused(baichuan: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match="less than one window"):
        calibration_windows(baichuan, RawTurns(baichuan), [SEA, "river"], COUNT, LENGTH)
