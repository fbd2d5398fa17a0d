"""Many prompts at once: one forward pass per step takes a token of every reply that is not finished.

The weights are read once for all of them, so a batch costs little more than one reply, and each reply has the same
bits as if it had been alone.

    python examples/batch.py [model.bin]
"""

import sys

from qwen3c import Model
from qwen3c.cli.run import MODEL_IN_THE_BOX

PROMPTS = ["def add(a, b):", "import os\n\ndef", "class Queue:\n", "for key, value in"]

model = Model(*sys.argv[1:2] or [str(MODEL_IN_THE_BOX)])
ends = set(model.metadata["eos_token_ids"])
sessions = [model.session() for _ in PROMPTS]
replies: list[list[int]] = [[] for _ in PROMPTS]
waiting = {i: model.tokenizer.encode(prompt) for i, prompt in enumerate(PROMPTS)}  # tokens still to be read
while waiting:
    logits = model.forward(
        [(sessions[i], ids) for i, ids in waiting.items()]
    )  # prompts and tokens mixed freely
    for i, row in zip(list(waiting), logits, strict=True):
        token = int(row[: model.config.n_tokens].argmax())
        replies[i].append(token)
        waiting[i] = [token]
        if token in ends or len(replies[i]) == 24:
            del waiting[i]
for prompt, reply in zip(PROMPTS, replies, strict=True):
    print(prompt, model.tokenizer.decode(reply), "\n---", sep="")
