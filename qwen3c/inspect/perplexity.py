"""How well a model predicts a text.

The text is cut into windows that do not overlap; in each, every token but the first is predicted from
those before it in the window. perplexity = exp(mean of -log p). Another program that cuts the tokens
the same way gets the same figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import engine

PIECE = 128  # tokens of a pass: the logits of a whole window would take gigabytes


@dataclass(frozen=True)
class Perplexity:
    """A running figure. nats: the sum of -log p over `tokens` predicted tokens."""

    nats: float = 0.0
    tokens: int = 0

    @property
    def perplexity(self) -> float:
        mean = self.nats / self.tokens if self.tokens else math.nan
        return math.exp(mean) if mean < 700 else math.inf


def measure(
    model: engine.Engine,
    ids: Sequence[int],
    window: int,
    progress: Callable[[int, Perplexity], None] | None = None,
) -> Perplexity:
    """Perplexity of `model` on the tokens `ids` in windows of `window` tokens.

    progress: called with the number of tokens done and the figure so far. ValueError if there are fewer than
    two tokens, or if the window is shorter than two or longer than the model's context.
    """
    if len(ids) < 2:
        raise ValueError(f"the text is {len(ids)} tokens, at least 2 are needed")
    if not 2 <= window <= model.config.context:
        raise ValueError(f"a window of {window} tokens is outside 2..{model.config.context}")
    result = Perplexity()
    session = model.session(window)
    for start in range(0, len(ids), window):
        session.rewind(0)
        part = ids[start : start + window]
        for done in range(0, len(part) - 1, PIECE):
            given = part[done : min(done + PIECE, len(part) - 1)]
            wanted = part[done + 1 : done + 1 + len(given)]
            rows = session.forward(given, logits="all")[:, : model.config.n_tokens]
            nats = sum(engine.log_sum_exp(row) - float(row[id]) for row, id in zip(rows, wanted, strict=True))
            result = Perplexity(result.nats + nats, result.tokens + len(wanted))
            if progress:
                progress(start + done + len(given), result)
    return result
