"""How likely a model finds the tokens of a text: what evaluations ask for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .reply import Vocabulary
from .sampler import Sampler, Sampling


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token of a text. logprob: in nats, None for the first, which nothing comes
    before. top: the likeliest there.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class PromptScores:
    """The scores of a prompt's tokens, filled in as its logits come.

    top: how many of the most likely tokens each score lists. add() takes the rows of logits piece by piece,
    (tokens, vocab_size); the row after the prompt's last token scores nothing.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: list[int], top: int) -> None:
        self._sampler = Sampler(Sampling(), (), vocabulary.n_tokens, vocabulary.undefined)
        self._prompt = prompt
        self._top = top
        self.restart()

    def restart(self) -> None:
        """Forget all rows: the prompt is read again."""
        self.values = [TokenScore(self._prompt[0], None, [])]

    def add(self, rows: NDArray[np.float32]) -> None:
        """Score the tokens that come after those whose logits these are."""
        for row in rows[: len(self._prompt) - len(self.values)]:
            token = self._prompt[len(self.values)]
            logprob, top = self._sampler.logprobs(row, token, self._top)
            self.values.append(TokenScore(token, logprob, top))
