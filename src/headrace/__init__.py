"""headrace takes a chat model from an open checkpoint to a phone, and runs the very same model on any computer.

import headrace
headrace.export("checkpoint/", "bundle/")
model = headrace.load("bundle/")
for token in model.generate("The capital of France is", max_tokens=16):
    print(token.text, end="")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.exporter.job import export
    from headrace.language_model import LanguageModel, load
    from headrace.runtime.answer import Token
    from headrace.runtime.chat import Chat

__all__ = ["Chat", "LanguageModel", "Token", "__version__", "export", "load"]

__version__ = "0.1.0"

_HOMES = {
    "Chat": "headrace.runtime.chat",
    "LanguageModel": "headrace.language_model",
    "Token": "headrace.runtime.answer",
    "export": "headrace.exporter.job",
    "load": "headrace.language_model",
}


def __getattr__(name: str) -> Any:
    """Names are imported when they are used: `headrace --help` must not load numpy."""
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
