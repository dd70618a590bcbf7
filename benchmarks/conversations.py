"""What conversations among the calibration windows are worth: KL on 24 answers of the float model, in two languages.

    python benchmarks/conversations.py CHECKPOINT [--recipe smollm2-135m] [--windows 16] [--calibration TEXT …]

The float decoder answers 24 fixed questions greedily, in the model's own turn format. The checkpoint is exported twice,
calibrated on text alone and as `export` does it, with every second window as a conversation; each bundle is scored on
the tokens of the answers, through `headrace.load`. One line a bundle and language.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

import headrace
from headrace.bundle.folder import open_bundle
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.model.decoder import block, embed, head
from headrace.model.fidelity import FidelityMeter
from headrace.model.ops import Array, Eager, Positions
from headrace.model.reference import causal_mask
from headrace.model.rope import rope_tables
from headrace.text.turns import Message, turn_format

CONTEXT = 512
QUESTIONS = {
    "English": (
        "What is the capital of France, and what is it known for?",
        "How do plants make their food?",
        "Write a Python function that reverses a string.",
        "Name three rivers in Europe.",
        "Why is the sky blue?",
        "Give me a short recipe for an omelette.",
        "What is the difference between a list and a tuple?",
        "How far is the moon from the earth?",
        "Write two sentences about a rainy day.",
        "What does a prime number look like? Name five.",
        "How can I sleep better?",
        "Translate 'good morning' into Spanish.",
    ),
    "Chinese": (
        "中国的首都是哪里?",
        "请用一句话介绍你自己。",
        "水的沸点是多少度?",
        "请写一首关于春天的短诗。",
        "怎样学好英语?",
        "一年有几个季节?请列出来。",
        "请把“谢谢”翻译成英文。",
        "长江有多长?",
        "什么是人工智能?",
        "请推荐三种健康的早餐。",
        "为什么要多喝水?",
        "一加二等于几?",
    ),
}


def main() -> int:
    """Answer, export, score; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--recipe", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--calibration", type=Path, nargs="*", default=[], help="by default Python's topics")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    options = parser.parse_args()
    source = open_checkpoint(options.checkpoint)
    answers: dict[str, list[tuple[list[int], Array]]] = {}
    print("| calibrated on | answers in | tokens | KL | top-1 |\n|---|---|---|---|---|", flush=True)
    for name in ("text alone", "text and conversations"):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "bundle"
            text_alone = mock.patch("headrace.exporter.calibration.conversation", lambda *_: [])
            with text_alone if name == "text alone" else nullcontext():
                headrace.export(
                    options.checkpoint, out, recipe=options.recipe, calibration=options.calibration,
                    windows=options.windows, context=CONTEXT,
                )  # fmt: skip
            answers = answers or {k: float_answers(source, out, v, options.tokens) for k, v in QUESTIONS.items()}
            with headrace.load(out) as model:
                for language, pairs in answers.items():
                    meter = FidelityMeter()
                    for ids, reference in pairs:
                        first = len(ids) - len(reference)
                        logits = model.logits(ids)[first - 1 : -1]
                        meter.add(reference, logits, np.array(ids[first:]))
                    found = meter.result()
                    print(f"| {name} | {language} | {found.tokens} | {found.kl:.4f} | {found.top1:.3f} |", flush=True)
    return 0


def float_answers(
    source: Checkpoint, bundle: Path, questions: tuple[str, ...], most: int
) -> list[tuple[list[int], Array]]:
    """Each question's prompt with its answer, and the logits that gave each token of the answer."""
    opened = open_bundle(bundle)
    with headrace.load(bundle) as model:
        tokenizer = model.tokenizer
    turns = turn_format(tokenizer, opened.read_json("generation_config.json"))
    kept: dict[str, Array] = {}

    def weight(name: str) -> Array:
        if name not in kept:
            kept[name] = source.tensor(name).load()
        return kept[name]

    ops = Eager(source.config, weight)
    return [answer(ops, turns.render([Message("user", q)], CONTEXT - most), turns.stop_ids, most) for q in questions]


def answer(ops: Eager, prompt: list[int], stop: frozenset[int], most: int) -> tuple[list[int], Array]:
    """The prompt and what follows greedily, and the logits of what follows: (tokens, V)."""
    cos, sin = rope_tables(ops.config, len(prompt) + most)
    past: list[tuple[Array, Array]] = []
    ids, new, rows = list(prompt), list(prompt), []
    while len(rows) < most:
        logits, past = step(ops, np.array([new]), len(ids) - len(new), past, cos, sin)
        rows.append(logits)
        new = [int(logits.argmax())]
        ids += new
        if new[0] in stop:
            break
    return ids, np.stack(rows)


def step(
    ops: Eager, ids: NDArray[np.int64], start: int, past: list[tuple[Array, Array]], cos: Array, sin: Array
) -> tuple[Array, list[tuple[Array, Array]]]:
    """Logits of the last token, (V,), and the cache with these tokens' keys and values."""
    stop = start + ids.shape[1]
    at = Positions(cos[None, None, start:stop], sin[None, None, start:stop], causal_mask(start, stop))
    stream, cache = embed(ops, ids), []
    for layer in range(ops.config.num_layers):
        stream, (keys, values) = block(ops, layer, stream, at, past[layer] if past else None)
        if past:
            keys = np.concatenate([past[layer][0], keys], 3)
            values = np.concatenate([past[layer][1], values], 2)
        cache.append((keys, values))
    return head(ops, stream, np.array([ids.shape[1] - 1]))[0, 0], cache


if __name__ == "__main__":
    sys.exit(main())
