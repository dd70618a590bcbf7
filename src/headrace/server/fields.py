"""Fields of request bodies, read with the errors that clients expect: one line that names the field.

A body that is no object, a field of a wrong type and a field that headrace does not support are all `Refused` with
status 400. Knows no dialect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.errors import UserError, did_you_mean, shown
from headrace.server.generation import Refused
from headrace.text.turns import message_text

__all__ = ["MAX_ANSWERS", "MAX_SEED", "MAX_TOP_LOGPROBS", "Body", "text_of"]

MAX_STOPS = 16
MAX_ANSWERS = 16
MAX_TOP_LOGPROBS = 20
MAX_SEED = (1 << 63) - 1


class Body:
    """A JSON object whose fields are taken out one by one; what is left at the end is not supported.

    Args:
        raw: the object.
        ignored: fields that change nothing here and are accepted whatever they hold.

    Raises:
        Refused: it is no object.
    """

    def __init__(self, raw: object, ignored: Sequence[str] = ()) -> None:
        if not isinstance(raw, dict):
            raise Refused(f"the body is a {type(raw).__name__}; expected a JSON object")
        self._raw: dict[str, Any] = {key: value for key, value in raw.items() if value is not None}
        self._ignored = set(ignored)
        self._known: set[str] = set(ignored)

    def take(self, name: str, *types: type, default: Any = None, required: bool = False, expected: str = "") -> Any:
        """A field of one of the types, or the default when it is absent or null."""
        self._known.add(name)
        if name not in self._raw:
            if required:
                raise Refused(f"{name} is missing; expected {expected or types[0].__name__}", field=name)
            return default
        value = self._raw.pop(name)
        # bool is an int for Python, but not for JSON.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = expected or " or ".join(t.__name__ for t in types)
            raise Refused(f"{name} is {shown(value)}; expected {wanted}", field=name)
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number between two bounds, or None."""
        value = self.take(name, int, float, expected=f"a number, {low} … {high}")
        if value is not None and not low <= value <= high:
            raise Refused(f"{name} is {value}; expected {low} … {high}", field=name)
        return None if value is None else float(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number between two bounds, or None; 8.0 is one too, since JSON has but one kind of numbers."""
        value: int | float | None = self.take(name, int, float, expected=f"a whole number, {low} … {high}")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and not (isinstance(value, int) and low <= value <= high):
            raise Refused(f"{name} is {value}; expected a whole number, {low} … {high}", field=name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        return bool(self.take(name, bool, default=default, expected="true or false"))

    def strings(self, name: str) -> tuple[str, ...]:
        """A string, or a list of strings."""
        value = self.take(name, str, list, default=[], expected="a string or a list of strings")
        items = [value] if isinstance(value, str) else value
        if not all(isinstance(item, str) and item for item in items) or len(items) > MAX_STOPS:
            raise Refused(f"{name} is {shown(value)}; expected at most {MAX_STOPS} non-empty strings", field=name)
        return tuple(items)

    def only(self, name: str, *values: Any) -> None:
        """A field that is supported for these values alone."""
        self._known.add(name)
        if name in self._raw and self._raw.pop(name) not in values:
            raise Refused(f"{name} is supported only as {' or '.join(map(repr, values))}", field=name)

    def done(self) -> None:
        """Refuse what nobody took.

        Raises:
            Refused: a field is left that is not supported; it is named.
        """
        for name in self._raw:
            if name not in self._ignored:
                raise Refused(f"{name} is not supported{did_you_mean(name, self._known)}", field=name)


def text_of(content: object, where: str) -> str:
    """The text of a message's content: a string, or a list of text parts.

    Raises:
        Refused: a part is no text.
    """
    try:
        return message_text(content)
    except UserError as error:
        raise Refused(f"{where} {error}", field=where) from None
