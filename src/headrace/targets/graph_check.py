"""What a graph may hold, looked at before ONNX Runtime reads the file.

A manifest's hashes tell of an accident, not who wrote the bundle. So a graph is read here first, as far as it must be
known: operators are those of the two emitters, with no graph inside a graph and no function; weights lie in the files
that belong to the graph, within them, and are as long as their shape; everything else is small. Knows no decoder.

Source of the field numbers: onnx/onnx.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from headrace.errors import BundleError, reason, shown
from headrace.files import read_bytes

__all__ = ["check_graph_file"]

GRAPH_LIMIT = 64 << 20  # bytes; a graph of 32 layers has some 400 KB
CONSTANT_LIMIT = 1 << 20  # bytes of one constant that is in the graph itself
OPERATORS = frozenset({
    *(("", name) for name in (
        "Add", "BitwiseOr", "Cast", "Concat", "DequantizeLinear", "Expand", "Gather", "MatMul", "Mul", "Pad",
        "QuantizeLinear", "RMSNormalization", "Reshape", "Sigmoid", "SimplifiedLayerNormalization", "Slice", "Softmax",
        "Split", "Sub", "Transpose",
    )),
    *(("com.microsoft", name) for name in (
        "GroupQueryAttention", "MatMulNBits", "SkipSimplifiedLayerNormalization",
    )),
})  # fmt: skip
LONGEST_SIZES = 16  # numbers of a shape or of a border
BYTES_OF_SCALE = 8  # of packed weights to each scale that is repeated: 16 weights of 4 bits
WIDEST_PAD = 4096  # places; a head is padded to the next width that the operator takes
INT64 = 7
# float, uint8, int8, uint16, int32, int64, bool, float16, uint4, int4
ELEMENT_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 6: 32, 7: 64, 9: 8, 10: 16, 21: 4, 22: 4}
# Fields of messages, by number.
_MODEL_KNOWN = {1, 2, 3, 4, 5, 6, 7, 8, 14}  # no training, no functions, no devices
_GRAPH_KNOWN = {1, 2, 5, 10, 11, 12, 13, 16}  # no sparse weights, no quantization notes
_NODE_KNOWN = {1, 2, 3, 4, 5, 6, 7}
_ATTRIBUTE_KNOWN = {1, 2, 3, 4, 7, 8, 9, 13, 20}  # numbers and texts; no tensor, no graph
_TENSOR_KNOWN = {1, 2, 8, 9, 12, 13, 14}


class _Odd(ValueError):
    """Why a graph is refused."""


def check_graph_file(path: Path) -> None:
    """Refuse a graph that no emitter of headrace would have written.

    Args:
        path: the graph; its weights are in `weights/*.safetensors` or `*.weights` beside it.

    Raises:
        BundleError: saying what is odd.
    """
    try:
        files = {
            file.relative_to(path.parent).as_posix(): file.stat().st_size
            for pattern in ("weights/*.safetensors", "*.weights")
            for file in path.parent.glob(pattern)
        }
        data = read_bytes(path, error=BundleError, limit=GRAPH_LIMIT)
        for number, value in _fields(memoryview(data), _MODEL_KNOWN, "model"):
            if number == 7:
                _check_graph(_message(value), files)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({reason(error)}); export the bundle again") from None
    except _Odd as odd:
        raise BundleError(f"{path} is no graph that headrace writes: it has {odd}; export the bundle again") from None


def _check_graph(graph: memoryview, files: Mapping[str, int]) -> None:
    sizes: dict[str, list[str]] = {"Expand": [], "Pad": []}  # the constants that say how much is made
    constants: dict[str, list[int]] = {}
    for number, value in _fields(graph, _GRAPH_KNOWN, "graph"):
        if number == 1:
            operator, inputs = _check_node(_message(value))
            if operator in sizes:
                sizes[operator].append(inputs[1] if len(inputs) > 1 else "")
        elif number == 5:
            name, numbers = _check_tensor(_message(value), files)
            constants[name] = numbers
        elif number in (11, 12, 13):
            _check_port(_message(value))
    for operator, names in sizes.items():
        for name in names:
            if not 0 < len(constants.get(name, ())) <= LONGEST_SIZES or min(constants[name]) < 0:
                raise _Odd(f"{operator} of a size {shown(name)} that is not in the graph")
    expanded = sum(math.prod(constants[name]) for name in sizes["Expand"])
    if expanded > sum(files.values()) / BYTES_OF_SCALE:
        raise _Odd(f"expansions to {expanded} numbers, more than the weights have blocks")
    if most := [n for name in sizes["Pad"] for n in constants[name] if n > WIDEST_PAD]:
        raise _Odd(f"a border of {most[0]}")


def _check_node(node: memoryview) -> tuple[str, list[str]]:
    """The operator, and the names of its inputs."""
    operator = domain = ""
    inputs = []
    for number, value in _fields(node, _NODE_KNOWN, "node"):
        if number == 5:
            for field, inside in _fields(_message(value), _ATTRIBUTE_KNOWN, "attribute"):
                if field in (1, 4, 9, 13):
                    _text(inside)
            continue
        text = _text(value)
        if number == 1:
            inputs.append(text)
        elif number == 4:
            operator = text
        elif number == 7:
            domain = text
    if (domain, operator) not in OPERATORS:
        raise _Odd(f"an operator {shown(f'{domain}::{operator}' if domain else operator)}")
    return operator, inputs


def _check_port(port: memoryview) -> None:
    """An input, an output, or the type of something between them."""
    for number, value in _fields(port, {1, 2}, "port"):
        if number == 1:
            _text(value)
            continue
        for kind, tensor in _fields(_message(value), {1}, "type"):  # a tensor, no list and no map
            assert kind == 1
            for field, inside in _fields(_message(tensor), {1, 2}, "tensor's type"):
                for _, axis in _fields(_message(inside), {1}, "shape") if field == 2 else ():
                    for side, length in _fields(_message(axis), {1, 2}, "axis"):
                        if side == 2:
                            _text(length)


def _check_tensor(tensor: memoryview, files: Mapping[str, int]) -> tuple[str, list[int]]:
    """A constant in the graph, or a weight in a file: its name, and the whole numbers of a constant of 64 bits."""
    shape: list[int] = []
    kind, name, inside, external = 0, "", memoryview(b""), False
    place: dict[str, str] = {}
    for number, value in _fields(tensor, _TENSOR_KNOWN, "tensor"):
        if number == 1:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == 2:
            kind = _number(value)
        elif number == 8:
            name = _text(value)
        elif number == 9:
            inside = _message(value)
        elif number == 13:
            entry = dict(_fields(_message(value), {1, 2}, "place"))
            place[_text(entry.get(1, memoryview(b"")))] = _text(entry.get(2, memoryview(b"")))
        elif number == 14:
            external = bool(_number(value))
    if kind not in ELEMENT_BITS or any(n >= 1 << 40 for n in shape):
        raise _Odd(f"a tensor {shown(name)} of type {kind} and shape {shown(shape)}")
    size = -(-math.prod(shape) * ELEMENT_BITS[kind] // 8)
    if not external:
        if place or len(inside) != size or size > CONSTANT_LIMIT:
            raise _Odd(f"a constant {shown(name)} of {len(inside)} bytes for shape {shown(shape)}")
        return name, list(inside.cast("q")) if kind == INT64 else []
    location = place.pop("location", "")
    offset, length = (_decimal(place.pop(key, "0")) for key in ("offset", "length"))
    if location not in files or place or inside:
        raise _Odd(f"a weight {shown(name)} in {shown(location)}, which is no weights file beside it")
    if length != size or offset + length > files[location]:
        raise _Odd(
            f"a weight {shown(name)} of {size} bytes at {offset} … {offset + length} of {location}, which has "
            f"{files[location]} bytes"
        )
    return name, []


def _fields(data: memoryview, known: set[int], where: str) -> Iterator[tuple[int, int | memoryview]]:
    """A message's fields: numbers as ints, everything else as bytes. One that is not known is refused."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if number not in known:
            raise _Odd(f"field {shown(number)} in a message {where!r}")
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _Odd(f"a field of kind {wire} in a message {where!r}")
        if at + size > len(data):
            raise _Odd(f"a message {where!r} that is cut off")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ((1 << 64) - 1), at
    raise _Odd("a number that does not end")


def _packed(data: memoryview) -> list[int]:
    at, values = 0, []
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _Odd("a number where a message is expected")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise _Odd("a message where a number is expected")
    return value


def _text(value: int | memoryview) -> str:
    try:
        return bytes(_message(value)).decode("utf-8")
    except UnicodeDecodeError:
        raise _Odd("a name that is not UTF-8") from None


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise _Odd(f"a place {shown(text)}")
    return int(text)
