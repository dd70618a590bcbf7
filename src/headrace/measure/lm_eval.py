"""lm-evaluation-harness's view of a bundle: the model `headrace`, registered when this file is imported.

    python -m headrace.measure.lm_eval run --model headrace --model_args bundle=BUNDLE --tasks mmlu,ceval-valid

Needs lm-eval (headrace[eval]). Requests are computed in their order: what contexts have in common is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from headrace.language_model import load
from headrace.measure.likelihood import likelihoods
from headrace.measure.questions import following
from headrace.model.fidelity import log_softmax

__all__ = ["HeadraceLM"]

MOST_TOKENS = 256  # of an answer, where a task does not say


@register_model("headrace")  # type: ignore[untyped-decorator,unused-ignore]
class HeadraceLM(TemplateLM):  # type: ignore[misc,unused-ignore]
    """A bundle for the harness.

    Args:
        bundle: the folder.
        runner: who computes.
        threads: of the runner.
        others: what the harness gives every model (batch_size, device); a bundle runs one sequence at a time here.
    """

    def __init__(self, bundle: str, runner: str | None = "host", threads: int | None = None, **others: Any) -> None:
        super().__init__()
        self.model = load(bundle, runner=runner, threads=None if threads is None else int(threads))

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.model.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What results of chat templates are kept under."""
        return self.model.bundle.root.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Text → ids, as the runtime encodes a text that is to be continued."""
        return self.model.tokenizer.encode(string) if add_special_tokens is False else self.model.encode_raw(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        room = self.model.context
        pairs = [(context[-(room + 1 - len(answer)) :], answer) for _, context, answer in requests]
        return [(one.log, one.greedy) for one in likelihoods(pairs, following(self.model))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of whole texts, in windows of the context."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.model.tokenizer.encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.context,
                context_len=1,
            )
            total = 0.0
            for context, continuation in map(make_disjoint_window, windows):
                rows = self.model.logits([*context, *continuation[:-1]])[len(context) - 1 :]
                total += float(log_softmax(rows)[np.arange(len(continuation)), continuation].sum())
            totals.append(total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first of a task's stop strings."""
        answers = []
        for request in requests:
            context, wanted = request.args
            until = wanted.get("until") or []
            most = int(wanted.get("max_gen_toks", wanted.get("max_tokens", MOST_TOKENS)))
            ids = self.model.encode_raw(context)[-(self.model.context - most) :]
            sampled = bool(wanted.get("do_sample", False))
            tokens = self.model.generate(
                ids,
                max_tokens=most,
                stop=[until] if isinstance(until, str) else list(until),
                temperature=float(wanted.get("temperature", 0.0)) if sampled else 0.0,
                top_p=wanted.get("top_p") if sampled else None,
            )
            answers.append("".join(token.text for token in tokens))
        return answers


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
