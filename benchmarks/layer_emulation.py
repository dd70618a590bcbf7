"""One layer of a bundle at full shape: Qualcomm's emulation of the chip beside ONNX Runtime's CPU kernels.

    python benchmarks/layer_emulation.py BUNDLE [--layer 0] [--length 1] [--target snapdragon-8-elite]

The layer's device graph over the bundle's longest context, with a full cache of random codes: hidden states are rows of
the embedding, so layer 0 sees what it would. Prints seconds, and each output's distance in steps of its own grid.
Needs headrace[qnn] and 3 GB of memory; a 7B layer takes ten seconds a token, and five times as long for a step of 128.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.encodings import ANGLE, port_encodings, read_encodings
from headrace.bundle.folder import open_bundle
from headrace.graph.emit_device import write_device_graphs
from headrace.model.rope import rope_angles
from headrace.model.weights import EMBEDDING
from headrace.plan import GraphStyle, plan_parts, ports
from headrace.targets.device import exact_session, run_session
from headrace.targets.host.sessions import default_threads
from headrace.targets.qualcomm.compiler import Emulator, GraphFile, compile_apart
from headrace.targets.qualcomm.soc import find_soc

ATTEND = 65535
SPREAD = 20  # standard deviation of the cache's codes around their zero point


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--length", type=int, default=1)
    parser.add_argument("--target", default="snapdragon-8-elite")
    options = parser.parse_args()
    bundle, soc = open_bundle(options.bundle), find_soc(options.target)
    config, context, length = bundle.config, bundle.contexts[-1], options.length
    parts = plan_parts(config, config.num_layers + 1)
    part = parts[options.layer + 1]
    encodings = read_encodings(bundle.root / "encodings.json")
    grids = port_encodings(parts, encodings)
    store, rng = bundle.weights(), np.random.default_rng(0)
    inputs, outputs = ports(config, part, GraphStyle.DEVICE, length=length, context=context)
    table = store.read_codes(EMBEDDING)
    tokens = rng.integers(0, config.vocab_size, length)
    rows = table.codes[tokens] * table.scales[tokens].astype(np.float32)
    del table
    angles = rope_angles(config, context)[context - length :]
    feeds: dict[str, NDArray[np.generic]] = {
        inputs[0].name: grids[inputs[0].name].quantize(rows)[None],
        "position_ids_cos": ANGLE.floor(np.cos(angles))[None, None],
        "position_ids_sin": ANGLE.floor(np.sin(angles))[None, None],
        "attention_mask": np.full((1, 1, length, context), ATTEND, np.uint16),
    }
    later = np.arange(context)[None, :] > np.arange(context - length, context)[:, None]
    feeds["attention_mask"][0, 0][later] = 0
    for port in inputs[4:]:
        codes = rng.normal(grids[port.name].zero_point, SPREAD, port.shape)
        feeds[port.name] = np.clip(codes.round(), 0, 255).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        (graph,) = write_device_graphs(
            config, [part], store.read_stored, encodings, Path(folder), lengths=[length], contexts=[context]
        )
        names = [port.name for port in outputs]
        expected = run_session(exact_session(graph.path, default_threads(), fold=True), feeds)
        started = time.perf_counter()
        compiled = compile_apart([GraphFile(graph.name, graph.path)], soc, Path(folder))
        print(f"{graph.name}, layer {options.layer}: compiled in {time.perf_counter() - started:.1f} s", flush=True)
        with Emulator(compiled) as emulator:
            started = time.perf_counter()
            found = emulator.run(graph.name, feeds)
            print(f"a step: {time.perf_counter() - started:.1f} s")
    for name in names:
        a, b = (result[name].astype(np.float64) for result in (expected, found))
        away = np.abs(a - b)
        alike = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        print(
            f"{name}: largest {away.max():.0f}, mean {away.mean():.2f} steps of {a.max() - a.min():.0f}; r {alike:.7f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
