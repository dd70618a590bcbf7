"""The jinja environment that chat templates run in: Hugging Face's settings, and bounds.

A template is code from whoever made the checkpoint. Jinja's immutable sandbox keeps it from the computer; the bounds
here keep it from looping, joining, repeating, nesting or padding its way through time and memory. Every loop, call,
filter, test and joined text counts against the limits of the rendering it belongs to; what one operation of Python's
can make of a value is bounded by the value's size, written out, and by the size of whole numbers. Knows nothing about
messages or tokens.

Source of the settings: transformers, utils/chat_template_utils.py.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["MAX_CHARACTERS", "MAX_STEPS", "SandboxEnvironment", "limited"]

MAX_CHARACTERS = 16 << 20  # characters and list items that one rendering may make, intermediate ones included
MAX_REPEAT = 1 << 20  # characters made at once by repeating or padding
MAX_ITEMS = 1 << 18  # items of a list or object with all that is inside it, one that is in it twice counted twice
MAX_DEPTH = 200  # lists inside lists; Python compares and hashes them by calling itself
MAX_BITS = 64  # of a whole number
MAX_STEPS = 300_000  # turns of loops and calls of one rendering
MAX_SECONDS = 5.0  # CPU time of one rendering; real templates take milliseconds
# Methods of strings, and filters, whose result can be about as long as the product of what they are given.
MULTIPLYING = frozenset({
    "batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice", "translate", "wordwrap",
    "zfill",
})  # fmt: skip
# Filters that take the square of their text's length and that no prompt has use for.
UNWANTED = ("pprint", "striptags", "urlize", "xmlattr")
MAX_WRAPPED = 1 << 16  # characters that wordwrap takes, which copies its text once a line


class _Limits:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.characters = MAX_CHARACTERS
        self.until = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError(f"its loops and calls take more than {MAX_STEPS} steps")
        if time.thread_time() > self.until:
            raise SecurityError(f"it takes more than {MAX_SECONDS:.0f} seconds")

    def make(self, size: int) -> None:
        self.characters -= size
        if self.characters < 0:
            raise SecurityError(f"it makes more than {MAX_CHARACTERS} characters")


_current: ContextVar[_Limits] = ContextVar("limits of a rendering")


@contextmanager
def limited() -> Iterator[None]:
    """What is rendered inside shares one set of limits; outside of one, nothing can be rendered."""
    token = _current.set(_Limits())
    try:
        yield
    finally:
        _current.reset(token)


def _size(value: object) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0


def _largest(arguments: Iterable[object]) -> int:
    """The largest number or length among arguments, which bounds how far a function can multiply its value."""
    sizes = [0]
    for argument in arguments:
        if isinstance(argument, dict):
            sizes.append(_largest(argument.values()))
        elif isinstance(argument, int):
            sizes.append(argument)
        else:
            sizes.append(_size(argument))
    return max(sizes)


def _check_growth(name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Refuse, before it is done, what would make too much of `value`."""
    if name in MULTIPLYING:
        factor = _largest(arguments)
        if factor > MAX_REPEAT or _size(value) * (1 + factor) > MAX_CHARACTERS:
            raise SecurityError(f"it pads text to more than {MAX_REPEAT} characters")
    elif name == "replace" and len(arguments) > 1:
        text, old, new = str(value), str(arguments[0]), str(arguments[1])
        _check_total(len(text) + text.count(old) * len(new))
    elif name == "join" and arguments:
        # a filter joins its value with its argument, a string joins its argument with itself
        _check_total(_size(value) * _size(arguments[0]))
    elif name == "format":
        _check_widths(str(value))
    if name == "wordwrap" and _size(value) > MAX_WRAPPED:
        raise SecurityError(f"it wraps more than {MAX_WRAPPED} characters")
    _check_text(value, *arguments)


def _check_text(*values: object) -> None:
    """Refuse lists and objects that would be too long written out, or are too deep; one that is in it many times counts
    each time, since comparing, hashing and printing visit it each time. Refuse large numbers too."""
    characters, items, level, depth = 0, 0, list(values), 0
    while level:
        depth += 1
        inside: list[object] = []
        for value in level:
            size = _size(value)
            characters += 1 + size
            if isinstance(value, dict):
                items += 2 * size
                if items <= MAX_ITEMS:
                    inside += [*value, *value.values()]
            elif isinstance(value, (list, tuple)):
                items += size
                if items <= MAX_ITEMS:
                    inside += value
            elif isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise SecurityError("its numbers are too large")
        _check_total(characters)
        if items > MAX_ITEMS:
            raise SecurityError(f"it makes more than {MAX_ITEMS} items")
        if depth > MAX_DEPTH:
            raise SecurityError(f"it puts lists into lists {MAX_DEPTH} times")
        level = inside


def _check_total(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise SecurityError(f"it makes more than {MAX_CHARACTERS} characters")


def _check_widths(text: str) -> None:
    # a long number, printf's width from an argument, and format's width from an argument
    if re.search(r"\d{5,}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{", text):
        raise SecurityError("a width in its format is too large")


class _Compiler(CodeGenerator):
    """Jinja's compiler, but `a ~ b`, lists and objects go through the environment, which counts them."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._checked(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._checked(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._checked(super().visit_Tuple, node, frame)
        else:  # names that are set
            super().visit_Tuple(node, frame)

    def _checked(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.checked(")
        visit(node, frame)
        self.write(")")


class _GenerationTag(Extension):
    """Hugging Face's `{% generation %}` marks the assistant's words for training; here it only passes them on."""

    tags = {"generation"}  # noqa: RUF012  jinja's own declaration

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class SandboxEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates whose work counts against the `limited()` they are rendered in."""

    code_generator_class = _Compiler
    intercepted_binops = frozenset(["+", "-", "*", "**", "%", "/", "//"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], finalize=_written
        )
        kept = {name: function for name, function in self.filters.items() if name not in UNWANTED}
        self.filters = {name: _counted_filter(name, function) for name, function in kept.items()}
        self.filters["tojson"] = _tojson
        self.tests = {name: _counted_test(function) for name, function in dict[str, Any](self.tests).items()}
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.globals.pop("lipsum")  # random text without a bound

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Call(nodes.EnvironmentAttribute("counted"), [loop.iter], [], None, None).set_lineno(
                loop.lineno
            )
        return tree

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, each counted."""
        limits = _current.get()
        for item in items:
            limits.step()
            yield item

    def checked(self, value: Any) -> Any:
        """A list or an object that the template writes."""
        _check_text(value)
        return value

    def joined(self, parts: Sequence[Any]) -> str:
        """`a ~ b`."""
        _check_text(*parts)
        return self.concat(map(str, parts))

    def concat(self, parts: Iterable[str]) -> str:
        """The text of a block or a macro."""
        limits = _current.get()
        texts = []
        for text in parts:
            limits.make(len(text))
            texts.append(text)
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja's hook for operators."""
        if operator == "**":
            raise SecurityError("powers are not allowed")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if hasattr(one, "__len__") and isinstance(other, int) and len(one) * other > MAX_REPEAT:
                    raise SecurityError(f"it repeats something to more than {MAX_REPEAT} characters or items")
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
        _check_text(left, right)
        result = super().call_binop(context, operator, left, right)
        _check_text(result)
        _current.get().make(_size(result))
        return result

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Jinja's hook for calls."""
        limits = _current.get()
        limits.step()
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, (str, bytes)):
            if name == "join" and len(args) == 1:
                args = (list(args[0]),)  # its length is needed first, and a generator can be read only once
            _check_growth(name, owner, [*args, *kwargs.values()])
        _check_text(args, kwargs)  # a macro sees them as a list
        if isinstance(function, LoopContext) and args:  # a recursive loop calls itself with the items of a branch
            args = (self.counted(args[0]), *args[1:])
        result = super().call(context, function, *args, **kwargs)
        limits.make(_size(result))
        return result

    def wrap_str_format(self, value: Any) -> Any:
        """Jinja's hook for str.format."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result counts, and which is refused beforehand where it could be huge."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja gives some filters the environment first

    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        limits = _current.get()
        limits.step()
        if name == "join" and len(args) > skipped:
            args = (*args[:skipped], list(args[skipped]), *args[skipped + 1 :])
        values = args[skipped:]
        if values:
            _check_growth(name, values[0], [*values[1:], *kwargs.values()])
        start = kwargs.get("start", values[2] if len(values) > 2 else 0)
        if name == "sum" and not isinstance(start, (int, float)):
            raise SecurityError("it adds up what are no numbers")
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return _counted_items(result)
        _check_text(result)
        limits.make(_size(result))
        return result

    return filtered


def _counted_items(items: Iterator[Any]) -> Iterator[Any]:
    """What a filter gives one by one, each a step."""
    for item in items:
        _current.get().step()
        _check_text(item)
        yield item


def _counted_test(function: Callable[..., Any]) -> Callable[..., Any]:
    """A test, which is a step."""

    @functools.wraps(function)
    def tested(*args: Any, **kwargs: Any) -> Any:
        _current.get().step()
        return function(*args, **kwargs)

    return tested


def _written(value: Any) -> Any:
    """Jinja's hook for whatever is written."""
    if not isinstance(value, str):
        _check_text(value)
    return value


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    _check_widths(form)
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own escapes HTML, which no prompt wants
    width = indent[:16] if isinstance(indent, str) else indent if indent is None else min(indent, 16)
    _check_text(value)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=width, separators=separators, sort_keys=sort_keys)
    _current.get().make(len(text))
    return text
