"""Metrics: what Prometheus reads is what happened.

python -m pytest tests/serve/test_metrics.py
"""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from small_models import TINY_QWEN3

from qwen3c import Model
from qwen3c.drivers.grammar import Grammar
from qwen3c.serve.ask import Ask, Stream
from qwen3c.serve.errors import ApiError
from qwen3c.serve.logs import Record
from qwen3c.serve.metrics import PREFIX, REASONS, Metrics
from qwen3c.serve.models import Models, ServeOptions


def samples(metrics: Metrics) -> dict[str, float]:
    """Sample -> value; labels other than the model's name and bounds of buckets behind a slash."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "model_name"]
            found["/".join([sample.name.removeprefix(PREFIX), *labels])] = sample.value
    return found


async def reply(models: Models, prompt: list[int], cancel: bool = False) -> Stream:
    served = await models.get()
    stream = await served.submit(Ask([prompt], max_tokens=6))
    async for update in stream:
        if cancel and update.event is not None:
            stream.cancel()
    return stream


def test_requests_leave_what_they_were_in_the_metrics_and_in_their_record() -> None:
    record = Record("POST", "/v1/completions", "id", status=200)

    async def serve() -> dict[str, float]:
        models = Models({"tiny": lambda: Model(str(TINY_QWEN3), threads=1)}, ServeOptions(kv_bytes=8 << 20))
        metrics = Metrics(lambda: models.loaded)
        assert "num_requests_running" not in samples(metrics), (
            "a model that is not loaded has counted nothing"
        )
        async with models.open():
            told = metrics.of("tiny")
            assert samples(metrics)["request_success_total/stop"] == 0
            prompt = list(range(100, 120))
            first, second = await reply(models, prompt), await reply(models, prompt)
            for stream in (first, second):
                told.ended(stream)
            record.tell("tiny", second)
            metrics.worked(0.25)
            return samples(metrics)

    found = asyncio.run(serve())
    assert found["prompt_tokens_total"] == found["prefix_cache_queries_total"] == 40
    assert 0 < found["prefix_cache_hits_total"] < 20 and record.cached == found["prefix_cache_hits_total"]
    replied = found["generation_tokens_total"]
    assert 2 <= replied <= 12 and record.completion == replied / 2 and record.prompt == 20
    assert sum(found[f"request_success_total/{reason}"] for reason in REASONS) == 2
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert found[f"{name}_seconds_count"] == found[f"{name}_seconds_bucket/+Inf"] == 2
    assert found["pass_seconds_count"] >= 3 and found["pass_seconds_sum"] > 0
    assert 0 < found["kv_cache_usage_perc"] <= 1
    assert (
        found["num_requests_running"] == found["num_requests_waiting"] == found["num_preemptions_total"] == 0
    )
    assert found["worker_seconds_total"] == 0.25 and found["worker_thread_share"] > 0
    assert found["process_resident_memory_bytes"] > 0
    assert record.model == "tiny" and record.backend == "local" and record.ttft is not None


def test_two_apps_count_apart() -> None:
    one, other = Metrics(list), Metrics(list)
    one.of("m").finished("error", 1.0)
    other.of("m")
    assert (
        samples(one)["request_success_total/error"] == 1
        and samples(other)["request_success_total/error"] == 0
    )


def test_what_a_worker_thread_computes_is_counted() -> None:
    async def serve() -> dict[str, float]:
        models = Models({"tiny": lambda: Model(str(TINY_QWEN3), threads=1)}, ServeOptions(kv_bytes=8 << 20))
        metrics = Metrics(lambda: models.loaded)
        models.worked = metrics.worked
        async with models.open():
            served = await models.get()
            assert samples(metrics)["worker_seconds_total"] == samples(metrics)["worker_thread_share"] == 0
            await served.work(time.sleep, 0.05)
            with pytest.raises(ZeroDivisionError):
                await served.work(divmod, 1, 0)
            return samples(metrics)

    found = asyncio.run(serve())
    assert found["worker_seconds_total"] >= 0.05 and 0 < found["worker_thread_share"] < 1


def test_a_reply_that_ends_in_an_error_counts_as_one() -> None:
    async def serve() -> dict[str, float]:
        models = Models({"tiny": lambda: Model(str(TINY_QWEN3), threads=1)}, ServeOptions(kv_bytes=8 << 20))
        metrics = Metrics(lambda: models.loaded)
        async with models.open():
            served = await models.get()
            grammar = Grammar.regex(served.model.vocabulary, r"(\w+\s?){1,1000}")
            asked = Ask([[1]], 600, sampling={"temperature": 100, "seed": 1}, grammar=grammar)
            stream = await served.submit(asked)
            with pytest.raises(ApiError) as error:
                async for _ in stream:
                    pass
            assert (error.value.status, error.value.code) == (400, "grammar_failed")
            metrics.of("tiny").ended(stream)
            return samples(metrics)

    found = asyncio.run(serve())
    assert found["request_success_total/error"] == 1 and found["request_success_total/stop"] == 0
