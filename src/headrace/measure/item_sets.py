"""Multiple-choice sets from their published folder layouts, and their prompts as their authors' harnesses write them.

    mmlu    dev/SUBJECT_dev.csv, test/SUBJECT_test.csv         no header: question, A, B, C, D, answer
    ceval   dev/SUBJECT_dev.csv, val/SUBJECT_val.csv           id, question, A, B, C, D, answer (, explanation)
    cmmlu   dev/SUBJECT.csv, test/SUBJECT.csv                  (number), Question, A, B, C, D, Answer

C-Eval's test answers are not public, so its validation items are asked. Sources: hendrycks/test evaluate.py,
hkust-nlp/ceval evaluator, haonan-li/CMMLU mp_utils.py. Knows no model.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from headrace.errors import UserError, reason

__all__ = ["LETTERS", "SETS", "Item", "ItemSet", "Subject", "open_set"]

LETTERS = ("A", "B", "C", "D")
SHOTS = 5


@dataclass(frozen=True)
class Item:
    """A question, its options A to D, and which of them is right, 0 to 3."""

    question: str
    options: tuple[str, str, str, str]
    answer: int


@dataclass(frozen=True)
class Subject:
    """A subject's file name, worked examples and the items that are asked."""

    name: str
    examples: tuple[Item, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class ItemSet:
    """A layout and a way to write prompts.

    Attributes:
        name: as `--tasks` takes it.
        files: dev folder and suffix, folder and suffix of what is asked.
        columns: names of question, A to D and answer; empty where files have no header.
        introduction: subject's file name → first line of a prompt.
        opening, asking: before a question, and after its options.
        answer_prefix: between `asking` and a letter.
    """

    name: str
    files: tuple[tuple[str, str], tuple[str, str]]
    columns: tuple[str, ...]
    introduction: Callable[[str], str]
    opening: str
    asking: str
    answer_prefix: str

    def ask(self, item: Item) -> str:
        """An item without its answer."""
        options = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, item.options))
        return f"{self.opening}{item.question}{options}\n{self.asking}"

    def answers(self) -> tuple[str, ...]:
        """What may follow a question: the letters as the set writes them."""
        return tuple(f"{self.answer_prefix}{letter}" for letter in LETTERS)

    def examples(self, subject: Subject, shots: int = SHOTS) -> str:
        """What every prompt of a subject begins with: the introduction and `shots` items with their answers."""
        told = "".join(f"{self.ask(e)}{self.answers()[e.answer]}\n\n" for e in subject.examples[:shots])
        return f"{self.introduction(subject.name)}\n\n{told}"

    def subjects(self, folder: Path) -> list[Subject]:
        """All subjects of a folder in this layout, by name.

        Raises:
            UserError: the folder has another layout, or a file cannot be read or holds no question.
        """
        (dev, dev_suffix), (asked, suffix) = self.files
        found = sorted((folder / asked).glob(f"*{suffix}.csv"))
        if not found:
            raise UserError(
                f"{folder} has no {asked}/SUBJECT{suffix}.csv; expected {self.name}'s published layout: "
                f"{dev}/SUBJECT{dev_suffix}.csv and {asked}/SUBJECT{suffix}.csv"
            )
        subjects = []
        for file in found:
            name = file.stem.removesuffix(suffix)
            examples, items = self._items(folder / dev / f"{name}{dev_suffix}.csv"), self._items(file)
            if not items:
                raise UserError(f"{file} holds no item; expected the questions of {name}")
            subjects.append(Subject(name, examples, items))
        return subjects

    def _items(self, path: Path) -> tuple[Item, ...]:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = [row for row in csv.reader(file) if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read ({reason(error)}); expected a CSV file of {self.name}") from None
        places: Sequence[int] = range(6)
        if self.columns:
            header = rows.pop(0) if rows else []
            if missing := [column for column in self.columns if column not in header]:
                raise UserError(f"{path} has no column {missing[0]!r}; expected {', '.join(self.columns)}")
            places = [header.index(column) for column in self.columns]
        items = []
        for number, row in enumerate(rows, 1):
            cells = [row[place] for place in places] if len(row) > max(places) else []
            if len(cells) != 6 or cells[5].strip() not in LETTERS:
                raise UserError(
                    f"{path}, item {number}: expected a question, options A to D and a right letter, got {row!r}"
                )
            question, a, b, c, d, answer = cells
            items.append(Item(question, (a, b, c, d), LETTERS.index(answer.strip())))
        return tuple(items)


def open_set(name: str, folder: Path) -> tuple[ItemSet, list[Subject]]:
    """A set and its subjects from its own folder, or from the folder of its name below.

    Raises:
        UserError: there is no such set or folder.
    """
    chosen = SETS[name]
    inner = folder / name
    return chosen, chosen.subjects(inner if inner.is_dir() else folder)


@cache
def _names() -> dict[str, dict[str, str]]:
    text = resources.files("headrace.measure").joinpath("subjects.json").read_text(encoding="utf-8")
    names: dict[str, dict[str, str]] = json.loads(text)
    return names


def _english(subject: str) -> str:
    # Two spaces before the subject, as the authors' evaluate.py has them.
    return f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}."


def _ceval(subject: str) -> str:
    return f"以下是中国关于{_names()['ceval'].get(subject, subject)}考试的单项选择题，请选出其中的正确答案。"


def _cmmlu(subject: str) -> str:
    return f"以下是关于{_names()['cmmlu'].get(subject, subject)}的单项选择题，请直接给出正确答案的选项。"


SETS = {
    chosen.name: chosen
    for chosen in (
        ItemSet("mmlu", (("dev", "_dev"), ("test", "_test")), (), _english, "", "Answer:", " "),
        ItemSet(
            "ceval",
            (("dev", "_dev"), ("val", "_val")),
            ("question", *LETTERS, "answer"),
            _ceval,
            "",
            "答案：",
            "",
        ),
        ItemSet(
            "cmmlu", (("dev", ""), ("test", "")), ("Question", *LETTERS, "Answer"), _cmmlu, "题目：", "答案是：", ""
        ),
    )
}
