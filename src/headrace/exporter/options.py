"""What can be asked of an export: each option with its default, its help and its reading, spelled here alone.

`headrace.export`, the verbs export and plan, the manifest and the work folder's record all go by these fields. Values
may be text, as on the command line, or Python values; either is read into the type that the field names. What an
option means for a certain checkpoint is settled in settings.py. Imports nothing heavy: `headrace --help` lists it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from headrace.errors import RecipeError, UserError, did_you_mean

if TYPE_CHECKING:
    from headrace.bundle.recipe import Recipe

__all__ = ["ExportOptions", "flag", "is_whole", "read_lengths", "read_size", "spelled"]

Reader = Callable[[str, Any], Any]  # (the option as it is spelled on the command line, a value) → what it means
MAX_DIGITS = 18  # of a whole number as text; Python reads none of thousands of them
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def _described(
    read: Reader, help: str, metavar: str = "", *, name: str = "", repeats: bool = False, decides: bool = True
) -> dict[str, Any]:
    """What a field says of itself.

    Args:
        read: from a value as it is given to what it means.
        help: a sentence.
        metavar: what stands for the value in --help; none for a flag.
        name: on the command line, the field's own by default.
        repeats: given several times on the command line, one value each.
        decides: it decides a bundle's bytes.
    """
    return {"read": read, "help": help, "metavar": metavar, "name": name, "repeats": repeats, "decides": decides}


def flag(option: Field[Any]) -> str:
    """How a field is spelled on the command line: `--prompt-length`."""
    return f"--{option.metadata['name'] or option.name.replace('_', '-')}"


def spelled(value: Any) -> str | None:
    """How a value is spelled on the command line; None when it is left open."""
    if value is None or value == ():
        return None
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _text(option: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{option} {value!r} is not possible; expected a name")
    return value


def _recipe(option: str, value: Any) -> str | Recipe:
    return os.fspath(value) if isinstance(value, str | os.PathLike) else value


def _block(option: str, value: Any) -> int | str:
    from headrace.bundle.recipe import parse_block

    return parse_block(value) or "channel"


def _truth(option: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{option} {value!r} is not possible; expected True or False")
    return value


def _count(least: int) -> Reader:
    def read(option: str, value: Any) -> int:
        whole = value if isinstance(value, int) else int(value) if is_whole(str(value).strip()) else least - 1
        if isinstance(value, bool) or whole < least:
            raise UserError(f"{option} {value} is not possible; expected a whole number, {least} or more")
        return whole

    return read


def is_whole(text: str) -> bool:
    """Whether a text is a whole number, 0 or more, that Python reads."""
    return text.isdecimal() and text.isascii() and len(text) <= MAX_DIGITS


def _bits(option: str, value: Any) -> float:
    try:
        bits = float(value)
    except (TypeError, ValueError):
        bits = math.nan
    if not 4 <= bits <= 8:  # also when it is no number
        raise RecipeError(f"{option} {value} is not possible; expected an average from 4 to 8 bits, such as 4.5")
    return bits


def read_size(option: str, value: Any) -> int:
    """Bytes: 105000000, "105MB", "5.06 GB" or "100MiB"; the B and its capital letters may be left out.

    Raises:
        UserError: the value is anything else.
    """
    match = re.fullmatch(r"(\d+)(\.\d+)?\s*((?:[kmg]i?)?)b?", str(value).strip(), re.ASCII | re.IGNORECASE)
    if match is None or not is_whole(match[1]):
        raise UserError(f"{option} {value!r} is not possible; expected a number of bytes, such as 105MB or 5.06GB")
    return int(float(match[1] + (match[2] or "")) * _UNITS[match[3].lower()])


def read_lengths(option: str, value: Any) -> tuple[int, ...]:
    """Token counts, rising: 4096, (512, 4096) or "512,4096".

    Raises:
        UserError: the value is anything else.
    """
    items = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    texts = [str(item).strip() for item in items]
    if not texts or not all(is_whole(text) and int(text) > 0 for text in texts):
        shown = ",".join(texts)
        raise UserError(f"{option} {shown!r} is not possible; expected whole numbers above 0, separated by commas")
    return tuple(sorted({int(text) for text in texts}))


def _names(option: str, value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else list(value)
    return tuple(dict.fromkeys(item.strip() for item in items if item.strip()))


def _paths(option: str, value: Any) -> tuple[Path, ...]:
    return (Path(value),) if isinstance(value, str | os.PathLike) else tuple(Path(item) for item in value)


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export; None leaves a choice to the recipe or the model.

    Raises:
        UserError: a value cannot be read; the message says what was expected.
    """

    recipe: str | Recipe = field(
        default="w4a16", metadata=_described(_recipe, "w4a16, w4b32, another shipped recipe, or a file.", "NAME")
    )
    lora: tuple[Path, ...] = field(
        default=(),
        metadata=_described(
            _paths, "An adapter's folder, as PEFT writes it, to merge before; repeatable.", "DIR", repeats=True
        ),
    )
    block: int | str | None = field(
        default=None,
        metadata=_described(
            _block, "Weights of less than 8 bits that share a scale: channel, 16, 32, 64, 128 or 256.", "BLOCK"
        ),
    )
    method: str | None = field(
        default=None,
        metadata=_described(_text, "How weights of less than 8 bits are found: nearest, gptq, descent, best …", "NAME"),
    )
    rotate: bool | None = field(
        default=None,
        metadata=_described(_truth, "Quantize in a basis without huge channels, exact in float; a device's default."),
    )
    bits: float | None = field(
        default=None,
        metadata=_described(_bits, "Budget: code bits averaged over the linears; 8 for the most sensitive.", "BITS"),
    )
    size: int | None = field(
        default=None,
        metadata=_described(
            read_size,
            "Budget: bytes of all weights, such as 105MB; 5 and 6 bits and blocks are chosen for it too.",
            "BYTES",
        ),
    )
    kv: str | None = field(default=None, metadata=_described(_text, "int8 or float32 cache.", "TYPE"))
    parts: int = field(default=5, metadata=_described(_count(1), "Graphs the model is split into.", "N"))
    prompt_length: tuple[int, ...] = field(
        default=(128,),
        metadata=_described(read_lengths, "Tokens a prompt step takes; for a device also several: 128,32.", "TOKENS"),
    )
    context: tuple[int, ...] | None = field(
        default=None,
        metadata=_described(
            read_lengths,
            "Context length, or several: 512,4096. By default 4096 or the model's own, and for a device also 1024 if "
            "a laptop can compile both.",
            "TOKENS",
        ),
    )
    calibration: tuple[Path, ...] = field(
        default=(),
        metadata=_described(
            _paths, "Text to calibrate on; repeatable. By default English that comes with Python.", "FILE", repeats=True
        ),
    )
    windows: int = field(default=32, metadata=_described(_count(1), "Most windows of calibration text.", "N"))
    window_length: int = field(default=512, metadata=_described(_count(2), "Tokens of a window.", "TOKENS"))
    targets: tuple[str, ...] = field(
        default=(),
        metadata=_described(
            _names, "Chips to compile for: snapdragon-8-elite,… (needs headrace[qnn]).", "CHIPS", name="target"
        ),
    )
    keep_onnx: bool = field(
        default=False, metadata=_described(_truth, "Keep the device graphs in the bundle, for other tools.")
    )
    keep_grid: bool = field(
        default=False,
        metadata=_described(
            _truth,
            "Keep weights that already lie on their rule's grid: a GGUF's Q4_0 at --block 32; --size finds its Q5_0 "
            "and Q8_0 too.",
        ),
    )
    jobs: int = field(
        default=2, metadata=_described(_count(1), "Cores to use; the result does not depend on it.", "N", decides=False)
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            value = option.default if value is None else option.metadata["read"](flag(option), value)
            object.__setattr__(self, option.name, value)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The options of a mapping from field names to values.

        Raises:
            UserError: a name is none of the fields, or a value cannot be read.
        """
        known = [option.name for option in fields(cls)]
        for name in given:
            if name not in known:
                raise UserError(f"unknown option {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
        return cls(**given)

    @property
    def for_device(self) -> bool:
        """Whether device graphs are made: compiled for a chip, or kept."""
        return bool(self.targets) or self.keep_onnx
