"""A checkpoint's vocabulary on its way into a bundle: written, and checked against the model and against Genie.

Checked before anything is quantized: a token without a row in the embedding, or a vocabulary that Genie cannot have,
would otherwise be found out hours later, or by whoever chats. Knows no weight.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from headrace.checkpoint import Checkpoint
from headrace.errors import TokenizerError, UserError
from headrace.files import write_file
from headrace.targets.qualcomm.genie_bundle import end_ids, genie_vocabulary
from headrace.text.tokenizer import Tokenizer
from headrace.text.tokenizer_folder import load_tokenizer, save_tokenizer
from headrace.text.turns import Message, turn_format

__all__ = ["check_vocabulary", "write_vocabulary"]


def write_vocabulary(source: Checkpoint, folder: Path) -> Tokenizer:
    """Put a checkpoint's tokenizer and generation settings into a bundle's folder.

    Raises:
        TokenizerError: there is none, a damaged one, or a kind that is not supported.
    """
    save_tokenizer(source.path, source.metadata or None, folder)
    if source.generation_config:
        text = json.dumps(dict(source.generation_config), ensure_ascii=False, indent=1)
        write_file(folder / "generation_config.json", text.encode())
    return load_tokenizer(folder)


def check_vocabulary(source: Checkpoint, *, for_genie: bool) -> None:
    """Refuse a checkpoint whose tokenizer cannot be used with its weights or, for a chip, with Genie.

    Raises:
        TokenizerError: there is no usable tokenizer, or it gives ids that the embedding has no row for.
        TargetError: Genie needs an end token and there is none.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-") as name:
        folder = Path(name)
        tokenizer = write_vocabulary(source, folder)
        turns = turn_format(tokenizer, source.generation_config)
        rows = source.config.vocab_size
        # Special tokens beyond the model, as an added <pad>, do no harm as long as nothing asks for them.
        extra = (token for token in range(rows, tokenizer.vocab_size) if token not in tokenizer.special_ids)
        given = [token for token in extra if tokenizer.piece_bytes(token)]
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            given.append(tokenizer.bos_id)
        with suppress(UserError):  # a template that wants something else first
            given += turns.render([Message("user", "a")], sys.maxsize)
        beyond = [token for token in given if token >= rows]
        if beyond:
            raise TokenizerError(
                f"the tokenizer of {source.path} gives id {beyond[0]} ({tokenizer.id_to_piece(beyond[0])!r}) and the "
                f"model knows ids 0 to {rows - 1}; expected the tokenizer that belongs to it: fetch both again"
            )
        if for_genie:
            end_ids(tokenizer, turns)
            genie_vocabulary(folder, source.generation_config)
