"""Sampler: the next token from one row of logits.

The order is Hugging Face's (transformers, LogitsProcessorList of `generate`): repetition penalty, temperature, top-k,
top-p. Knows nothing about text, models or when to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.errors import HeadraceError, UserError, did_you_mean

__all__ = ["Sampler", "SamplingOptions"]

FIRST_LOOK = 256  # candidates looked at first for top-p
ROW = 128  # logits looked at together when the largest are sought
HF_TOP_K = 50  # what Hugging Face's generation takes when it samples and the configuration says nothing


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens (and those as likely as the k-th); 0 for all.
        top_p: only the most likely tokens that together reach this probability; 1 for all.
        repetition_penalty: above 1 makes tokens that were seen less likely (Keskar et al. 2019, CTRL).
        seed: the same seed gives the same choices; None takes a new one each time.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, lambda v: 0 <= v < math.inf, "0 (greedy) or more")
        _number("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1")
        _number("repetition_penalty", self.repetition_penalty, lambda v: 0 < v < math.inf, "above 0")
        _whole("top_k", self.top_k, "a whole number, 0 (all) or more")
        if self.seed is not None:
            _whole("seed", self.seed, "a whole number, 0 or more")

    @property
    def greedy(self) -> bool:
        """The most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> SamplingOptions:
        """What a model's generation_config.json asks for, changed by what the caller asks for.

        As in Hugging Face, nothing is sampled unless do_sample is true, and top_k is 50 when it samples and none is
        given. Asking for top_k or top_p of a model that is greedy by itself samples, at temperature 1 unless that is
        given too.

        Args:
            config: the content of generation_config.json; other keys are ignored.
            overrides: field name → value; None leaves the model's value.

        Raises:
            UserError: a value is out of range or an override has an unknown name.
        """
        wanted = {name: value for name, value in (overrides or {}).items() if value is not None}
        known = [f.name for f in fields(cls)]
        for name in wanted:
            if name not in known:
                raise UserError(f"unknown sampling option {name!r}; expected one of {', '.join(known)}"
                                f"{did_you_mean(name, known)}")  # fmt: skip
        values: dict[str, Any] = {}
        if config.get("do_sample") is True:
            values = {"temperature": 1.0, "top_k": HF_TOP_K}
            for name in ("temperature", "top_k", "top_p"):
                if config.get(name) is not None:
                    values[name] = config[name]
        elif {"top_k", "top_p"} & wanted.keys():
            values["temperature"] = 1.0
        if config.get("repetition_penalty") is not None:
            values["repetition_penalty"] = config["repetition_penalty"]
        return replace(cls(), **{**values, **wanted})


class Sampler:
    """Chooses tokens; holds the random numbers' state.

    Args:
        options: how to choose.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._random = np.random.Generator(np.random.PCG64(options.seed))

    def sample(self, logits: npt.NDArray[np.float32], recent_ids: Iterable[int] = ()) -> int:
        """The next token.

        Args:
            logits: float32 [V]; not changed.
            recent_ids: tokens seen so far, for the repetition penalty; Hugging Face counts the prompt's too.

        Returns:
            The token's id; equally likely tokens go to the lowest id when greedy.

        Raises:
            HeadraceError: the logits have no finite largest value.
        """
        options = self.options
        if options.repetition_penalty != 1:
            logits = _penalized(logits, recent_ids, options.repetition_penalty)
        best = int(np.argmax(logits))  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise HeadraceError(
                f"the model's logits have {logits[best]} as largest value; the model or its cache is damaged"
            )
        if options.greedy:
            return best
        ids = _largest(logits, options.top_k)
        # float32 is exact enough for one weight (its error is far below a logit's own); sums need float64
        weights = np.exp((logits[ids] - logits[best]) / np.float32(options.temperature))
        if options.top_p < 1:
            ids, weights = _nucleus(ids, weights, options.top_p)
        reached = np.cumsum(weights, dtype=np.float64)
        at = int(np.searchsorted(reached, self._random.random() * reached[-1], side="right"))
        return int(ids[min(at, len(ids) - 1)])


def _penalized(logits: npt.NDArray[np.float32], seen: Iterable[int], penalty: float) -> npt.NDArray[np.float32]:
    """A copy of the logits where tokens seen are less likely: negative ones multiplied, positive ones divided."""
    ids = np.unique(np.fromiter(seen, dtype=np.int64))
    ids = ids[(ids >= 0) & (ids < len(logits))]
    if not len(ids):
        return logits
    logits = logits.copy()
    values = logits[ids].astype(np.float64)
    logits[ids] = np.where(values < 0, values * penalty, values / penalty)
    return logits


def _largest(values: npt.NDArray[Any], count: int) -> npt.NDArray[np.intp]:
    """The places of the `count` largest values and of any as large as the last of them, ascending; all for 0.

    Values are first looked at in rows: the `count`-th largest of the rows' maxima is at most the `count`-th largest
    value, so everything below it is out, which leaves little to partition.
    """
    size = len(values)
    if not 0 < count < size:
        return np.arange(size)
    places = np.arange(size)
    rows = size // ROW
    if count <= rows:
        peaks = values[: rows * ROW].reshape(rows, ROW).max(axis=1)
        places = np.flatnonzero(values >= np.partition(peaks, rows - count)[rows - count])
        values = values[places]
    at = len(values) - count
    large: npt.NDArray[np.intp] = places[values >= np.partition(values, at)[at]]
    return large


def _nucleus(
    ids: npt.NDArray[np.intp], weights: npt.NDArray[np.float32], share: float
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """The fewest most likely tokens whose weights reach `share` of the whole, at least one; of equals the lowest ids.

    The order of what is given is kept.
    """
    goal = share * float(weights.sum(dtype=np.float64))
    looked = np.arange(len(weights))
    for count in (FIRST_LOOK, 0):  # a few are nearly always enough, and cheaper than sorting a vocabulary
        looked = _largest(weights, count)
        falling = np.sort(weights[looked])[::-1]
        reached = np.cumsum(falling, dtype=np.float64)
        if reached[-1] >= goal:
            break
    size = min(int(np.searchsorted(reached, goal, side="left")) + 1, len(looked))
    above = looked[weights[looked] > falling[size - 1]]
    equal = looked[weights[looked] == falling[size - 1]]
    keep = np.sort(np.concatenate([above, equal[: size - len(above)]]))
    return ids[keep], weights[keep]


def _number(name: str, value: float, valid: Callable[[float], bool], expected: str) -> None:
    # NumPy's own numbers are welcome, a bool or a text from a configuration file is not.
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not valid(value):
        raise UserError(f"{name} is {value!r}; expected {expected}")


def _whole(name: str, value: int, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise UserError(f"{name} is {value!r}; expected {expected}")
