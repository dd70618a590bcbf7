"""What a server tells Prometheus: counts, latencies, queue and cache. Knows no HTTP and no dialect."""

from __future__ import annotations

from dataclasses import dataclass, fields

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics", "ModelMetrics"]

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


@dataclass(frozen=True)
class ModelMetrics:
    """The measurements of one model."""

    first_token: Histogram
    between_tokens: Histogram
    prompt_tokens: Counter
    cached_tokens: Counter
    generated_tokens: Counter
    drafted_tokens: Counter
    accepted_tokens: Counter
    queued: Gauge
    active: Gauge
    cache_bytes: Gauge


class Metrics:
    """One server's measurements, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        r = self._registry
        self.requests = Counter("headrace_requests", "Requests, by route and status", ["route", "status"], registry=r)
        self.first_token = Histogram(
            "headrace_time_to_first_token_seconds", "From a request's arrival to its first token", ["model"],
            buckets=_FIRST, registry=r,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "headrace_inter_token_seconds", "Between two tokens of one answer", ["model"], buckets=_BETWEEN, registry=r
        )
        self.prompt_tokens = Counter("headrace_prompt_tokens", "Tokens of prompts", ["model"], registry=r)
        self.cached_tokens = Counter(
            "headrace_cached_prompt_tokens", "Tokens of prompts that the cache already held", ["model"], registry=r
        )
        self.generated_tokens = Counter("headrace_generated_tokens", "Tokens of answers", ["model"], registry=r)
        self.drafted_tokens = Counter("headrace_drafted_tokens", "Tokens guessed ahead", ["model"], registry=r)
        self.accepted_tokens = Counter("headrace_accepted_tokens", "Guessed tokens that came", ["model"], registry=r)
        self.queued = Gauge("headrace_queued_requests", "Answers that wait for a slot", ["model"], registry=r)
        self.active = Gauge("headrace_active_answers", "Answers under way", ["model"], registry=r)
        self.cache_bytes = Gauge("headrace_kv_cache_bytes", "Bytes of the key and value cache", ["model"], registry=r)

    def of(self, model: str) -> ModelMetrics:
        """One model's. Looking its label up for each token would cost more than counting the token."""
        return ModelMetrics(*(getattr(self, field.name).labels(model) for field in fields(ModelMetrics)))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)
