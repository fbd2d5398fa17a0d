"""Which of some answers is the likeliest: the model is not asked to write, it is asked to score.

The prompt is read once; every answer goes on from a fork of its session.

    python examples/choose.py [model.bin]
"""

import sys

import numpy as np

from qwen3c import MODEL_IN_THE_BOX, Model, Session, engine

PROMPT = "try:\n    return self._cache[key]\nexcept"
ANSWERS = [" KeyError:", " ValueError:", " ZeroDivisionError:", " banana:"]


def log_probability(session: Session, first: np.ndarray, ids: list[int]) -> float:
    """Of `ids` in nats, after what `session` holds; `first` are the logits there."""
    rows = [first, *(session.fork().forward(ids[:-1], logits="all") if ids[1:] else [])]
    exist = session.model.config.n_tokens  # logits beyond are padding
    return sum(float(row[id]) - engine.log_sum_exp(row[:exist]) for row, id in zip(rows, ids, strict=True))


model = Model(sys.argv[1] if sys.argv[1:] else str(MODEL_IN_THE_BOX))
session = model.session()
first = session.forward(model.tokenizer.encode(PROMPT))
answers = {answer: model.tokenizer.encode(answer) for answer in ANSWERS}
scores = {answer: log_probability(session, first, ids) for answer, ids in answers.items()}
print(PROMPT)
for answer, score in sorted(scores.items(), key=lambda item: -item[1]):
    print(f"  {answer!r:<22} {score:8.3f} nats, {score / len(answers[answer]):7.3f} a token")
