"""Search by meaning: texts and a query as vectors, the nearest texts first.

Made for Qwen3-Embedding, and good for search only with such a model. The model in the box is not one (it
chats), so without an argument this shows how it is done, not how well it works.

    python examples/search.py [model.bin] [query]
"""

import sys

from qwen3c import MODEL_IN_THE_BOX, Model
from qwen3c.drivers.retrieval import instruct

TEXTS = [
    "import os\nimport sys\n",
    "def add(a, b):\n    return a + b\n",
    "class Queue:\n    def __init__(self):\n        self.items = []\n",
    "The capital of China is Beijing.",
    "Gravity is what gives weight to things and keeps planets on their way around the sun.",
]

model = Model(sys.argv[1] if sys.argv[1:] else str(MODEL_IN_THE_BOX))
query = sys.argv[2] if len(sys.argv) > 2 else "What is the capital of China?"
vectors = model.embed([*TEXTS, instruct(query)])  # (n + 1, dim), each of length 1
similarities = vectors[:-1] @ vectors[-1]  # cosines
print(query)
for i in similarities.argsort()[::-1]:
    print(f"{similarities[i]:7.4f}  {TEXTS[i]!r}")
