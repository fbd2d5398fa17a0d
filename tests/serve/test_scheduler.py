"""A sequence's text, tokens and log-probabilities do not depend on what runs beside it,
before it or instead of it.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from small_models import export_small_model

from qwen3c import Model
from qwen3c.drivers.batch import CachedSession
from qwen3c.drivers.draft import Drafting
from qwen3c.drivers.reply import Event
from qwen3c.serve.ask import Ask, KeyLimits, Stream
from qwen3c.serve.errors import ApiError
from qwen3c.serve.models import Served, ServeOptions


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small_model(tmp_path_factory.mktemp("scheduler"), context=2048)


@asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncIterator[Served]:
    served = Served("m", Model(path, 2), ServeOptions(**options), threading.Lock())
    try:
        yield served
    finally:
        await asyncio.to_thread(served.close)


def endless(served: Served, prompt: list[int], **ask: Any) -> Ask:
    """A request whose reply fills the context."""
    ends = dict.fromkeys(served.model.metadata["eos_token_ids"], -1e4)
    return Ask([prompt], sampling={"logit_bias": ends}, **ask)


async def until(so: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    for _ in range(2000):
        if so():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come about")


def asks(n: int, seed: int, longest: int = 900) -> list[Ask]:
    """Requests of every kind, some with beginnings in common."""
    draw = random.Random(seed)
    common = [[draw.randrange(4, 200) for _ in range(600)] for _ in range(3)]
    found = []
    for i in range(n):
        beginning = draw.choice(common)[: draw.choice([0, 5, 300, 600])]
        prompt = beginning + [draw.randrange(4, 200) for _ in range(draw.randrange(1, longest - 600))]
        sampling: Any = {
            "seed": i,
            "temperature": draw.choice([0.0, 0.7, 1.5]),
            "top_p": draw.choice([0.9, 1.0]),
        }
        sampling |= draw.choice([{}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.3}])
        sampling |= draw.choice([{}, {"presence_penalty": 0.5}, {"logit_bias": {7: 2.0}}])
        kind = draw.random()
        ask = Ask(
            [prompt], max_tokens=draw.randrange(1, 60), sampling=sampling, logprobs=draw.choice([None, 0, 3])
        )
        if kind < 0.1:
            ask = replace(ask, echo=2, max_tokens=draw.choice([0, 1, 9]))
        elif kind < 0.2:
            ask = Ask([prompt], vectors=True)
        elif kind < 0.3:
            ask = replace(ask, prompts=[prompt] * 3, seeds=[i, i + 1, i + 2])
        elif kind < 0.4:
            ask = replace(ask, stop=("e", "\n"))
        found.append(replace(ask, namespace=draw.choice(["", "", "key"])))
    return found


async def outcome(served: Served, ask: Ask) -> Any:
    """All that came, in a form that == compares."""
    stream = await served.submit(ask)
    return await collected(stream)


async def collected(stream: Stream) -> Any:
    events: list[list[Event]] = [[] for _ in stream.jobs]
    others: list[Any] = []
    async for update in stream:
        if update.event is not None:
            events[update.index].append(update.event)
        if update.row is not None:
            others.append((update.index, update.row.tobytes()))
        if update.scores is not None:
            others.append((update.index, tuple(map(repr, update.scores))))
    return [[repr(event) for event in one] for one in events], sorted(others, key=repr)


async def alone(path: Path, wanted: list[Ask], **options: Any) -> list[Any]:
    """Each request as the only one that a server ever saw: its cache is emptied after each."""
    found = []
    async with serving(path, **options) as served:
        for ask in wanted:
            found.append(await outcome(served, ask))
            served.scheduler.tree.clear()
    return found


async def mixed(
    path: Path, wanted: list[Ask], seed: int, clients: int = 32, **options: Any
) -> tuple[list[Any], Served]:
    """The requests in a random order and at random moments, with others between them that are cancelled."""
    draw = random.Random(seed)
    found: dict[int, Any] = {}
    async with serving(path, **options) as served:
        gate = asyncio.Semaphore(clients)

        async def one(i: int) -> None:
            async with gate:
                await asyncio.sleep(draw.random() * 0.05)
                found[i] = await outcome(served, wanted[i])

        async def disturber(i: int) -> None:
            stream = await served.submit(replace(wanted[i], max_tokens=500, echo=None, stop=()))
            await asyncio.sleep(draw.random() * 0.05)
            stream.cancel()
            async for _ in stream:
                pass

        order = draw.sample(range(len(wanted)), len(wanted))
        await asyncio.gather(
            *(one(i) for i in order),
            *(disturber(i) for i in draw.sample(order, len(order) // 3) if not wanted[i].vectors),
        )
    return [found[i] for i in range(len(wanted))], served


@pytest.mark.parametrize("options", [{}, {"kv_bytes": 1 << 20, "running": 8}], ids=["room", "little memory"])
def test_the_same_bytes_alone_and_in_company(path: Path, options: dict[str, Any]) -> None:
    wanted = asks(40, 3)
    expected = asyncio.run(alone(path, wanted))
    options = {"queue": 1000} | options
    together, served = asyncio.run(mixed(path, wanted, 4, **options))
    for i, (one, other) in enumerate(zip(expected, together, strict=True)):
        assert one == other, f"request {i}"
    counters = served.scheduler.counters
    assert counters.cached_tokens > 0
    assert (counters.preemptions > 0) == ("kv_bytes" in options)
    assert expected[0] != expected[1]


@pytest.mark.parametrize("options", [{}, {"kv_bytes": 1 << 20, "running": 8}], ids=["room", "little memory"])
def test_the_same_bytes_with_every_guess_checked(
    path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts of other texts, too, and of sequences that are cancelled and preempted."""
    wanted = asks(40, 3)
    expected = asyncio.run(alone(path, wanted, draft=False))
    monkeypatch.setattr(
        Drafting, "lengths", lambda self, found, *_: [len(draft.chances) if draft else 0 for draft in found]
    )
    together, served = asyncio.run(mixed(path, wanted, 4, queue=1000, **options))
    for i, (one, other) in enumerate(zip(expected, together, strict=True)):
        assert one == other, f"request {i}"
    counters = served.scheduler.counters
    assert 50 < counters.accepted_tokens < counters.drafted_tokens
    assert (counters.preemptions > 0) == ("kv_bytes" in options)


def test_a_text_of_another_key_is_no_guess(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of an answer tells nobody what others were answered."""
    monkeypatch.setattr(
        Drafting, "lengths", lambda self, found, *_: [len(draft.chances) if draft else 0 for draft in found]
    )

    async def run() -> None:
        async with serving(path) as served:
            guesses = []
            for namespace in ("a", "b", "b", "a"):
                served.scheduler.tree.clear()
                ask = endless(served, [5, 6, 7, 8], max_tokens=40, namespace=namespace)
                ask.sampling["seed"] = 1
                stream = await served.submit(ask)
                await collected(stream)
                guesses.append((stream.stats[0].drafted_tokens, stream.stats[0].accepted_tokens))
            assert guesses[0] == guesses[1]  # what "a" was answered is nothing to "b"
            assert guesses[2] == guesses[3] and guesses[2][1] > guesses[0][1]

    asyncio.run(run())


def test_a_wrong_cache_would_be_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3c.serve.prefix import PrefixTree

    find = PrefixTree.find

    def wrong(self: PrefixTree, namespace: str, tokens: list[int]) -> tuple[CachedSession | None, int]:
        session, n = find(self, namespace, tokens)
        if session is not None and len(session.tokens) > 8:
            session = session.fork()
            session.tokens[:] = [*tokens[: len(session.tokens)]]  # it claims to hold what it does not
        return session, n

    wanted = asks(12, 5)
    expected = asyncio.run(alone(path, wanted))
    monkeypatch.setattr(PrefixTree, "find", wrong)
    together, _ = asyncio.run(mixed(path, wanted, 6, clients=1))
    assert together != expected


def test_a_second_turn_reads_what_is_new_alone(path: Path) -> None:
    async def run() -> None:
        async with serving(path) as served:
            first = await served.submit(Ask([list(range(4, 200)) * 3], max_tokens=10, sampling={"seed": 1}))
            await collected(first)
            said = first.jobs[0].state.tokens  # type: ignore[union-attr]
            prompt = list(range(4, 200)) * 3 + said + [9, 8, 7]
            second = await served.submit(Ask([prompt], max_tokens=1, sampling={"seed": 1}))
            await collected(second)
            assert second.stats[0].cached_tokens >= len(prompt) - 3 - 1
            other = await served.submit(Ask([prompt], max_tokens=1, namespace="key"))
            await collected(other)
            assert other.stats[0].cached_tokens == 0

    asyncio.run(run())


def test_the_cache_stays_within_its_bytes(path: Path) -> None:
    async def run() -> None:
        async with serving(path, kv_bytes=2 << 20) as served:
            draw = random.Random(1)
            for _ in range(60):
                prompt = [draw.randrange(4, 200) for _ in range(300)]
                await outcome(served, Ask([prompt], max_tokens=4))
                assert served.model.kv_bytes <= 2 << 20
            assert len(served.scheduler.tree) > 1
            assert served.scheduler.counters.evictions > 0
            served.scheduler.tree.clear()
            await until(lambda: served.model.kv_bytes == 0)  # the engine thread lets go of the last one

    asyncio.run(run())


def test_a_full_queue_refuses_at_once_and_loses_nobody(path: Path) -> None:
    async def run() -> None:
        async with serving(path, running=1, queue=3) as served:
            accepted, refused = [], 0
            for i in range(10):
                try:
                    accepted.append(await served.submit(endless(served, [5, 6, 7 + i], max_tokens=400)))
                except ApiError as error:
                    assert error.status == 429 and error.headers()["retry-after"] >= "1"
                    refused += 1
            assert len(accepted) + refused == 10 and refused >= 5
            for stream in accepted:
                events, _ = await collected(stream)
                assert "finish_reason=None" not in events[0][-1]

    asyncio.run(run())


def test_a_key_has_its_own_limits(path: Path) -> None:
    async def run() -> None:
        async with serving(path) as served:
            limits = KeyLimits(running=1, queue=2)
            streams = []
            with pytest.raises(ApiError) as refused:
                for _ in range(9):
                    ask = endless(served, [5, 6, 7], namespace="key")
                    streams.append(await served.submit(ask, limits))
            assert refused.value.status == 429
            await until(lambda: served.scheduler.n_running == 1)
            other = await served.submit(Ask([[5, 6, 7]], max_tokens=3))
            await collected(other)
            for stream in streams:
                stream.cancel()
                await collected(stream)

    asyncio.run(run())


def test_a_lower_priority_number_comes_sooner(path: Path) -> None:
    async def run() -> None:
        async with serving(path, running=1) as served:
            order: list[int] = []

            async def one(priority: int) -> None:
                stream = await served.submit(Ask([[5, 6, priority + 4]], max_tokens=30, priority=priority))
                await collected(stream)
                order.append(priority)

            blocker = await served.submit(endless(served, [5]))
            tasks = [asyncio.create_task(one(p)) for p in (9, 5, 1)]
            await until(lambda: served.scheduler.n_waiting == 3)
            blocker.cancel()
            await asyncio.gather(collected(blocker), *tasks)
            assert order == [1, 5, 9]

    asyncio.run(run())


@pytest.mark.parametrize("when", ["queued", "reading", "writing"])
def test_a_cancelled_sequence_leaves_in_any_state(path: Path, when: str) -> None:
    async def run() -> None:
        async with serving(path, running=1) as served:
            blocker = await served.submit(endless(served, [5])) if when == "queued" else None
            prompt = [5] * (1900 if when == "reading" else 3)
            stream = await served.submit(endless(served, prompt))
            async for update in stream:
                if update.event is not None or (update.progress and update.progress.stage == when):
                    break
            stream.cancel()
            events, _ = await collected(stream)
            assert events[0] and "cancelled" in events[0][-1]
            if blocker is not None:
                blocker.cancel()
                await collected(blocker)
            assert served.scheduler.n_running == served.scheduler.n_waiting == 0

    asyncio.run(run())


def test_an_engine_that_fails_is_an_error_of_the_stream_and_the_next_request_is_fine(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with serving(path) as served:
            expected = await outcome(served, Ask([[5, 6]], max_tokens=4, sampling={"seed": 1}))
            with monkeypatch.context() as patched:

                def fails(*_: object) -> NoReturn:
                    raise ValueError("m.bin: the logits are not finite")

                patched.setattr(Model, "forward", fails)
                with pytest.raises(ApiError) as failed:
                    await outcome(served, Ask([[5, 6]], max_tokens=4))
                assert failed.value.status == 500 and "m.bin" not in failed.value.message
            assert await outcome(served, Ask([[5, 6]], max_tokens=4, sampling={"seed": 1})) == expected

    asyncio.run(run())


def test_a_prompt_beyond_the_context_is_an_error_with_both_numbers(path: Path) -> None:
    async def run() -> None:
        async with serving(path, context=100) as served:
            with pytest.raises(ApiError) as refused:
                await served.submit(Ask([[5] * 101], max_tokens=1))
            assert refused.value.openai()["error"] | {"message": ""} == {
                "message": "", "type": "invalid_request_error", "param": "messages",
                "code": "context_length_exceeded", "n_prompt_tokens": 101, "n_ctx": 100,
            }  # fmt: skip

    asyncio.run(run())


def test_what_is_scored_is_what_the_model_says(path: Path) -> None:
    async def run() -> None:
        async with serving(path) as served:
            prompt = [5, 6, 7, 8, 9]
            (scores,) = await served.score([prompt], 2)
            logits = served.model.session().forward(prompt, logits="all")[:, : served.model.config.n_tokens]
            logits = logits.astype(np.float64)
            total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
            assert scores[0].logprob is None and [one.token for one in scores] == prompt
            for i, one in enumerate(scores[1:]):
                assert one.logprob == pytest.approx(logits[i, prompt[i + 1]] - total[i], abs=1e-4)
                assert len(one.top) == 2

    asyncio.run(run())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]


def test_a_grammar_that_fails_ends_its_own_sequence_alone(path: Path) -> None:
    class Broken:
        def __init__(self) -> None:
            self.n_left = 3

        def allowed(self) -> None:
            self.n_left -= 1
            if self.n_left == 0:
                raise ValueError("the grammar is lost")

        def accept(self, token: int) -> None:
            """Whatever comes."""

        def prepare(self) -> None:
            """Nothing."""

    class Lost:
        def mask(self, prompt: list[int]) -> Broken:
            return Broken()

    async def run() -> None:
        async with serving(path) as served:
            wanted = Ask([[1, 2, 3]], max_tokens=12, sampling={"seed": 5})
            expected = await outcome(served, wanted)
            good, bad, also_good = await asyncio.gather(
                outcome(served, wanted),
                outcome(served, replace(endless(served, [4, 5]), grammar=Lost(), max_tokens=9)),  # type: ignore[arg-type]
                outcome(served, wanted),
                return_exceptions=True,
            )
            assert good == also_good == expected
            assert isinstance(bad, ApiError) and bad.status == 500 and "the grammar is lost" in bad.message

    asyncio.run(run())
