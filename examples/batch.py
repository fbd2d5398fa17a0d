"""Many prompts at once: one forward pass per step takes a token of every reply that is not finished.

The weights are read once for all of them, so a batch costs little more than one reply, and each reply has the
same bits as if it had been alone.

    python examples/batch.py [model.bin]
"""

import sys

from qwen3c import MODEL_IN_THE_BOX, Model, Reply

PROMPTS = ["def add(a, b):", "import os\n\ndef", "class Queue:\n", "for key, value in"]

model = Model(sys.argv[1] if sys.argv[1:] else str(MODEL_IN_THE_BOX))
replies = [Reply() for _ in PROMPTS]
prompts = [model.text_prompt(prompt) for prompt in PROMPTS]
for index, event in model.generate_many(prompts, max_tokens=24, temperature=0):
    replies[index].add(event)
for prompt, reply in zip(PROMPTS, replies, strict=True):
    print(prompt, reply, "\n---", sep="")
