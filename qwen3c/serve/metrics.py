"""What Prometheus may ask: counters and histograms under the names that vLLM gives them, in a registry of their own.

A Metrics belongs to one app; of() gives what one model counts, whose methods the scheduler and the surfaces call.
They may be called from any thread.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "qwen3c:"
# seconds
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
INTER_TOKEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
PASS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)


class Metrics:
    """All metrics of a server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=registry)
        self._started = time.monotonic()

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(PREFIX + name, what, ["model_name", *labels], registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, what, ["model_name", *labels], registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, what, ["model_name"], registry=registry, buckets=buckets)

        self.running = gauge("num_requests_running", "Requests that are read or written now")
        self.waiting = gauge("num_requests_waiting", "Requests in the queue")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of the memory for KV caches that is used, 1: all")
        self.prompt = counter("prompt_tokens", "Prompt tokens, cached ones included")
        self.generation = counter("generation_tokens", "Tokens of replies")
        self.queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self.success = counter("request_success", "Requests that ended, by finish reason", "finished_reason")
        self.preemptions = counter("num_preemptions", "Requests put back because memory ran out")
        self.first = histogram("time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN)
        self.between = histogram("inter_token_latency_seconds", "Between two tokens of a reply", INTER_TOKEN)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end", WHOLE)
        self.queue_time = histogram("request_queue_time_seconds", "From arrival to the first pass", FIRST_TOKEN)  # fmt: skip
        self.passes = histogram("pass_seconds", "One pass through the model", PASS)
        self.worker_seconds = Counter(
            PREFIX + "worker_seconds", "What the worker thread computed: templates, tokens, JSON", registry=registry
        )  # fmt: skip
        self.worker_share = Gauge(
            PREFIX + "worker_thread_share", "Share of the time that the worker thread computed", registry=registry
        )  # fmt: skip
        self._worked = 0.0
        self.worker_share.set_function(lambda: self._worked / max(time.monotonic() - self._started, 1e-9))

    def of(self, model: str) -> ModelMetrics:
        """What the model of this name counts; it begins with 0, not with nothing."""
        return ModelMetrics(self, model)

    def worked(self, seconds: float) -> None:
        """The worker thread was busy for so long; called by that thread alone."""
        self._worked += seconds
        self.worker_seconds.inc(seconds)

    def render(self) -> bytes:
        """The answer of /metrics, of type CONTENT_TYPE."""
        return generate_latest(self.registry)


class ModelMetrics:
    """What one model counts."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._running = metrics.running.labels(model)
        self._waiting = metrics.waiting.labels(model)
        self._kv_usage = metrics.kv_usage.labels(model)
        self._prompt = metrics.prompt.labels(model)
        self._generation = metrics.generation.labels(model)
        self._queries = metrics.queries.labels(model)
        self._hits = metrics.hits.labels(model)
        self._preemptions = metrics.preemptions.labels(model)
        self._first = metrics.first.labels(model)
        self._between = metrics.between.labels(model)
        self._whole = metrics.whole.labels(model)
        self._queue_time = metrics.queue_time.labels(model)
        self._passes = metrics.passes.labels(model)
        self._success = {
            reason: metrics.success.labels(model, reason)
            for reason in ("stop", "length", "tool_calls", "cancelled", "error")
        }

    def load(self, running: int, waiting: int) -> None:
        """How many requests are read or written, and how many wait."""
        self._running.set(running)
        self._waiting.set(waiting)

    def kv_usage(self, share: float) -> None:
        """Share of the memory for KV caches that is used, 0 to 1."""
        self._kv_usage.set(share)

    def started(self, prompt: int, cached: int, queued: float) -> None:
        """A prompt of so many tokens gets its first pass, `cached` of them from the prefix cache, after `queued` seconds."""
        self._prompt.inc(prompt)
        self._queries.inc(prompt)
        self._hits.inc(cached)
        self._queue_time.observe(queued)

    def first_token(self, seconds: float) -> None:
        """Seconds from arrival to the first token of a reply."""
        self._generation.inc()
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Seconds between two tokens of a reply."""
        self._generation.inc()
        self._between.observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        """A request ended, so long after it arrived. reason: stop, length, tool_calls, cancelled or error."""
        self._success[reason].inc()
        self._whole.observe(seconds)

    def preempted(self) -> None:
        """A request was put back because memory ran out."""
        self._preemptions.inc()

    def passed(self, seconds: float) -> None:
        """One pass through the model took so long."""
        self._passes.observe(seconds)
