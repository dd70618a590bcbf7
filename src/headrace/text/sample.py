"""The text that a bundle is checked on. What quantization costs on it is recorded by the export that made the bundle,
so that `verify` repeats the very same comparison."""

from __future__ import annotations

from headrace.text.tokenizer import Tokenizer

__all__ = ["sample_ids"]

# Both languages, digits, punctuation; longer than one prompt step, so that the cache is read across steps.
SAMPLE = (
    "A headrace is the channel that carries a river to the machine. In 2026, 7 of 10 engineers measured first. "
    "百川东到海，何时复西归？引水渠把河水送到机器。先测量，再优化；每一个数字背后都有一次测量。"
)
SAMPLE_TOKENS = 160


def sample_ids(tokenizer: Tokenizer, context: int) -> list[int]:
    """The sample in a model's vocabulary, repeated to SAMPLE_TOKENS tokens or the context, if that is less."""
    ids = tokenizer.encode(SAMPLE)
    return (ids * (SAMPLE_TOKENS // len(ids) + 1))[: min(SAMPLE_TOKENS, context)]
