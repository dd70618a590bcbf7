"""The checkpoint that a bundle was made of, opened as the export saw it: with the adapters that were merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from headrace.bundle.folder import Bundle
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.checkpoint.lora import adapted, adapter_digest
from headrace.errors import BundleError

__all__ = ["open_original"]


def open_original(bundle: Bundle, checkpoint: Path, adapters: Sequence[Path] = ()) -> Checkpoint:
    """What a bundle is compared with.

    Args:
        bundle: the bundle.
        checkpoint: a Hugging Face folder or a GGUF file.
        adapters: folders of the LoRA adapters that were merged, in the same order.

    Raises:
        BundleError: it has another geometry, or other adapters were merged.
        CheckpointError: the checkpoint or an adapter cannot be opened.
    """
    source = adapted(open_checkpoint(checkpoint), adapters)
    if replace(source.config, tied_head=bundle.config.tied_head) != bundle.config:  # rotation unties it
        raise BundleError(f"{checkpoint} has another geometry than {bundle.root}; give the checkpoint it was made of")
    merged = bundle.provenance.get("options", {}).get("lora", [])
    if [adapter["sha256"] for adapter in merged] != [adapter_digest(folder) for folder in adapters]:
        names = ", ".join(str(adapter["name"]) for adapter in merged) or "none"
        raise BundleError(
            f"{bundle.root} was made with other adapters ({names}); expected the same, in the same order, with --lora"
        )
    return source
