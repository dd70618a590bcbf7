"""What every dialect of the API asks for and gets back, in headrace's own terms. Knows no HTTP and no engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from headrace.errors import UserError

__all__ = ["GenerationRequest", "Generator", "Logprob", "Piece", "Refused", "Usage", "collect"]


class Refused(UserError):
    """A request that cannot be served.

    Attributes:
        status: HTTP status code.
        field: the name of the field that is wrong, or None.
        retry_after: seconds after which it may succeed, or None.
        code: OpenAI's word for what is wrong, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        field: str | None = None,
        retry_after: int | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.field = field
        self.retry_after = retry_after
        self.code = code


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to answer it.

    Attributes:
        prompt: token ids, a text to continue, or a conversation as {"role", "content", …} messages.
        max_tokens: most tokens of an answer, 0 where only the prompt's are of interest; None: as many as the context
            leaves.
        sampling: fields of SamplingOptions that differ from the model's own.
        stop: strings that end an answer.
        n: how many answers.
        top_logprobs: how many alternatives are told with each token; None tells no probabilities.
        echo: the prompt's text is given before each answer, and where probabilities are told, those of its tokens too.
        tools: functions the model may call, as OpenAI's {"type": "function", "function": …}.
        grammar: ("json_schema" | "json_object" | "regex" | "lark", source), or None.
    """

    prompt: Sequence[int] | str | Sequence[Mapping[str, Any]]
    max_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int | None = None
    echo: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    grammar: tuple[str, str] | None = None

    @property
    def is_conversation(self) -> bool:
        """The prompt is a list of messages."""
        return not isinstance(self.prompt, str) and bool(self.prompt) and isinstance(self.prompt[0], Mapping)


@dataclass(frozen=True)
class Logprob:
    """A token and how likely it was.

    Attributes:
        text: its own text; bytes that are no whole character are spelled \\xf0, special tokens as the vocabulary does.
        raw: the bytes it stands for in the text; none for special tokens.
        logprob: the natural logarithm of its probability; None for a prompt's first token, which nothing predicts.
        start: the character of the answer's text that it begins, or goes on with.
        top: the likeliest tokens at its place, without a start.
    """

    text: str
    raw: bytes
    logprob: float | None
    start: int = 0
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step adds to one answer.

    Attributes:
        choice: which of the n answers.
        text: text that became certain; may be empty.
        finish: on the last piece, "stop", "length", "context" or "cancelled".
        stop: on the last piece, the stop string that the answer ended at, or None.
        tokens: where log probabilities were asked for, the tokens that have a part in the text so far and were not told
            yet; at last also the end token.
    """

    choice: int
    text: str
    finish: str | None = None
    stop: str | None = None
    tokens: tuple[Logprob, ...] = ()


@dataclass
class Usage:
    """Tokens of a request, counted as it goes."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    prompt_seconds: float = 0.0


class Generator(Protocol):
    """A request under way: iterate over its pieces; leaving the iteration early cancels it.

    Attributes:
        usage: counted so far; `prompt_tokens` from the start.
    """

    usage: Usage

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    async def aclose(self) -> None:
        """Stop and free the slots."""


@dataclass
class Answer:
    """One finished answer."""

    text: str = ""
    finish: str = "stop"
    stop: str | None = None
    tokens: list[Logprob] = field(default_factory=list)


async def collect(generator: Generator, n: int) -> list[Answer]:
    """The whole answers of a request."""
    answers = [Answer() for _ in range(n)]
    async for piece in generator:
        answer = answers[piece.choice]
        answer.text += piece.text
        answer.tokens += piece.tokens
        if piece.finish is not None:
            answer.finish, answer.stop = piece.finish, piece.stop
    return answers
