"""How likely every token was: of a text that is there already, and of a reply.

Probabilities are the model's own, before penalties and temperature.

    python examples/logprobs.py [model.bin [TEXT]]
"""

import math
import sys

import numpy as np

from qwen3c import MODEL_IN_THE_BOX, Model, engine

model = Model(sys.argv[1] if sys.argv[1:] else str(MODEL_IN_THE_BOX))
ids = model.tokenizer.encode("".join(sys.argv[2:]) or "for i in range(10):\n    print(i)\n")

print("the text")
logits = model.session().forward(ids, logits="all")[:, : model.config.n_tokens]  # row t predicts token t + 1
nats = [float(row[id]) - engine.log_sum_exp(row) for row, id in zip(logits[:-1], ids[1:], strict=True)]
for id, logprob in zip(ids[1:], nats, strict=True):
    print(f"  {model.tokenizer.decode([id])!r:<16} {math.exp(logprob):7.2%}")
print(f"  perplexity {math.exp(-np.mean(nats)):.2f}" if nats else "  a single token: nothing to predict")

print("the reply, greedily, and what else was likely")
for event in model.generate(ids, 8, temperature=0, logprobs=3):
    if event.token is not None and event.logprob is not None and event.top_logprobs is not None:
        best = ", ".join(
            f"{model.tokenizer.decode([id])!r} {math.exp(p):.1%}" for id, p in event.top_logprobs
        )
        token = model.tokenizer.decode([event.token])
        print(f"  {token!r:<16} {math.exp(event.logprob):7.2%}   of {best}")
