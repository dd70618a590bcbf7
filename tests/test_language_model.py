"""headrace.load: logits, generation and conversations, as the README shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headrace
from headrace.errors import BundleError, ContextFull, TargetError, UserError
from headrace.language_model import LanguageModel
from headrace.runtime.runner import Span
from headrace.runtime.sampling import SamplingOptions
from headrace.runtime.sequence import common_prefix
from headrace.runtime.session import read_session
from headrace.text.turns import IdTurns, Message, RawTurns, TemplateTurns
from tests.exports import CONTEXT, SMALL, VOCAB, Exports, write_checkpoint

MODELS = ["gqa", "tied", "mha"]
# An int8 cache code on the other side of a tie, in these random models' sharp attention.
TIE_TOLERANCE = 0.3


@pytest.fixture(scope="module")
def models(exports: Exports) -> Iterator[dict[str, LanguageModel]]:
    # A fixed runner: which one is the default depends on what is installed.
    opened = {kind: headrace.load(exports.bundle(kind), runner="host") for kind in MODELS}
    yield opened
    for model in opened.values():
        model.close()


def text(tokens: object) -> str:
    return "".join(t.text for t in tokens)  # type: ignore[attr-defined]


def test_the_public_names() -> None:
    assert set(headrace.__all__) == {"Chat", "LanguageModel", "Token", "__version__", "export", "load"}
    for name in headrace.__all__:
        assert getattr(headrace, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        headrace.laod  # noqa: B018


@pytest.mark.parametrize("kind", MODELS)
def test_logits_of_a_whole_sequence(models: dict[str, LanguageModel], kind: str) -> None:
    model = models[kind]
    ids = np.random.default_rng(0).integers(0, VOCAB, 70).tolist()
    logits = model.logits(ids)
    assert logits.shape == (70, VOCAB)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(model.logits(ids[:33]), logits[:33], atol=TIE_TOLERANCE)
    with pytest.raises(ContextFull, match=str(CONTEXT)):
        model.logits([1] * (CONTEXT + 1))
    assert model.logits([]).shape == (0, VOCAB)


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_generation_follows_the_logits(models: dict[str, LanguageModel], kind: str) -> None:
    model = models[kind]
    ids = model.tokenizer.encode("The river")
    tokens = list(model.generate(ids, max_tokens=10, temperature=0))
    said = [t.id for t in tokens]
    scored = model.logits(ids + said[:-1])
    for row, token in zip(scored[len(ids) - 1 :], said, strict=True):
        assert row[token] >= row.max() - TIE_TOLERANCE
    assert [t.id for t in model.generate("The river", max_tokens=10, temperature=0)] == said
    assert text(tokens) == model.tokenizer.decode([t for t in said if t not in model.tokenizer.eos_ids], continues=True)


def test_options_of_generate(models: dict[str, LanguageModel]) -> None:
    model = models["gqa"]
    one, same, other = (
        [t.id for t in model.generate("a", max_tokens=12, temperature=1.2, seed=seed)] for seed in (1, 1, 2)
    )
    assert one == same != other
    greedy = [t.id for t in model.generate("a", max_tokens=12, temperature=0)]
    assert [t.id for t in model.generate("a", max_tokens=12, temperature=2, top_k=1)] == greedy
    stop = text(model.generate("a", max_tokens=12, temperature=0))[3:6]
    cut = list(model.generate("a", max_tokens=12, temperature=0, stop=[stop]))
    assert stop not in text(cut)
    assert cut[-1].finish == "stop"
    with pytest.raises(UserError, match="temperature"):
        list(model.generate("a", temperature=-1.0))
    with pytest.raises(ContextFull, match=f"has {CONTEXT} tokens, but the context holds {CONTEXT}"):
        list(model.generate([5] * CONTEXT))


def test_no_text_begins_with_bos(models: dict[str, LanguageModel]) -> None:
    model = models["gqa"]
    assert model.encode_raw("") == [1]
    assert model.encode_raw("a") == model.tokenizer.encode("a")
    assert len(list(model.generate("", max_tokens=3, temperature=0))) >= 1


def test_each_model_has_its_own_turns(models: dict[str, LanguageModel]) -> None:
    assert isinstance(models["gqa"].turns, RawTurns)
    assert isinstance(models["tied"].turns, TemplateTurns)
    assert isinstance(models["mha"].turns, IdTurns)
    assert isinstance(models["mha"].chat(raw=True).turns, RawTurns)


class Spans:
    """What a model computes while the block runs."""

    def __init__(self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Span] = []
        run = model.engine.runner.run
        monkeypatch.setattr(model.engine.runner, "run", lambda spans: (self.made.extend(spans), run(spans))[1])

    @property
    def tokens(self) -> int:
        return sum(len(span.ids) for span in self.made)


@pytest.mark.parametrize("kind", ["tied", "mha"])
def test_a_conversation_keeps_its_cache(
    models: dict[str, LanguageModel], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next prompt begins with the tokens that are in the cache; only what is new is computed."""
    model = models[kind]
    chat = model.chat("Be brief.")
    greedy = model.sampling_options(temperature=0.0)
    first = list(chat.say("The river", max_tokens=6, options=greedy))
    assert [m.role for m in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[-1].content == text(first)
    before = model.turns.render(chat.messages[:2], CONTEXT)
    prompt = model.turns.render([*chat.messages, Message("user", "the sea")], CONTEXT)
    spans = Spans(model, monkeypatch)
    list(chat.say("the sea", max_tokens=1, options=greedy))
    shared = common_prefix(prompt, before + [t.id for t in first[:-1]])
    assert shared >= len(before)
    # Of a prompt so many are computed that the runner's arithmetic is that of a prompt.
    assert spans.tokens == max(len(prompt) - shared, 1 + model.engine.runner.fine_tokens)
    assert [m.role for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_baichuan_turns_are_ids(models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["mha"]
    chat = model.chat()
    first = [t.id for t in chat.say("The river", max_tokens=4, options=model.sampling_options(temperature=0.0))]
    spans = Spans(model, monkeypatch)
    list(chat.say("the sea", max_tokens=1, options=model.sampling_options(temperature=0.0)))
    encode = model.tokenizer.encode
    said = [t for t in first if t not in model.turns.stop_ids]
    expected = [195, *encode("The river"), 196, *said, 195, *encode("the sea"), 196]
    assert expected[spans.made[0].start :] == [token for span in spans.made for token in span.ids]
    # The last token of an answer that was cut was chosen, but never computed.
    assert len(expected) - spans.made[0].start == (1 if said == first else 0) + 1 + len(encode("the sea")) + 1


def test_an_answer_closed_early_stays_in_the_conversation(models: dict[str, LanguageModel]) -> None:
    chat = models["gqa"].chat()
    stream = chat.say("The river", max_tokens=50)
    heard = [next(stream) for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]
    assert chat.messages[-1].role == "assistant"
    assert chat.messages[-1].content == text(heard)
    assert chat.used == len(chat.turns.render(chat.messages[:1], CONTEXT)) + len(heard)
    list(chat.say(" and", max_tokens=2))
    assert len(chat.messages) == 4
    assert chat.used > len(chat.turns.render(chat.messages[:3], CONTEXT))
    chat.messages = []
    assert chat.used == 0


@pytest.mark.parametrize("kind", MODELS)
def test_what_the_context_takes_follows_the_messages(
    models: dict[str, LanguageModel], kind: str, tmp_path: Path
) -> None:
    """However they were replaced: as much as it was when they were the conversation; and no more is saved of it."""
    model = models[kind]
    chat = model.chat("Rivers.")
    options = model.sampling_options(temperature=0.0)
    taken = {0: 0}
    for said in ("The river", "and the sea", "and so on"):
        taken[len(chat.messages)] = chat.used
        list(chat.say(said, max_tokens=3, options=options))
    whole, taken[7] = list(chat.messages), chat.used
    assert 0 == taken[1] < taken[3] < taken[5] < taken[7]
    chat.save(tmp_path / "7.session")
    tokens = read_session(tmp_path / "7.session").tokens
    for count in (7, 5, 3, 1, 7, 0):
        chat.messages = whole[:count]
        chat.save(tmp_path / f"{count}.session")
        assert chat.used == taken[count]
        saved = read_session(tmp_path / f"{count}.session").tokens
        assert saved == tokens[: len(saved)] and len(saved) <= chat.used
        again = model.chat()
        again.restore(tmp_path / f"{count}.session")
        assert (again.messages, again.used) == (whole[:count], chat.used)
    chat.messages = [Message("user", "The lake"), Message("assistant", "is deep.")]
    assert chat.used == len(model.turns.render(chat.messages, CONTEXT)) > 0
    chat.messages = [Message("user", "x " * 400), Message("assistant", "y")]
    assert chat.used == CONTEXT  # it takes all there is


def test_the_oldest_rounds_go_when_the_context_fills(
    models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["mha"]
    chat = model.chat("sea")
    spans = Spans(model, monkeypatch)
    options = model.sampling_options(temperature=0.0)
    for number in range(12):
        answer = list(chat.say(f"river {number} " * 3, max_tokens=20, options=options))
        assert answer
    assert len(chat.messages) == 25, "nothing is forgotten by the conversation itself"
    assert spans.made[-1].stop <= CONTEXT
    with pytest.raises(ContextFull, match="tokens, but the context holds"):
        list(chat.say("x " * 400))


def test_a_message_that_does_not_fit_changes_nothing(models: dict[str, LanguageModel]) -> None:
    chat = models["mha"].chat()
    with pytest.raises(ContextFull):
        list(chat.say("x " * 400))
    assert chat.messages == []


def test_what_fails_before_its_first_token_changes_nothing(
    models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["mha"]
    chat = model.chat()
    list(chat.say("the sea", max_tokens=2))
    before = list(chat.messages)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr(model.engine.runner, "run", lambda spans: (_ for _ in ()).throw(OSError("gone")))
        list(chat.say("the river", max_tokens=2))
    assert chat.messages == before
    stream = chat.say("the river", max_tokens=2)
    stream.close()  # type: ignore[attr-defined]
    assert chat.messages == before
    list(chat.say("the river", max_tokens=2))
    assert len(chat.messages) == len(before) + 2


def test_a_prompt_of_nothing(models: dict[str, LanguageModel]) -> None:
    for prompt in (lambda: models["gqa"].chat(raw=True).say(""), lambda: models["gqa"].generate([])):
        with pytest.raises(UserError, match="the prompt is empty; expected at least one token"):
            list(prompt())


def test_a_token_that_the_model_does_not_have(models: dict[str, LanguageModel]) -> None:
    model = models["gqa"]
    wrong = (
        rf"the text has token {VOCAB}, but the model knows {VOCAB} tokens, 0 to {VOCAB - 1}; expected the vocabulary"
    )
    for ids in ([1, VOCAB], [1, VOCAB, VOCAB + 7]):
        with pytest.raises(UserError, match=wrong):
            model.generate(ids)
        with pytest.raises(UserError, match=wrong):
            model.logits(ids)
    with pytest.raises(UserError, match="the text has token -1"):
        model.generate([-1])


def test_settings_that_cannot_be_used_keep_no_bundle_from_opening(exports: Exports, tmp_path: Path) -> None:
    odd = {"do_sample": True, "top_k": -1, "top_p": 0, "temperature": "0.7", "pad_token_id": None, "eos_token_id": [2]}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "gqa")
    (checkpoint / "generation_config.json").write_text(json.dumps(odd))
    bundle = headrace.export(checkpoint, tmp_path / "bundle", **SMALL, calibration=[exports.text])
    with headrace.load(bundle) as model:
        assert [note.split(" is ")[0] for note in model.notes] == [
            "generation_config.json: temperature",
            "generation_config.json: top_p",
        ]
        assert model.sampling == SamplingOptions(temperature=1.0)
        assert model.bundle.pad_id == 2


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 4}])
def test_answers_in_turns_are_what_each_is_alone(exports: Exports, slots: int, sampling: dict[str, Any]) -> None:
    """Also with logits asked for in the middle; with one slot for both, each is computed again when it goes on."""
    prompts = ("The river runs", "百川东到海")
    with headrace.load(exports.bundle("gqa", kv="float32"), slots=slots) as model:
        alone = [[t.id for t in model.generate(p, max_tokens=8, **sampling)] for p in prompts]
        scored = model.logits([5, 6, 7])
        streams = [model.generate(p, max_tokens=8, **sampling) for p in prompts]
        found: list[list[int]] = [[], []]
        for _ in range(8):
            for stream, said in zip(streams, found):
                said += [token.id for token in islice(stream, 1)]
                np.testing.assert_allclose(model.logits([5, 6, 7]), scored, atol=TIE_TOLERANCE)
    assert found == alone


def test_loading(exports: Exports, tmp_path: Path) -> None:
    with headrace.load(str(exports.bundle()), threads=1) as model:
        assert model.bundle.root == exports.bundle()
    with pytest.raises(BundleError, match="is no folder"):
        headrace.load(tmp_path / "absent")
    with pytest.raises(TargetError, match="runner 'hots' is unknown"):
        headrace.load(exports.bundle(), runner="hots")


def test_a_negative_count_of_logprobs_is_refused(models: dict[str, LanguageModel]) -> None:
    with pytest.raises(UserError, match=r"logprobs is -1; expected 0 or more"):
        list(next(iter(models.values())).generate("a", logprobs=-1))
