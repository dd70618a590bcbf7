"""Text as it comes: pushed token by token it is the text decoded at once, and stop strings never leak."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import UserError
from headrace.text.streaming import TextStream
from headrace.text.tokenizer import Tokenizer
from tests.text.vocabularies import byte_level_tokenizer, sentencepiece_tokenizer

KINDS = ("sentencepiece", "sentencepiece with a space before", "byte-level")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folders = [tmp_path_factory.mktemp("vocabulary") for _ in KINDS]
    return {
        KINDS[0]: sentencepiece_tokenizer(folders[0]),
        KINDS[1]: sentencepiece_tokenizer(folders[1], dummy_prefix=True),
        KINDS[2]: byte_level_tokenizer(folders[2]),
    }


def stream(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str] = (), continues: bool = False) -> list[str]:
    """What a stream gives out for each token, and at the end."""
    text = TextStream(tokenizer, stops, continues=continues)
    return [*(text.push(i) for i in ids), text.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.text(st.sampled_from("the sea 百川😀👨‍👩‍👧é\n\t 0123abc") | st.characters(codec="utf-8"), max_size=40),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_pushing_tokens_gives_the_whole_text(
    tokenizers: dict[str, Tokenizer], kind: str, text: str, continues: bool
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    parts = stream(tokenizer, ids, continues=continues)
    assert "".join(parts) == tokenizer.decode(ids, continues=continues)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts[:-1])  # no character was cut


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.integers(0, 400), max_size=30), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_tokens_even_invalid_utf8_give_the_whole_text(
    tokenizers: dict[str, Tokenizer], kind: str, ids: list[int], continues: bool
) -> None:
    tokenizer = tokenizers[kind]
    assert "".join(stream(tokenizer, ids, continues=continues)) == tokenizer.decode(ids, continues=continues)


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_of_many_tokens_comes_whole(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("龘🦕")  # in no vocabulary here: three and four byte tokens
    assert len(ids) >= 7
    given_out = [part for part in stream(tokenizer, ids) if part]
    assert given_out == ["龘", "🦕"]


def test_an_unfinished_character_is_replaced_at_the_end(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    ids = tokenizer.encode("ok 🦕")[:-1]
    parts = stream(tokenizer, ids)
    assert "".join(parts[:-1]) == "ok "
    assert parts[-1] == "\ufffd"


def test_a_leading_space_belongs_to_a_text_that_continues(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[KINDS[1]]
    ids = tokenizer.encode("the sea")
    assert "".join(stream(tokenizer, ids)) == "the sea"
    assert "".join(stream(tokenizer, ids, continues=True)) == " the sea"


def by_characters(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Oracle: read one character more each time, until the text ends with a stop string, which comes second."""
    for end in range(len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], max(found, key=len)
    return text, None


@given(
    st.text("abc百", max_size=24),
    st.lists(st.text("abc百", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_do_not_depend_on_tokens(tokenizers: dict[str, Tokenizer], text: str, stops: list[str]) -> None:
    for tokenizer in tokenizers.values():
        out = TextStream(tokenizer, stops, continues=True)
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids, continues=True)
        parts = []
        for token in ids:
            parts.append(out.push(token))
            # nothing given out may have to be taken back
            assert by_characters(whole, stops)[0].startswith("".join(parts))
        parts.append(out.finish())
        assert ("".join(parts), out.stop) == by_characters(whole, stops)


def test_nothing_comes_after_a_stop(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    text = TextStream(tokenizer, ["\n\n"])
    given_out = "".join(text.push(i) for i in tokenizer.encode("one\n\ntwo"))
    assert given_out == "one"
    assert text.stop == "\n\n"
    assert text.finish() == ""


def test_the_beginning_of_a_stop_string_is_held_back_and_given_at_the_end(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    text = TextStream(tokenizer, ["User:"])
    assert "".join(text.push(i) for i in tokenizer.encode("hi Use")) == "hi "
    assert text.finish() == "Use"
    assert text.stop is None


@pytest.mark.parametrize("stops", [[""], ["a", ""], "word"])
def test_an_empty_stop_string_is_refused(tokenizers: dict[str, Tokenizer], stops: Sequence[str]) -> None:
    with pytest.raises(UserError, match="expected a list of strings, none of them empty"):
        TextStream(tokenizers["byte-level"], stops)
