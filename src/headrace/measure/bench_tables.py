"""A bench record as others' tables: Markdown and CSV in the form of llama.cpp's llama-bench. Measures nothing."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["bench_csv", "bench_markdown"]

_COLUMNS = (
    "model_filename", "model_type", "model_size", "model_n_params", "cpu_info", "backends", "n_threads", "n_prompt",
    "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts",
)  # fmt: skip


def bench_markdown(record: Mapping[str, Any]) -> str:
    """llama-bench's table: one row a test, tokens a second with their deviation."""
    lines = [
        "| model | size | params | backend | threads | test | t/s |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in _rows(record):
        test = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
        if row["n_depth"]:
            test += f" @ d{row['n_depth']}"
        lines.append(
            f"| {row['model_type']} | {row['model_size'] / 2**20:.2f} MiB | {row['model_n_params'] / 1e6:.2f} M "
            f"| {row['backends']} | {row['n_threads']} | {test} | {row['avg_ts']:.2f} ± {row['stddev_ts']:.2f} |"
        )
    return "\n".join(lines)


def bench_csv(record: Mapping[str, Any]) -> str:
    """One row a test under llama-bench's own column names."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(record))
    return out.getvalue().rstrip("\n")


def _rows(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    bundle = record["bundle"]
    common = {
        "model_filename": bundle["name"],
        "model_type": f"{bundle['architecture']} {bundle['recipe']}",
        "model_size": bundle["weight_bytes"],
        "model_n_params": record["parameters"],
        "cpu_info": record["machine"]["processor"],
        "backends": record["runner"],
        "n_threads": record["settings"]["threads"],
        "test_time": record["created"],
    }
    for row in record["prompts"]:
        yield {**common, "n_prompt": row["tokens"], "n_gen": 0, "n_depth": 0, **_speed(row, row["tokens"])}
    for row in record["decode"]:
        yield {**common, "n_prompt": 0, "n_gen": row["tokens"], "n_depth": row["depth"], **_speed(row, row["tokens"])}


def _speed(row: Mapping[str, Any], tokens: int) -> dict[str, float]:
    seconds = row["samples"]
    rates = [tokens / s for s in seconds]
    spread = statistics.stdev if len(seconds) > 1 else lambda _: 0.0
    return {
        "avg_ns": round(statistics.mean(seconds) * 1e9),
        "stddev_ns": round(spread(seconds) * 1e9),
        "avg_ts": round(statistics.mean(rates), 6),
        "stddev_ts": round(spread(rates), 6),
    }
