"""A GGUF dequantized to F16 and quantized to Q4_0 by llama.cpp itself.  usage: quantize_gguf.py IN.gguf OUT.gguf"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, quants


def write_float(source: Path, target: Path) -> None:
    """The same model with F16 matrices."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    skipped = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for key, field in reader.fields.items():
        if not key.startswith(skipped):
            kind = field.types[0]
            sub = {"sub_type": field.types[-1]} if kind == GGUFValueType.ARRAY else {}
            writer.add_key_value(key, field.contents(), kind, **sub)
    writer.add_file_type(1)
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32 if values.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Both steps."""
    source, target = map(Path, sys.argv[1:3])
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        middle = Path(folder) / "f16.gguf"
        write_float(source, middle)
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        if llama_cpp.llama_model_quantize(str(middle).encode(), str(target).encode(), ctypes.byref(options)):
            raise SystemExit(f"error: llama.cpp could not quantize {source}")


if __name__ == "__main__":
    main()
