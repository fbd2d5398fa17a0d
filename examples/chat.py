"""A conversation that remembers, in a few lines.

Every question goes on from the same session: what was said before is not read again.

    python examples/chat.py [model.bin [QUESTION ...]]
"""

import sys

from qwen3c import MODEL_IN_THE_BOX, Conversation, Model

model = Model(sys.argv[1] if sys.argv[1:] else str(MODEL_IN_THE_BOX))
conversation = Conversation(model, system="You answer in one sentence.", max_tokens=60, seed=1)
for question in sys.argv[2:] or ["What is a river?", "And what is a lake?"]:
    print(f"> {question}")
    for event in conversation.ask(question):
        print(event.text, end="", flush=True)
    print("\n")
print(f"{len(conversation.messages)} messages, {len(conversation.session.tokens)} tokens in the session")
