"""KL and top-1 of llama.cpp's own quantizations of a GGUF, on the windows that `headrace evaluate` scores.

    python benchmarks/llama_cpp_quality.py MODEL.gguf --text eval_en.txt --types Q4_0 IQ4_XS [--calibration TEXT]

The GGUF is dequantized to F16, which is the reference, and quantized from there by llama.cpp's quantizer; with
--calibration by an importance matrix as llama-imatrix defines it: the mean square of each linear's input channels, here
computed by the float decoder over windows of the text. Files are kept beside the GGUF and used again. Runs on the
processors that it may use, `taskset` included. Needs llama-cpp-python in the Python that LLAMA_PYTHON names, by default
this one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, quants

from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.measure.text_score import first_windows, read_text
from headrace.model.fidelity import FidelityMeter, no_target
from headrace.model.weights import EMBEDDING, Role, weight_table
from headrace.quantize.source import load_layer
from headrace.quantize.windows import LayerWalk, causal_positions, cut_windows, embed_windows
from headrace.text.tokenizer_folder import load_tokenizer, save_tokenizer

WINDOW = 512
DERIVED = ("general.architecture", "general.file_type", "general.quantization_version")  # the writer's own
F16 = 1  # general.file_type
IMPORTANCE_WINDOWS = 64
GGUF_NAMES = {
    Role.QUERY: "attn_q", Role.KEY: "attn_k", Role.VALUE: "attn_v", Role.OUTPUT: "attn_output",
    Role.GATE: "ffn_gate", Role.UP: "ffn_up", Role.DOWN: "ffn_down",
}  # fmt: skip

QUANTIZE = """
import ctypes, sys
import numpy as np, llama_cpp
threads, source, out, kind, importance = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind), int(threads)
if importance:
    values = dict(np.load(importance))
    entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()  # ends with an entry without a name
    for entry, (name, value) in zip(entries, values.items()):
        pointer = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.name, entry.data, entry.size = name.encode(), pointer, value.size
    parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)))
"""

# Logits of the second half of each window, one window after the other, as float32 in a file.
LOGITS = """
import sys
import numpy as np, llama_cpp
threads, path, windows, out = sys.argv[1:]
windows = np.load(windows)
length = windows.shape[1]
model = llama_cpp.Llama(
    path, n_ctx=length, n_batch=length, logits_all=True, verbose=False,
    n_threads=int(threads), n_threads_batch=int(threads),
)
with open(out, "wb") as file:
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        file.write(np.asarray(model.scores[length // 2 : length], np.float32).tobytes())
"""


def main() -> int:
    """Make the files and score them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "IQ4_XS"])
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, from the text's beginning")
    parser.add_argument("--calibration", type=Path, help="text for an importance matrix, up to 64 windows of it")
    options = parser.parse_args()
    exact = options.model.with_name(f"{options.model.stem}.f16.gguf")
    if not exact.exists():
        dequantize(options.model, exact)
    by = "imatrix." if options.calibration else ""
    files = {kind: options.model.with_name(f"{options.model.stem}.{by}{kind.lower()}.gguf") for kind in options.types}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(options.model)
        save_tokenizer(options.model, checkpoint.metadata, Path(scratch))
        tokenizer = load_tokenizer(Path(scratch))
        matrix = ""
        if options.calibration and not all(file.exists() for file in files.values()):
            ids = np.array(tokenizer.encode(read_text(options.calibration)), np.int64)
            matrix = f"{scratch}/importance.npz"
            np.savez(matrix, allow_pickle=False, **importance(checkpoint, cut_windows(ids, WINDOW, IMPORTANCE_WINDOWS)))
        for kind, file in files.items():
            if not file.exists():
                partial = file.with_name(f"{file.name}.partial")  # a file that is there is a whole one
                _llama(QUANTIZE, exact, partial, kind, matrix)
                partial.replace(file)
        for text in options.text:
            windows = first_windows(tokenizer.encode(read_text(text)), text.name, WINDOW, options.windows)
            np.save(f"{scratch}/windows.npy", windows)
            reference = logits(exact, windows, scratch, "reference")
            for kind, file in files.items():
                meter = FidelityMeter()
                for window, a, b in zip(windows, reference, logits(file, windows, scratch, "other"), strict=True):
                    meter.add(np.array(a), np.array(b), np.append(window[WINDOW // 2 + 1 :], no_target))
                found = meter.result()
                report = {
                    "type": kind,
                    "matrix": options.calibration.name if options.calibration else None,
                    "text": text.name,
                    "bytes": file.stat().st_size,
                    "windows": len(windows),
                }
                print(json.dumps({**report, "kl": round(found.kl, 5), "top1": round(found.top1, 4)}), flush=True)
    return 0


def importance(checkpoint: Checkpoint, windows: np.ndarray) -> dict[str, np.ndarray]:
    """The mean square of each linear's input channels, float32 (K,), by the linear's name in a GGUF."""
    config = checkpoint.config
    at = causal_positions(config, windows.shape[1])
    states = embed_windows(config, checkpoint.tensor(EMBEDDING).load(), windows)
    found = {}
    for layer in range(config.num_layers):
        walk = LayerWalk(config, load_layer(checkpoint, layer), layer, states, at)
        while names := walk.advance():
            energy = sum(np.einsum("wsk,wsk->k", x, x, dtype=np.float64) for x in walk.inputs) / windows.size
            for name in names:
                role = weight_table(config)[name].role
                found[f"blk.{layer}.{GGUF_NAMES[role]}.weight"] = np.asarray(energy, np.float32)
    return found


def dequantize(source: Path, out: Path) -> None:
    """The GGUF with every matrix in float16; what float16 cannot hold of a format is lost in the reference too."""
    reader = GGUFReader(source)
    write_f16(reader, out, ((t.name, quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors))


def write_f16(reader: GGUFReader, out: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """A GGUF with what another says of its model and these tensors, matrices in float16."""
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in DERIVED:
            continue
        kind = field.types[0]
        inner = {"sub_type": field.types[-1]} if kind is GGUFValueType.ARRAY else {}
        writer.add_key_value(key, field.contents(), kind, **inner)
    writer.add_file_type(F16)
    for name, values in tensors:
        writer.add_tensor(name, values.astype(np.float32 if values.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: Path, windows: np.ndarray, scratch: str, name: str) -> np.ndarray:
    """(windows, half a window, vocabulary), in a file."""
    out = Path(scratch) / name
    _llama(LOGITS, model, f"{scratch}/windows.npy", out)
    return np.memmap(out, np.float32, "r").reshape(len(windows), windows.shape[1] // 2, -1)


def _llama(code: str, *arguments: object) -> None:
    """Runs the code with as many threads as this process may use: more of them would wait for each other."""
    python, threads = os.environ.get("LLAMA_PYTHON", sys.executable), len(os.sched_getaffinity(0))
    subprocess.run([python, "-c", code, *map(str, (threads, *arguments))], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
