"""Questions by likelihood: a model that knows answers it, flips are counted, and one forward pass says the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from headrace.checkpoint import open_checkpoint
from headrace.errors import ContextFull
from headrace.language_model import load
from headrace.measure.choices import Choices, answer_subject, choices_report
from headrace.measure.item_sets import SETS, Item, Subject, open_set
from headrace.measure.likelihood import likelihoods, split_pair
from headrace.measure.questions import ask_bundle, following
from headrace.measure.shared_prefix import next_logits
from headrace.model.fidelity import log_softmax
from headrace.model.reference import eager_logits
from tests.exports import Exports
from tests.measure.test_item_sets import CHOICES

ITEMS = tuple(Item(f"Question {n}?", ("one", "two", "three", "four"), n % 4) for n in range(8))
SUBJECT = Subject("world_history", ITEMS[:2], ITEMS)
VOCAB = 0x3000  # a token is a character


def encode(text: str) -> list[int]:
    return [ord(c) % VOCAB for c in text]


class Knowing:
    """A model of characters that gives the right letter some of the time, and remembers what it was asked."""

    def __init__(self, wrong: Sequence[int] = ()) -> None:
        self.wrong = wrong
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        for ids in prompts:
            self.asked.append(tuple(ids))
            number = next(n for n, item in enumerate(ITEMS) if tuple(encode(item.question)) in _windows(ids))
            right = ITEMS[number].answer
            logits = np.zeros(VOCAB, np.float32)
            logits[ord("ABCD"[(right + 1) % 4 if number in self.wrong else right])] = 3
            logits[ord(" ")] = 5
            yield logits


def _windows(ids: Sequence[int]) -> set[tuple[int, ...]]:
    """The question of a prompt is the last one in it."""
    starts = [i for i in range(len(ids)) if tuple(ids[i : i + 9]) == tuple(encode("Question "))]
    return {tuple(ids[starts[-1] : starts[-1] + 11])}


@pytest.mark.parametrize("name", SETS)
def test_a_model_that_knows(name: str) -> None:
    model = Knowing()
    found = answer_subject(SETS[name], SUBJECT, encode, model, room=4000)
    assert found.right.all()
    assert found.log_likelihoods.shape == (8, 4)
    report = choices_report(name, [found])
    assert (report["right"], report["items"], report["accuracy"]) == (8, 8, 1.0)
    assert report["low"] == pytest.approx(0.6756, abs=1e-3)
    # MMLU's answers are a space and a letter, two of these tokens: the first is asked once for all four.
    assert len(model.asked) == 8 * (2 if name == "mmlu" else 1)


def test_flips_are_counted() -> None:
    chosen = SETS["ceval"]
    before = answer_subject(chosen, SUBJECT, encode, Knowing(wrong=(0, 1)), room=4000)
    after = answer_subject(chosen, SUBJECT, encode, Knowing(wrong=(1, 2, 3, 4)), room=4000)
    report = choices_report("ceval", [after], [before])
    assert report["flips"] == {"lost": 3, "gained": 1, "changed": 4, "p": pytest.approx(0.625)}
    assert report["subjects"][0]["reference"]["right"] == 6
    assert report["macro"]["reference"]["accuracy"] == 0.75


def test_worked_examples_leave_when_there_is_no_room() -> None:
    chosen, model = SETS["mmlu"], Knowing()
    whole = len(encode(chosen.examples(SUBJECT) + chosen.ask(ITEMS[0]) + " A"))
    answer_subject(chosen, SUBJECT, encode, model, room=whole)
    assert len(model.asked[0]) == whole - 2
    shorter = Knowing()
    found = answer_subject(chosen, SUBJECT, encode, shorter, room=whole - 1)
    assert found.shots == 1 and choices_report("mmlu", [found])["shots"] == 1
    assert len(shorter.asked[0]) == len(encode(chosen.examples(SUBJECT, 1) + chosen.ask(ITEMS[0])))
    with pytest.raises(ContextFull):
        answer_subject(chosen, SUBJECT, encode, model, room=50)


def test_the_longest_item_is_that_of_most_tokens() -> None:
    """Not of most characters: 百 takes three of these tokens, as it does of bytes."""

    def encode(text: str) -> list[int]:
        return list(text.encode())

    items = (Item("a" * 60, ("",) * 4, 0), Item("百" * 50, ("",) * 4, 0))
    subject = Subject("world_history", items[:1], items)
    needed = len(encode(SETS["mmlu"].examples(subject, 0) + SETS["mmlu"].ask(items[1]) + " A"))
    prompts: list[int] = []

    def model(asked: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        for ids in asked:
            prompts.append(len(ids))
            yield np.zeros(256, np.float32)

    assert answer_subject(SETS["mmlu"], subject, encode, model, room=needed).shots == 0
    assert max(prompts) < needed


def test_spaces_belong_to_what_follows() -> None:
    assert split_pair(encode, "a b ", "c") == (encode("a b"), encode(" c"))
    assert split_pair(encode, "a", " b") == (encode("a"), encode(" b"))


def test_a_letter_that_joins_the_text_before_it_is_asked_for() -> None:
    """A vocabulary with "：A": nothing would follow, and that letter be certain."""

    def joined(text: str) -> list[int]:
        return encode(text.replace("：A", "Ä"))

    assert split_pair(joined, "答案：", "A") == (joined("答案"), joined("：A"))
    assert split_pair(joined, "答案：", "B") == (joined("答案："), joined("B"))


def test_likelihoods_are_those_of_one_pass(exports: Exports) -> None:
    rng = np.random.default_rng(3)
    prefix = rng.integers(3, 400, 40).tolist()
    pairs = [(prefix + rng.integers(3, 400, n).tolist(), rng.integers(3, 400, m).tolist()) for n, m in
             [(1, 1), (5, 3), (9, 2), (0, 4)]]  # fmt: skip
    with load(exports.bundle()) as model:
        found = likelihoods(pairs, following(model))
        for (context, continuation), told in zip(pairs, found):
            rows = log_softmax(model.logits([*context, *continuation])[len(context) - 1 : -1])
            expected = rows[np.arange(len(continuation)), continuation]
            # Chunks of another length round the 8-bit cache and activations elsewhere.
            assert told.log == pytest.approx(expected.sum(), abs=0.3)
            assert told.greedy == bool((rows.argmax(1) == continuation).all())


def test_the_reference_computes_a_shared_beginning_once(exports: Exports) -> None:
    source = open_checkpoint(exports.checkpoint())
    rng = np.random.default_rng(4)
    loads: list[str] = []

    def weights(name: str) -> np.ndarray:
        loads.append(name)
        return source.tensor(name).load()

    for shared in (0, 1, 30):
        prefix = rng.integers(3, 400, shared).tolist()
        prompts = [prefix + rng.integers(3, 400, n).tolist() for n in (7, 1, 12)]
        prompts[1] = prefix if shared else prompts[1]  # one prompt is where the others begin
        loads.clear()
        for ids, logits in zip(prompts, next_logits(source.config, weights, prompts), strict=True):
            expected = eager_logits(source.config, lambda name: source.tensor(name).load(), np.array([ids]))[0, -1]
            np.testing.assert_allclose(logits, expected, atol=1e-4)
        assert len(loads) == len(set(loads))


def test_a_bundle_is_asked(exports: Exports) -> None:
    bundle = exports.bundle("tied", context=512)
    reports = ask_bundle(bundle, ["ceval", "cmmlu"], CHOICES, checkpoint=exports.checkpoint("tied"), shots=1)
    assert [report["task"] for report in reports] == ["ceval", "cmmlu"]
    with load(bundle) as model:  # the same, item by item and without a cache
        chosen, subjects = open_set("ceval", CHOICES)
        for subject, row in zip(subjects, reports[0]["subjects"]):
            right = 0
            for item in subject.items:
                ids = model.encode_raw(chosen.examples(subject, 1) + chosen.ask(item))
                letters = [model.tokenizer.encode(letter)[0] for letter in "ABCD"]
                right += int(model.logits(ids)[-1][letters].argmax()) == item.answer
            assert abs(row["right"] - right) <= 1  # a near tie may fall either way
            assert row["flips"]["lost"] + row["reference"]["right"] >= row["right"] - row["flips"]["gained"]


def test_choices_know_what_is_right() -> None:
    one = Choices("s", np.array([0, 1]), np.array([0, 2]), np.zeros((2, 4)))
    assert one.right.tolist() == [True, False]
