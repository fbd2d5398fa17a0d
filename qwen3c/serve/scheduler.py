"""The engine thread: who waits, who is in the next pass, and where the memory for it comes from.

    submit -> queue -> admitted: a session with what the cache has of the prompt -> passes -> last update
                ^                                                            |
                +------------------- preempted, when KV memory runs out -----+

One thread owns a model. Between two passes it drops what was cancelled, admits what waits, makes room in the
KV cache and hands over what came, once for all streams. What a sequence computes does not depend on the
others, to the bit, and its random numbers follow from its positions: so a sequence that was preempted and
read again goes on with the same text.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..drivers.batch import Batch, CachedSession, LastRow, Member, session_for
from ..drivers.reply import ReplyState
from ..model import Model
from .ask import Failed, Job, KeyLimits, Progress, Stage, Stream, Update
from .errors import ApiError, server_error
from .pace import Pace
from .prefix import PrefixTree

log = logging.getLogger(__name__)

LOOKED_AT = 16  # waiting sequences, the first in the queue, that an admission considers
LONGEST_RETRY = 120.0  # seconds that Retry-After says at most


@dataclass(frozen=True)
class Limits:
    """running, queue: sequences on their way, and waiting. kv_bytes: of KV cache, running
    sequences and cache together.
    """

    running: int = 64
    queue: int = 128
    kv_bytes: int = 1 << 30


@dataclass
class Counters:
    """What has happened since the start, for metrics. Written by the engine thread alone."""

    passes: int = 0
    pass_seconds: float = 0.0
    prompt_tokens: int = 0  # read, those from the cache aside
    cached_tokens: int = 0  # of prompts, found in the cache
    generated_tokens: int = 0
    drafted_tokens: int = 0  # guesses that passes checked, of sequences that have ended
    accepted_tokens: int = 0  # those that were right
    preemptions: int = 0
    evictions: int = 0


class Scheduler:
    """The queue and the engine thread of one model.

    turn: held during a pass; models that share a processor share it. draft: whether passes may check guesses
    at several tokens of a sequence. close() ends the thread.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits,
        pace: Pace | None = None,
        turn: threading.Lock | None = None,
        draft: bool = True,
    ) -> None:
        self.model = model
        self.limits = limits
        self.counters = Counters()
        self.tree = PrefixTree()
        self._turn = turn or threading.Lock()
        self._drafting = model.drafting if draft else None
        self._batch: Batch[Any] = Batch(model, pace or Pace(), self._drafting)
        self._jobs: dict[int, Job] = {}  # running, by number
        self._queue: list[Job] = []  # waiting, in the order of their turns; the engine thread's
        self._inbox: deque[Job] = deque()
        self._waiting: Counter[str] = Counter()  # by namespace: in the inbox or in the queue
        self._n_submitted = 0
        self._full = False  # memory ran out, and no sequence has ended since
        self._job_seconds = 1.0  # of recent jobs, on average
        self._posts: list[tuple[Stream, Update]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._failed: ApiError | None = None  # why the thread has ended
        self._seen = time.monotonic()  # when the thread last ended a step, or found work after idling
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- from other threads

    @property
    def context(self) -> int:
        """How many positions one sequence can have: what the model holds and the KV memory allows."""
        blocks = max(self.limits.kv_bytes // self.model.kv_block_bytes, 1)
        return min(self.model.config.context, blocks * 256)

    @property
    def n_running(self) -> int:
        """Sequences on their way."""
        return len(self._jobs)

    @property
    def n_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._queue) + len(self._inbox)

    def most(self, limits: KeyLimits) -> int:
        """How many sequences a key can have at once, running and waiting."""
        running, queue = self.limits.running, self.limits.queue
        if limits.running is not None:
            running = min(running, limits.running)
        if limits.queue is not None:
            queue = min(queue, limits.queue)
        return running + queue

    def is_alive(self, bound: float) -> bool:
        """Whether the engine thread lives and, while there is work, has ended a step within `bound`
        seconds.
        """
        with self._changed:
            working = bool(self._inbox or self._queue or self._jobs)
            return self._thread.is_alive() and not (working and time.monotonic() - self._seen > bound)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the sequences of a stream, all or none.

        ApiError 400 if they are more than the queue ever has room for, 429 if it has none for them now.
        """
        with self._changed:
            if self._closing:
                down = ApiError(503, "the server is shutting down", type="server_error", retry_after=5)
                raise self._failed or down
            namespace = jobs[0].namespace
            most = self.most(jobs[0].limits)
            if len(jobs) > most:
                raise ApiError(
                    400,
                    f"the request is {len(jobs)} sequences, the server takes at most {most} at once",
                    code="too_many_sequences",
                )
            room = self.limits.running + self.limits.queue - self.n_running - self.n_waiting
            running = sum(job.namespace == namespace for job in list(self._jobs.values()))
            room = min(room, most - running - self._waiting[namespace])
            if len(jobs) > room:
                message = f"{len(jobs)} more do not fit into the queue: {self.n_waiting} wait already"
                raise ApiError(
                    429,
                    message,
                    type="rate_limit_exceeded",
                    code="queue_full",
                    retry_after=self._retry_after(),
                )
            if not (self._inbox or self._queue or self._jobs):
                self._seen = time.monotonic()
            for job in jobs:
                self._n_submitted += 1
                job.number, job.wake = self._n_submitted, self.wake
                self._waiting[namespace] += 1
                self._inbox.append(job)
            self._changed.notify()

    def wake(self) -> None:
        """Something has changed that the engine thread should look at."""
        with self._changed:
            self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """End every sequence and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _retry_after(self) -> float:
        """Seconds until the queue will have moved, as far as recent jobs say."""
        return min(self._job_seconds * (1 + self.n_waiting / self.limits.running), LONGEST_RETRY)

    # ---- the engine thread

    def _run(self) -> None:
        try:
            while not self._closing:
                with self._changed:
                    while not (self._inbox or self._queue or self._jobs or self._closing):
                        self._changed.wait()
                self._step()
                self._seen = time.monotonic()
        except Exception:  # a fault of this program: whoever waits must hear of it, and /health
            log.exception("the engine thread has failed")
            self._failed = server_error("the engine has failed", code="engine_failed")
        with self._changed:
            self._closing = True
        for job in [*self._jobs.values(), *self._queue, *self._inbox]:
            if self._failed is not None:
                self._post(job, Update(job.index, error=self._failed, last=True))
            else:
                self._post(job, self._final(job, job.end("cancelled")))
        self._batch.running.clear()
        self._jobs.clear()
        self.tree.clear()
        self._hand_over()

    def _step(self) -> None:
        """One pass, and what has to be done before and after it."""
        self._take_in()
        for member, outcome in self._batch.drop_cancelled():
            self._settle(member, outcome)
        self._admit()
        self._tell_positions()
        rows = self._affordable()
        if rows:
            self._pass(rows)
        elif not self._jobs and self._queue:
            with self._changed:  # all that waits waits for something: look again soon, or when woken
                self._changed.wait(0.05)
        self._hand_over()

    def _take_in(self) -> None:
        """The newcomers join the queue; the cancelled leave it."""
        while self._inbox:
            insort(self._queue, self._inbox.popleft())
        for job in [job for job in self._queue if job.cancelled]:
            self._queue.remove(job)
            self._leave_queue(job)
            self._post(job, self._final(job, job.end("cancelled")))

    def _admit(self) -> None:
        """Give a session to the first that wait, as long as there are places and memory."""
        if self._full and self._jobs:
            return
        running: Counter[str] = Counter(job.namespace for job in self._jobs.values())
        for job in self._queue[:LOOKED_AT]:
            if len(self._jobs) >= self.limits.running:
                return
            if job.limits.running is not None and running[job.namespace] >= job.limits.running:
                continue
            members = [m for m in self._batch.running if self._jobs[m.index].namespace == job.namespace]
            session = self._session(job, members)
            if session is None:
                continue  # a running sequence will soon hold more of its prompt
            self._start(job, session)
            running[job.namespace] += 1

    def _session(self, job: Job, members: list[Member[Any]]) -> CachedSession | None:
        if job.kind == "all":  # the logits of every token are wanted, so that every token is read
            return CachedSession(self.model)
        found, _ = self.tree.find(job.namespace, job.tokens)
        return session_for(job.tokens, self.model, members, [found] if found else [])

    def _start(self, job: Job, session: CachedSession) -> None:
        self._queue.remove(job)
        self._leave_queue(job)
        held = len(session.tokens)
        if not job.preempted:
            job.stats.cached_tokens = held
            self.counters.cached_tokens += held
        member: Member[Any] = Member(
            job.number, job, session, job.tokens[held:], job.stats, job.kind,
            cancelled=lambda: job.cancelled, progress=lambda done, total: self._tell(job, "reading", done),
        )  # fmt: skip
        if job.scores is not None:
            member.rows = job.scores.add
        if self._drafting is not None and isinstance(job.state, ReplyState):
            member.drafter = self._drafting.drafter(job.tokens, job.forced, job.namespace)
        self._jobs[job.number] = job
        insort(self._batch.running, member, key=lambda one: self._jobs[one.index])
        self._tell(job, "reading", held)

    def _leave_queue(self, job: Job) -> None:
        with self._changed:
            self._waiting[job.namespace] -= 1
            if not self._waiting[job.namespace]:
                del self._waiting[job.namespace]

    def _affordable(self) -> list[tuple[Member[Any], list[int]]]:
        """The rows of the next pass, with room for their keys and values made before any is allocated.

        Drafts go first, then sessions that only the cache holds, the least recently used before the others;
        then the youngest sequence goes back to the queue.
        """
        drafts = True
        while True:
            rows = self._batch.plan(drafts)
            needed = sum(one.session.session.growth(len(ids)) for one, ids in rows)
            if self.model.kv_bytes + needed <= self.limits.kv_bytes:
                return rows
            if drafts:
                drafts = False
            elif self.tree.evict():
                self.counters.evictions += 1
            elif len(self._jobs) > 1:
                self._preempt(max(self._jobs.values()))
            else:
                return rows  # one sequence alone fits: see `context`

    def _preempt(self, job: Job) -> None:
        """Back to the queue; what was computed of it is let go of when memory is short, and computed
        again.
        """
        member = self._leave_batch(job)
        if job.kind == "last":
            self.tree.insert(job.namespace, member.session)
        if job.scores is not None:
            job.scores.restart()
        job.preempted += 1
        self.counters.preemptions += 1
        self._full = True
        with self._changed:
            self._waiting[job.namespace] += 1
        insort(self._queue, job)

    def _pass(self, rows: list[tuple[Member[Any], list[int]]]) -> None:
        begin = time.perf_counter()
        n_prompt = sum(len(ids) for one, ids in rows if one.reads)
        try:
            with self._turn:
                outcomes = self._batch.run(rows)
                while more := self._batch.follow():
                    outcomes += more
        except (ValueError, MemoryError) as error:
            for one, _ in rows:
                self._fail(self._jobs[one.index], error)
            return
        self.counters.passes += 1
        self.counters.pass_seconds += time.perf_counter() - begin
        self.counters.prompt_tokens += n_prompt
        for member, outcome in outcomes:
            self._settle(member, outcome)

    def _fail(self, job: Job, error: Exception) -> None:
        """The engine could not compute a pass: nobody can say what is in the sessions that were in it."""
        self._leave_batch(job)
        what = (
            "out of memory" if isinstance(error, MemoryError) else str(error).partition(": ")[2] or str(error)
        )
        self._ended(job)
        self._post(job, Update(job.index, error=server_error(what, code="engine_failed"), last=True))

    def _settle(self, member: Member[Any], outcome: Any) -> None:
        """What came of a sequence in a pass goes to its stream; one that has ended
        leaves, its session stays cached.
        """
        job = self._jobs[member.index]
        self.counters.generated_tokens += outcome.token is not None
        if job.first_token is None and not member.reads:
            job.first_token = time.monotonic() - job.arrived
        if job.scores is not None and not member.reads:
            self._post(job, Update(job.index, scores=job.scores.values))
            job.scores, job.kind, member.kind = None, "last", "last"
        if outcome.finish_reason is None:
            self._post(job, Update(job.index, event=outcome))
            return
        del self._jobs[member.index]
        self._ended(job)
        if job.kind == "last":
            self.tree.insert(job.namespace, member.session)
        if member.drafter is not None and self._drafting is not None:
            new = job.tokens[job.stats.cached_tokens :]  # the others are of a text that is there already
            self._drafting.shelf(job.namespace).put(new)
        self._post(job, self._final(job, outcome))

    def _leave_batch(self, job: Job) -> Member[Any]:
        member = next(one for one in self._batch.running if one.index == job.number)
        self._batch.running.remove(member)
        del self._jobs[job.number]
        return member

    def _ended(self, job: Job) -> None:
        self._full = False
        job.ended = time.monotonic() - job.arrived
        self.counters.drafted_tokens += job.stats.drafted_tokens
        self.counters.accepted_tokens += job.stats.accepted_tokens
        self._job_seconds += 0.1 * (job.ended - self._job_seconds)

    # ---- to the streams

    def _final(self, job: Job, outcome: Any) -> Update:
        if job.ended is None:
            job.ended = time.monotonic() - job.arrived
        if isinstance(outcome, Failed):
            return Update(job.index, error=outcome.error, last=True)
        if isinstance(outcome, LastRow):
            row = getattr(outcome, "values", None)
            if row is None:
                return Update(job.index, error=ApiError(499, "cancelled"), last=True)
            return Update(job.index, row=row, last=True)
        job.stats.finish_reason = outcome.finish_reason
        return Update(job.index, event=outcome, last=True)

    def _tell_positions(self) -> None:
        """Say to those that wait where they stand in the queue."""
        for position, job in enumerate(self._queue, 1):
            if job.position != position:
                job.position = position
                self._tell(job, "queued", 0)

    def _tell(self, job: Job, stage: Stage, done: int) -> None:
        """Say where a sequence is before its first token, if anybody looks."""
        if job.stream.whole:
            return
        ms = 1000 * (time.monotonic() - job.arrived)
        progress = Progress(stage, job.position, len(job.prompt), job.stats.cached_tokens, done, ms)
        self._post(job, Update(job.index, progress=progress))

    def _post(self, job: Job, update: Update) -> None:
        self._posts.append((job.stream, update))

    def _hand_over(self) -> None:
        """All that came since the last time, with one wake-up of each event loop."""
        loops: dict[asyncio.AbstractEventLoop, dict[Stream, list[Update]]] = {}
        for stream, update in self._posts:
            stream.held.append(update)
            if update.last or not stream.whole:
                loops.setdefault(stream.loop, {}).setdefault(stream, []).extend(stream.held)
                stream.held.clear()
        self._posts.clear()
        for loop, streams in loops.items():
            try:
                loop.call_soon_threadsafe(_put_all, streams)
            except RuntimeError:  # the loop is closed: nobody listens
                for stream in streams:
                    for job in stream.jobs:
                        job.cancelled = True


def _put_all(streams: dict[Stream, list[Update]]) -> None:
    for stream, updates in streams.items():
        stream.put(updates)
