"""A vocabulary in a folder: the two calls that open one and put one into a bundle.

Two kinds of vocabulary exist at run time:

    tokenizer.json        ── tokenizer_json.py           (the `tokenizers` library)
    tokenizer.model       ── tokenizer_sentencepiece.py  (SentencePiece)
    tokenizer_config.json    bos, eos, whether a prompt begins with bos, the chat template

A vocabulary inside a GGUF file becomes one of the two when a bundle is made (tokenizer_gguf.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.errors import TokenizerError
from headrace.files import stands_for, write_file
from headrace.panics import told_as
from headrace.text.tokenizer import Tokenizer

__all__ = ["load_tokenizer", "save_tokenizer"]

JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The vocabulary of a bundle or of a Hugging Face folder; tokenizer.json is preferred when both files are there.

    Raises:
        TokenizerError: no vocabulary, a damaged one, or a kind that is not supported.
    """
    from headrace.text.tokenizer_config import TokenizerConfig

    config = TokenizerConfig.from_folder(folder)
    name = _vocabulary_file(folder)
    if name == JSON_FILE:
        from headrace.text.tokenizer_json import JsonTokenizer

        return JsonTokenizer(folder / name, config)
    from headrace.text.tokenizer_sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(folder / name, config)


def save_tokenizer(source: Path, gguf_metadata: Mapping[str, Any] | None, out: Path) -> list[Path]:
    """Puts a checkpoint's vocabulary into the folder `out`: tokenizer.json or tokenizer.model, and
    tokenizer_config.json. The result is loaded once, so that a damaged vocabulary is found here and not in a bundle.

    Args:
        source: the Hugging Face folder; not read when `gguf_metadata` is given.
        gguf_metadata: GGUF keys with their values as Python numbers, strings and lists; None for a folder.
        out: an existing folder.

    Returns:
        The files written.

    Raises:
        TokenizerError: no vocabulary, a damaged one, or a kind that is not supported.
    """
    from headrace.text.tokenizer_config import TokenizerConfig

    if gguf_metadata is not None:
        from headrace.text.tokenizer_gguf import gguf_vocabulary

        with told_as(TokenizerError, "the GGUF's vocabulary is damaged"):
            name, content, config = gguf_vocabulary(gguf_metadata)
            config.to_json().encode()  # half a character in a template is no text
    else:
        config = TokenizerConfig.from_folder(source)
        name = _vocabulary_file(source)
        if name == JSON_FILE:
            from headrace.text.tokenizer_json import JsonTokenizer

            content = JsonTokenizer(source / name, config).to_json().encode()
            config = config._replace(added={})  # tokenizer.json has them now
        else:
            content = (source / name).read_bytes()
    if name == JSON_FILE:
        from headrace.text.tokenizer_json import quick_to_read

        content = quick_to_read(content.decode()).encode()
    write_file(out / name, content)
    write_file(out / CONFIG_FILE, config.to_json().encode())
    load_tokenizer(out)
    return [out / name, out / CONFIG_FILE]


def _vocabulary_file(folder: Path) -> str:
    for name in (JSON_FILE, MODEL_FILE):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                if instead := stands_for(file.read(512)):
                    raise TokenizerError(f"{folder / name} is {instead}")
            return name
    raise TokenizerError(
        f"{folder} has neither {JSON_FILE} nor {MODEL_FILE}; copy the tokenizer's files into that folder"
    )
