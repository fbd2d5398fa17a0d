"""Drafts: guesses at the next tokens of a sequence, which a pass checks beside its newest one.

    Drafting    what drafts are made for the sequences of one model, and how long they are
    Drafter     the guesses at one sequence: what came after the same words before, in its own text or in
                others; what a smaller model says; what a grammar leaves no choice of
    Shelf       texts that ended, which may come again; kept apart by whose they are
    Costs       what passes of so many rows cost here, in passes of one row
    Chances     how often guesses of each kind were right

A draft changes no token: a row's logits do not depend on what else is in its pass, and a token's random
number follows from its position, so a guess is right exactly if it is the token that would have come. A wrong
one costs its row. So a draft is as long as is expected to win by what was measured. What a text guesses is
compared with what comes whether or not a pass checks it, so that nothing is risked to learn how good it is.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..engine import Engine
from .lookup import BETWEEN, LONGEST, MOST, Lookup

if TYPE_CHECKING:
    from ..engine import Session
    from ..format import ModelFile

LONGEST_DRAFT = 15  # tokens
MOST_DRAFTED = 48  # rows of drafts in a pass, of all sequences
WIN = 1.02  # a draft must promise so many times the tokens per second
LEAST = 0.05  # chance of a guess that is looked at
BESIDE_PROMPTS = 0.5  # chance of a guess that takes a row from prompts which others wait for
ROOM = 1024  # tokens that a reply adds to its prompt before its Lookup is made again, larger
CATCH_UP = 256  # tokens that the smaller model reads of a sequence between two passes
SHELVES = 256  # namespaces whose texts are kept
TRUST = 4.0  # guesses of one sequence that count as much as what all others show
FADE = 0.97  # what a guess counts for after the next one of its kind
LEARNING = 0.02  # weight of the newest guess in what all sequences show
FORGIVING = 0.0005  # how much of that is forgotten with each token at which nothing is guessed

# kinds of guesses: by how many tokens a text has in common with what came before, the smaller model's, and a
# grammar's; and how often each is right before anything is known
MATCHES = (2, 3, 4, 5, 7, 10, 16, 32)
MODEL, FORCED = len(MATCHES), len(MATCHES) + 1
PRIORS = (0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.88, 0.92, 0.6, 0.8)
KIND = [sum(n >= least for least in MATCHES) - 1 for n in range(LONGEST + 1)]  # by tokens in common

# rows of a pass, and what it costs where nothing is measured yet: products alone, INT8, AVX-512
FIRST_COSTS = ((1, 1.0), (4, 1.1), (6, 1.2), (8, 1.45), (12, 1.7), (16, 2.0), (32, 3.6), (64, 7.0))
LARGEST_PASS = FIRST_COSTS[-1][0]


# ----------------------------------------------------------------------------
# What is measured


class Costs:
    """What a pass of n rows costs, in passes of one row: learned from passes as they come.

    A pass that the machine disturbed counts no more than a half or a double of what was expected.
    """

    def __init__(self) -> None:
        rows, costs = zip(*FIRST_COSTS, strict=True)
        # what passes cost beside each other, by rows; times _level they are seconds
        self._costs: list[float] = [0.0, *np.interp(range(1, LARGEST_PASS + 1), rows, costs).tolist()]
        self._level = 0.0

    def of(self, n: int) -> float:
        """The cost of a pass of n rows."""
        cost = self._costs[n] if n <= LARGEST_PASS else self._costs[-1] * n / LARGEST_PASS
        return cost / self._costs[1]

    def relative(self, seconds: float) -> float:
        """What took so long, in passes of one row; 0 as long as none is measured."""
        return seconds / (self._level * self._costs[1]) if self._level else 0.0

    def learn(self, n: int, seconds: float) -> None:
        """A pass of n rows, none of them of a prompt, took so long."""
        if n > LARGEST_PASS:
            return
        if not self._level:
            self._level = seconds / self._costs[n]
        change = min(max(seconds / (self._level * self._costs[n]), 0.5), 2.0) ** 0.1
        self._level *= change  # of all passes: a longer text, a slower clock
        self._costs[n] *= change


class Chances:
    """How often guesses of each kind are right. general: what others show, where little is known yet."""

    def __init__(self, general: Chances | None = None) -> None:
        self._general = general
        self._right = [0.0] * len(PRIORS) if general else list(PRIORS)
        self._made = [0.0] * len(PRIORS)

    def of(self, kind: int) -> float:
        """How likely a guess of this kind is right."""
        if self._general is None:
            return self._right[kind]
        return (self._right[kind] + TRUST * self._general.of(kind)) / (self._made[kind] + TRUST)

    def learn(self, kind: int, right: bool) -> None:
        """A guess was right or wrong."""
        if self._general is None:
            self._right[kind] += LEARNING * (right - self._right[kind])
            return
        self._general.learn(kind, right)
        self._right[kind] = FADE * self._right[kind] + right
        self._made[kind] = FADE * self._made[kind] + 1

    def relax(self, kind: int) -> None:
        """No guess of this kind was made: what was known of it slowly grows old, and it is tried again."""
        self._right[kind] *= 0.99
        self._made[kind] *= 0.99
        if self._general is not None:
            self._general._right[kind] += FORGIVING * (PRIORS[kind] - self._general._right[kind])


class Shelf:
    """Texts that ended, the last tokens of them, and how often guesses are right where they belong."""

    def __init__(self) -> None:
        self.texts = Lookup()
        self.chances = Chances()

    def put(self, tokens: Sequence[int]) -> None:
        """Keep a text that has ended."""
        self.texts.add(tokens)
        self.texts.add((BETWEEN,))


# ----------------------------------------------------------------------------
# One sequence


@dataclass
class Draft:
    """Guesses at the next tokens of a sequence. tokens: None if the smaller model has still to make them.

    chances: how likely each is right if those before it are. kind: MODEL or FORCED; None where a text is
    matched.
    """

    tokens: list[int] | None
    chances: list[float]
    kind: int | None = None


class Drafter:
    """The guesses at one sequence. tokens: those so far. shelf: texts of others that it may learn from.

    small: whether a smaller model guesses, too. rest: what a grammar leaves no choice of, as it is now.
    """

    def __init__(
        self, tokens: Sequence[int], shelf: Shelf, small: bool, rest: Callable[[], Sequence[int]]
    ) -> None:
        self.tokens = list(tokens)
        self._shelf = shelf
        self._chances = Chances(shelf.chances)
        self._small = small
        self._reader: Reader | None = None
        self._rest = rest
        self._text: Lookup | None = None  # made when the first token has come
        # where the end of the text stood before: in what, its place there, how many tokens are in common
        self._match: tuple[Lookup, int, int] | None = None
        self._coming: list[int] = []  # of the smaller model or the grammar, that come next
        self._kind = MODEL

    def add(self, token: int) -> None:
        """The sequence goes on with `token`."""
        self._compare(token)
        self.tokens.append(token)
        if self._text is None or self._text.capacity <= len(self._text) < MOST:
            self._text = Lookup(min(len(self.tokens) + ROOM, MOST))
            self._text.add(self.tokens)
        else:
            self._text.add((token,))
        self._match = self._find(self._text)

    def _compare(self, token: int) -> None:
        """Learn from the guesses at `token`, whether or not a pass checks them."""
        if self._match is not None:
            lookup, place, length = self._match
            self._chances.learn(KIND[length], lookup.read(place, 1) == [token])
        if self._coming:
            right = self._coming[0] == token
            self._chances.learn(self._kind, right)
            self._coming = self._coming[1:] if right else []
        elif self._small:
            self._chances.relax(MODEL)

    def _find(self, text: Lookup) -> tuple[Lookup, int, int] | None:
        before, place, _ = self._match or (None, -1, 0)
        length, found = text.find(text, place if before is text else -1)
        match = (text, found, length) if length else None
        others = self._shelf.texts
        if len(others) and length < LONGEST:
            more, found = others.find(text, place if before is others else -1)
            if more > length:
                match = (others, found, more)
        return match

    def guesses(self) -> bool:
        """Whether draft() may have any."""
        return self._match is not None or self._small or bool(self._rest())

    def draft(self, most: int) -> Draft | None:
        """The best guesses at the next tokens, at most `most`."""
        of = self._chances.of
        rest = self._rest()[:most]
        if rest:
            return Draft([*rest], [of(FORCED)] * len(rest), FORCED)
        small = of(MODEL) if self._small else 0.0
        if self._match is not None and of(KIND[self._match[2]]) >= max(small, LEAST):
            tokens = self._after(*self._match[:2], most)
            return Draft(tokens, [of(KIND[min(self._match[2] + i, LONGEST)]) for i in range(len(tokens))])
        return Draft(None, [small] * most, MODEL) if small else None

    def _after(self, lookup: Lookup, place: int, most: int) -> list[int]:
        tokens = lookup.read(place, most)
        if lookup is self._text and tokens and len(tokens) < most:  # it ends here, and may go on as it did
            tokens = (tokens * most)[:most]
        return tokens

    def guess_by(self, small: Small, n: int) -> Asked:
        """What the smaller model is asked for: n guesses at this sequence."""
        if self._reader is None:
            self._reader = small.reader()
        return self._reader, self.tokens, n

    def expect(self, guesses: list[int], kind: int) -> None:
        """These guesses, of a kind that is not compared otherwise, are checked by a pass."""
        self._coming, self._kind = guesses, kind


# ----------------------------------------------------------------------------
# The smaller model


class Small:
    """A smaller model that guesses what it finds most likely itself. seconds: of one of its passes."""

    def __init__(self, model: Engine) -> None:
        self.seconds = 0.0
        self._model = model

    def reader(self) -> Reader:
        """A sequence of it."""
        return Reader(self._model.session())

    def guess(self, asked: Sequence[Asked]) -> list[list[int]]:
        """The guesses at several sequences, in shared passes: none where there is much to read before."""
        guesses: list[list[int]] = [[] for _ in asked]
        going = {i: ids for i, (reader, tokens, n) in enumerate(asked) if (ids := reader.waiting(tokens, n))}
        while going:
            begin = time.perf_counter()
            try:
                # not its own forward(), which refuses numbers that are not finite: a bad guess does no harm
                rows = Engine.forward(self._model, [(asked[i][0].session, ids) for i, ids in going.items()])
            except MemoryError:
                break
            if all(len(ids) <= 4 for ids in going.values()):  # it does not catch up with a prompt
                seconds = time.perf_counter() - begin
                self.seconds += (seconds - self.seconds) * (0.1 if self.seconds else 1.0)
            for (i, ids), row in zip(list(going.items()), rows, strict=True):
                reader, tokens, n = asked[i]
                reader.tokens += ids
                if len(reader.tokens) >= len(tokens):
                    guesses[i].append(self.choose(row, len(reader.tokens)))
                    going[i] = guesses[i][-1:]
                if len(reader.tokens) < len(tokens) or len(guesses[i]) == n:
                    del going[i]
        return guesses

    def choose(self, row: NDArray[np.float32], place: int) -> int:
        """Its guess at the token of this place, by the logits before it."""
        return int(np.argmax(row[: self._model.config.n_tokens]))


class Reader:
    """A sequence of the smaller model. tokens: those it has read, its own guesses among them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tokens: list[int] = []
        self._right = 0  # how many of them are known to be the sequence's

    def waiting(self, tokens: Sequence[int], n: int) -> list[int]:
        """What it has to read next of a sequence, to guess n more; [] if its context is too short for that.

        Its wrong guesses are forgotten.
        """
        limit = min(len(self.tokens), len(tokens) - 1)  # the last token's logits are wanted
        while self._right < limit and self.tokens[self._right] == tokens[self._right]:
            self._right += 1
        self._right = min(self._right, limit)
        del self.tokens[self._right :]
        self.session.rewind(self._right)
        if len(tokens) + n > self.session.context:
            return []
        return list(tokens[self._right : self._right + CATCH_UP])


Asked = tuple[Reader, Sequence[int], int]  # a sequence of the smaller model, its tokens, how many guesses


def check_vocabulary(model: ModelFile, small: ModelFile) -> None:
    """ValueError, one line, if a token of one model does not mean the same to the other."""
    if bytes(model.tokenizer) != bytes(small.tokenizer) or model.config.n_tokens != small.config.n_tokens:
        raise ValueError(f"{small.path}: it cannot draft for {model.path}, which has another tokenizer")


# ----------------------------------------------------------------------------
# All of them


class Drafting:
    """The drafts for the sequences of one model. small: a model of the same vocabulary that guesses, too.

    ValueError, one line, if the smaller model has another vocabulary.
    """

    def __init__(self, model: Engine, small: Engine | None = None) -> None:
        if small is not None:
            check_vocabulary(model.file, small.file)
        self.small = None if small is None else Small(small)
        self.costs = Costs()
        self._alone = Shelf()  # where no text is put
        self._shelves: OrderedDict[str, Shelf] = OrderedDict()

    def drafter(
        self, tokens: Sequence[int], rest: Callable[[], Sequence[int]], namespace: str | None = None
    ) -> Drafter:
        """What guesses at a sequence that has these tokens. namespace: whose texts may be its guesses, too.

        rest: tells the tokens that a grammar leaves no choice of; see reply.Mask.
        """
        shelf = self._alone if namespace is None else self.shelf(namespace)
        return Drafter(tokens, shelf, self.small is not None, rest)

    def shelf(self, namespace: str) -> Shelf:
        """The texts of one namespace, which no other sees: speed would tell what others were answered."""
        shelf = self._shelves.pop(namespace, None) or Shelf()
        self._shelves[namespace] = shelf
        if len(self._shelves) > SHELVES:
            self._shelves.popitem(last=False)
        return shelf

    def drafts(self, asked: Sequence[tuple[Drafter, int]], n_decoding: int, n_prompt: int) -> list[list[int]]:
        """The guesses for the next pass to check, of each sequence; [] where none is worth its row.

        asked: of each sequence its drafter and the most tokens it has use for. n_decoding, n_prompt: rows of
        the pass besides.
        """
        found = [drafter.draft(min(most, LONGEST_DRAFT)) if most > 0 else None for drafter, most in asked]
        if not any(found):
            return [[]] * len(asked)
        lengths = self.lengths(found, n_decoding, n_prompt)
        made = [(d.tokens or [])[:n] if d else [] for d, n in zip(found, lengths, strict=True)]
        unmade = [i for i, draft in enumerate(found) if draft and draft.tokens is None and lengths[i]]
        if self.small and unmade:
            guesses = self.small.guess([asked[i][0].guess_by(self.small, lengths[i]) for i in unmade])
            for i, guess in zip(unmade, guesses, strict=True):
                made[i] = guess
        for (drafter, _), draft, guess in zip(asked, found, made, strict=True):
            if draft and draft.kind is not None:
                drafter.expect(guess, draft.kind)
        return made

    def lengths(self, found: Sequence[Draft | None], n_decoding: int, n_prompt: int) -> list[int]:
        """How many guesses at each sequence are worth it: those that give the most tokens per second."""
        gains = []  # of each guess: how likely it is right, and all before it
        for i, draft in enumerate(found):
            gain = 1.0
            for depth, chance in enumerate(draft.chances if draft else (), 1):
                gain *= chance
                if n_prompt and gain < BESIDE_PROMPTS:
                    break
                gains.append((-gain, depth, i))
        gains.sort()
        n, expected, deepest = n_decoding + n_prompt, float(n_decoding), 0
        best, kept = WIN * expected / self.costs.of(n), 0
        for more, (gain, depth, i) in enumerate(gains[:MOST_DRAFTED], 1):
            expected -= gain
            draft = found[i]
            if draft and draft.tokens is None:
                deepest = max(deepest, depth)  # as many passes of the smaller model
            small = deepest * self.costs.relative(self.small.seconds) if self.small else 0.0
            value = expected / (self.costs.of(n + more) + small)
            if value > best:
                best, kept = value, more
        lengths = [0] * len(found)
        for _, depth, i in gains[:kept]:
            lengths[i] = max(lengths[i], depth)
        return lengths
