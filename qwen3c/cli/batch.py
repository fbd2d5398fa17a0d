"""-m batch: a file of requests -> a file of answers, which a run that was cut short goes on with.

requests.jsonl -> answers.jsonl.part, as they come -> answers.jsonl, in the order of the requests
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import sys
import tempfile
import time
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..system import terminal
from ..system.files import lock, replacing
from ..system.journal import Journal, json_value
from .command import concerning
from .opening import open_model
from .serve import check_libraries, described
from .signals import Ended, endings

if TYPE_CHECKING:
    from ..model import Model
    from ..serve.api import Api
    from ..serve.batch import Item
    from ..serve.models import ServeOptions

LIBRARIES = ("starlette", "llguidance")
RUNNING = 64  # sequences at once, as the server has it
# what of a journal's head a run has to agree with, and what it is called
AGREED = {
    "requests": "other requests", "model": "another model", "kv": "another --kv",
    "activations": "other --activations", "version": "another version of qwen3c",
}  # fmt: skip


def answer_batch(args: argparse.Namespace) -> int:
    """Answer a file of requests; Ctrl-C and a kill leave what the same command goes on with."""
    check_libraries("-m batch", LIBRARIES)
    from ..serve.batch import read_items

    raw = _read(args.requests)
    try:
        items = read_items(raw.splitlines(keepends=True))
    except ValueError as error:
        raise ValueError(f"{args.requests}, {error}") from None
    if not items:
        raise ValueError(f"{args.requests}: there is no request in it")
    order = [item.custom_id for item in items]
    if args.output != "-" and _is_done(Path(args.output), order):
        terminal.note(f"{args.output}: all {len(items)} answers are there already")
        return 0
    with _journal(args.output) as journal:
        run = Run(args, items, journal, _head(args, raw))
        try:
            run.go_on()
        finally:
            if args.output == "-":
                journal.write(order, sys.stdout.buffer)
                sys.stdout.buffer.flush()
        if args.output != "-":
            with replacing(Path(args.output)) as temporary, open(temporary, "wb") as out:
                journal.write(order, out)
            _part(args.output).unlink()
    run.say_end()
    return 0


def _read(path: str) -> bytes:
    """The requests; - is stdin."""
    if path == "-":
        return sys.stdin.buffer.read()
    with concerning(path):
        return Path(path).read_bytes().removeprefix(BOM_UTF8)


def _is_done(output: Path, order: list[str]) -> bool:
    """Whether the answers are there and nothing is left to do. ValueError if something else is there."""
    if not output.exists() or _part(str(output)).exists():
        return False
    if not output.is_file():
        raise ValueError(f"{output}: it is there and no file; -o - writes to stdout")
    with open(output, "rb") as lines:
        found = [_custom_id(json_value(line)) for line in lines]
    if found != order:
        raise ValueError(f"{output}: it is there already, and not of these requests; take another name")
    return True


def _custom_id(answer: Any) -> str | None:
    """Whose answer it is; None if it is none."""
    is_answer = isinstance(answer, dict) and "response" in answer
    return answer.get("custom_id") if is_answer else None


def _part(output: str) -> Path:
    """Where answers are until all are there."""
    return Path(f"{output}.part")


@contextlib.contextmanager
def _journal(output: str) -> Iterator[Journal]:
    """The answers of earlier runs, and of this one. ValueError if another run is writing them."""
    if output == "-":
        with tempfile.TemporaryFile() as file:
            yield Journal(file, _custom_id)
        return
    part = _part(output)
    with open(part, "a+b") as file:
        try:
            lock(file, wait=False)
        except OSError:
            raise ValueError(f"{part}: another run is writing it") from None
        try:
            journal = Journal(file, _custom_id)
        except ValueError as error:
            raise ValueError(f"{part}: {error}; take another name for the answers") from None
        try:
            yield journal
        finally:
            if journal.head is None:
                part.unlink()  # nothing was begun


def _head(args: argparse.Namespace, raw: bytes) -> dict[str, Any]:
    """What the answers of a run depend on, beside the context."""
    from .. import __version__
    from ..format import ModelFile

    file = ModelFile(args.model)
    model = [file.metadata["name"], file.file_size, file.fields()["sections_crc"]]
    requests = hashlib.sha256(raw).hexdigest()
    return {
        "requests": requests, "model": model, "kv": args.kv, "activations": args.activations,
        "version": __version__,
    }  # fmt: skip


@dataclass
class Run:
    """The answers that are not there yet. head: what they depend on, beside the context.

    found: how many were there. refused: how many of those that came since say why there is no reply.
    """

    args: argparse.Namespace
    items: list[Item]
    journal: Journal
    head: dict[str, Any]
    refused: int = 0

    def __post_init__(self) -> None:
        before = self.journal.head
        for name, other in AGREED.items():
            if before is not None and before.get(name) != self.head[name]:
                raise ValueError(f"{self._where}: it was begun with {other}; remove it to begin anew")
        self.found = len(self.journal)
        self._begin = time.monotonic()
        self._counts: list[str] = []

    @property
    def _where(self) -> str:
        return str(_part(self.args.output))

    def go_on(self) -> None:
        """Answer what is not answered.

        Ended if a signal asks for it, RuntimeError if the engine fails: what is answered by then stays.
        """
        from ..serve.batch import EngineFailedError

        if self.found:
            terminal.note(f"{self._where}: {self.found} of {len(self.items)} answers are there")
        if self.found == len(self.items):
            return
        try:
            number = asyncio.run(self._answer(open_model(self.args, chats=True)))
        except EngineFailedError as error:
            raise RuntimeError(f"{error}; {self._kept()}") from None
        if number:
            raise Ended(number, f"{Ended(number).word}; {self._kept()}")

    def _kept(self) -> str:
        done = f"{len(self.journal)} of {len(self.items)} answers are"
        if self.args.output == "-":
            return f"{done} written"
        return f"{done} in {self._where}, with which the same command goes on"

    async def _answer(self, model: Model) -> int:
        """Answer to the end; the number of the signal that was it, 0 if all are answered."""
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        with endings(ended):
            working = asyncio.ensure_future(self._work(model))
            ended.add_done_callback(lambda _: working.cancel())
            try:
                await working
            except asyncio.CancelledError:
                return ended.result()
        return 0

    async def _work(self, model: Model) -> None:
        from ..serve.api import Api
        from ..serve.models import Models

        name = str(model.metadata["name"])
        async with Models({name: lambda: model}, self._options()).open() as models:
            self._agree_on_context(models.loaded[0].context)
            terminal.note(" | ".join([name, *described(models)]))
            progress = terminal.Progress(self._describe, start=self.found)
            telling = asyncio.create_task(self._tell(progress))
            try:
                await self._add_answers(Api(models))
            finally:
                telling.cancel()
                progress.clear()
            counters = models.loaded[0].scheduler.counters
            rate = counters.generated_tokens / (time.monotonic() - self._begin)
            self._counts = [
                f"prompts {counters.prompt_tokens} tok ({counters.cached_tokens} cached)",
                f"replies {counters.generated_tokens} tok {rate:.1f} tok/s",
            ]

    async def _add_answers(self, api: Api) -> None:
        from ..serve.batch import answered

        missing = [item for item in self.items if item.custom_id not in self.journal]
        async with contextlib.aclosing(answered(api, missing, self._running)) as answers:
            async for answer in answers:
                with concerning(self._where):
                    self.journal.add(answer.custom_id, answer.line)
                self.refused += answer.status >= 400

    @property
    def _running(self) -> int:
        return self.args.concurrency or RUNNING

    def _options(self) -> ServeOptions:
        from ..serve.batch import PASS_SECONDS
        from ..serve.config import size
        from ..serve.models import ServeOptions

        memory = self.args.max_memory
        try:
            kv_bytes = None if memory is None else size(memory)
        except ValueError as error:
            raise ValueError(f"--max-memory = {memory!r}: expected {error}") from None
        context = self.args.context or (self.journal.head or {}).get("context")
        return ServeOptions(
            self._running, sys.maxsize, kv_bytes, PASS_SECONDS, context, draft=self.args.drafts, offline=True
        )

    def _agree_on_context(self, context: int) -> None:
        if self.journal.head is None:
            self.journal.begin(self.head | {"context": context})
        elif self.journal.head["context"] != context:
            before = self.journal.head["context"]
            raise ValueError(
                f"{self._where}: it was begun with a context of {before}, now it is {context} "
                "(-c, --max-memory); remove it to begin anew"
            )

    def _describe(self, done: float, total: float, rate: float) -> str:
        refused = f"  {self.refused} refused" * bool(self.refused)
        return f"{done:.0f} of {total:.0f} answers{refused}  {rate:.1f} a second"

    async def _tell(self, progress: terminal.Progress) -> None:
        while True:
            progress(len(self.journal), len(self.items))
            await asyncio.sleep(terminal.DRAWN_EVERY)

    def say_end(self) -> None:
        """What has been done, in a line."""
        where = "" if self.args.output == "-" else f" in {self.args.output}"
        said = [f"{len(self.items)} answers{where}", *[f"{self.found} were there"] * bool(self.found)]
        said += [f"{self.refused} refused"] * bool(self.refused)
        terminal.note(" | ".join([*said, *self._counts, f"{time.monotonic() - self._begin:.1f} s"]))
