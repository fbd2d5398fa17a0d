"""Logits -> token.

The order is that of `transformers`, which also is vLLM's but for min-p:

    logit bias, repetition penalty, presence and frequency penalties     on the logits
    temperature, softmax
    top-k, then top-p of what top-k left, then min-p                     which tokens remain
    one uniform number picks among them

Everything that decides a token is the same on every machine: the engine's own exp, sums in a fixed
order, and Philox's bits turned into a number here (Random). So a seed gives the same text everywhere.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..kernels.table import log_sum_exp, softmax, top_k

GREEDY_BELOW = 1e-5  # lower temperatures count as 0, because dividing by them would overflow

# What the makers of Qwen3 recommend (its README): with thinking, without
RECOMMENDED = {
    True: {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    False: {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
}


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. ValueError with the accepted range if a number is outside it."""

    temperature: float = 1.0  # 0 picks the largest logit, the lowest id among equals
    top_k: int = 0  # only the k most likely; 0: all
    top_p: float = 1.0  # only the fewest most likely that together have probability top_p
    min_p: float = 0.0  # only those at least min_p times as likely as the most likely
    presence_penalty: float = 0.0  # subtracted from the logit of each token of the reply so far
    frequency_penalty: float = 0.0  # subtracted as often as the token came so far
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of prompt and reply
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    seed: int | None = None  # None: a fresh one, see Sampler.seed

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 100)
        _check("top_k", self.top_k, 0, 1 << 31, int)
        _check("top_p", self.top_p, 0, 1)
        _check("min_p", self.min_p, 0, 1)
        _check("presence_penalty", self.presence_penalty, -100, 100)
        _check("frequency_penalty", self.frequency_penalty, -100, 100)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias = {self.logit_bias!r} is not a dict of token ids and numbers")
        for id, bias in self.logit_bias.items():
            _check("logit_bias token id", id, 0, (1 << 32) - 1, int)
            _check(f"logit_bias of token {id}", bias, -1e4, 1e4)
        if self.seed is not None:
            _check("seed", self.seed, 0, (1 << 64) - 1, int)


class SamplingOptions(TypedDict, total=False):
    """The fields of Sampling as keywords of a call. None counts as not given."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None


def _check(name: str, value: Any, low: float, high: float, kind: type = float) -> None:
    # a bool is an int to Python, but no number is meant by it
    number = isinstance(value, (int, np.integer) if kind is int else (int, float, np.integer, np.floating))
    if not number or isinstance(value, bool) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} = {value!r} is not {what} from {low} to {high}")


def default_sampling(metadata: Mapping[str, Any], thinking: bool) -> dict[str, float]:
    """The model's own defaults, where it has any, over the recommended ones.

    metadata: of a model.bin. thinking: whether the reply may think. The generation_config of a
    hybrid model describes thinking, so it is not used when thinking is off.
    """
    own = metadata["generation"] if thinking or metadata["thinking"] != "hybrid" else {}
    names = {f.name for f in fields(Sampling)} - {"logit_bias", "seed"}
    # top_k: a JSON writer may have stored 20 as 20.0
    own = {name: int(x) if abs(x) < 2**53 and x == int(x) else x for name, x in own.items() if name in names}
    return {**RECOMMENDED[thinking], **own}


class NoTokenError(ValueError):
    """What a token has to be leaves none."""


class Sampler:
    """Chooses the tokens of one reply, one after the other.

    prompt: its token ids, which the repetition penalty covers. n_tokens: only ids below it exist.
    undefined: ids below it that stand for no token. `seed` is the seed in use. `logprob` is the
    log-probability, in nats, of the last token under the distribution it was drawn from: after penalties,
    temperature and filters.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], n_tokens: int, undefined: Iterable[int] = ()
    ) -> None:
        beyond = [id for id in sampling.logit_bias if id >= n_tokens]
        if beyond:
            raise ValueError(
                f"logit_bias: token {beyond[0]} does not exist, the vocabulary has {n_tokens} tokens"
            )
        self.sampling = sampling
        self.seed = secrets.randbits(32) if sampling.seed is None else int(sampling.seed)
        self.logprob = 0.0
        self._random = Random(self.seed)
        self._position = len(prompt)  # of the next token in its sequence
        self._n_tokens = n_tokens
        self._undefined = np.fromiter(undefined, dtype=np.int64)
        self._bias_ids = np.array(list(sampling.logit_bias), dtype=np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._counts: Counter[int] = Counter()

    def sample(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        """The next token for `logits`, shape (vocab_size,).

        allowed: (n_tokens,), false where a grammar forbids a token; None: every token may come.
        ValueError if the logits hold a NaN or infinity, or no token may come.
        """
        logits = self._adjusted(self._existing(logits))
        if allowed is not None:
            logits = np.where(allowed, logits, np.float32(-np.inf))
            if not np.any(logits > -np.inf):
                raise NoTokenError("the grammar allows no token that exists and is not forbidden otherwise")
        token, self.logprob = self._choose(logits)
        self._position += 1
        self._counts[token] += 1
        if self.sampling.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def logprobs(
        self, logits: NDArray[np.float32], token: int, n: int
    ) -> tuple[float, list[tuple[int, float]]]:
        """(log-probability of `token`, the n most likely tokens with theirs), in nats.

        They are those of the model's own distribution over the tokens that exist, before penalties and
        temperature.
        """
        logits = self._existing(logits)
        total = log_sum_exp(logits)
        top = top_k(logits, min(n, len(logits))) if n else ()
        return float(logits[token]) - total, [(int(id), float(logits[id]) - total) for id in top]

    def _existing(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Without the rows that stand for no token, which must never be chosen nor take probability."""
        logits = logits[: self._n_tokens]
        if len(self._undefined):
            logits = logits.copy()
            logits[self._undefined] = -np.inf
        return logits

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        s = self.sampling
        counts = self._counts if s.presence_penalty or s.frequency_penalty else {}
        if not (len(self._bias_ids) or self._seen or counts):
            return logits
        logits = logits.copy()
        logits[self._bias_ids] += self._bias
        if self._seen:
            ids = np.fromiter(self._seen, dtype=np.int64)
            penalty = np.float32(s.repetition_penalty)
            logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
        if counts:
            ids = np.fromiter(counts, dtype=np.int64)
            times = np.fromiter(counts.values(), dtype=np.float32)
            logits[ids] -= np.float32(s.frequency_penalty) * times + np.float32(s.presence_penalty)
        return logits

    def _choose(self, logits: NDArray[np.float32]) -> tuple[int, float]:
        s = self.sampling
        largest = np.argmax(logits)  # the lowest id among equals; the first NaN, if there is one
        if not math.isfinite(logits[largest]):
            raise ValueError(
                f"the largest logit is {logits[largest]}: the model file is damaged or its weights overflow"
            )
        if s.temperature < GREEDY_BELOW:
            return int(largest), 0.0
        ids: NDArray[np.int32] | None = None  # p[i] belongs to token ids[i]; None: to token i
        if s.top_k and s.top_k < len(logits):
            ids = top_k(logits, s.top_k)
            p = softmax(logits[ids], s.temperature)
        else:
            p = softmax(logits, s.temperature)
            if s.top_p < 1 or s.min_p > 0:
                ids = _most_likely(p, s.top_p)
                p = p[ids]
        if ids is not None:
            keep = kept(p, s.top_p, s.min_p)
            ids, p = ids[keep], p[keep]
        index, share = pick(p, self._random.uniform(self._position))
        return int(index if ids is None else ids[index]), math.log(share)


class Random:
    """Random numbers by position: number i is a function of the seed and i, in whatever order they are drawn.

    Philox is a function of key and counter (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").
    """

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=seed)
        self._state: Any = self._philox.state

    def uniform(self, position: int) -> float:
        """The number of `position`, in [0, 1)."""
        self._state["state"]["counter"][0] = position
        self._philox.state = self._state
        return (int(self._philox.random_raw()) >> 11) * 2.0**-53


def pick(p: NDArray[np.float32], uniform: float) -> tuple[int, float]:
    """(index, its share of the sum) that `uniform`, in [0, 1), picks in proportion to `p`; never where p is
    0.

    A tree of sums of pairs, each level added at once, is descended from its root: the additions are the same
    on every machine, and ten times faster than a running sum.
    """
    leaves = np.zeros(1 << (len(p) - 1).bit_length())
    leaves[: len(p)] = p
    levels = [leaves]
    while len(levels[-1]) > 1:
        half = len(levels[-1]) // 2
        levels.append(levels[-1][:half] + levels[-1][half:])
    total = float(levels.pop()[0])
    rest, index = uniform * total, 0
    for level in reversed(levels):
        other = index + len(level) // 2
        if rest >= level[index] and level[other] > 0:
            rest -= level[index]
            index = other
    return index, float(p[index]) / total


def kept(p: NDArray[np.float32], top_p: float, min_p: float) -> NDArray[np.bool_]:
    """Which of the probabilities `p`, largest first where top_p < 1, the two filters keep: always the first.

    top-p keeps a token while those before it sum to less than top_p; min-p compares with the largest.
    """
    keep = np.ones(len(p), dtype=bool)
    if top_p < 1:
        before = np.cumsum(p, dtype=np.float64)[:-1]
        keep[1:] = before < top_p
    if min_p > 0:
        keep &= p >= p.max() * min_p
    return keep


def _most_likely(p: NDArray[np.float32], top_p: float) -> NDArray[np.int32]:
    """Ids by falling probability, as many as top_p needs; all ids, unsorted, if top_p is 1."""
    if top_p == 1:
        return np.arange(len(p), dtype=np.int32)
    for n in (64, 512, 4096):
        if n < len(p):
            ids = top_k(p, n)
            if np.cumsum(p[ids], dtype=np.float64)[-1] >= top_p:
                return ids
    return np.argsort(-p, kind="stable").astype(np.int32)
