"""Sequences that share forward passes: the one loop that asks a model for logits, token by token.

    CachedSession    a session that knows its tokens
    Batch            sequences in ragged passes: pieces of prompts and single tokens, mixed freely
    drive            many sequences, `running` of them at once; common beginnings are computed once
    last_rows        the row of logits, or the hidden state, at the end of each of many prompts

This module does not know what a sequence does with its logits: a ReplyState samples a token, a LastRow keeps
the row.
What a sequence computes does not depend on the others, to the bit.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .reply import FinishReason, Stats

if TYPE_CHECKING:
    from ..engine import Engine, Logits, Session

FIRST_PIECE = 64  # tokens of prompts forwarded in the first pass
# how long a pass with a piece of a prompt should take; a cancel or a progress line waits that long
PIECE_SECONDS = 0.5
LARGEST_PIECE = 256  # tokens; the engine computes no more at once
RUNNING = 16  # default for how many sequences run at once
KEPT = 4  # ended sessions that stay, because later prompts may begin as they do
# a prompt waits for another one that is being read if they share so many tokens; fewer are computed twice
WORTH_WAITING = 32


# ----------------------------------------------------------------------------
# Sessions that know their tokens


class CachedSession:
    """A session that knows its tokens, so that a prompt costs only what differs from what went before.

    tokens: those whose keys and values the session holds. context: how many it can hold. Only the newest
    reply may go on in a session: asking an older one for more is a ValueError.
    """

    def __init__(self, model: Engine, context: int | None = None, *, session: Session | None = None) -> None:
        self.model = model
        self.session = model.session(context) if session is None else session
        self.context = self.session.context
        self.tokens: list[int] = []
        self.n_replies = 0

    def __repr__(self) -> str:
        return (
            f"<CachedSession of {self.model.metadata['name']!r}, {len(self.tokens)} of {self.context} tokens>"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a CachedSession cannot be pickled or copied: its cache belongs to its model's process"
        )

    def begin_reply(self) -> int:
        """Let a new reply go on in the session; returns the number of the reply."""
        self.n_replies += 1
        return self.n_replies

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the longest common prefix with `prompt`, but for its last token; return its length.

        Positions of the session beyond `tokens`, left by an interrupted pass, are forgotten too.
        """
        n = min(common_prefix(self.tokens, prompt), len(prompt) - 1)  # the last token's logits are wanted
        self.rewind(n)
        return n

    def fork(self) -> CachedSession:
        """A second session with the same tokens; it takes no memory until one of the two goes on."""
        other = CachedSession(self.model, session=self.session.fork())
        other.tokens = self.tokens.copy()
        return other

    def rewind(self, position: int) -> None:
        """Forget everything from `position` on."""
        del self.tokens[position:]
        self.session.rewind(position)


def forward(
    model: Engine, rows: Sequence[tuple[CachedSession, list[int]]], kind: Logits = "last"
) -> Sequence[NDArray[np.float32]]:
    """One pass that appends tokens to each session; returns each session's row, by `kind` (see
    Session.forward).
    """
    outputs = model.forward([(cached.session, ids) for cached, ids in rows], kind)
    for cached, ids in rows:
        # an interrupt before this line leaves the session longer than `tokens`: see reuse()
        cached.tokens += ids
    return outputs


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists have in common from their beginning."""
    limit = min(len(a), len(b))
    # bisect the first length at which the slices differ: slices compare at the speed of C
    return bisect_left(range(limit), True, key=lambda n: a[: n + 1] != b[: n + 1])


# ----------------------------------------------------------------------------
# Sequences that share passes


class Outcome(Protocol):
    """What a State makes of one row of logits: the token to go on with, or the reason to end."""

    @property
    def token(self) -> int | None:
        """The token to go on with, unless there is a finish_reason."""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends here; None if it goes on."""


OutcomeT = TypeVar("OutcomeT", bound=Outcome)
OutcomeT_co = TypeVar("OutcomeT_co", bound=Outcome, covariant=True)


class State(Protocol[OutcomeT_co]):
    """What a sequence does with its logits. max_tokens: how many rows it will take at most."""

    max_tokens: int

    def take(self, logits: NDArray[np.float32]) -> OutcomeT_co:
        """Take the row (logits or hidden state) after all tokens so far."""

    def end(self, reason: FinishReason) -> OutcomeT_co:
        """End the sequence for a reason that does not come from its logits, such as a cancel."""


@dataclass(eq=False)
class Member(Generic[OutcomeT]):
    """A sequence in a batch: its session, the tokens that the session has still to read, and its state.

    index: the caller's number for the sequence. reads: whether its prompt is still being read. cancelled:
    called before each pass. progress: called with (tokens read, tokens in all) of the prompt.
    """

    index: int
    state: State[OutcomeT]
    session: CachedSession
    waiting: list[int]
    stats: Stats
    reads: bool = True
    cancelled: Callable[[], bool] = lambda: False
    progress: Callable[[int, int], None] = lambda done, total: None
    claim: int = field(init=False)

    def __post_init__(self) -> None:
        self.claim = self.session.begin_reply()

    def check_claim(self) -> None:
        """ValueError if a newer reply goes on in the session."""
        if self.session.n_replies != self.claim:
            raise ValueError("another reply goes on in the session of this one, which cannot go on itself")


class Batch(Generic[OutcomeT]):
    """The sequences that are on their way, and the passes that take them further.

    A pass takes one token of every sequence that decodes, then as many prompt tokens as the pace allows,
    those of the sequences that came first.
    """

    def __init__(self, model: Engine, kind: Logits = "last") -> None:
        self._model = model
        self._kind = kind
        self._piece = FIRST_PIECE
        self.running: list[Member[OutcomeT]] = []

    def step(self) -> list[tuple[Member[OutcomeT], OutcomeT]]:
        """One pass; returns the outcomes of the sequences whose logits it computed. Ended ones leave the
        batch.
        """
        outcomes = [(one, one.state.end("cancelled")) for one in self.running if one.cancelled()]
        for one, _ in outcomes:
            self.running.remove(one)
        rows = self._rows()
        if rows:
            outcomes += self._pass(rows)
        return outcomes

    def _rows(self) -> list[tuple[Member[OutcomeT], list[int]]]:
        """The tokens of the next pass, by sequence."""
        rows, room = [], self._piece
        for one in self.running:
            ids = one.waiting[:room] if one.reads else one.waiting
            if ids:
                one.check_claim()
                rows.append((one, ids))
                room -= len(ids) * one.reads
        return rows

    def _pass(
        self, rows: list[tuple[Member[OutcomeT], list[int]]]
    ) -> list[tuple[Member[OutcomeT], OutcomeT]]:
        begin = time.perf_counter()
        outputs = forward(self._model, [(one.session, ids) for one, ids in rows], self._kind)
        seconds = time.perf_counter() - begin
        if any(one.reads for one, _ in rows):
            self._adapt(seconds)
        outcomes = []
        for (one, ids), row in zip(rows, outputs, strict=True):
            one.waiting = one.waiting[len(ids) :]
            if one.reads:
                one.stats.prefill_seconds += seconds
                one.stats.read_tokens += len(ids)
                one.progress(len(one.session.tokens), len(one.session.tokens) + len(one.waiting))
            else:
                one.stats.decode_seconds += seconds
            if not one.waiting:
                outcomes += self._take(one, row)
        return outcomes

    def _take(
        self, one: Member[OutcomeT], row: NDArray[np.float32]
    ) -> list[tuple[Member[OutcomeT], OutcomeT]]:
        if one.cancelled():  # cancelled while its prompt was read
            self.running.remove(one)
            return [(one, one.state.end("cancelled"))]
        begin = time.perf_counter()
        outcome = one.state.take(row)
        one.reads = False
        one.stats.generated_tokens += outcome.token is not None
        if outcome.finish_reason is None and outcome.token is not None:
            one.waiting = [outcome.token]
        else:
            self.running.remove(one)
        one.stats.decode_seconds += time.perf_counter() - begin
        return [(one, outcome)]

    def _adapt(self, seconds: float) -> None:
        """Choose the size of the next prompt piece, so that its pass takes about PIECE_SECONDS."""
        if seconds < PIECE_SECONDS / 2:
            self._piece = min(2 * self._piece, LARGEST_PIECE)
        elif seconds > 2 * PIECE_SECONDS:
            self._piece = max(self._piece // 2, 1)


# ----------------------------------------------------------------------------
# Many sequences


def drive(
    model: Engine,
    sequences: Iterable[tuple[list[int], State[OutcomeT]]],
    running: int,
    kind: Logits = "last",
) -> Iterator[tuple[int, OutcomeT]]:
    """The outcomes of many sequences as they come, each with the number of its sequence.

    sequences: (prompt, state) pairs, started in order as soon as fewer than `running` are on their way. A
    common beginning of two prompts is computed once, and its session forked.
    """
    batch: Batch[OutcomeT] = Batch(model, kind)
    ended: deque[CachedSession] = deque(maxlen=KEPT)
    waiting = enumerate(sequences)
    following = next(waiting, None)
    while following or batch.running:
        while following and len(batch.running) < running:
            index, (prompt, state) = following
            if state.max_tokens == 0:
                yield index, state.end("length")
                following = next(waiting, None)
                continue
            session = _session_for(prompt, model, batch, ended)
            if session is None:
                break
            rest = prompt[len(session.tokens) :]
            stats = Stats(prompt_tokens=len(prompt), cached_tokens=len(session.tokens))
            batch.running.append(Member(index, state, session, rest, stats))
            following = next(waiting, None)
        for one, outcome in batch.step():
            if outcome.finish_reason is not None:
                ended.append(one.session)
            yield one.index, outcome


def _session_for(
    prompt: list[int], model: Engine, batch: Batch[Any], ended: Iterable[CachedSession]
) -> CachedSession | None:
    """The session to read `prompt` in: a fork of the one with the longest common prefix, else a new one.

    None if a running sequence will soon hold a longer prefix: the prompt then waits for it.
    """
    n_useful = len(prompt) - 1  # the last token's logits are wanted
    best, n_best, n_coming = None, 0, 0
    for one in batch.running:
        n_held = common_prefix(one.session.tokens, prompt)
        if one.reads and n_held == len(one.session.tokens):
            n_coming = max(n_coming, n_held + common_prefix(one.waiting, prompt[n_held:]))
    for session in (*(one.session for one in batch.running), *ended):
        n_held = min(common_prefix(session.tokens, prompt), n_useful)
        if n_held > n_best:
            best, n_best = session, n_held
    if min(n_coming, n_useful) >= n_best + WORTH_WAITING:
        return None
    if best is None:
        return CachedSession(model)
    session = best.fork()
    session.reuse(prompt)
    return session


class LastRow:
    """A State that keeps the row after its prompt and ends there; it is its own Outcome."""

    token: int | None = None
    finish_reason: FinishReason | None = "stop"
    max_tokens = 1
    values: NDArray[np.float32]

    def take(self, logits: NDArray[np.float32]) -> LastRow:
        """Keep the row."""
        self.values = logits
        return self

    def end(self, reason: FinishReason) -> LastRow:
        """Never called: nothing cancels these sequences."""
        return self


def last_rows(model: Engine, prompts: Sequence[list[int]], kind: Logits) -> list[NDArray[np.float32]]:
    """What Session.forward returns of each prompt: its last token's logits, or final hidden state."""
    states = [LastRow() for _ in prompts]
    for _ in drive(model, zip(prompts, states, strict=True), LARGEST_PIECE, kind):
        pass
    return [state.values for state in states]
