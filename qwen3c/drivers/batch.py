"""Sequences that share forward passes: the one loop that asks a model for logits, token by token.

    CachedSession    a session that knows its tokens
    Batch            sequences in ragged passes: pieces of prompts, single tokens and drafts, mixed freely
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
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..kernels.draw import Draw, draw
from .draft import Drafter, Drafting
from .reply import FinishReason, Stats

if TYPE_CHECKING:
    from ..engine import Engine, Logits, Session

FIRST_PIECE = 64  # tokens of prompts forwarded in the first pass
# how long a pass with a piece of a prompt should take; a cancel or a progress line waits that long
PIECE_SECONDS = 0.5
LARGEST_PIECE = 256  # tokens; the engine computes no more at once
LARGEST_ALL = (
    64  # tokens of a sequence that wants the logits of all: each row of them is as long as the vocabulary
)
RUNNING = 16  # sequences at once, where the caller has no wish
KEPT = 4  # sessions of sequences that ended, kept for what later prompts have in common with them
KINDS: tuple[Logits, ...] = ("last", "hidden", "all")
WORTH_WAITING = 32  # tokens in common with a prompt that is being read: fewer are computed twice


# ----------------------------------------------------------------------------
# Sessions that know their tokens


class CachedSession:
    """A session that knows its tokens, so that a prompt costs only what differs from what went before.

    tokens: those whose keys and values the session holds; behind them it may hold those of a draft or of an
    interrupted pass, which are forgotten before it goes on. context: how many it can hold. Only the newest
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
        """Keep the longest common prefix with `prompt`, but for its last token; return its length."""
        n = min(common_prefix(self.tokens, prompt), len(prompt) - 1)  # the last token's logits are wanted
        self.rewind(n)
        return n

    def positions(self, n: int) -> range:
        """Those of the next n tokens."""
        return range(len(self.tokens), len(self.tokens) + n)

    def fork(self) -> CachedSession:
        """A second session with the same tokens; it takes no memory until one of the two goes on."""
        other = CachedSession(self.model, session=self.session.fork())
        other.tokens = self.tokens.copy()
        other.rewind(len(other.tokens))
        return other

    def rewind(self, position: int) -> None:
        """Forget everything from `position` on."""
        del self.tokens[position:]
        self.session.rewind(position)


def forward(
    model: Engine,
    rows: Sequence[tuple[CachedSession, list[int]]],
    kind: Logits = "last",
    drafted: Sequence[int] = (),
) -> Sequence[NDArray[np.float32]]:
    """One pass that appends tokens to each session; returns each session's row, by `kind` (see
    Session.forward).

    drafted: of each session, how many of its ids, the last ones, are a draft; with any, the logits of those
    and of the one before them are returned, (1 + drafted, vocab_size).
    """
    drafted = drafted if any(drafted) else ()
    outputs = model.forward(
        [(cached.session, ids) for cached, ids in rows], [1 + n for n in drafted] if drafted else kind
    )
    for i, (cached, ids) in enumerate(rows):
        # an interrupt before this line leaves the session longer than `tokens`
        cached.tokens += ids[: len(ids) - drafted[i]] if drafted else ids
    if not drafted:
        return outputs
    return [output if n else output[0] for output, n in zip(outputs, drafted, strict=True)]


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
    """What a sequence does with its logits."""

    @property
    def max_tokens(self) -> int:
        """How many rows it will take at most."""

    def forced(self) -> Sequence[int]:
        """The tokens that will most likely come whatever the logits are; none where that cannot be known."""

    def prepare(self) -> None:
        """A pass begins that will end in take(): what can be computed beside it may start now."""

    def begin(self, logits: NDArray[np.float32]) -> Draw | None:
        """take() comes with these logits, of which it draws a token: the draw, to be made beside others'.

        None if there is nothing to draw. Called only where there are others; take() draws by itself else.
        """

    def take(self, logits: NDArray[np.float32]) -> OutcomeT_co:
        """Take the row (logits or hidden state) after all tokens so far."""

    def end(self, reason: FinishReason) -> OutcomeT_co:
        """End the sequence for a reason that does not come from its logits, such as a cancel."""


@dataclass(eq=False)
class Member(Generic[OutcomeT]):
    """A sequence in a batch: its session, the tokens that the session has still to read, and its state.

    index: the caller's own number for it. kind: what of each row is wanted (see Session.forward).
    reads: whether it is still in its prompt. cancelled: asked before each pass. progress: told
    (tokens read, tokens in all) of the prompt. rows: with kind "all", told the rows of each piece of
    the prompt, (tokens, vocab_size). drafter: what guesses at its tokens; None for nothing. draft: the
    guesses that the last pass checks and that nothing was compared with yet; checks: the row after each.
    """

    index: int
    state: State[OutcomeT]
    session: CachedSession
    waiting: list[int]
    stats: Stats
    kind: Logits = "last"
    reads: bool = True
    cancelled: Callable[[], bool] = lambda: False
    progress: Callable[[int, int], None] = lambda done, total: None
    rows: Callable[[NDArray[np.float32]], None] = lambda rows: None
    drafter: Drafter | None = None
    draft: list[int] = field(init=False, default_factory=list)
    checks: list[NDArray[np.float32]] = field(init=False, default_factory=list)
    claim: int = field(init=False)

    def __post_init__(self) -> None:
        self.claim = self.session.begin_reply()

    def check_claim(self) -> None:
        """ValueError if a newer reply goes on in the session."""
        if self.session.n_replies != self.claim:
            raise ValueError("another reply goes on in the session of this one, which cannot go on itself")

    @property
    def room(self) -> int:
        """How many tokens may come after its newest one."""
        tokens = self.state.max_tokens - self.stats.generated_tokens
        return min(tokens, self.session.context - len(self.session.tokens)) - 1

    def go_on(self, token: int) -> None:
        """`token` has come: the draft has it next, or what is left of the draft was wrong."""
        if self.drafter is not None:
            self.drafter.add(token)
        if self.draft and self.draft[0] == token:
            self.stats.accepted_tokens += 1
            return
        self.forget_draft()
        self.waiting = [token]

    def forget_draft(self) -> None:
        """Nothing more is compared with the draft."""
        if self.draft:
            self.draft, self.checks = [], []
            if self.session.n_replies == self.claim:
                self.session.rewind(len(self.session.tokens))


class Pace(Protocol):
    """How much of the prompts each pass takes."""

    def shares(self, left: Sequence[range], n_decoding: int) -> Sequence[int]:
        """Tokens for each prompt in the next pass; left: the positions that each has still to read, the first
        come first.
        """

    def learn(self, seconds: float, read: Sequence[range], n_decoding: int) -> None:
        """A pass took so long, with these positions of prompts and one token of n_decoding sequences."""


class Pieces:
    """Prompts in the order they came, in pieces as large as a pass of about PIECE_SECONDS allows."""

    def __init__(self) -> None:
        self._piece = FIRST_PIECE

    def shares(self, left: Sequence[range], n_decoding: int) -> Sequence[int]:
        """The first prompts get all there is."""
        before = accumulate(map(len, left), initial=0)
        return [max(min(len(one), self._piece - n), 0) for one, n in zip(left, before, strict=False)]

    def learn(self, seconds: float, read: Sequence[range], n_decoding: int) -> None:
        """Only passes with prompts count."""
        if read and seconds < PIECE_SECONDS / 2:
            self._piece = min(2 * self._piece, LARGEST_PIECE)
        elif read and seconds > 2 * PIECE_SECONDS:
            self._piece = max(self._piece // 2, 1)


class Batch(Generic[OutcomeT]):
    """The sequences that are on their way, and the passes that take them further.

    A pass takes one token of every sequence that decodes, with a draft of what may follow, and as many tokens
    of prompts as the pace allows. A Batch is driven by step(); or by plan(), run() and follow(), for a caller
    who has to make room for a pass first. drafting: what makes the drafts; None for none.
    """

    def __init__(self, model: Engine, pace: Pace | None = None, drafting: Drafting | None = None) -> None:
        self._model = model
        self._pace = Pieces() if pace is None else pace
        self._drafting = drafting
        self.running: list[Member[OutcomeT]] = []

    def step(self) -> list[tuple[Member[OutcomeT], OutcomeT]]:
        """One token of each sequence that has one: of the draft that the last pass checked, else by a pass.

        Sequences that ended leave the batch.
        """
        return self.drop_cancelled() + (self.follow() or self.run(self.plan()))

    def drop_cancelled(self) -> list[tuple[Member[OutcomeT], OutcomeT]]:
        """End the sequences whose caller has asked for it."""
        cancelled = [one for one in self.running if one.cancelled()]
        for one in cancelled:
            self.running.remove(one)
            one.forget_draft()
        return [(one, one.state.end("cancelled")) for one in cancelled]

    def plan(self, drafts: bool = True) -> list[tuple[Member[OutcomeT], list[int]]]:
        """The tokens of the next pass, by sequence; those beyond what it waits for are a draft.

        drafts: whether there may be any.
        """
        readers = [one for one in self.running if one.reads]
        n_decoding = len(self.running) - len(readers)
        left = [one.session.positions(len(one.waiting)) for one in readers]
        share = {id(one): n for one, n in zip(readers, self._pace.shares(left, n_decoding), strict=True)}
        rows = []
        for one in self.running:
            n = share.get(id(one), 1)
            ids = one.waiting[: min(n, LARGEST_ALL) if one.kind == "all" else n]
            if ids:
                rows.append((one, ids))
        if drafts and self._drafting and any(one.drafter and one.drafter.guesses() for one, _ in rows):
            return self._with_drafts(rows, self._drafting)
        return rows

    def _with_drafts(
        self, rows: list[tuple[Member[OutcomeT], list[int]]], drafting: Drafting
    ) -> list[tuple[Member[OutcomeT], list[int]]]:
        """`rows`, with drafts as far as they are worth it, in place of as many tokens of prompts."""
        n_prompt = sum(len(ids) for one, ids in rows if one.reads)
        n_decoding = sum(not one.reads for one, _ in rows)
        asked = [one for one, _ in rows if one.drafter is not None and not one.reads and one.kind == "last"]
        made = drafting.drafts(
            [(one.drafter, one.room) for one in asked if one.drafter], n_decoding, n_prompt
        )
        size = self._model.config.vocab_size
        draft = {
            id(one): [*takewhile(lambda id: 0 <= id < size, guesses[: max(one.room, 0)])]
            for one, guesses in zip(asked, made, strict=True)
        }
        n_drafted, planned = sum(map(len, draft.values())), []
        for one, ids in rows:
            cut = min(n_drafted, len(ids) - 1) if one.reads else 0
            n_drafted -= cut
            planned.append((one, ids[: len(ids) - cut] + draft.get(id(one), [])))
        return planned

    def run(
        self, rows: Sequence[tuple[Member[OutcomeT], list[int]]]
    ) -> list[tuple[Member[OutcomeT], OutcomeT]]:
        """One pass over `rows`: what came of the sequences that have then read all they had."""
        if not rows:
            return []
        ready: list[tuple[Member[OutcomeT], NDArray[np.float32]]] = []
        for one, ids in rows:
            one.check_claim()
            if len(ids) >= len(one.waiting):
                one.state.prepare()
        read = [one.session.positions(len(ids)) for one, ids in rows if one.reads]
        begin = time.perf_counter()
        outputs = self._forward(rows)
        seconds = time.perf_counter() - begin
        self._pace.learn(seconds, read, sum(not one.reads for one, _ in rows))
        if self._drafting and not read:
            self._drafting.costs.learn(sum(len(ids) for _, ids in rows), seconds)
        for (one, ids), output in zip(rows, outputs, strict=True):
            one.draft = ids[len(one.waiting) :]
            one.waiting = one.waiting[len(ids) :]
            if one.reads:
                one.stats.prefill_seconds += seconds
                one.stats.read_tokens += len(ids)
                one.progress(len(one.session.tokens), len(one.session.tokens) + len(one.waiting))
            else:
                one.stats.decode_seconds += seconds
                one.stats.decode_passes += 1
                one.stats.drafted_tokens += len(one.draft)
            if one.kind == "all":
                one.rows(output)
                output = output[-1]
            if one.draft:
                output, *one.checks = output
            if not one.waiting:
                ready.append((one, output))
        return self._take_all(ready)

    def follow(self) -> list[tuple[Member[OutcomeT], OutcomeT]]:
        """What comes of the sequences whose newest token is the next of their drafts; [] if there are none.

        No pass is needed for it: the last one has checked the drafts.
        """
        ready = []
        for one in self.running:
            if one.draft:
                one.check_claim()
                one.session.tokens.append(one.draft.pop(0))
                ready.append((one, one.checks.pop(0)))
        return self._take_all(ready)

    def _forward(self, rows: Sequence[tuple[Member[OutcomeT], list[int]]]) -> list[NDArray[np.float32]]:
        """What is wanted of each of the rows: a pass through the layers for each kind."""
        outputs: dict[int, NDArray[np.float32]] = {}
        for kind in KINDS:
            chosen = [(one, ids) for one, ids in rows if one.kind == kind]
            if chosen:
                drafted = [0 if one.reads else len(ids) - len(one.waiting) for one, ids in chosen]
                results = forward(self._model, [(one.session, ids) for one, ids in chosen], kind, drafted)
                outputs |= {id(one): output for (one, _), output in zip(chosen, results, strict=True)}
        return [outputs[id(one)] for one, _ in rows]

    def _take_all(
        self, ready: Sequence[tuple[Member[OutcomeT], NDArray[np.float32]]]
    ) -> list[tuple[Member[OutcomeT], OutcomeT]]:
        """The outcomes of sequences whose rows are there; the draws of several go on at once."""
        begin = time.perf_counter()
        cancelled = {id(one) for one, _ in ready if one.cancelled()}  # while their prompts were read
        if len(ready) > 1:
            begun = [one.state.begin(row) for one, row in ready if id(one) not in cancelled]
            draw([one for one in begun if one is not None], self._model.threads)
        seconds = time.perf_counter() - begin
        outcomes = []
        for one, row in ready:
            begin = time.perf_counter()
            outcome = one.state.end("cancelled") if id(one) in cancelled else one.state.take(row)
            one.reads = False
            one.stats.generated_tokens += outcome.token is not None
            if outcome.finish_reason is None and outcome.token is not None:
                one.go_on(outcome.token)
            else:
                self.running.remove(one)
                one.forget_draft()
            one.stats.decode_seconds += seconds + time.perf_counter() - begin
            outcomes.append((one, outcome))
        return outcomes


# ----------------------------------------------------------------------------
# Many sequences


def drive(
    model: Engine,
    sequences: Iterable[tuple[list[int], State[OutcomeT]]],
    running: int,
    kind: Logits = "last",
    drafting: Drafting | None = None,
) -> Iterator[tuple[int, OutcomeT]]:
    """The outcomes of many sequences as they come, each with the number of its sequence.

    sequences: (prompt, state) pairs, started in order as soon as fewer than `running` are on their way. A
    common beginning of two prompts is computed once, and its session forked. drafting: see Batch.
    """
    batch: Batch[OutcomeT] = Batch(model, drafting=drafting)
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
            session = session_for(prompt, model, batch.running, ended)
            if session is None:
                break
            rest = prompt[len(session.tokens) :]
            stats = Stats(prompt_tokens=len(prompt), cached_tokens=len(session.tokens))
            drafter = drafting.drafter(prompt, state.forced) if drafting else None
            batch.running.append(Member(index, state, session, rest, stats, kind, drafter=drafter))
            following = next(waiting, None)
        for one, outcome in batch.step():
            if outcome.finish_reason is not None:
                ended.append(one.session)
            yield one.index, outcome


def session_for(
    prompt: list[int], model: Engine, running: Iterable[Member[Any]], others: Iterable[CachedSession]
) -> CachedSession | None:
    """The session to read `prompt` in: a fork of the one with the longest common prefix, else a new one.

    None if a running sequence will soon hold a longer prefix: the prompt then waits for it.
    """
    n_useful = len(prompt) - 1  # the last token's logits are wanted
    best, n_best, n_coming = None, 0, 0
    sessions = [*others]
    for one in running:
        sessions.append(one.session)
        n_held = common_prefix(one.session.tokens, prompt)
        if one.reads and n_held == len(one.session.tokens):
            n_coming = max(n_coming, n_held + common_prefix(one.waiting, prompt[n_held:]))
    for session in sessions:
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


def alike_together(prompts: Sequence[list[int]]) -> list[int]:
    """The order, as indices, in which prompts with a long common beginning follow each other: drive() keeps
    few sessions of those that ended. Prompts that share little stay as they are.
    """
    beginnings = [tuple(prompt[:WORTH_WAITING]) for prompt in prompts]
    first: dict[tuple[int, ...], int] = {}
    for i, beginning in enumerate(beginnings):
        first.setdefault(beginning, i)
    return sorted(range(len(prompts)), key=lambda i: (first[beginnings[i]], prompts[i]))


class LastRow:
    """A State that keeps the row after its prompt and ends there; it is its own Outcome."""

    token: int | None = None
    finish_reason: FinishReason | None = "stop"
    max_tokens = 1
    values: NDArray[np.float32]

    def forced(self) -> Sequence[int]:
        """No tokens follow."""
        return ()

    def prepare(self) -> None:
        """There is nothing to compute beside a pass."""

    def begin(self, logits: NDArray[np.float32]) -> None:
        """There is nothing to draw."""

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
