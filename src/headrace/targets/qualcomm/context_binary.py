"""What a QNN context binary says about itself: chip, graphs, tensors and their quantization.

The structures are those of Qualcomm's QnnSystemContext.h, QnnTypes.h and QnnHtpSystemContext.h (API 2.40: binary and
graph information version 3, tensors version 1 or 2). libQnnSystem parses; it trusts what it reads, so it does so in a
child process, and a damaged file is an error and not a crash. This file does not know what a binary should contain.
"""

from __future__ import annotations

import ctypes as c
import json
import mmap
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.errors import TargetError
from headrace.targets.qualcomm.toolchain import child_environment, find_toolchain

__all__ = ["BinaryInfo", "GraphInfo", "TensorInfo", "read_context_binaries", "read_context_binary"]

SECONDS = 300  # a 1 GB binary is parsed in about a second


@dataclass(frozen=True)
class TensorInfo:
    """A graph's input or output. real = (code + offset) · scale; both None where the tensor is not quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None
    offset: int | None

    @property
    def zero_point(self) -> int | None:
        """ONNX's zero point: the negated offset."""
        return None if self.offset is None else -self.offset


@dataclass(frozen=True)
class GraphInfo:
    """A graph of a binary.

    Attributes:
        name, inputs, outputs: as compiled, in the binary's order.
        shared_bytes: weights that the binary holds once for all its graphs; 0 when nothing is shared.
        own_bytes: instructions and constants of this graph alone.
        vtcm_bytes: the processor's fast memory that it was planned for.
    """

    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    shared_bytes: int
    own_bytes: int
    vtcm_bytes: int


@dataclass(frozen=True)
class BinaryInfo:
    """A context binary.

    Attributes:
        soc_model: the chip it was compiled for; 0 when the compiler was not told.
        arch: generation of the Hexagon tensor processor (79); 0 when not stated.
        build: the build of QAIRT that made it ("v2.51.0.260611…").
        graphs: in the file's order.
        size: bytes of the file.
    """

    soc_model: int
    arch: int
    build: str
    graphs: tuple[GraphInfo, ...]
    size: int

    @property
    def shared(self) -> bool:
        """Whether weights are held once for several graphs: such a binary runs on a phone, not in the emulator."""
        return any(graph.shared_bytes for graph in self.graphs)


def read_context_binary(path: Path) -> BinaryInfo:
    """What the binary at `path` says about itself.

    Raises:
        TargetError: it is missing or is not a context binary, or the toolchain is not installed.
    """
    return read_context_binaries([path])[0]


def read_context_binaries(paths: Sequence[Path]) -> list[BinaryInfo]:
    """What each binary says about itself.

    Raises:
        TargetError: the first that is missing or is not a context binary; or the toolchain is not installed.
    """
    for path in paths:
        if not path.is_file():
            raise TargetError(f"there is no context binary at {path}; export with --target again")
    toolchain = find_toolchain()
    command = [sys.executable, "-m", __name__, str(toolchain.library("QnnSystem")), *map(str, paths)]
    try:
        done = subprocess.run(
            command, env=child_environment(toolchain), capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise TargetError(f"{paths[0]} could not be read as a context binary within {SECONDS} s") from None
    if done.returncode == 0:
        return [_from_json(raw) for raw in json.loads(done.stdout)]
    if len(paths) > 1:  # one by one, to find out which it is
        return [read_context_binary(path) for path in paths]
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    why = said[-1] if said else f"the reader ended with status {done.returncode}"
    raise TargetError(f"{paths[0]} is not a readable QNN context binary ({why}); export with --target again")


def _from_json(raw: dict[str, Any]) -> BinaryInfo:
    def tensors(listed: list[dict[str, Any]]) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(**(t | {"shape": tuple(t["shape"])})) for t in listed)

    graphs = (GraphInfo(**(g | {k: tensors(g[k]) for k in ("inputs", "outputs")})) for g in raw["graphs"])
    return BinaryInfo(**(raw | {"graphs": tuple(graphs)}))


# What follows runs in the child: the C structures, field for field.

_DTYPES = {
    0x0008: "int8", 0x0016: "int16", 0x0032: "int32", 0x0064: "int64",
    0x0108: "uint8", 0x0116: "uint16", 0x0132: "uint32", 0x0164: "uint64",
    0x0216: "float16", 0x0232: "float32", 0x0264: "float64",
    0x0304: "int4", 0x0308: "int8", 0x0316: "int16", 0x0332: "int32",
    0x0404: "uint4", 0x0408: "uint8", 0x0416: "uint16", 0x0432: "uint32",
    0x0508: "bool",
}  # fmt: skip


class _Version(c.Structure):
    _fields_ = (("major", c.c_uint32), ("minor", c.c_uint32), ("patch", c.c_uint32))


class _ScaleOffset(c.Structure):
    _fields_ = (("scale", c.c_float), ("offset", c.c_int32))


class _Encoding(c.Union):
    _fields_ = (("scale_offset", _ScaleOffset), ("room", c.c_uint64 * 4))  # the largest member has 32 bytes


class _Quantization(c.Structure):
    _fields_ = (("defined", c.c_uint32), ("kind", c.c_uint32), ("encoding", _Encoding))


class _Tensor(c.Structure):
    _fields_ = (
        ("version", c.c_uint32),
        ("padding", c.c_uint32),  # the versioned structures are members of a union with pointers in it
        ("id", c.c_uint32),
        ("name", c.c_char_p),
        ("type", c.c_uint32),
        ("data_format", c.c_uint32),
        ("data_type", c.c_uint32),
        ("quantization", _Quantization),
        ("rank", c.c_uint32),
        ("dimensions", c.POINTER(c.c_uint32)),
        ("memory_type", c.c_uint32),
        ("data", c.c_void_p * 2),
        ("dynamic_dimensions", c.c_void_p),
        ("sparse", c.c_uint32 * 3),
        ("is_produced", c.c_uint8),
    )


class _Graph(c.Structure):
    _fields_ = (
        ("version", c.c_uint32),
        ("name", c.c_char_p),
        ("input_count", c.c_uint32),
        ("inputs", c.POINTER(_Tensor)),
        ("output_count", c.c_uint32),
        ("outputs", c.POINTER(_Tensor)),
        ("updateable_count", c.c_uint32),
        ("updateable", c.c_void_p),
        ("blob_size", c.c_uint32),
        ("blob", c.c_void_p),
        ("reserved", c.c_void_p),  # the stride in binaries of API 2.40 is 88 bytes
    )


class _GraphBlob(c.Structure):
    """What the HTP backend tells of a graph: its version 1, then its version 2."""

    _fields_ = (
        ("version", c.c_uint64),
        ("spill_fill", c.c_uint64),
        ("vtcm", c.c_uint32),
        ("optimization", c.c_uint32),
        ("dlbc", c.c_uint64),
        ("hvx_threads", c.c_uint64),
        ("second_version", c.c_uint64),
        ("key_tile", c.c_uint64),
        ("value_tile", c.c_uint64),
        ("safe_share", c.c_uint64),
        ("io", c.c_uint64),
        ("op_data", c.c_uint64),
        ("constants", c.c_uint64),
        ("ddr", c.c_uint64),
        ("shared_weights", c.c_uint64),
    )


class _Binary(c.Structure):
    _fields_ = (
        ("version", c.c_uint32),
        ("padding", c.c_uint32),
        ("backend", c.c_uint32),
        ("build", c.c_char_p),
        ("core_api", _Version),
        ("backend_api", _Version),
        ("soc_version", c.c_char_p),
        ("blob_version", _Version),
        ("blob_size", c.c_uint64),
        ("tensor_count", c.c_uint32),
        ("tensors", c.c_void_p),
        ("graph_count", c.c_uint32),
        ("graphs", c.POINTER(_Graph)),
        ("platform", c.c_void_p),
        ("metadata_size", c.c_uint32),
        ("metadata", c.c_void_p),
        ("soc_model", c.c_uint32),
    )


class _Provider(c.Structure):
    _fields_ = (
        ("backend", c.c_uint32),
        ("name", c.c_char_p),
        ("version", _Version),
        ("create", c.CFUNCTYPE(c.c_uint64, c.c_void_p)),
        ("get_binary_info", c.CFUNCTYPE(c.c_uint64, c.c_void_p, c.c_void_p, c.c_uint64, c.c_void_p, c.c_void_p)),
    )


_DEFINED = 1  # QNN_DEFINITION_DEFINED
_SCALE_OFFSET = 0  # QNN_QUANTIZATION_ENCODING_SCALE_OFFSET
_VERSION = 3  # of binary and graph information


def _parse(library: str, data: mmap.mmap) -> BinaryInfo:
    providers, count = c.POINTER(c.POINTER(_Provider))(), c.c_uint32()
    system = c.CDLL(library)
    if system.QnnSystemInterface_getProviders(c.byref(providers), c.byref(count)) or not count.value:
        raise ValueError("libQnnSystem offers no interface")
    interface = providers[0][0]
    handle, found, size = c.c_void_p(), c.POINTER(_Binary)(), c.c_uint64()
    if interface.create(c.byref(handle)):
        raise ValueError("libQnnSystem has no context")
    address = c.addressof(c.c_char.from_buffer(data))  # mapped: a part may be larger than memory should be
    status = interface.get_binary_info(handle, address, len(data), c.byref(found), c.byref(size))
    if status or not found:
        raise ValueError(f"libQnnSystem refuses it with status {status}")
    binary = found[0]
    if binary.version != _VERSION:
        raise ValueError(f"binary information of version {binary.version}; version {_VERSION} is known")
    arch = c.cast(binary.metadata, c.POINTER(c.c_uint32))[1] if binary.metadata_size >= 8 else 0
    graphs = tuple(_graph(graph) for graph in binary.graphs[: binary.graph_count])
    return BinaryInfo(binary.soc_model, arch, binary.build.decode(), graphs, len(data))


def _graph(graph: _Graph) -> GraphInfo:
    if graph.version != _VERSION:
        raise ValueError(f"graph information of version {graph.version}; version {_VERSION} is known")
    blob = _GraphBlob()
    if graph.blob:
        c.memmove(c.byref(blob), graph.blob, min(graph.blob_size, c.sizeof(blob)))
    return GraphInfo(
        graph.name.decode(),
        tuple(_tensor(t) for t in graph.inputs[: graph.input_count]),
        tuple(_tensor(t) for t in graph.outputs[: graph.output_count]),
        blob.shared_weights,
        blob.op_data + blob.constants,
        blob.vtcm,
    )


def _tensor(tensor: _Tensor) -> TensorInfo:
    quantization = tensor.quantization
    scale = offset = None
    if quantization.defined == _DEFINED and quantization.kind == _SCALE_OFFSET:
        scale, offset = quantization.encoding.scale_offset.scale, quantization.encoding.scale_offset.offset
    dtype = _DTYPES.get(tensor.data_type, hex(tensor.data_type))
    return TensorInfo(tensor.name.decode(), tuple(tensor.dimensions[: tensor.rank]), dtype, scale, offset)


def _main(library: str, *paths: str) -> None:
    answers = []
    for path in paths:
        try:
            with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as data:
                answers.append(asdict(_parse(library, data)))
        except (OSError, ValueError) as error:
            raise SystemExit(str(error)) from None
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    _main(*sys.argv[1:])
