"""ModelConfig: every impossible geometry is one clear line; what it says of itself comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from headrace.config import ModelConfig, RopeScaling, positive_int
from headrace.errors import ConfigError

GOOD = ModelConfig("llama", 160, 64, 96, 3, 4, 2, 16, 1e-5, 10000.0, 512, False)
SCALED = replace(GOOD, rope_scaling=RopeScaling("llama3", 8.0))


def test_derived_sizes() -> None:
    assert (GOOD.group_size, GOOD.query_size, GOOD.kv_size) == (2, 64, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; expected a whole number from 1"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"num_layers": 2.0}, "num_layers is 2.0"),
        ({"num_layers": True}, "num_layers is True"),
        ({"intermediate_size": "96"}, "intermediate_size is '96'"),
        ({"max_context": 1 << 40}, "max_context is 1099511627776"),
        ({"num_kv_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps 0.0 is not between 0 and 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
        ({"rope_theta": 1.0}, "rope_theta 1.0 is not above 1"),
        ({"rope_theta": float("nan")}, "rope_theta nan"),
    ],
)
def test_impossible_geometry(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(GOOD, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_impossible_scaling() -> None:
    with pytest.raises(ConfigError, match="rope_scaling 'yarn' is not supported; expected 'linear' or 'llama3'"):
        RopeScaling("yarn", 4.0)
    with pytest.raises(ConfigError, match=r"factor 0.5 is below 1"):
        RopeScaling("linear", 0.5)
    with pytest.raises(ConfigError, match="factor is nan; expected a number above 0"):
        RopeScaling("linear", float("nan"))


@pytest.mark.parametrize("config", [GOOD, SCALED], ids=["plain", "scaled"])
def test_json_and_back(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_and_missing_keys() -> None:
    raw = GOOD.to_dict()
    with pytest.raises(ConfigError, match="unknown geometry key 'hiden_size'; did you mean 'hidden_size'"):
        ModelConfig.from_dict(raw | {"hiden_size": 64})
    del raw["num_layers"], raw["tied_head"]
    with pytest.raises(ConfigError, match="geometry lacks num_layers, tied_head"):
        ModelConfig.from_dict(raw)


def test_scaling_is_optional() -> None:
    raw = GOOD.to_dict()
    del raw["rope_scaling"]
    assert ModelConfig.from_dict(raw) == GOOD


def test_limits() -> None:
    assert positive_int("n", 7, limit=7) == 7
    with pytest.raises(ConfigError, match="n is 8; expected a whole number from 1 to 7"):
        positive_int("n", 8, limit=7)
