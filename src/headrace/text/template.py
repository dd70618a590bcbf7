"""ChatTemplate: a checkpoint's jinja template, run in a sandbox and with bounds.

A template is code from whoever made the checkpoint. It runs in jinja's immutable sandbox with the settings and the few
functions Hugging Face gives templates (transformers, utils/chat_template_utils.py), and it cannot loop, repeat or pad
its way through memory. Knows nothing about tokens.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from headrace.errors import TokenizerError

__all__ = ["ChatTemplate"]

MAX_TEMPLATE = 256 << 10  # characters; the longest known ones have about 20,000
MAX_OUTPUT = 64 << 20  # characters of one rendering
MAX_REPEAT = 1 << 20  # characters or items a template may make by repeating or padding
MAX_RANGE = 100_000  # numbers all range() calls of one rendering may give together
PADDING = ("ljust", "rjust", "center", "zfill", "expandtabs")


class ChatTemplate:
    """A compiled template.

    Args:
        source: jinja source.

    Raises:
        TokenizerError: the template does not compile.
    """

    def __init__(self, source: str) -> None:
        import jinja2

        if len(source) > MAX_TEMPLATE:
            raise TokenizerError(f"the chat template has {len(source)} characters; expected at most {MAX_TEMPLATE}")
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise _refused(error) from None
        except RecursionError:
            raise TokenizerError("the chat template is nested too deep; use --raw to go without it") from None

    def render(self, messages: Sequence[Mapping[str, str]], *, ask: bool, marks: Mapping[str, str]) -> str:
        """The text of a conversation.

        Args:
            messages: each with "role" and "content".
            ask: end with the beginning of the assistant's turn.
            marks: further names the template can use, such as bos_token and eos_token.

        Raises:
            TokenizerError: the template refused the conversation, failed, or went beyond a bound.
        """
        left = MAX_RANGE

        def bounded_range(*args: int) -> range:
            nonlocal left
            numbers = range(*args)
            left -= len(numbers)
            if left < 0:
                raise OverflowError(f"its loops go round more than {MAX_RANGE} times")
            return numbers

        names = {"messages": list(messages), "add_generation_prompt": ask, "range": bounded_range, **marks}
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(**names):
                parts.append(part)
                size += len(part)
                if size > MAX_OUTPUT:
                    raise OverflowError(f"it gives more than {MAX_OUTPUT} characters")
        except Exception as error:  # a template's mistake can be any exception: TypeError, KeyError, …
            raise _refused(error) from None
        return "".join(parts)


def _refused(error: Exception) -> TokenizerError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return TokenizerError(f"the model's chat template failed: {reason}; change the messages or use --raw to go without")


@lru_cache(maxsize=1)
def _environment() -> Any:
    import jinja2
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "%"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                raise SecurityError("powers are not allowed")
            if operator == "*":
                for one, other in ((left, right), (right, left)):
                    if hasattr(one, "__len__") and isinstance(other, int) and len(one) * other > MAX_REPEAT:
                        raise SecurityError(f"it repeats something to more than {MAX_REPEAT} items")
                if isinstance(left, int) and isinstance(right, int) and abs(left * right) >> 64:
                    raise SecurityError("its numbers are too large")
            if operator == "%" and isinstance(left, str):
                _check_widths(left)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
            if isinstance(owner, str):
                if name in PADDING and any(isinstance(a, int) and a > MAX_REPEAT for a in args):
                    raise SecurityError(f"it pads text to more than {MAX_REPEAT} characters")
                if name == "replace" and len(args) > 1 and len(owner) * max(len(str(args[1])), 1) > MAX_OUTPUT:
                    raise SecurityError(f"it makes a text of more than {MAX_OUTPUT} characters")
            return super().call(context, function, *args, **kwargs)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                _check_widths(value.__self__)
            return wrapped

    class Generation(Extension):
        """Hugging Face's `{% generation %}` marks the assistant's words for training; here it only passes them on."""

        tags = {"generation"}  # noqa: RUF012  jinja's own declaration

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def _check_widths(text: str) -> None:
        # a long number, printf's width from an argument, and format's width from an argument
        if re.search(r"\d{5,}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{", text):
            raise SecurityError("a width in its format is too large")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        _check_widths(form)
        return datetime.datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja's own escapes HTML, which no prompt wants
        width = indent if indent is None else min(indent, 16)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=width, separators=separators, sort_keys=sort_keys)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    for name in ("center", "format", "indent", "wordwrap"):  # they pad without a bound
        environment.filters.pop(name)
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name)
    return environment
