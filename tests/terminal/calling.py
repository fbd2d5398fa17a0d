"""run.py with a model that says what a test wants, tool calls among it: python calling.py SCRIPT run.py ...

SCRIPT is a JSON file, a list of replies, one for each time the model is asked. What the model was told is
appended to the file SCRIPT.told, a JSON text a line.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]


class Script:
    """A mask that allows one token at a time: the reply comes out as it is written."""

    def __init__(self, ids: list[int], n_tokens: int) -> None:
        self._ids = ids
        self._n_tokens = n_tokens

    def prepare(self) -> None:
        """The next token is known already."""

    def allowed(self) -> NDArray[np.bool_]:
        allowed = np.zeros(self._n_tokens, np.bool_)
        allowed[self._ids[0]] = True
        return allowed

    def accept(self, token: int) -> None:
        del self._ids[0]


def main() -> None:
    script, program, *arguments = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    from qwen3c.drivers.generate import Generation
    from qwen3c.model import Model

    replies = iter(json.loads(Path(script).read_text()))
    generate = Model.generate

    def say(self: Model, prompt: Sequence[int], *positional: Any, **options: Any) -> Generation:
        with open(f"{script}.told", "a") as told:
            print(json.dumps(self.tokenizer.decode(prompt)), file=told)
        ids = [*self.tokenizer.encode(next(replies, "done"), special=True), self.metadata["eos_token_ids"][0]]
        return generate(self, prompt, *positional, mask=Script(ids, self.config.n_tokens), **options)

    Model.generate = say  # type: ignore[method-assign]
    sys.argv = [program, *arguments]
    runpy.run_path(str(ROOT / program), run_name="__main__")


if __name__ == "__main__":
    main()
