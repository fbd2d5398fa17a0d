"""What Prometheus may ask: counters and histograms under the names that vLLM gives them, in a registry of
their own.

What the engine threads count is read when somebody asks. What only a surface can see, it tells by the methods
of the ModelMetrics that Metrics.of() gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .ask import Stream
from .models import Served

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "qwen3c:"
REASONS = ("stop", "length", "tool_calls", "cancelled", "error")
# bounds of buckets, in seconds
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
INTER_TOKEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)


class Metrics:
    """All metrics of one app. loaded: the models that are in memory now."""

    def __init__(self, loaded: Callable[[], Iterable[Served]]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_Engines(loaded))

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, what, ["model_name"], registry=self._registry, buckets=buckets)

        self.success = Counter(
            PREFIX + "request_success",
            "Requests that ended",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self.queued = histogram("request_queue_time_seconds", "From arrival to the first pass", FIRST_TOKEN)
        self.first = histogram("time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN)
        self.between = histogram(
            "inter_token_latency_seconds", "Between two tokens, the mean of a reply", INTER_TOKEN
        )
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end", WHOLE)
        self._started = time.monotonic()
        self._worked = 0.0
        self._worker = Counter(
            PREFIX + "worker_seconds",
            "What worker threads computed: templates, tokens, JSON",
            registry=self._registry,
        )
        share = Gauge(
            PREFIX + "worker_thread_share",
            "Share of the time since the start that a worker thread computed",
            registry=self._registry,
        )
        share.set_function(lambda: self._worked / max(time.monotonic() - self._started, 1e-9))

    def of(self, model: str) -> ModelMetrics:
        """What the surfaces tell of the model of this alias. Every series of it begins with 0."""
        return ModelMetrics(self, model)

    def worked(self, seconds: float) -> None:
        """A worker thread was busy for so long."""
        self._worked += seconds
        self._worker.inc(seconds)

    def routes(self) -> list[Route]:
        """GET /metrics."""

        async def answer(request: Request) -> Response:
            return Response(self.render(), media_type=CONTENT_TYPE)

        return [Route("/metrics", answer, methods=["GET"])]

    def render(self) -> bytes:
        """The answer of /metrics, of type CONTENT_TYPE."""
        return generate_latest(self._registry)


class ModelMetrics:
    """What is told of one model, from any thread; all times in seconds."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._queued = metrics.queued.labels(model)
        self._first = metrics.first.labels(model)
        self._between = metrics.between.labels(model)
        self._whole = metrics.whole.labels(model)
        self._success = {reason: metrics.success.labels(model, reason) for reason in REASONS}

    def ended(self, stream: Stream) -> None:
        """A stream has ended; each of its sequences counts."""
        for job in stream.jobs:
            stats, whole = job.stats, job.ended or 0.0
            usual = stats.finish_reason or ("stop" if job.ended else "cancelled")
            self.finished("error" if job.index in stream.failed else usual, whole)
            if job.first_token is not None:
                self._first.observe(job.first_token)
                self._queued.observe(max(job.first_token - stats.prefill_seconds, 0.0))
            if stats.generated_tokens > 1:
                self._between.observe(stats.decode_seconds / (stats.generated_tokens - 1))

    def finished(self, reason: str, seconds: float) -> None:
        """A sequence ended, so long after its arrival. reason: one of REASONS."""
        self._success[reason].inc()
        self._whole.observe(seconds)


class _Engines(Collector):
    """What the engine thread of each loaded model has counted; a model that was unloaded begins again."""

    def __init__(self, loaded: Callable[[], Iterable[Served]]) -> None:
        self._loaded = loaded

    def collect(self) -> Iterator[Metric]:
        def gauge(name: str, what: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(PREFIX + name, what, labels=["model_name"])

        def counter(name: str, what: str) -> CounterMetricFamily:
            return CounterMetricFamily(PREFIX + name, what, labels=["model_name"])

        running = gauge("num_requests_running", "Sequences that are read or written now")
        waiting = gauge("num_requests_waiting", "Sequences in the queue")
        kv_usage = gauge(
            "kv_cache_usage_perc", "Share of the memory for keys and values that is used, 1: all"
        )
        prompt = counter("prompt_tokens", "Tokens of prompts, those from the cache included")
        generation = counter("generation_tokens", "Tokens of replies")
        queries = counter(
            "prefix_cache_queries", "Tokens of prompts that were looked for in the prefix cache"
        )
        hits = counter("prefix_cache_hits", "Tokens of prompts that were found in it")
        drafted = counter(
            "spec_decode_num_draft_tokens", "Guesses at tokens that passes checked, of sequences that ended"
        )
        accepted = counter("spec_decode_num_accepted_tokens", "Those that were right")
        preemptions = counter("num_preemptions", "Sequences put back into the queue because memory ran out")
        evictions = counter("prefix_cache_evictions", "Sessions that the prefix cache let go")
        passes = SummaryMetricFamily(
            PREFIX + "pass_seconds", "Passes through the model", labels=["model_name"]
        )
        for served in self._loaded():
            scheduler, counted, name = served.scheduler, served.scheduler.counters, [served.name]
            running.add_metric(name, scheduler.n_running)
            waiting.add_metric(name, scheduler.n_waiting)
            kv_usage.add_metric(name, served.model.kv_bytes / scheduler.limits.kv_bytes)
            prompt.add_metric(name, counted.prompt_tokens + counted.cached_tokens)
            generation.add_metric(name, counted.generated_tokens)
            queries.add_metric(name, counted.prompt_tokens + counted.cached_tokens)
            hits.add_metric(name, counted.cached_tokens)
            drafted.add_metric(name, counted.drafted_tokens)
            accepted.add_metric(name, counted.accepted_tokens)
            preemptions.add_metric(name, counted.preemptions)
            evictions.add_metric(name, counted.evictions)
            passes.add_metric(name, counted.passes, counted.pass_seconds)
        yield from (
            running,
            waiting,
            kv_usage,
            prompt,
            generation,
            queries,
            hits,
            drafted,
            accepted,
            preemptions,
            evictions,
            passes,
        )
