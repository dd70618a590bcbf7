"""ChatTemplate: a checkpoint's jinja template, rendered as Hugging Face renders it, in a sandbox and with bounds.

What a template may do and use is sandbox.py's matter. Knows nothing about tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from headrace.errors import TokenizerError

if TYPE_CHECKING:
    from headrace.text.sandbox import SandboxEnvironment

__all__ = ["ChatTemplate"]

MAX_TEMPLATE = 256 << 10  # characters; the longest known ones have about 30,000


class ChatTemplate:
    """A compiled template.

    Args:
        source: jinja source.

    Raises:
        TokenizerError: the template does not compile.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise TokenizerError(f"the chat template has {len(source)} characters; expected at most {MAX_TEMPLATE}")
        try:
            self._template = _environment().from_string(source)
        except RecursionError:
            raise TokenizerError("the chat template is nested too deep; use --raw to go without it") from None
        except Exception as error:  # jinja's TemplateError, and SyntaxError or MemoryError of Python's own compiler
            raise _refused(error) from None

    def render(self, messages: Sequence[Mapping[str, str]], *, ask: bool, marks: Mapping[str, object]) -> str:
        """The text of a conversation.

        Args:
            messages: each with "role" and "content".
            ask: end with the beginning of the assistant's turn.
            marks: further names the template can use, such as bos_token and eos_token.

        Raises:
            TokenizerError: the template refused the conversation, failed, or went beyond a bound.
        """
        from headrace.text.sandbox import limited

        # Templates ask `if tools` and also `if tools is not none`: the names are there, and None.
        names = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": ask, **marks}
        try:
            with limited():
                return self._template.render(names)
        except Exception as error:  # a template's mistake can be any exception: TypeError, KeyError, …
            raise _refused(error) from None


def _refused(error: Exception) -> TokenizerError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return TokenizerError(f"the model's chat template failed: {reason}; change the messages or use --raw to go without")


@lru_cache(maxsize=1)
def _environment() -> SandboxEnvironment:
    from headrace.text.sandbox import SandboxEnvironment

    return SandboxEnvironment()
