"""The decoder as a program of headrace-kernels: the third emitter of the Ops seam.

    embed · rms_norm │ linear q,k,v · rope_cache · attention · linear o · add_norm · linear gate,up · silu_mul ·
                     │ linear down · add_norm │ rows · head

A program is a flat list of instructions over registers, one a result, which are used again when their result is not
needed any more. Weights are places in the bundle's files: nothing is read here. The format is docs/kernels.md's. Knows
neither the engine that runs it, nor slots and spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headrace.bundle.folder import Bundle
from headrace.bundle.grid import Grid
from headrace.bundle.weights import StoredTensor
from headrace.config import ModelConfig
from headrace.model import decoder
from headrace.model.ops import Ops, Positions
from headrace.model.weights import Role, Weight, weight_table

__all__ = ["COSINES", "READ", "SINES", "WRITTEN", "Instruction", "Program", "record_program"]

FORMAT = 4
GROUPS, FINE = (32, 64), 0
"""Columns of a prompt that share a scale of int8 activations: 32 where weights have blocks as small, since sums are
scaled there anyway; elsewhere 64, which is faster. `FINE`: none, activations are as in decoding. The
head's are: it computes few rows in a prompt, and its error goes straight to the logits."""
COSINES, SINES = "cos", "sin"
"""Names of the rotary tables, which the caller gives as arrays."""

READ = ("in", "update", "gate", "up", "q", "k", "v")
WRITTEN = ("sum", "out")
_IN_PLACE = ("rms_norm", "add_norm", "add", "silu_mul")  # these may write over what they read


class Instruction(NamedTuple):
    """One instruction: its name, and its fields as docs/kernels.md has them; registers are numbers."""

    op: str
    fields: Mapping[str, Any]

    @property
    def weights(self) -> list[str]:
        """Names of the weights or tensors it uses."""
        named = self.fields.get("weights", self.fields.get("weight", []))
        return named if isinstance(named, list) else [named]

    def operands(self, names: Sequence[str]) -> list[Any]:
        """The registers of those fields that it has, in the order of `names`; before they are given, the results."""
        found: list[Any] = []
        for name in names:
            if name in self.fields:
                value = self.fields[name]
                found += value if isinstance(value, list) else [value]
        return found


class Program(NamedTuple):
    """What `headrace_kernels.Engine` runs.

    Attributes:
        root: the bundle's folder.
        config: the geometry.
        context: positions of a slot.
        kv_scales: (key, value) scale of each layer's int8 cache; empty for a float32 cache.
        tensors: the stored tensors that are used, by name.
        weights: the grid of each quantized weight that is used, by name.
        registers: their widths.
        instructions: in order.
    """

    root: Path
    config: ModelConfig
    context: int
    kv_scales: Sequence[tuple[float, float]]
    tensors: Mapping[str, StoredTensor]
    weights: Mapping[str, Grid]
    registers: tuple[int, ...]
    instructions: tuple[Instruction, ...]

    def bytes_read(self, instruction: Instruction) -> int:
        """Bytes of weights that an instruction reads for one token: all of them, but one row of the embedding."""
        size, table = 0, weight_table(self.config)
        for name in instruction.weights:
            parts = _tensors(table[name], self.weights[name]) if name in self.weights else [name]
            size += sum(self.tensors[part].nbytes for part in parts)
        return size // self.config.vocab_size if instruction.op == "embed" else size

    def to_dict(self) -> dict[str, Any]:
        """As docs/kernels.md has it: plain JSON values."""
        c, table = self.config, weight_table(self.config)
        files = sorted({tensor.file for tensor in self.tensors.values()})
        number = {file: i for i, file in enumerate(files)}
        return {
            "format": FORMAT,
            "geometry": {
                "layers": c.num_layers,
                "heads": c.num_heads,
                "kv_heads": c.num_kv_heads,
                "head_dim": c.head_dim,
                "hidden": c.hidden_size,
                "vocab": c.vocab_size,
                "eps": c.rms_norm_eps,
                "context": self.context,
            },
            "cache": {"dtype": "int8", "scales": [list(pair) for pair in self.kv_scales]}
            if self.kv_scales
            else {"dtype": "float32"},
            "files": [str(self.root / file) for file in files],
            "tensors": {
                name: {"file": number[t.file], "offset": t.offset, "dtype": t.dtype, "shape": list(t.shape)}
                for name, t in self.tensors.items()
            },
            "weights": {
                name: {
                    "bits": grid.bits,
                    "packed": f"{name}_packed",
                    **({"high": f"{name}_high"} if grid.high_bits else {}),
                    "scale": f"{name}_scale",
                    **({"factors": f"{name}_factors", "block": grid.block} if grid.lpbq else {}),
                    "bias": table[name].bias,
                }
                for name, grid in self.weights.items()
            },
            "registers": list(self.registers),
            "instructions": [{"op": i.op, **i.fields} for i in self.instructions],
        }


def record_program(bundle: Bundle, context: int | None = None) -> Program:
    """The program of a bundle's decoder, for slots of `context` positions, the bundle's own by default."""
    store = bundle.weights()
    small_blocks = any(grid.block is not None and grid.block <= GROUPS[0] for grid in store.grids.values())
    ops = _Recorder(bundle.config, GROUPS[0] if small_blocks else GROUPS[1])
    _record(ops)
    registers, instructions = _with_registers(ops.instructions)
    weights = {name: store.grids[name] for name in sorted(ops.weights)}
    tensors = ops.tensors.union(*(_tensors(ops.table[name], grid) for name, grid in weights.items()))
    return Program(
        root=bundle.root,
        config=bundle.config,
        context=context or bundle.context,
        kv_scales=bundle.kv_scales,
        tensors={name: store.tensors[name] for name in sorted(tensors)},
        weights=weights,
        registers=registers,
        instructions=instructions,
    )


def _record(ops: _Recorder) -> None:
    """The whole decoder in one piece. The engine knows ids, positions and wanted rows itself: no operand names them."""
    given = Result(0)
    at = Positions(given, given, given)
    stream = decoder.embed(ops, given)
    last = ops.config.num_layers - 1
    for layer in range(last):
        stream, _ = decoder.block(ops, layer, stream, at, None)
    stream, _ = decoder.block(ops, last, stream, at, None, wanted=given)
    decoder.head(ops, stream)


class Result:
    """What an instruction gives, `width` numbers a token, before it has a register."""

    def __init__(self, width: int) -> None:
        self.width = width


class _Recorder(Ops[Result]):
    """Records instructions whose operands are results; notes which weights and tensors they use."""

    def __init__(self, config: ModelConfig, group: int) -> None:
        super().__init__(config)
        self.table = weight_table(config)
        self.group = group
        self.instructions: list[Instruction] = []
        self.tensors: set[str] = set()
        self.weights: set[str] = set()

    def embed(self, ids: Result, weight: str) -> Result:
        return self._record("embed", self.config.hidden_size, weight=self._weight(weight))

    def linear(self, x: Result, weight: str) -> Result:
        return self.linears(x, [weight])[0]

    def linears(self, x: Result, weights: Sequence[str]) -> tuple[Result, ...]:
        row = self.table[weights[0]]
        if row.role is Role.HEAD:
            fields = {"in": x, "weight": self._weight(row.stored_as), "group": FINE}
            self.instructions.append(Instruction("head", fields))
            return (Result(self.config.vocab_size),)
        names = [self._weight(weight) for weight in weights]
        made = [Result(self.table[name].shape[0]) for name in names]
        self.instructions.append(Instruction("linear", {"in": x, "weights": names, "out": made, "group": self.group}))
        return tuple(made)

    def rms_norm(self, x: Result, weight: str) -> Result:
        return self._record("rms_norm", x.width, **{"in": x}, weight=self._tensor(weight))

    def add(self, a: Result, b: Result, name: str) -> Result:
        return self._record("add", a.width, **{"in": a}, update=b)

    def add_norm(self, x: Result, update: Result, weight: str, name: str) -> tuple[Result, Result]:
        total = Result(x.width)
        fields = {"in": x, "update": update, "weight": self._tensor(weight), "sum": total}
        return self._record("add_norm", x.width, **fields), total

    def rows(self, x: Result, wanted: Result) -> Result:
        return self._record("rows", x.width, **{"in": x})

    def gated(self, gate: Result, up: Result, layer: int) -> Result:
        return self._record("silu_mul", gate.width, gate=gate, up=up)

    def attention(
        self,
        q: Result,
        k: Result,
        v: Result,
        at: Positions[Result],
        past: tuple[Result, Result] | None,
        layer: int,
    ) -> tuple[Result, tuple[Result, Result]]:
        fields = {"layer": layer, "q": q, "k": k, "v": v, "cos": COSINES, "sin": SINES}
        self.instructions.append(Instruction("rope_cache", fields))
        return self._record("attention", q.width, layer=layer, q=q), (k, v)

    def _record(self, op: str, width: int, **fields: Any) -> Result:
        made = Result(width)
        self.instructions.append(Instruction(op, {**fields, "out": made}))
        return made

    def _weight(self, name: str) -> str:
        self.weights.add(name)
        return name

    def _tensor(self, name: str) -> str:
        self.tensors.add(name)
        return name


def _tensors(weight: Weight, grid: Grid) -> list[str]:
    """The stored tensors of a quantized weight."""
    name = weight.name
    high = [f"{name}_high"] if grid.high_bits else []
    factors = [f"{name}_factors"] if grid.lpbq else []
    return [f"{name}_packed", *high, f"{name}_scale", *factors, *([] if weight.bias is None else [weight.bias])]


def _with_registers(recorded: Sequence[Instruction]) -> tuple[tuple[int, ...], tuple[Instruction, ...]]:
    """Results become registers: a register is free again after the last instruction that reads its result."""
    read = [dict.fromkeys(instruction.operands(READ)) for instruction in recorded]
    last: dict[Result, int] = {}
    for at, results in enumerate(read):
        last |= dict.fromkeys(results, at)
    widths: list[int] = []
    free: dict[int, list[int]] = {}
    number: dict[Result, int] = {}
    instructions = []
    for at, instruction in enumerate(recorded):
        gone = [result for result in read[at] if last[result] == at]
        if instruction.op in _IN_PLACE:
            _give_back(gone, number, free)
        for result in instruction.operands(WRITTEN):
            if free.get(result.width):
                number[result] = free[result.width].pop()
            else:
                number[result] = len(widths)
                widths.append(result.width)
        if instruction.op not in _IN_PLACE:
            _give_back(gone, number, free)
        instructions.append(
            Instruction(instruction.op, {k: _numbered(v, number) for k, v in instruction.fields.items()})
        )
    return tuple(widths), tuple(instructions)


def _give_back(gone: Sequence[Result], number: Mapping[Result, int], free: dict[int, list[int]]) -> None:
    for result in reversed(gone):  # the first one read is the first to be taken: a sum stays where it was
        free.setdefault(result.width, []).append(number[result])


def _numbered(value: Any, number: Mapping[Result, int]) -> Any:
    if isinstance(value, list):
        return [_numbered(v, number) for v in value]
    return number[value] if isinstance(value, Result) else value
