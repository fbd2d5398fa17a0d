"""What a request comes down to, whichever surface it came by, and its result while it comes.

Ask       prompts of token ids and what is wanted of them
Update    what a pass of the engine brought one of its sequences
Stream    the updates of all its sequences, for the event loop
Job       one of the sequences, for the engine thread
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ..drivers.batch import LastRow
from ..drivers.reply import Event, FinishReason, ReplyState, Stats
from ..drivers.sampler import SamplingOptions
from ..drivers.schema import GrammarError
from ..drivers.score import PromptScores, TokenScore
from ..engine import Logits
from ..kernels.draw import Draw, NoTokenError
from .errors import ApiError, grammar_error, server_error

if TYPE_CHECKING:
    from ..drivers.grammar import Grammar
    from ..text.tools import ToolSet

Stage = Literal["queued", "reading"]


@dataclass(frozen=True)
class Ask:
    """Sequences that share a key, a priority and the way their tokens are chosen.

    prompts: token ids, one list a sequence; a prompt that is wanted n times is there n times. origin: the
    field of the request that they come from, which an error names. max_tokens, sampling, stop, logprobs,
    thinking_budget: see Model.generate. seeds: one for each sequence, in place of the sampling's. grammar:
    what each reply must follow. tools: whose calls are looked for in each reply. bare: a reply is text alone,
    in which no tag means anything. echo: None, or how many of the most likely tokens to give with the
    log-probability of each token of the prompts. vectors: the final hidden state of each prompt is wanted;
    rows: the logits after each prompt; either way there is no reply. namespace: of the prefix cache, the name
    of the key. priority: lower comes sooner.
    """

    prompts: Sequence[list[int]]
    max_tokens: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seeds: Sequence[int] | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    tools: ToolSet | None = None
    thinking_budget: int | None = None
    echo: int | None = None
    vectors: bool = False
    rows: bool = False
    namespace: str = ""
    priority: int = 0
    origin: str = "messages"
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a sequence is before its first token.

    stage: whether it waits or its prompt is read. position: in the queue, from 1. total, cached, processed:
    tokens of the prompt in all, found in the cache, and read including those. ms: since the request came.
    """

    stage: Stage
    position: int
    total: int
    cached: int
    processed: int
    ms: float


@dataclass(frozen=True, slots=True)
class Update:
    """What came of one sequence. index: which. The last update of a sequence has `last`.

    event: a token of a reply. row: with Ask.vectors (dim,), with Ask.rows (vocab_size,).
    scores: with Ask.echo, before the first event. error: the engine or the grammar failed.
    """

    index: int
    event: Event | None = None
    progress: Progress | None = None
    row: NDArray[np.float32] | None = None
    scores: list[TokenScore] | None = None
    error: ApiError | None = None
    last: bool = False


class Stream(AsyncIterator[Update]):
    """The updates of an Ask as they come; it ends after the last one of every sequence.

    An engine that fails, or a grammar, raises its ApiError here. stats: of each sequence. whole: the
    updates of a sequence may come together, at its end, and none of its progress. Belongs to the event loop
    that made it.
    """

    def __init__(self, n: int, whole: bool = False) -> None:
        self.loop = asyncio.get_running_loop()
        self.whole = whole
        self.held: list[Update] = []  # not yet handed over; the engine thread's
        self.jobs: list[Job] = []
        self._updates: deque[Update] = deque()
        self._changed = asyncio.Event()
        self._unfinished = n
        self.failed: set[int] = set()  # which sequences ended in an error

    @property
    def stats(self) -> list[Stats]:
        """Counts and times of each sequence, complete when it has ended."""
        return [job.stats for job in self.jobs]

    @property
    def ended(self) -> bool:
        """Whether every sequence has had its last update."""
        return self._unfinished == 0

    def put(self, updates: Sequence[Update]) -> None:
        """Take in what a pass brought; called in the stream's event loop."""
        self._updates.extend(updates)
        self._unfinished -= sum(update.last for update in updates)
        self.failed.update(update.index for update in updates if update.error is not None)
        self._changed.set()

    def cancel(self) -> None:
        """End every sequence after the pass under way, whatever its state. From any
        thread, as often as one likes.
        """
        for job in self.jobs:
            job.cancel()

    async def __anext__(self) -> Update:
        while not self._updates:
            if self.ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        update = self._updates.popleft()
        if update.error is not None:
            self.cancel()
            raise update.error
        return update

    def ready(self) -> list[Update]:
        """The updates that can be had without waiting, beside the one that was just awaited."""
        found = []
        while self._updates and self._updates[0].error is None:
            found.append(self._updates.popleft())
        return found


# ----------------------------------------------------------------------------
# A sequence of a stream


@dataclass(frozen=True)
class KeyLimits:
    """What one key may have at once; None: as much as all together."""

    running: int | None = None
    queue: int | None = None


@dataclass
class Failed:
    """The outcome of a sequence whose next token could not be chosen."""

    error: ApiError
    token: int | None = None
    finish_reason: FinishReason | None = "cancelled"


@dataclass(eq=False)
class Job:
    """One sequence of a stream, from its arrival to its last update; to a Batch it is a State.

    number: in order of arrival. state: what makes a reply of logits; a LastRow where there is none to make.
    kind: what is wanted of the rows of the prompt (see Session.forward).
    """

    stream: Stream
    index: int
    prompt: list[int]
    state: ReplyState | LastRow
    kind: Logits
    namespace: str
    priority: int
    limits: KeyLimits
    scores: PromptScores | None = None
    number: int = 0
    stats: Stats = field(default_factory=Stats)
    arrived: float = field(default_factory=time.monotonic)
    first_token: float | None = None  # seconds after `arrived`
    ended: float | None = None  # likewise
    preempted: int = 0
    position: int = 0  # in the queue, as last told
    wake: Callable[[], None] = lambda: None  # its scheduler, which looks for what was cancelled
    cancelled: bool = False
    _fault: ValueError | None = None  # what begin() found, for take() to tell

    def __lt__(self, other: Job) -> bool:
        """Whether it comes sooner."""
        return (self.priority, self.number) < (other.priority, other.number)

    @property
    def tokens(self) -> list[int]:
        """The prompt and what has been sampled after it."""
        return self.prompt + self.state.tokens if isinstance(self.state, ReplyState) else self.prompt

    @property
    def max_tokens(self) -> int:
        """How many rows its state will take at most."""
        return self.state.max_tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the reply, if one has."""
        return self.state.stop_string if isinstance(self.state, ReplyState) else None

    def cancel(self) -> None:
        """End it after the pass under way. From any thread."""
        self.cancelled = True
        self.wake()

    def forced(self) -> Sequence[int]:
        return self.state.forced()

    def prepare(self) -> None:
        self.state.prepare()

    def begin(self, logits: NDArray[np.float32]) -> Draw | None:
        if self.max_tokens == 0:
            return None
        try:
            return self.state.begin(logits)
        except ValueError as error:  # which take() is to tell
            self._fault = error
            return None

    def take(self, logits: NDArray[np.float32]) -> Event | LastRow | Failed:
        if self.max_tokens == 0:  # the prompt alone was to be read
            return self.state.end("length")
        try:
            if self._fault is not None:
                raise self._fault
            return self.state.take(logits)
        except (GrammarError, NoTokenError) as error:
            return Failed(grammar_error(str(error)))
        except ValueError as error:  # it is this sequence's fault alone
            return Failed(server_error(str(error)))

    def end(self, reason: FinishReason) -> Event | LastRow | Failed:
        return self.state.end(reason)
