"""Multiple-choice sets: published layouts are read, prompts are the authors' to the last character."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.errors import UserError
from headrace.measure.item_sets import SETS, Item, Subject, open_set

CHOICES = Path(__file__).parents[1] / "data" / "choices"
RIVER = Item("Which is a river?", ("Nile", "Alps", "Sahara", "Baltic"), 0)
SEA = Item("Which is a sea?", ("Nile", "Alps", "Sahara", "Baltic"), 3)
OPTIONS = "\nA. Nile\nB. Alps\nC. Sahara\nD. Baltic\n"

# As hendrycks/test's evaluate.py, hkust-nlp/ceval's evaluator and haonan-li/CMMLU's mp_utils.py build them.
PROMPTS = {
    "mmlu": (
        "high_school_geography",
        "The following are multiple choice questions (with answers) about  high school geography.\n\n"
        f"Which is a river?{OPTIONS}Answer: A\n\nWhich is a sea?{OPTIONS}Answer:",
        " D",
    ),
    "ceval": (
        "computer_network",
        "以下是中国关于计算机网络考试的单项选择题，请选出其中的正确答案。\n\n"
        f"Which is a river?{OPTIONS}答案：A\n\nWhich is a sea?{OPTIONS}答案：",
        "D",
    ),
    "cmmlu": (
        "world_history",
        "以下是关于世界历史的单项选择题，请直接给出正确答案的选项。\n\n"
        f"题目：Which is a river?{OPTIONS}答案是：A\n\n题目：Which is a sea?{OPTIONS}答案是：",
        "D",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_prompts_are_the_authors(name: str) -> None:
    subject, prompt, answer = PROMPTS[name]
    chosen = SETS[name]
    assert chosen.examples(Subject(subject, (RIVER,), (SEA,))) + chosen.ask(SEA) == prompt
    assert chosen.answers()[SEA.answer] == answer


@pytest.mark.parametrize(
    ("name", "subjects", "items"),
    [
        ("mmlu", ["computer_security", "elementary_mathematics", "high_school_geography"], 24),
        ("ceval", ["computer_network", "middle_school_geography"], 14),
        ("cmmlu", ["chinese_food_culture", "elementary_commonsense"], 14),
    ],
)
def test_published_layouts(name: str, subjects: list[str], items: int) -> None:
    for folder in (CHOICES, CHOICES / name):
        _, found = open_set(name, folder)
        assert [subject.name for subject in found] == subjects
        assert sum(len(subject.items) for subject in found) == items
        assert all(len(subject.examples) == 5 for subject in found)
    answers = [item.answer for subject in found for item in subject.items]
    assert max(answers.count(letter) for letter in range(4)) <= items / 4 + 1  # no letter is a good guess


def test_quotes_and_lines_within_a_cell(tmp_path: Path) -> None:
    for folder, suffix in (("dev", "_dev"), ("test", "_test")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"logic{suffix}.csv").write_text('"a ""b"",\nc?",1,2,3,4,B\n', encoding="utf-8")
    _, [subject] = open_set("mmlu", tmp_path)
    assert subject.items == (Item('a "b",\nc?', ("1", "2", "3", "4"), 1),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q,1,2,3,4\n", "item 1: expected a question, options A to D and a right letter"),
        ("q,1,2,3,4,E\n", "item 1: expected"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_item(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    for folder in ("dev", "test"):
        (tmp_path / folder).mkdir()
    (tmp_path / "test" / "logic_test.csv").write_text("q,1,2,3,4,A\n", encoding="utf-8")
    if text is not None:
        (tmp_path / "dev" / "logic_dev.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        open_set("mmlu", tmp_path)


@pytest.mark.parametrize("name", ["mmlu", "ceval"])
def test_a_subject_without_items_is_one_line(tmp_path: Path, name: str) -> None:
    (dev, dev_suffix), (asked, suffix) = SETS[name].files
    header = ",".join(SETS[name].columns) + "\n"
    for folder, file in ((dev, f"logic{dev_suffix}.csv"), (asked, f"logic{suffix}.csv")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(header, encoding="utf-8")
    with pytest.raises(UserError, match=rf"logic{suffix}.csv holds no item; expected the questions of logic"):
        open_set(name, tmp_path)


def test_another_layout_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no val/SUBJECT_val.csv; expected ceval's published layout"):
        open_set("ceval", tmp_path)
    (tmp_path / "val").mkdir()
    (tmp_path / "dev").mkdir()
    (tmp_path / "val" / "law_val.csv").write_text("id,Frage,A,B,C,D,answer\n", encoding="utf-8")
    (tmp_path / "dev" / "law_dev.csv").write_text("id,question,A,B,C,D,answer\n", encoding="utf-8")
    with pytest.raises(UserError, match="no column 'question'"):
        open_set("ceval", tmp_path)
