"""The models of side_by_side.py: where they are, how they are made, what a token of them must read and compute."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
GGUF_BLOCKS = {"Q4_0": (18, 32), "Q8_0": (34, 32)}  # bytes and columns of a block
SMOL = {"smol": "smollm2-135m.bundle", "smol_w4a16": "smollm2-w4a16.bundle"}
PLAIN = ["--method", "nearest", "--windows", "1", "--window-length", "128"]  # an export for its speed alone


@dataclass(frozen=True)
class Size:
    """A decoder's size.

    Attributes:
        layers, hidden, ffn, vocab, kv: its geometry; kv: width of keys (and of values).
        weight_bytes: of all weights that a token reads, in headrace's bundle.
    """

    layers: int
    hidden: int
    ffn: int
    vocab: int
    kv: int
    weight_bytes: int

    def token_bytes(self, depth: int) -> float:
        """Bytes a token must read: weights, and the int8 cache of `depth` positions."""
        return self.weight_bytes + 2 * self.layers * self.kv * depth

    def prompt_operations(self, tokens: int) -> float:
        """int8 operations of a prompt whose last token alone is wanted; a multiply-add counts as two."""
        h, f, kv = self.hidden, self.ffn, self.kv
        every, last = 2 * h * kv, 2 * h * h + 3 * h * f  # weights of the last layer: for every token, for one
        linears = tokens * (self.layers * (every + last) - last) + last + self.vocab * h
        attention = self.layers * 2 * h * tokens * (tokens + 1) / 2
        return 2 * (linears + attention)


class Models:
    """Paths below `work`; each is made when it is first asked for and kept.

    Args:
        work: the folder.
        layers: of the shape.
        peer_python: has llama_cpp, whose own quantizer makes SmolLM2's Q4_0.
        tokenizer: a SentencePiece model for the shape, or None for a small one.
    """

    def __init__(self, work: Path, *, layers: int, peer_python: str, tokenizer: Path | None) -> None:
        self.work = work
        self.layers = layers
        self.peer_python = peer_python
        self.tokenizer = tokenizer
        self._sizes: dict[str, Size] = {}
        work.mkdir(parents=True, exist_ok=True)

    def bundle(self, model: str) -> Path:
        """A model's bundle."""
        path = self.work / {"shape": f"7b-{self.layers}l.bundle", **SMOL}[model]
        if not path.exists():
            options = ["--recipe", "smollm2-135m", "--windows", "16"] if model == "smol" else PLAIN
            checkpoint = self._shape_checkpoint() if model == "shape" else self._smol_gguf()
            _run([sys.executable, "-m", "headrace", "export", str(checkpoint), "-o", str(path), *options])
        return path

    def _shape_checkpoint(self) -> Path:
        checkpoint = self.work / f"7b-{self.layers}l"
        if not checkpoint.exists():
            given = [] if self.tokenizer is None else ["--tokenizer", str(self.tokenizer)]
            script = HERE.parent / "make_checkpoint.py"
            _run([sys.executable, str(script), str(checkpoint), "--layers", str(self.layers), *given])
        return checkpoint

    @cached_property
    def gguf(self) -> dict[str, Path]:
        """Q4_0 files by model, for llama.cpp."""
        shape, smol = self.work / f"7b-{self.layers}l-q4_0.gguf", self.work / "smollm2-Q4_0.gguf"
        if not shape.exists():
            self._write_shape(shape)
        if not smol.exists():
            script = HERE / "quantize_gguf.py"
            _run([self.peer_python, str(script), str(self._smol_gguf()), str(smol)])
        return {"shape": shape, "smol": smol, "smol_w4a16": smol}

    def size(self, model: str) -> Size:
        """A model's size."""
        if model not in self._sizes:
            self._sizes[model] = _size(self.bundle(model))
        return self._sizes[model]

    def openvino_geometry(self) -> str:
        """The shape, for run_openvino.py."""
        s = self.size("shape")
        heads = s.hidden // 128
        return json.dumps({"layers": s.layers, "hidden": s.hidden, "heads": heads, "ffn": s.ffn, "vocab": s.vocab})

    def _smol_gguf(self) -> Path:
        folder = self.work / "smollm2-135m"
        if not folder.exists():
            _run([sys.executable, "-m", "headrace", "pull", "smollm2-135m", "-o", str(folder)])
        return next(folder.glob("*.gguf"))

    def _write_shape(self, path: Path) -> None:
        """The shape with random Q4_0 linears; embedding and head Q8_0, as ours have 8 bits."""
        from gguf import GGUFWriter

        s = self.size("shape")
        writer = GGUFWriter(path, "llama", use_temp_file=True)
        writer.add_context_length(4096)
        writer.add_embedding_length(s.hidden)
        writer.add_block_count(s.layers)
        writer.add_feed_forward_length(s.ffn)
        writer.add_head_count(s.hidden // 128)
        writer.add_head_count_kv(s.kv // 128)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_dimension_count(128)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(s.vocab)
        writer.add_tokenizer_model("llama")
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        writer.add_token_list([*pieces, *(f"t{i}" for i in range(s.vocab - len(pieces)))])
        writer.add_token_scores([-float(i) for i in range(s.vocab)])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (s.vocab - len(pieces)))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        _matrix(writer, "token_embd.weight", s.vocab, s.hidden, "Q8_0")
        for layer in range(s.layers):
            for norm in ("attn_norm", "ffn_norm"):
                writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(s.hidden, np.float32))
            for name, rows in (("q", s.hidden), ("k", s.kv), ("v", s.kv), ("output", s.hidden)):
                _matrix(writer, f"blk.{layer}.attn_{name}.weight", rows, s.hidden, "Q4_0")
            for name, rows, columns in (("gate", s.ffn, s.hidden), ("up", s.ffn, s.hidden), ("down", s.hidden, s.ffn)):
                _matrix(writer, f"blk.{layer}.ffn_{name}.weight", rows, columns, "Q4_0")
        writer.add_tensor("output_norm.weight", np.ones(s.hidden, np.float32))
        _matrix(writer, "output.weight", s.vocab, s.hidden, "Q8_0")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _matrix(writer: object, name: str, rows: int, columns: int, kind: str) -> None:
    """A tensor of random codes with small scales."""
    from gguf import GGMLQuantizationType

    nbytes, block = GGUF_BLOCKS[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (rows * columns // block, nbytes), np.uint8)
    scales = (rng.random(len(blocks)) * 0.002 + 0.001) / (1 if kind == "Q4_0" else 10)
    blocks[:, :2] = scales.astype(np.float16)[:, None].view(np.uint8)
    data = blocks.reshape(rows, columns // block * nbytes)
    writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])  # type: ignore[attr-defined]


def _size(bundle: Path) -> Size:
    """A bundle's size: what `inspect --program` says a token reads."""
    done = _run([sys.executable, "-m", "headrace", "inspect", str(bundle), "--program"])
    read = next(line for line in done.splitlines() if line.startswith("weights "))
    g = json.loads((bundle / "headrace.json").read_text(encoding="utf-8"))["geometry"]
    kv = g["num_kv_heads"] * g["head_dim"]
    size = int(read.split()[1].replace(",", ""))
    return Size(g["num_layers"], g["hidden_size"], g["intermediate_size"], g["vocab_size"], kv, size)


def _run(command: list[str]) -> str:
    print("$", *command, file=sys.stderr, flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
