"""What a calibration reads: a plain text, conversations as JSONL, or the mix that comes with the program.

A line of JSONL is {"messages": [...]}, rendered by the model's chat template as at run time, or
{"text": "..."}. All becomes one sequence of tokens, cut into windows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..system.files import reason
from ..system.jsonl import objects
from ..text.chat import ChatTemplate, normalized
from ..text.tokenizer import Tokenizer
from .source import SourceError, cut

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .huggingface import Checkpoint

BUILT_IN = Path(__file__).parents[1] / "data" / "calibration.jsonl"  # written for this purpose
WINDOW = 512  # tokens that see each other
MAX_TOKENS = 1 << 16  # what comes later in a text is not read
MAX_TEXT = 64 << 20  # bytes of a file


@dataclass(frozen=True)
class CalibrationOptions:
    """What an export is told of a calibration (calibrate.py).

    text: a file; "" for the mix that comes with the program. feedback: whether codes make good what others
    lose; without it columns are weighted alone. say: told in a line what it will take, before it starts.
    progress: told (work done, work in all), some of which an earlier run may have done.
    """

    text: str | os.PathLike[str] = ""
    feedback: bool = True
    say: Callable[[str], None] = lambda line: None
    progress: Callable[[float, float], None] = lambda done, total: None

    @property
    def option(self) -> str:
        """The option that asks for it."""
        return "--calibrate" if self.feedback else "--importance"


class CalibrationText:
    """The tokens of a text as the model of `checkpoint` reads them.

    path: the file; "" for the mix that comes with the program. windows: ids, (windows, tokens). SourceError
    if the file cannot be read, a line of it is malformed, or nothing of it becomes tokens.
    """

    def __init__(self, checkpoint: Checkpoint, path: str | os.PathLike[str] = "") -> None:
        self.path = Path(path) if path else BUILT_IN
        self.name = os.fspath(path) or "the built-in mix"
        self._checkpoint = checkpoint
        self._tokenizer = Tokenizer(checkpoint.tokenizer)
        self._template = ChatTemplate(
            checkpoint.template,
            self._tokenizer,
            checkpoint.metadata["thinking"],
            checkpoint.metadata["special_tokens"],
        )
        self.windows = self._cut()

    def _cut(self) -> NDArray[np.int32]:
        import numpy as np

        ids: list[int] = []
        for part in self._parts():
            ids += part
            if len(ids) >= MAX_TOKENS:
                break
        if len(ids) < 2:
            raise SourceError(f"{self.name}: holds no text: {len(ids)} tokens, at least 2 are needed")
        window = min(WINDOW, self._checkpoint.config.context, len(ids))
        n = min(len(ids), MAX_TOKENS) // window
        return np.array(ids[: n * window], np.int32).reshape(n, window)

    def _parts(self) -> Iterator[list[int]]:
        """Token ids of the text, or of each line of JSONL."""
        if self.path.suffix == ".jsonl":
            try:
                for number, line in objects(self.path):
                    yield self._line(line, f"{self.name}: line {number}")
            except OSError as error:
                raise SourceError(f"{self.name}: {reason(error)}") from None
            except ValueError as error:
                raise SourceError(cut(error, 200)) from None
            return
        try:
            with open(self.path, "rb") as file:
                data = file.read(MAX_TEXT + 1)
        except OSError as error:
            raise SourceError(f"{self.name}: {reason(error)}") from None
        if len(data) > MAX_TEXT:
            raise SourceError(f"{self.name}: is larger than {MAX_TEXT} bytes; a part of it will do")
        try:
            yield self._encoded(data.decode("utf-8-sig"), self.name)
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.name}: byte {error.start} is not UTF-8") from None

    def _line(self, line: dict[str, Any], where: str) -> list[int]:
        if "messages" not in line:
            text = line.get("text")
            if not isinstance(text, str):
                raise SourceError(f"{where}: has neither messages nor a text")
            return self._encoded(text + "\n", where)
        try:
            messages = normalized(line["messages"])
            if self._template.source:
                return self._template.prompt(messages, tools=line.get("tools") or None)
        except ValueError as error:
            raise SourceError(f"{where}: {cut(error)}") from None
        return self._encoded("".join(f"{message['content']}\n\n" for message in messages), where)

    def _encoded(self, text: str, where: str) -> list[int]:
        try:
            return self._tokenizer.encode(text)
        except ValueError as error:
            raise SourceError(f"{where}: {cut(error)}") from None
