"""Recipes: ordered rules from weight names to grids and methods, as data. First match wins.

A recipe is a small JSON file:

    {"name": "w4a16", "kv": "int8",
     "rules": [{"match": "embed_tokens|lm_head", "bits": 8, "block": "channel", "method": "nearest"},
               {"match": "layers\\..*_proj",      "bits": 4, "block": "channel", "method": "gptq"}]}

`match` is a regular expression (patterns.py) searched in the canonical name; `bits` are 4, 5, 6 or 8 (5 and 6 need a
block); `"lpbq": true` gives blocks of less than 8 bits the other form of scales that grid.py has; `"rotate": true`
quantizes the model in another basis (rotation.py). This file does not know how a method works.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.bundle.grid import Grid
from headrace.errors import RecipeError, did_you_mean, shown
from headrace.files import read_json
from headrace.patterns import Pattern, PatternError

__all__ = ["Recipe", "Rule", "load_recipe", "parse_block", "shipped_recipes"]

KV_KINDS = ("int8", "float32")


@dataclass(frozen=True)
class Rule:
    """Weights whose name matches get this grid and method."""

    match: str
    bits: int
    block: int | None
    method: str
    lpbq: bool = False
    pattern: Pattern = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "pattern", Pattern(self.match))
        except PatternError as error:
            raise RecipeError(f"rule {shown(self.match)} is not a regular expression: {error}") from None
        _ = self.grid

    @property
    def grid(self) -> Grid:
        """What the weights are rounded to."""
        return Grid(self.bits, self.block, self.lpbq)

    def on(self, grid: Grid) -> Rule:
        """The same rule with another grid."""
        return replace(self, bits=grid.bits, block=grid.block, lpbq=grid.lpbq)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "match": self.match,
            "bits": self.bits,
            "block": self.block or "channel",
            "method": self.method,
            **({"lpbq": True} if self.lpbq else {}),
        }


@dataclass(frozen=True)
class Recipe:
    """Ordered rules, the KV cache's element type ("int8" or "float32"), and whether the model is rotated before.

    Raises:
        RecipeError: there is no rule, or the cache's type is unknown.
    """

    name: str
    rules: tuple[Rule, ...]
    kv: str = "int8"
    rotate: bool = False

    def __post_init__(self) -> None:
        if not self.rules:
            raise RecipeError(f"recipe {self.name!r} has no rules")
        if self.kv not in KV_KINDS:
            raise RecipeError(f"kv {self.kv!r} is unknown; expected {' or '.join(KV_KINDS)}")

    def resolve(self, names: Iterable[str]) -> dict[str, Rule]:
        """The rule of each name.

        Raises:
            RecipeError: a name has no rule, or a rule has no name left.
        """
        numbers = {name: self._first(name) for name in names}
        chosen: dict[str, Rule] = {}
        for name, number in numbers.items():
            if number is None:
                raise RecipeError(f"recipe {self.name!r} has no rule for {name}; add one whose match fits it")
            chosen[name] = self.rules[number]
        used = set(numbers.values())
        for number, rule in enumerate(self.rules):
            if number not in used:
                raise RecipeError(
                    f"rule {number + 1} of recipe {self.name!r}, {rule.match!r}, matches no weight that is left "
                    "by the rules before it; remove or correct it"
                )
        return chosen

    def _first(self, name: str) -> int | None:
        """The number of the first rule that matches a name."""
        return next((number for number, rule in enumerate(self.rules) if rule.pattern.found_in(name)), None)

    def with_linears(
        self,
        linears: Iterable[str],
        *,
        block: int | str | None = "keep",
        method: str | None = None,
        lpbq: bool | None = None,
    ) -> Recipe:
        """The same recipe with another block or method for rules of less than 8 bits that any of the `linears` has; a
        block given here has LPBQ scales, unless `lpbq` says otherwise."""
        theirs = {self._first(name) for name in linears}
        rules = []
        for number, rule in enumerate(self.rules):
            if number in theirs and rule.bits < 8:
                given = rule if isinstance(block, str) else replace(rule, block=block, lpbq=block is not None)
                rule = replace(given, method=method or rule.method, lpbq=given.lpbq if lpbq is None else lpbq)
            rules.append(rule)
        return replace(self, rules=tuple(rules))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "name": self.name,
            "kv": self.kv,
            "rotate": self.rotate,
            "rules": [rule.to_dict() for rule in self.rules],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], origin: str = "a recipe") -> Recipe:
        """The inverse of `to_dict`.

        Raises:
            RecipeError: a key or value is not what the module docstring describes.
        """
        _only(raw, ("name", "kv", "rotate", "rules", "about"), origin)
        rules = raw.get("rules")
        if not isinstance(rules, list):
            raise RecipeError(f"{origin}: 'rules' is {type(rules).__name__}; expected a list of rules")
        parsed = []
        for number, item in enumerate(rules, 1):
            where = f"{origin}, rule {number}"
            if not isinstance(item, dict):
                raise RecipeError(f"{where} is {item!r}; expected an object with match, bits, block, method")
            _only(item, ("match", "bits", "block", "method", "lpbq"), where)
            if "match" not in item or "bits" not in item:
                raise RecipeError(f"{where} lacks 'match' or 'bits'")
            parsed.append(
                Rule(
                    str(item["match"]),
                    item["bits"],
                    parse_block(item.get("block", "channel")),
                    item.get("method", "nearest"),
                    _flag(item, "lpbq", where),
                )
            )
        rotate = _flag(raw, "rotate", origin)
        return cls(str(raw.get("name", "unnamed")), tuple(parsed), str(raw.get("kv", "int8")), rotate)


def parse_block(value: object) -> int | None:
    """ "channel" → None, "32" or 32 → 32.

    Raises:
        RecipeError: it is neither.
    """
    if value is None or value == "channel":
        return None
    try:
        return int(str(value))
    except ValueError:
        raise RecipeError(f"block {value!r} is not possible; expected channel, 16, 32, 64, 128 or 256") from None


def shipped_recipes() -> dict[str, Path]:
    """Names and files of the recipes that come with the package."""
    from importlib import resources

    folder = Path(str(resources.files("headrace"))) / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.json"))}


def load_recipe(name_or_file: str) -> Recipe:
    """A shipped recipe by name, or one from a JSON file.

    Raises:
        RecipeError: there is no such recipe or it does not parse.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_file, Path(name_or_file))
    if not path.is_file():
        raise RecipeError(
            f"recipe {name_or_file!r} is neither a shipped one ({', '.join(shipped)}) nor a file"
            f"{did_you_mean(name_or_file, shipped)}"
        )
    raw = read_json(path, error=RecipeError, advice="see docs/bundle-format.md")
    return Recipe.from_dict(raw, f"recipe {path.name}")


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise RecipeError(f"{where}: {key} is {value!r}; expected true or false")
    return value


def _only(raw: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}; known: {', '.join(known)}")
