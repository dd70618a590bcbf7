"""Decode and prompt speed of a bundle beside llama.cpp's Q4_0 of the same model, alternating in one run.

usage: llama_cpp.py BUNDLE MODEL_Q4_0.gguf [ROUNDS] [THREADS]

Needs llama-cpp-python built for this machine (CMAKE_ARGS=-DGGML_NATIVE=ON) LLAMA_PYTHON, by default
this Python. Each round runs one process of each; medians and the ratio are printed. To make the Q4_0 file from the
embedded model, dequantize it to F16 and quantize that with llama.cpp's own quantizer.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

TOKENS, DEPTH, PROMPT = 128, 128, 128

LLAMA = f"""
import json, sys, time
import numpy as np, llama_cpp
path, threads = sys.argv[1], int(sys.argv[2])
m = llama_cpp.Llama(path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
ids = np.random.default_rng(0).integers(300, 40000, {PROMPT}).tolist()
m.eval(ids); m.reset()
t = time.perf_counter(); m.eval(ids); prompt = {PROMPT} / (time.perf_counter() - t)
token = 305
t = time.perf_counter()
for _ in range({TOKENS}):
    m.eval([token])
print(json.dumps({{"prompt": prompt, "decode": {TOKENS} / (time.perf_counter() - t)}}))
"""


def headrace(bundle: str, threads: int) -> dict[str, float]:
    """One process of ours."""
    command = [
        sys.executable, "-c", "from headrace.cli.main import main; main()", "bench", bundle, "-p", str(PROMPT), "-n",
        str(TOKENS), "-d", str(DEPTH), "-r", "1", "-t", str(threads), "--json",
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return {"prompt": report["prompts"][0]["useful_tok_s"], "decode": report["decode"][0]["tok_s"]}


def llama(model: str, threads: int) -> dict[str, float]:
    """One process of llama.cpp."""
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    done = subprocess.run([python, "-c", LLAMA, model, str(threads)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    bundle, model = sys.argv[1:3]
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 7
    threads = int(sys.argv[4]) if len(sys.argv) > 4 else 2
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(headrace(bundle, threads))
        theirs.append(llama(model, threads))
    for what in ("prompt", "decode"):
        a, b = [r[what] for r in ours], [r[what] for r in theirs]
        ratios = [x / y for x, y in zip(a, b)]
        print(
            f"{what}: headrace {statistics.median(a):.1f} tok/s, llama.cpp {statistics.median(b):.1f} tok/s, "
            f"ratio pair by pair {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
