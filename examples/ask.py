"""Text in, text out: a question answered, a text gone on with, and what a reply says beside its text.

python examples/ask.py [model.bin [QUESTION]]
"""

import sys

from qwen3c import MODEL_IN_THE_BOX, Model

with Model(sys.argv[1] if sys.argv[1:] else str(MODEL_IN_THE_BOX)) as model:
    reply = model.chat(sys.argv[2] if len(sys.argv) > 2 else "What is a river?", max_tokens=100, seed=1)
    print(reply)  # reply.thinking and reply.tool_calls are apart from the text
    stats = reply.stats
    print(f"[{reply.finish_reason}: {stats.generated_tokens} tokens, {stats.decode_rate:.0f} a second]")
    print("import os" + model.complete("import os", 24, temperature=0).text)
