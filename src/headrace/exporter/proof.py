"""What an export must show before it is called done: that its bundle runs, and what quantization cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.bundle.folder import Bundle
from headrace.checkpoint import Checkpoint
from headrace.errors import BundleError
from headrace.model.fidelity import fidelity
from headrace.model.reference import eager_logits

__all__ = ["quantization_kl", "refuse_broken"]

_DIGITS = 5  # of the recorded figure: what no order of float32 sums changes


def quantization_kl(checkpoint: Checkpoint, bundle: Bundle, ids: Sequence[int]) -> float:
    """Mean KL, in nats, of the quantized weights from the checkpoint's, both eager, over a text of token ids."""
    tokens, store = np.array([ids]), bundle.weights()
    reference = eager_logits(checkpoint.config, lambda name: checkpoint.tensor(name).load(), tokens)[0]
    kl = fidelity(reference, eager_logits(bundle.config, store.read, tokens)[0]).kl
    return float(f"{kl:.{_DIGITS}g}")


def refuse_broken(bundle: Bundle, ids: Sequence[int]) -> None:
    """Run a prompt step and a token step of what was written, a part at a time.

    Raises:
        BundleError: it does not run, or a logit is no finite number.
    """
    from headrace.targets.host.by_parts import logits_by_parts

    ids = ids[: bundle.prompt_length + 1]
    try:
        logits = logits_by_parts(bundle, [ids[:-1], ids[-1:]])
    except Exception as error:  # ONNX Runtime raises classes of its own, of no common base
        raise BundleError(
            f"the bundle that was written does not run ({' '.join(str(error).split())[:300]}); nothing is published: "
            "please report this model, and try another --recipe or --block"
        ) from error
    broken = int((~np.isfinite(logits)).any(axis=1).sum())
    if broken:
        raise BundleError(
            f"the bundle that was written gives logits that are no finite numbers at {broken} of {len(ids)} tokens; "
            "nothing is published: please report this model"
        )
