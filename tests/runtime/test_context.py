"""What happens when the context fills: by each choice, over conversations of twice 4,096 tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bundle.folder import open_bundle
from headrace.errors import ContextFull, UserError
from headrace.language_model import LanguageModel
from headrace.runtime.answer import Answer, Limits
from headrace.runtime.chat import Chat
from headrace.runtime.context import SINKS, WhenFull, fit, slide
from headrace.runtime.engine import Engine
from headrace.runtime.sampling import SamplingOptions
from headrace.runtime.sequence import common_prefix
from headrace.testing import ScriptedRunner, prefix_logits
from tests.exports import VOCAB, Exports

CONTEXT = 4096
GREEDY = SamplingOptions()
KINDS = {"mha": "ids", "tied": "template", "gqa": "raw"}


def model_of(exports: Exports, kind: str, context: int = CONTEXT) -> tuple[LanguageModel, ScriptedRunner]:
    """The bundle's turns over logits that depend on every token."""
    runner = ScriptedRunner(prefix_logits(VOCAB), vocab_size=VOCAB, context=context, prompt_length=512)
    model = LanguageModel(open_bundle(exports.bundle(kind)), Engine(runner))
    assert model.turns.name == KINDS[kind]
    return model, runner


def talk(chat: Chat, tokens: int) -> list[int]:
    """Rounds until the conversation has so many tokens: what was dropped in each."""
    dropped = []
    while len(chat.turns.render(chat.messages, 1 << 60) if chat.messages else []) < tokens:
        number = len(chat.messages)
        answer = list(chat.say(f"river {number} " * 30, max_tokens=60, options=GREEDY))
        assert answer
        assert answer[-1].usage is not None
        assert answer[-1].usage.dropped_tokens == chat.dropped_tokens
        dropped.append(chat.dropped_tokens)
    return dropped


@pytest.mark.parametrize("kind", ["mha", "tied"])
def test_newest_keeps_system_and_whole_rounds_and_tells(exports: Exports, kind: str) -> None:
    model, runner = model_of(exports, kind)
    chat = model.chat("Be brief.")
    dropped = talk(chat, 2 * CONTEXT)
    assert dropped[0] == 0 < dropped[-1] and dropped == sorted(dropped)
    assert len(chat.messages) > 20, "the conversation itself forgets nothing"
    asked = chat.messages[:-1]
    whole = model.turns.render(asked, 1 << 60)
    fitted = fit(model.turns, asked, CONTEXT, 60, WhenFull.NEWEST)
    assert runner.cache[0][: len(fitted.ids)] == fitted.ids
    assert fitted.dropped_tokens == len(whole) - len(fitted.ids) == dropped[-1]
    system = common_prefix(whole, fitted.ids)
    assert system >= len(model.tokenizer.encode("Be brief."))
    assert fitted.ids[system:] == whole[len(whole) - len(fitted.ids) + system :]


@pytest.mark.parametrize("kind", ["mha", "tied", "gqa"])
def test_window_keeps_the_beginning_and_goes_on_in_the_middle_of_an_answer(exports: Exports, kind: str) -> None:
    model, runner = model_of(exports, kind)
    chat = model.chat(None if kind == "gqa" else "Be brief.", when_full="window")
    talk(chat, CONTEXT)
    said = list(chat.say("river", max_tokens=CONTEXT + 100, options=SamplingOptions(temperature=1.0, seed=0)))
    if said[-1].finish != "stop":
        assert (said[-1].finish, len(said)) == ("length", CONTEXT + 100)
        assert chat.dropped_tokens > CONTEXT / 2
    whole = model.turns.render(chat.messages, 1 << 60)
    assert max(span.stop for span in runner.spans) <= CONTEXT
    assert runner.cache[0][:SINKS] == whole[:SINKS]
    if kind != "tied":  # a template's answers are encoded again, and random tokens are not the ids of their text
        said_ids = [token.id for token in said if token.id not in model.turns.stop_ids]
        held = runner.cache[0]
        assert held[-100:] in [said_ids[-100:], said_ids[-101:-1]]


def test_a_window_moves_in_steps_so_that_turns_reuse_the_cache(exports: Exports) -> None:
    model, runner = model_of(exports, "mha")
    chat = model.chat("Be brief.", when_full="window")
    talk(chat, 2 * CONTEXT)
    runner.calls.clear()
    costs = []
    for _ in range(12):
        before = runner.computed
        list(chat.say("sea " * 30, max_tokens=60, options=GREEDY))
        costs.append(runner.computed - before)
    assert sum(cost > 1000 for cost in costs) <= 3, "only when a quarter of the context goes is it computed again"
    assert sorted(costs)[len(costs) // 2] < 300


def test_stop_refuses_and_changes_nothing(exports: Exports) -> None:
    model, _ = model_of(exports, "mha", context=256)
    chat = model.chat(when_full="stop")
    with pytest.raises(ContextFull, match=r"the prompt has \d+ tokens, but the context holds 256") as error:
        for _ in range(20):
            before = list(chat.messages)
            list(chat.say("river " * 20, max_tokens=20, options=GREEDY))
    assert chat.messages == before
    assert error.value.needed >= 256


def test_an_answer_that_fails_before_its_first_token_leaves_the_conversation(exports: Exports) -> None:
    model, runner = model_of(exports, "mha")
    chat = model.chat()
    list(chat.say("river", max_tokens=3, options=GREEDY))
    before = list(chat.messages)
    runner.run = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        list(chat.say("sea", max_tokens=3, options=GREEDY))
    assert chat.messages == before
    unread = chat.say("sea", max_tokens=3, options=GREEDY)
    unread.close()  # type: ignore[attr-defined]
    assert chat.messages == before


@given(
    ids=st.lists(st.integers(0, 5), max_size=300),
    context=st.integers(16, 64),
    share=st.floats(0, 0.25),
    free=st.integers(1, 32),
)
def test_sliding_keeps_both_ends_and_drops_whole_steps(
    ids: Sequence[int], context: int, share: float, free: int
) -> None:
    beginning, room = int(context * share), context - min(free, context // 2)
    left = slide(ids, beginning, context, room)
    assert len(left) <= max(room, beginning + 1)
    assert list(left[:beginning]) == list(ids[:beginning])
    assert list(left[beginning:]) == list(ids[len(ids) - len(left) + beginning :])
    if len(ids) <= room:
        assert left == list(ids)
    elif len(left) > beginning + 1:
        assert (len(ids) - len(left)) % (context // 4) == 0


def test_a_window_of_a_raw_answer() -> None:
    runner = ScriptedRunner(prefix_logits(50), vocab_size=50, context=32)

    class Silent:
        drops_leading_space = False

        def piece_bytes(self, token: int) -> bytes:
            return b"x"

    answer = Answer(Silent(), Limits(200, beginning=4))  # type: ignore[arg-type]
    tokens = list(Engine(runner).answer(range(10, 20), GREEDY, answer))
    assert len(tokens) == 200 and tokens[-1].finish == "length"
    assert answer.usage.dropped_tokens >= 200 + 10 - 32
    assert runner.cache[0][:4] == [10, 11, 12, 13]
    said = [token.id for token in tokens]
    assert said[-9:-1] == runner.cache[0][-8:]


def test_an_unknown_choice_gets_a_hint(exports: Exports) -> None:
    model, _ = model_of(exports, "mha")
    with pytest.raises(UserError, match="--when-full 'windw' is unknown; did you mean 'window'"):
        model.chat(when_full="windw")
    assert [kind.value for kind in WhenFull] == ["stop", "newest", "window"]
