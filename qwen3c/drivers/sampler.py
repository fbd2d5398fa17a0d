"""Logits -> token.

The order is that of `transformers`, which also is vLLM's but for min-p:

    logit bias, repetition penalty, presence and frequency penalties     on the logits
    temperature, softmax
    top-k, then top-p of what top-k left, then min-p                     which tokens remain
    one uniform number picks among them

Everything that decides a token is the same on every machine: the engine's own exp, sums in a fixed
order, and Philox's bits turned into a number (kernels/draw.pyx). So a seed gives the same text everywhere.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..kernels.draw import Draw, draw

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


class Sampler:
    """Chooses the tokens of one reply, one after the other.

    prompt: its token ids, which the repetition penalty covers. n_tokens: only ids below it exist.
    undefined: ids below it that stand for no token. `seed` is the seed in use. `logprob` is the
    log-probability, in nats, of the last token under the distribution it was drawn from: after penalties,
    temperature and filters.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], n_tokens: int, undefined: Collection[int] = ()
    ) -> None:
        beyond = [id for id in sampling.logit_bias if id >= n_tokens]
        if beyond:
            raise ValueError(
                f"logit_bias: token {beyond[0]} does not exist, the vocabulary has {n_tokens} tokens"
            )
        self.sampling = sampling
        self.seed = secrets.randbits(32) if sampling.seed is None else int(sampling.seed)
        self.logprob = 0.0
        self._position = len(prompt)  # of the next token in its sequence
        self._undefined = frozenset(undefined)
        self._draw = Draw(sampling, self.seed, n_tokens, undefined, GREEDY_BELOW)
        self._draw.know(prompt, reply=False)

    def sample(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        """The next token for `logits`, shape (vocab_size,).

        allowed: (n_tokens,), false where a grammar forbids a token; None: every token may come.
        ValueError if the logits hold a NaN or infinity, or no token may come.
        """
        draw([self.begin(logits, allowed)])
        return self.end()

    def begin(
        self,
        logits: NDArray[np.float32],
        allowed: NDArray[np.bool_] | None = None,
        n_top: int | None = None,
    ) -> Draw:
        """What sample() computes, for draw() to compute beside that of other sequences; end() has the token.

        n_top: the log-probabilities of the token and of the n_top most likely ones are wanted, too.
        """
        self._draw.begin(logits, self._position, allowed, n_top)
        return self._draw

    def end(self) -> int:
        """The token that draw() has found. ValueError as sample()."""
        token, share = self._draw.result()
        self.logprob = math.log(share)
        self.accept(token)
        return token

    def take(self, token: int) -> None:
        """`token` comes next because no other may."""
        self.logprob = 0.0
        self.accept(token)

    def accept(self, token: int) -> None:
        """`token` is the next one of the reply, whoever chose it."""
        self._position += 1
        self._draw.know((token,))

    def logprobs(
        self, logits: NDArray[np.float32], token: int, n: int
    ) -> tuple[float, list[tuple[int, float]]]:
        """(log-probability of `token`, the n most likely tokens with theirs), in nats.

        They are those of the model's own distribution over the tokens that exist, before penalties and
        temperature.
        """
        draw([self.begin(logits, None, n)], tokens=False)
        return self.measured(logits, token)

    def measured(self, logits: NDArray[np.float32], token: int) -> tuple[float, list[tuple[int, float]]]:
        """logprobs() after draw(), of the row and the n_top that begin() was given."""
        total, top = self._draw.measured()
        logit = -math.inf if token in self._undefined else float(logits[token])
        return logit - total, [(id, value - total) for id, value in top]
