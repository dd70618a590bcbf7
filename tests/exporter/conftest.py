"""Exports of the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.exporter.job import export
from tests.exports import SMALL, Exports


@pytest.fixture
def run(exports: Exports, tmp_path: Path) -> Any:
    """Export the tiny model into tmp_path/out."""

    def call(**options: Any) -> Path:
        return export(exports.checkpoint(), tmp_path / "out", **{**SMALL, "calibration": [exports.text], **options})

    return call
