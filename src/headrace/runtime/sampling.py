"""Sampler: the next token from one row of logits.

The order: logit bias, repetition penalty, presence and frequency penalties, what a grammar allows, temperature, top-k,
top-p, min-p; where Hugging Face has them, it is theirs (transformers, LogitsProcessorList of `generate`). Knows nothing
about text, models or when to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.errors import HeadraceError, UserError, did_you_mean, shown

__all__ = ["Sampler", "SamplingOptions", "log_probabilities", "token_key", "usable_settings"]

LOOKS = (256, 4096, 0)  # candidates looked at for top-p, until they suffice; 0: the whole vocabulary
ROW = 128  # logits looked at together when the largest are sought, or summed up
SAMPLED = ("temperature", "top_k", "top_p")  # a generation_config.json has a say in these only where do_sample is true
LARGEST = 3e38  # of a float32
MAX_DIGITS = 18  # of a token id as text; Python reads no number of thousands of them
HF_TOP_K = 50  # what Hugging Face's generation takes when it samples and the configuration says nothing


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens (and those as likely as the k-th); 0 for all.
        top_p: only the most likely tokens that together reach this probability; 1 for all.
        repetition_penalty: above 1 makes tokens seen, in the prompt too, less likely (Keskar et al. 2019, CTRL).
        seed: the same seed gives the same choices; None takes a new one each time.
        min_p: only tokens at least so likely as this share of the likeliest one (Nguyen et al. 2024); 0 for all.
        presence_penalty: taken from the logit of every token that the answer has, −2 to 2 (OpenAI's API).
        frequency_penalty: taken once for each time that the answer has the token, −2 to 2 (OpenAI's API).
        logit_bias: (id, number added to its logit) pairs; a mapping is taken too. −100 never, 100 always, in practice.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, lambda v: 0 <= v < math.inf, "0 (greedy) or more")
        _number("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1")
        _number("repetition_penalty", self.repetition_penalty, lambda v: 0 < v < math.inf, "above 0")
        _number("min_p", self.min_p, lambda v: 0 <= v <= 1, "0 (all) to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), lambda v: -2 <= v <= 2, "-2 to 2")
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        object.__setattr__(self, "logit_bias", tuple(sorted((token_key(id), bias) for id, bias in pairs)))
        for token, bias in self.logit_bias:
            _number(f"logit_bias of token {token}", bias, lambda v: -100 <= v <= 100, "-100 to 100")
        _whole("top_k", self.top_k, "a whole number, 0 (all) or more")
        if self.seed is not None:
            _whole("seed", self.seed, "a whole number, 0 or more")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError for a bias on a token that the model does not have."""
        for token, _ in self.logit_bias:
            if token >= vocab_size:
                raise UserError(f"logit_bias names token {token}; expected 0 to {vocab_size - 1}")

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
            config: the content of generation_config.json; other keys, and values that cannot be used, are ignored.
            overrides: field name → value; None leaves the model's value.

        Raises:
            UserError: an override is out of range or has an unknown name.
        """
        wanted = {name: value for name, value in (overrides or {}).items() if value is not None}
        known = [f.name for f in fields(cls)]
        for name in wanted:
            if name not in known:
                raise UserError(f"unknown sampling option {name!r}; expected one of {', '.join(known)}"
                                f"{did_you_mean(name, known)}")  # fmt: skip
        said, _ = usable_settings(config)
        samples = said.pop("do_sample", False)
        values = {name: value for name, value in said.items() if samples or name not in SAMPLED}
        if samples:
            values = {"temperature": 1.0, "top_k": HF_TOP_K, **values}
        elif {"top_k", "top_p", "min_p"} & wanted.keys():
            values["temperature"] = 1.0
        return replace(cls(), **{**values, **wanted})


def usable_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What can be used of a generation_config.json's sampling values, and a note on each that cannot.

    A model's files are as their author left them: null means not said, a top_k below 1 means all tokens, and a value
    that means nothing here must not keep a bundle from opening.
    """
    values: dict[str, Any] = {}
    notes = []
    for name in ("do_sample", *SAMPLED, "repetition_penalty"):
        value = config.get(name)
        if value is None:
            continue
        if name == "top_k" and isinstance(value, int) and not isinstance(value, bool):
            value = max(value, 0)
        said: dict[str, Any] = {name: value}
        try:
            if name == "do_sample":
                if not isinstance(value, bool):
                    raise UserError(f"do_sample is {value!r}; expected true or false")
            else:
                replace(SamplingOptions(), **said)
        except UserError as error:
            notes.append(f"generation_config.json: {error}: ignored")
        else:
            values |= said
    return values, notes


class Sampler:
    """Chooses tokens; holds the random numbers' state.

    Args:
        options: how to choose.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._scratch = np.empty(0, dtype=np.float32)

    @cached_property
    def _random(self) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(self.options.seed))

    def sample(
        self,
        logits: npt.NDArray[np.float32],
        recent_ids: Iterable[int] = (),
        answer_ids: Iterable[int] = (),
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> int:
        """The next token. One random number is drawn each time, so that choices depend on the seed and on what was
        said, and on nothing else.

        Args:
            logits: float32 (V,); not changed.
            recent_ids: tokens seen so far, for the repetition penalty; Hugging Face counts the prompt's too.
            answer_ids: the answer's own tokens so far, for the presence and frequency penalties.
            allowed: bool (V,): the tokens that may come; None for all.

        Returns:
            The token's id; equally likely tokens go to the lowest id when greedy.

        Raises:
            HeadraceError: the logits have no finite largest value.
        """
        options = self.options
        logits = self._changed(logits, recent_ids, answer_ids, allowed)
        best = int(np.argmax(logits))  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise HeadraceError(
                f"the model's logits have {logits[best]} as largest value; the model or its cache is damaged"
            )
        if options.greedy:
            return best
        ids = _largest(logits, options.top_k)
        # float32 is exact enough for one weight (its error is far below a logit's own); sums need float64
        weights = self._buffer(len(ids) if ids is not None else len(logits))
        np.subtract(logits if ids is None else logits[ids], logits[best], out=weights)
        np.divide(weights, np.float32(options.temperature), out=weights)
        np.exp(weights, out=weights)
        if options.top_p < 1:
            places = _nucleus(weights, options.top_p)
            ids, weights = (places if ids is None else ids[places]), weights[places]
        if options.min_p > 0:  # the likeliest one weighs 1
            places = np.flatnonzero(weights >= options.min_p)
            ids, weights = (places if ids is None else ids[places]), weights[places]
        at = _draw(weights, self._random.random())
        return at if ids is None else int(ids[at])

    def _changed(
        self,
        logits: npt.NDArray[np.float32],
        recent_ids: Iterable[int],
        answer_ids: Iterable[int],
        allowed: npt.NDArray[np.bool_] | None,
    ) -> npt.NDArray[np.float32]:
        """The logits with all that is added to, taken from or forbidden in them; a copy when anything is."""
        options = self.options
        if options.logit_bias:
            logits = logits.copy()
            for token, bias in options.logit_bias:
                logits[token] += bias
        if options.repetition_penalty != 1:
            logits = _penalized(logits, recent_ids, options.repetition_penalty)
        if options.presence_penalty or options.frequency_penalty:
            ids, counts = np.unique(np.fromiter(answer_ids, dtype=np.int64), return_counts=True)
            logits = logits.copy()
            logits[ids] -= np.float32(options.presence_penalty) + np.float32(options.frequency_penalty) * counts
        return logits if allowed is None else np.where(allowed, logits, np.float32(-np.inf))

    def _buffer(self, size: int) -> npt.NDArray[np.float32]:
        # Fresh pages for a vocabulary of weights would cost more than filling them.
        if len(self._scratch) < size:
            self._scratch = np.empty(size, dtype=np.float32)
        return self._scratch[:size]


def log_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """log softmax of one row of logits (V,), as the model gave them: nothing penalized, temperature 1."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    return exact


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


def _largest(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp] | None:
    """The places of the `count` largest values and of any as large as the last of them, ascending; None: all.

    Values are first looked at in columns of a table: the `count`-th largest of the columns' maxima is at most the
    `count`-th largest value, so columns below it are out, which leaves little to look through.
    """
    size = len(values)
    if not 0 < count < size:
        return None
    columns = size // ROW
    if count > columns:
        return np.flatnonzero(values >= np.partition(values, size - count)[size - count])
    table = values[: ROW * columns].reshape(ROW, columns)
    peaks = table.max(axis=0)
    floor = np.partition(peaks, columns - count)[columns - count]
    chosen = np.flatnonzero(peaks >= floor)
    rows, places = np.nonzero(table[:, chosen] >= floor)
    behind = np.flatnonzero(values[ROW * columns :] >= floor) + ROW * columns
    found = np.concatenate([rows * columns + chosen[places], behind])  # ascending, as the table's rows are
    left = values[found]
    at = len(left) - count
    large: npt.NDArray[np.intp] = found[left >= np.partition(left, at)[at]]
    return large


def _draw(weights: npt.NDArray[np.float32], chance: float) -> int:
    """The place where the running sum of `weights` passes `chance` (0 … 1) of the whole.

    Sums of rows come first, so that only one row needs a running sum.
    """
    rows = np.add.reduceat(weights, np.arange(0, len(weights), ROW), dtype=np.float64)
    reached = np.cumsum(rows)
    goal = chance * reached[-1]
    row = min(int(np.searchsorted(reached, goal, side="right")), len(rows) - 1)
    inside = np.cumsum(weights[row * ROW : (row + 1) * ROW], dtype=np.float64)
    goal -= reached[row] - rows[row]
    at = min(int(np.searchsorted(inside, goal, side="right")), len(inside) - 1)
    # Rounding may carry the goal past the last weight that counts: step back to it.
    while at and inside[at] == inside[at - 1]:
        at -= 1
    return row * ROW + at


def _nucleus(weights: npt.NDArray[np.float32], share: float) -> npt.NDArray[np.intp]:
    """The places, ascending, of the fewest and largest weights that reach `share` of the whole, at least one.

    Of equal weights the lowest places are taken.
    """
    goal = share * float(weights.sum(dtype=np.float64))
    for count in LOOKS:  # a few are nearly always enough, and cheaper than sorting a vocabulary
        places = _largest(weights, count)
        looked = weights if places is None else weights[places]
        falling = np.sort(looked)[::-1]
        reached = np.cumsum(falling, dtype=np.float64)
        if reached[-1] >= goal:
            break
    size = min(int(np.searchsorted(reached, goal, side="left")) + 1, len(looked))
    keep = looked > falling[size - 1]
    equal = np.flatnonzero(looked == falling[size - 1])
    keep[equal[: size - np.count_nonzero(keep)]] = True
    chosen = np.flatnonzero(keep)
    return chosen if places is None else places[chosen]


def _number(name: str, value: float, valid: Callable[[float], bool], expected: str) -> None:
    # NumPy's own numbers are welcome, a bool or a text from a configuration file is not.
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not -LARGEST < value < LARGEST or not valid(value):  # a whole number can be beyond any float
        raise UserError(f"{name} is {value!r}; expected {expected}")


def token_key(token: Any) -> int:
    """A key of logit_bias as a token id; JSON has keys as text.

    Raises:
        UserError: it is none.
    """
    text = str(token)
    if isinstance(token, bool) or not text.isascii() or not text.isdecimal() or len(text) > MAX_DIGITS:
        raise UserError(f"logit_bias names token {shown(token)}; expected a token id, 0 or more")
    return int(text)


def _whole(name: str, value: int, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise UserError(f"{name} is {value!r}; expected {expected}")
