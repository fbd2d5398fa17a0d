"""Text as it comes, and how to stop it.

A reply ends at a stop text, after so many tokens, or when the caller has had enough. `async for` works too.

    python examples/stream.py [model.bin]
"""

import sys
import time

from qwen3c import MODEL_IN_THE_BOX, Model

model = Model(sys.argv[1] if sys.argv[1:] else str(MODEL_IN_THE_BOX))
deadline = time.monotonic() + 5  # seconds
reply = model.generate(
    model.text_prompt("class Stack:\n    def __init__(self"),
    max_tokens=120,
    temperature=0.6,
    seed=3,
    stop="\nclass",
    cancel=lambda: time.monotonic() > deadline,
)
for event in reply:
    print(event.text, end="", flush=True)
stats = reply.stats
print(f"\n[{stats.finish_reason}: {stats.generated_tokens} tokens, {stats.decode_rate:.0f} a second]")
