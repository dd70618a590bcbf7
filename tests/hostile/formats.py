"""Every reader that takes what a stranger may have written, by the name that the fuzzers show."""

from __future__ import annotations

from tests.hostile import bundles, checkpoints, engines, graphs, requests, texts

__all__ = ["FORMATS"]

FORMATS = {
    **checkpoints.FORMATS,
    **bundles.FORMATS,
    **graphs.FORMATS,
    **texts.FORMATS,
    **requests.FORMATS,
    **engines.FORMATS,
}
