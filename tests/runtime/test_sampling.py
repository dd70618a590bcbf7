"""Choosing tokens: against a plain, slow rendering of the same rules, and by counting."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from headrace.errors import HeadraceError, UserError
from headrace.runtime.sampling import Sampler, SamplingOptions, log_probabilities, usable_settings

# A probability estimated from this many draws is off by less than 4 standard deviations: 4 * sqrt(0.25 / DRAWS).
DRAWS = 8000
COUNT_TOLERANCE = 4 * (0.25 / DRAWS) ** 0.5
# float32 weights and float64 sums: what a share of the whole may be off at the edge of top-p.
SAME = 1e-6  # logits nearer than this may have equal float32 weights, and equal ones go by their place
EDGE = 1e-5


def probabilities(
    logits: npt.NDArray[np.float32], options: SamplingOptions, seen: Sequence[int], said: Sequence[int] = ()
) -> list[float]:
    """The rules in the order of Hugging Face's processors, one token at a time, in float64."""
    bias = dict(options.logit_bias)
    scores = [float(x) + bias.get(i, 0.0) for i, x in enumerate(logits)]
    for i in set(seen):
        scores[i] = scores[i] * options.repetition_penalty if scores[i] < 0 else scores[i] / options.repetition_penalty
    for i in said:
        scores[i] -= options.frequency_penalty
    for i in set(said):
        scores[i] -= options.presence_penalty
    scores = [s / options.temperature for s in scores]
    if 0 < options.top_k < len(scores):
        last = sorted(scores, reverse=True)[options.top_k - 1]
        scores = [s if s >= last else -np.inf for s in scores]
    weights = np.exp(np.array(scores) - max(scores))
    weights /= weights.sum()
    order = sorted(range(len(scores)), key=lambda i: (-weights[i], i))
    kept, reached = [], 0.0
    for i in order:
        if kept and reached >= options.top_p:
            break
        kept.append(i)
        reached += weights[i]
    kept = [i for i in kept if weights[i] >= options.min_p * max(weights)]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(scores))]


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=1.0, seed=1),
        SamplingOptions(temperature=0.5, seed=2),
        SamplingOptions(temperature=1.0, top_k=3, seed=3),
        SamplingOptions(temperature=1.3, top_p=0.7, seed=4),
        SamplingOptions(temperature=0.7, top_k=5, top_p=0.8, repetition_penalty=1.3, seed=5),
        SamplingOptions(temperature=1.0, min_p=0.5, seed=6),
        SamplingOptions(temperature=1.2, top_k=6, min_p=0.2, top_p=0.9, seed=7),
        SamplingOptions(temperature=1.0, presence_penalty=0.8, frequency_penalty=-0.5, seed=8),
        SamplingOptions(temperature=1.0, logit_bias=((0, -100.0), (5, 4.5)), repetition_penalty=1.1, seed=9),
    ],
)
def test_tokens_come_as_often_as_the_rules_say(options: SamplingOptions) -> None:
    logits = np.array([1.5, -0.5, 2.0, 0.3, 2.2, -3.0, 1.49, 0.0], np.float32)
    seen = [4, 1, 4]
    sampler = Sampler(options)
    said = [6, 6, 4]
    counts = np.bincount([sampler.sample(logits, seen, said) for _ in range(DRAWS)], minlength=len(logits))
    expected = probabilities(logits, options, seen, said)
    assert np.abs(counts / DRAWS - expected).max() < COUNT_TOLERANCE
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)


@given(
    hnp.arrays(np.float32, st.integers(1, 700), elements=st.floats(-20, 20, width=32)),
    st.integers(0, 40),
    st.floats(0.05, 1.0),
    st.floats(0.2, 3.0),
    st.lists(st.integers(0, 900), max_size=10),
)
@settings(max_examples=150, deadline=None)
def test_only_tokens_the_rules_leave_are_chosen(
    logits: npt.NDArray[np.float32], top_k: int, top_p: float, temperature: float, seen: list[int]
) -> None:
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=1.2, seed=0)
    known = [i for i in seen if i < len(logits)]
    # Tokens on the very edge of top-p may fall either side of it.
    wider = probabilities(logits, SamplingOptions(temperature, top_k, min(1.0, top_p + EDGE), 1.2), known)
    before = logits.copy()
    sampler = Sampler(options)
    for _ in range(5):
        token = sampler.sample(logits, seen)
        assert wider[token] > 0 or np.abs(logits[token] - logits[np.array(wider) > 0]).min() < SAME
    assert np.array_equal(logits, before)


def test_greedy_takes_the_largest_and_of_equals_the_lowest() -> None:
    logits = np.array([0.0, 7.0, 3.0, 7.0], np.float32)
    assert Sampler(SamplingOptions()).sample(logits) == 1
    assert Sampler(SamplingOptions(temperature=0.8, top_k=1)).sample(logits) == 1


def test_greedy_minds_the_repetition_penalty() -> None:
    logits = np.array([-1.0, 7.0, 6.5], np.float32)
    assert Sampler(SamplingOptions(repetition_penalty=1.2)).sample(logits, [1]) == 2
    assert Sampler(SamplingOptions(repetition_penalty=1.2)).sample(logits, []) == 1
    negative = np.array([-1.0, -1.1], np.float32)
    assert Sampler(SamplingOptions(repetition_penalty=1.2)).sample(negative, [0]) == 1


def test_a_seed_gives_the_same_tokens_again() -> None:
    logits = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    options = SamplingOptions(temperature=1.0, top_p=0.95, seed=11)
    one, two, other = (Sampler(o) for o in (options, options, SamplingOptions(temperature=1.0, top_p=0.95, seed=12)))
    first = [one.sample(logits) for _ in range(20)]
    assert first == [two.sample(logits) for _ in range(20)]
    assert first != [other.sample(logits) for _ in range(20)]


def test_a_flat_distribution_is_sampled_whole() -> None:
    logits = np.zeros(20_000, np.float32)  # more than the first looks at top-p hold
    sampler = Sampler(SamplingOptions(temperature=1.0, top_p=0.5, seed=0))
    tokens = [sampler.sample(logits) for _ in range(300)]
    assert max(tokens) < 10_000  # of equals the lowest ids
    assert max(tokens) > 9_000
    assert min(tokens) < 1_000


def test_tiny_weights_are_never_drawn_as_rounding_artefacts() -> None:
    logits = np.full(1000, -1e9, np.float32)
    logits[500] = 0.0
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=0))
    assert {sampler.sample(logits) for _ in range(200)} == {500}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_logits_are_an_error(bad: float) -> None:
    logits = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(HeadraceError, match="the model or its cache is damaged"):
        Sampler(SamplingOptions()).sample(logits)


def test_a_blocked_token_is_no_error() -> None:
    logits = np.array([0.0, -np.inf, 1.0], np.float32)
    assert Sampler(SamplingOptions(temperature=1.0, top_p=0.9, seed=0)).sample(logits) in (0, 2)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": None}, "frequency_penalty"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3"),
        ({"seed": -3}, "seed"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} is .*; expected ") as caught:
        SamplingOptions(**values)
    assert "\n" not in str(caught.value)


BAICHUAN = {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        ({}, {}, SamplingOptions()),
        (BAICHUAN, {}, SamplingOptions(0.3, 5, 0.85, 1.05)),
        (BAICHUAN, {"temperature": 0, "seed": None}, SamplingOptions(0, 5, 0.85, 1.05)),
        (BAICHUAN, {"seed": 4, "top_k": 0}, SamplingOptions(0.3, 0, 0.85, 1.05, 4)),
        ({**BAICHUAN, "do_sample": False}, {}, SamplingOptions(repetition_penalty=1.05)),
        ({"temperature": 0.6}, {}, SamplingOptions()),  # Hugging Face samples only when told to
        ({"do_sample": True}, {}, SamplingOptions(1.0, 50)),
        ({"eos_token_id": 2}, {"top_p": 0.9}, SamplingOptions(1.0, 0, 0.9)),
        ({}, {"min_p": 0.1}, SamplingOptions(1.0, min_p=0.1)),
        ({}, {"temperature": 0.7}, SamplingOptions(0.7)),
    ],
)
def test_a_models_own_sampling_and_what_changes_it(
    config: Mapping[str, Any], overrides: Mapping[str, Any], expected: SamplingOptions
) -> None:
    assert SamplingOptions.from_generation_config(config, overrides) == expected


# Values that published generation_config.json files have
SAMPLES = {"do_sample": True}
PLAIN = SamplingOptions(1.0, 50)


@pytest.mark.parametrize(
    ("config", "expected", "note"),
    [
        (SAMPLES | {"top_k": -1}, SamplingOptions(1.0, 0), None),
        (SAMPLES | {"top_k": 0}, SamplingOptions(1.0, 0), None),
        (SAMPLES | {"top_k": 20.5}, PLAIN, "top_k is 20.5; expected a whole number"),
        (SAMPLES | {"top_p": 0}, PLAIN, "top_p is 0; expected above 0"),
        (SAMPLES | {"top_p": 0.0}, PLAIN, "top_p is 0.0; expected above 0"),
        (SAMPLES | {"top_p": None, "top_k": None, "temperature": None, "repetition_penalty": None}, PLAIN, None),
        (SAMPLES | {"temperature": "0.7"}, PLAIN, "temperature is '0.7'; expected 0"),
        (SAMPLES | {"temperature": -1}, PLAIN, "temperature is -1"),
        (SAMPLES | {"temperature": math.nan}, PLAIN, "temperature is nan"),
        (SAMPLES | {"temperature": [1]}, PLAIN, r"temperature is \[1\]"),
        (SAMPLES | {"temperature": 0}, SamplingOptions(0, 50), None),
        (SAMPLES | {"repetition_penalty": 0}, PLAIN, "repetition_penalty is 0; expected above 0"),
        ({"repetition_penalty": "1.1"}, SamplingOptions(), "repetition_penalty is '1.1'"),
        ({"do_sample": "true", "temperature": 0.5}, SamplingOptions(), "do_sample is 'true'; expected true or false"),
        ({"do_sample": False, "top_p": 7}, SamplingOptions(), "top_p is 7"),
        ({"do_sample": None, "temperature": 0.6}, SamplingOptions(), None),
    ],
)
def test_what_cannot_be_used_is_ignored_with_a_note(
    config: dict[str, Any], expected: SamplingOptions, note: str | None
) -> None:
    assert SamplingOptions.from_generation_config(config) == expected
    notes = usable_settings(config)[1]
    assert len(notes) == (note is not None)
    if note is not None:
        assert re.match(rf"generation_config.json: {note}.*: ignored$", notes[0])


def test_what_is_asked_for_wins_over_what_cannot_be_used() -> None:
    asked = SamplingOptions.from_generation_config({"do_sample": True, "temperature": "x", "top_k": -1}, {
        "temperature": 0.5, "top_k": 3,
    })  # fmt: skip
    assert asked == SamplingOptions(0.5, 3)


def test_an_unknown_option_gets_a_hint() -> None:
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        SamplingOptions.from_generation_config({}, {"temprature": 1})


def test_a_bias_names_tokens() -> None:
    assert SamplingOptions(logit_bias={"7": 1, 3: -2.0}).logit_bias == ((3, -2.0), (7, 1))  # type: ignore[arg-type]
    for wrong in ("x", "-1", 1.5, True, "9" * 5000):
        with pytest.raises(UserError, match=r"logit_bias names token .*; expected a token id"):
            SamplingOptions(logit_bias={wrong: 1})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="logit_bias names token 90; expected 0 to 89"):
        SamplingOptions(logit_bias=((90, 1.0),)).check_vocabulary(90)
    logits = np.array([0.0, 7.0, 3.0], np.float32)
    assert Sampler(SamplingOptions(logit_bias=((1, -100.0),))).sample(logits) == 2


def test_only_what_is_allowed_comes() -> None:
    logits = np.array([0.0, 7.0, 3.0, 1.0], np.float32)
    allowed = np.array([True, False, False, True])
    assert Sampler(SamplingOptions()).sample(logits, allowed=allowed) == 3
    sampler = Sampler(SamplingOptions(temperature=5.0, top_p=0.99, min_p=0.01, seed=0))
    assert {sampler.sample(logits, allowed=allowed) for _ in range(200)} == {0, 3}


def test_log_probabilities_are_log_softmax() -> None:
    logits = np.random.default_rng(0).normal(scale=30, size=500).astype(np.float32)
    weights = np.exp(logits.astype(np.longdouble) - logits.max())
    np.testing.assert_allclose(log_probabilities(logits), np.log(weights / weights.sum()).astype(float), atol=1e-12)


def test_a_step_of_baichuan2s_vocabulary_costs_little() -> None:
    logits = np.random.default_rng(0).standard_normal(125_696).astype(np.float32) * 4
    sampler = Sampler(SamplingOptions(0.3, 5, 0.85, 1.05, seed=0))
    seen = range(1000)
    best = min(_seconds(lambda: sampler.sample(logits, seen)) for _ in range(20))
    assert best < 0.005  # measured 0.0004; a busy machine is allowed ten times that


def _seconds(step: Any) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
