"""Small vocabularies, made in memory: SentencePiece trained on a few lines, byte-level BPE as GGUF metadata."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from hypothesis import strategies as st

from headrace.text.tokenizer import Tokenizer
from headrace.text.tokenizer_folder import load_tokenizer, save_tokenizer
from headrace.text.tokenizer_json import byte_alphabet

TEXT = [
    "The capital of France is Paris, and the river runs to the sea.",
    "百川东到海，何时复西归？少壮不努力，老大徒伤悲。",
    "def add(a, b):\n    return a + b  # 12345",
    "a hundred rivers run to the sea; the sea is not full 😀",
] * 20

ANY_TEXT = st.text(st.sampled_from("the sea 百川😀é\n\t 0123abc▁") | st.characters(codec="utf-8"), max_size=40)

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def sentencepiece_model(dummy_prefix: bool = False, kind: str = "bpe", symbols: tuple[str, ...] = ()) -> bytes:
    """A SentencePiece model of 420 pieces, with byte fallback and whatever else the arguments ask for."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=420,
        model_type=kind,
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=list(symbols),
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def sentencepiece_tokenizer(folder: Path, *, dummy_prefix: bool = False, **config: Any) -> Tokenizer:
    """A Hugging Face folder with that model and tokenizer_config.json, loaded."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(dummy_prefix))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, **config}), encoding="utf-8")
    return load_tokenizer(folder)


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of a ChatML vocabulary: three marks, 256 bytes, and merges of a few words."""
    words = ["Ġthe", "Ġsea", "river", "Ġis", "ĊĊ", "çĻ¾"]  # the last is 百 in byte spelling
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet().values()]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(pieces) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    for key, value in changes.items():
        name = key if key.startswith(("general.", "tokenizer.")) else f"tokenizer.ggml.{key}"
        metadata[name] = value
    return {key: value for key, value in metadata.items() if value is not None}


def byte_level_tokenizer(folder: Path, **changes: Any) -> Tokenizer:
    """That vocabulary, saved as a bundle has it, and loaded."""
    save_tokenizer(folder, byte_level_metadata(**changes), folder)
    return load_tokenizer(folder)
