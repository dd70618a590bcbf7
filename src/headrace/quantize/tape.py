"""Tape: the decoder's operations in NumPy, remembered, so that gradients can be carried back through them.

    forward:  block(tape, …) on Nodes      each primitive appends its pullback
    backward: tape.backward(output, g)     walks them in reverse; `at_linear` sees (weight, input, output gradient)

A layer at a time: keep the layers' inputs, run a block on a tape, pull the gradient back to its input, go to the
layer before. Gradients of weights are not computed: `at_linear` gets the two factors they are made of. This file does
not know what gradients are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from headrace.config import ModelConfig
from headrace.model.ops import Array, Eager, Positions, PrimitiveOps

__all__ = ["Node", "Tape"]


class Node:
    """A value, and the gradient summed for it so far; a constant has none."""

    __slots__ = ("constant", "grad", "value")

    def __init__(self, value: Array, constant: bool = False) -> None:
        self.value = value
        self.constant = constant
        self.grad: Array | None = None

    def add_grad(self, grad: Array) -> None:
        """Add to the gradient, summing over the axes that were broadcast."""
        if self.constant:
            return
        extra = grad.ndim - self.value.ndim
        if extra:
            grad = grad.sum(tuple(range(extra)))
        axes = tuple(i for i, n in enumerate(self.value.shape) if n == 1 and grad.shape[i] != 1)
        if axes:
            grad = grad.sum(axes, keepdims=True)
        self.grad = grad if self.grad is None else self.grad + grad


class Tape(PrimitiveOps[Node]):
    """Records operations on Nodes.

    Args:
        config: the geometry.
        weights: gives a weight by canonical name, float32.
        at_linear: called on the way back with each linear's name, its input (…, K) and the gradient of its output.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Callable[[str], Array],
        at_linear: Callable[[str, Array, Array], None] | None = None,
    ) -> None:
        super().__init__(config)
        self._plain = Eager(config, weights)
        self._weights = weights
        self._at_linear = at_linear
        self._steps: list[tuple[Node, Callable[[Array], None]]] = []

    def backward(self, output: Node, grad: Array) -> None:
        """Carry `grad`, of `output`'s shape, to every node it was made of; the tape is empty afterwards."""
        output.add_grad(grad)
        while self._steps:
            node, pull = self._steps.pop()
            if node.grad is not None:
                pull(node.grad)
                node.grad = None

    def _record(self, value: Array, pull: Callable[[Array], None]) -> Node:
        node = Node(value)
        self._steps.append((node, pull))
        return node

    def embed(self, ids: Node, weight: str) -> Node:
        return Node(self._plain.embed(ids.value, weight))

    def product(self, x: Node, weight: str, name: str) -> Node:
        matrix = self._weights(weight)

        def pull(g: Array) -> None:
            if self._at_linear is not None:
                self._at_linear(weight, x.value, g)
            x.add_grad(g @ matrix)

        return self._record(x.value @ matrix.T, pull)

    def bias(self, weight: str) -> Node:
        return Node(self._weights(weight), constant=True)

    def rms_norm(self, x: Node, weight: str) -> Node:
        gain = self._weights(weight)
        mean_square = np.mean(np.square(x.value), axis=-1, keepdims=True)
        inverse = 1 / np.sqrt(mean_square + np.float32(self.config.rms_norm_eps))
        unit = x.value * inverse

        def pull(g: Array) -> None:
            scaled = g * gain
            x.add_grad(inverse * (scaled - unit * np.mean(scaled * unit, axis=-1, keepdims=True)))

        return self._record(unit * gain, pull)

    def matmul(self, a: Node, b: Node, name: str) -> Node:
        def pull(g: Array) -> None:
            a.add_grad(g @ b.value.swapaxes(-1, -2))
            b.add_grad(a.value.swapaxes(-1, -2) @ g)

        return self._record(a.value @ b.value, pull)

    def softmax(self, x: Node, name: str) -> Node:
        share = self._plain.softmax(x.value, name)
        return self._record(share, lambda g: x.add_grad(share * (g - np.sum(g * share, axis=-1, keepdims=True))))

    def sigmoid(self, x: Node, name: str) -> Node:
        y = self._plain.sigmoid(x.value, name)
        return self._record(y, lambda g: x.add_grad(g * y * (1 - y)))

    def add(self, a: Node, b: Node, name: str) -> Node:
        def pull(g: Array) -> None:
            a.add_grad(g)
            b.add_grad(g)

        return self._record(a.value + b.value, pull)

    def subtract(self, a: Node, b: Node, name: str) -> Node:
        def pull(g: Array) -> None:
            a.add_grad(g)
            b.add_grad(-g)

        return self._record(a.value - b.value, pull)

    def multiply(self, a: Node, b: Node, name: str) -> Node:
        def pull(g: Array) -> None:
            a.add_grad(g * b.value)
            b.add_grad(g * a.value)

        return self._record(a.value * b.value, pull)

    def scale(self, x: Node, factor: float, name: str) -> Node:
        number = np.float32(factor)
        return self._record(x.value * number, lambda g: x.add_grad(g * number))

    def concat(self, parts: Sequence[Node], axis: int, name: str) -> Node:
        edges = np.cumsum([part.value.shape[axis] for part in parts])[:-1]

        def pull(g: Array) -> None:
            for part, piece in zip(parts, np.split(g, edges, axis), strict=True):
                part.add_grad(piece)

        return self._record(np.concatenate([part.value for part in parts], axis), pull)

    def slice(self, x: Node, axis: int, start: int, stop: int) -> Node:
        def pull(g: Array) -> None:
            whole = np.zeros_like(x.value)
            index = [slice(None)] * whole.ndim
            index[axis] = slice(start, stop)
            whole[tuple(index)] = g
            x.add_grad(whole)

        return self._record(self._plain.slice(x.value, axis, start, stop), pull)

    def reshape(self, x: Node, shape: Sequence[int]) -> Node:
        return self._record(self._plain.reshape(x.value, shape), lambda g: x.add_grad(g.reshape(x.value.shape)))

    def transpose(self, x: Node, order: Sequence[int]) -> Node:
        back = np.argsort(order)
        return self._record(np.transpose(x.value, order), lambda g: x.add_grad(np.transpose(g, back)))

    def rows(self, x: Node, wanted: Node) -> Node:
        index = np.asarray(wanted.value, np.intp)

        def pull(g: Array) -> None:
            whole = np.zeros_like(x.value)
            np.add.at(whole.swapaxes(0, 1), index, g.swapaxes(0, 1))
            x.add_grad(whole)

        return self._record(np.take(x.value, index, axis=1), pull)

    def to_cache(self, x: Node, name: str) -> Node:
        return x

    @staticmethod
    def positions(at: Positions[Array]) -> Positions[Node]:
        """Positions as constants."""
        return Positions(Node(at.cos, True), Node(at.sin, True), Node(at.mask, True))
