"""How much each calibration token's error in a linear's output counts. Knows no method and no grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from headrace.config import ModelConfig
from headrace.model.ops import Array
from headrace.model.weights import Role, weight_table
from headrace.quantize.parallel import parallel_map

__all__ = ["token_weights", "with_gradients"]

_SKETCH = 512  # random projections, whose energy is within 6 % of the token's


def token_weights(
    config: ModelConfig,
    weights: Mapping[str, Array],
    names: Sequence[str],
    inputs: Sequence[Array],
    stream: Sequence[Array],
    attention_weights: Array | None,
) -> dict[str, Array]:
    """The weights of tokens for the linears of one input, (tokens,), mean 1.

    An output that is added to the residual stream counts in inverse proportion to the stream's energy at that
    token, since a norm follows: SmolLM2's first token is a thousand times larger than the others. Keys and values
    count by the attention that their token gets.

    Args:
        config: the geometry.
        weights: of the layer, by canonical name.
        names: of the linears.
        inputs: their input, in batches (tokens, K).
        stream: the residual stream at the same tokens, in the same batches, (tokens, H).
        attention_weights: how much attention each token gets, (tokens,), mean 1; None: alike.
    """
    table = weight_table(config)
    row = table[names[0]]
    weight = weights[row.name] if row.role.writes_stream else None
    bias = weights[row.bias] if weight is not None and row.bias is not None else None
    signs: Array | None = None
    if weight is not None and len(weight) > 2 * _SKETCH:
        # The energy of stream plus output, estimated from a few sums of its channels with random signs.
        signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (_SKETCH, len(weight)))
        weight = signs @ weight
        bias = None if bias is None else signs @ bias

    def energy(piece: tuple[Array, Array]) -> Array:
        x, residual = piece
        if weight is not None:
            residual = (residual if signs is None else residual @ signs.T) + x @ weight.T
            if bias is not None:
                residual += bias
        return np.asarray(np.einsum("tk,tk->t", residual, residual), np.float32)

    energies = np.concatenate(parallel_map(energy, zip(inputs, stream, strict=True)))
    share = 1 / np.maximum(energies, np.finfo(np.float32).tiny)
    share /= share.mean()
    found = dict.fromkeys(names, share)
    if attention_weights is not None:
        found.update({n: attention_weights for n in names if table[n].role in (Role.KEY, Role.VALUE)})
    return found


def with_gradients(weights: Array, energy: Array) -> Array:
    """The geometric mean of a token weight (tokens,) and the gradient energy there, mean 1; where that is NaN, the
    weight as it is.

    The energy is of one random draw a token, and the weight is of attention and residual stream alone: each knows what
    the other does not. docs/LOG.md has what either gains without the other.
    """
    known = ~np.isnan(energy)
    both = weights.copy()
    both[known] = np.sqrt(weights[known] * energy[known])
    total = float(both[known].sum())
    if not total > 0:
        return weights
    both[known] *= float(weights[known].sum()) / total
    return np.asarray(both / both.mean(), np.float32)
