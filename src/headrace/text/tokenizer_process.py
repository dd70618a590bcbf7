"""A vocabulary that a process of its own reads, beside everything else that is done until a first answer.

A vocabulary is a third of the time until a small model's first token, and `tokenizers` holds Python's lock while it
reads, so that no thread could do this. The process is a copy of this one (fork), so it must be begun early, before
there are threads and large libraries. Requests and answers are single values of `marshal`: a method's name and
arguments, then what it returned.
"""

from __future__ import annotations

import marshal
import os
import signal
import sys
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from headrace.errors import TokenizerError
from headrace.text.tokenizer import Tokenizer
from headrace.text.tokenizer_folder import load_tokenizer

__all__ = ["Reading", "TokenizerProcess"]

FACTS = (
    "bos_id", "eos_ids", "add_bos", "special_ids", "chat_template", "tool_template", "marks", "drops_leading_space",
)  # fmt: skip


class Reading:
    """A vocabulary that is being read since this was made.

    Args:
        folder: the vocabulary's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._requests = self._answers = -1
        if not sys.platform.startswith("linux"):
            return  # elsewhere a copy of a process is not to be trusted, or there is none
        theirs_in, requests = os.pipe()
        answers, theirs_out = os.pipe()
        try:
            if os.fork() == 0:
                os.close(requests)
                os.close(answers)
                _serve(folder, theirs_in, theirs_out)
            self._requests, self._answers = requests, answers
        except OSError:  # there are as many processes as this user may have
            os.close(requests)
            os.close(answers)
        os.close(theirs_in)
        os.close(theirs_out)

    def done(self, folder: Path) -> Tokenizer:
        """The vocabulary, when it is read; by this process, where the other could not, so that errors are told as ever.

        Raises:
            TokenizerError: as `load_tokenizer`.
        """
        if self._requests >= 0:
            process = TokenizerProcess(self._requests, self._answers)
            self._requests = -1
            if folder == self._folder and process.begun:
                return process
            process.close()
        return load_tokenizer(folder)


class TokenizerProcess(Tokenizer):
    """A vocabulary in another process, which ends when this is closed or this process ends; see `Tokenizer`.

    Nobody waits for that end, which takes 6 to 9 ms: this is for a process that is about to end itself.

    Args:
        requests: file descriptor that the process reads.
        answers: the one that it writes, first of all the vocabulary's attributes.

    Attributes:
        begun: it could read the vocabulary; without that there are no others.
    """

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = os.fdopen(requests, "wb"), os.fdopen(answers, "rb")
        self._bytes: dict[int, bytes] = {}
        try:
            vars(self).update(marshal.load(self._answers))
            self.begun = True
        except EOFError:
            self.begun = False

    @cached_property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return int(self._ask("vocab_size"))

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        return list(self._ask("encode", text, special=special, continues=continues))

    def token_id(self, piece: str) -> int | None:
        """See `Tokenizer.token_id`."""
        found: int | None = self._ask("token_id", piece)
        return found

    def id_to_piece(self, token: int) -> str:
        """See `Tokenizer.id_to_piece`."""
        return str(self._ask("id_to_piece", token))

    def piece_bytes(self, token: int) -> bytes:
        """See `Tokenizer.piece_bytes`."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = bytes(self._ask("piece_bytes", token))
        return known

    def close(self) -> None:
        """See `Tokenizer.close`."""
        with suppress(OSError):  # nobody reads any more what was still to be written
            self._requests.close()
        self._answers.close()

    def _ask(self, name: str, *given: Any, **named: Any) -> Any:
        try:
            marshal.dump((name, given, named), self._requests)
            self._requests.flush()
            well, answer = marshal.load(self._answers)
        except (EOFError, OSError):
            raise TokenizerError("the process that read the vocabulary was ended; start again") from None
        if not well:
            raise TokenizerError(answer)
        return answer


def _serve(folder: Path, requests: int, answers: int) -> NoReturn:
    """The other process: it answers until nobody can ask any more, and says nothing to anybody else."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the one who asks
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):  # whoever reads our output waits until all have closed it
            os.dup2(nowhere, standard)
        with os.fdopen(requests, "rb") as asked, os.fdopen(answers, "wb") as told:
            tokenizer = load_tokenizer(folder)
            facts = {name: getattr(tokenizer, name) for name in FACTS}
            marshal.dump({**facts, "marks": dict(tokenizer.marks)}, told)
            told.flush()
            while True:
                name, given, named = marshal.load(asked)
                found = getattr(tokenizer, name)
                try:
                    answer = (True, found(*given, **named) if callable(found) else found)
                except TokenizerError as error:
                    answer = (False, str(error))
                marshal.dump(answer, told)
                told.flush()
    finally:
        os._exit(0)
