"""What drafts win: replies with and without them, in turns within one run.

    python benchmarks/speculation.py model.bin                    # real texts, as replies that are dictated
    python benchmarks/speculation.py model.bin --small small.bin  # also a smaller model's guesses
    python benchmarks/speculation.py                              # the model in the box

The words of a reply are dictated, so that a model of any weights says a real text: all passes and draws are
computed, and the token that comes of them is replaced. Which guesses are right is a matter of the text then:

    edit       a file is written again with one name changed
    extract    the lines of a file that have a word
    quotes     one's own sentences and quoted ones, in turn
    prose      a text that has nothing in common with the prompt
    noise      a text in which nothing repeats itself: what drafts may cost at most

With --small the smaller model's passes are computed, too, and its guesses are made right with the
probability of --acceptance, each by itself. Printed: tokens per second of both, their ratio (median and range
of --pairs pairs, the first one discarded), tokens a pass, guesses checked and right.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qwen3c
from qwen3c import CachedSession, Model
from qwen3c.drivers.draft import Drafting, Small
from qwen3c.drivers.generate import Generation
from qwen3c.drivers.reply import ReplyState, Stats
from qwen3c.drivers.sampler import Sampling
from qwen3c.system.files import MODEL_IN_THE_BOX
from qwen3c.system.machine import default_threads

EDITED = Path(qwen3c.__file__).parent / "serve" / "pace.py"
QUOTED, OTHER = topics["objects"], topics["execmodel"]  # of Python's documentation
CHAT = Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=1)


class Dictated(ReplyState):
    """A reply whose tokens are dictated. They are drawn all the same, for that takes time."""

    def __init__(self, model: Model, prompt: list[int], text: list[int]) -> None:
        vocabulary = model.vocabulary
        bare = type(vocabulary)(vocabulary.n_tokens, frozenset(), (), vocabulary.tokenizer, bare=True)
        super().__init__(bare, prompt, CHAT, len(text))
        self._dictated = text

    def _next(self, logits: NDArray[np.float32]) -> int:
        super()._next(logits)
        return self._dictated[len(self.tokens)]


class Replayed(Small):
    """A smaller model whose guesses are right as often as is said."""

    def __init__(self, model: Model, text: list[int], acceptance: float) -> None:
        super().__init__(model)
        self._text = text
        self._acceptance = acceptance
        self._random = random.Random(1)

    def choose(self, row: NDArray[np.float32], place: int) -> int:
        """See Small."""
        guess = super().choose(row, place)
        right = self._text[place] if place < len(self._text) else guess
        return right if self._random.random() < self._acceptance else (right + 1) % len(row)


def tasks(model: Model, most: int) -> dict[str, tuple[list[int], list[int]]]:
    """Prompts and replies, in tokens; together they have at most `most`."""
    encode = model.tokenizer.encode
    code = EDITED.read_text()
    lines = [line for line in QUOTED.splitlines() if " the " in line]
    mixed = [line for pair in zip(OTHER.splitlines(), lines, strict=False) for line in pair]
    r = random.Random(1)
    noise = r.sample(range(256, model.config.n_tokens), min(most, model.config.n_tokens - 256))
    texts = {
        "edit": (code, code.replace("Pace", "Tempo")),
        "extract": (QUOTED, "\n".join(lines)),
        "quotes": (QUOTED, "\n".join(mixed)),
        "prose": (code, OTHER),
    }
    found = {name: _fitting(encode(asked), encode(said), most) for name, (asked, said) in texts.items()}
    return found | {"noise": _fitting(noise[: most // 2], noise[most // 2 :], most)}


def _fitting(asked: list[int], said: list[int], most: int) -> tuple[list[int], list[int]]:
    return asked[: most // 2], said[: most // 2]


def measured(model: Model, prompt: list[int], text: list[int], drafting: Drafting | None) -> Stats:
    """The figures of a reply to `prompt` that says `text`."""
    state = Dictated(model, prompt, text)
    generation = Generation(CachedSession(model), prompt, state, owns_session=True, drafting=drafting)
    for _ in generation:
        pass
    assert generation.tokens == text
    generation.close()
    return generation.stats


def compare(name: str, pairs: int, run: Callable[[bool], Stats]) -> None:
    """Measure with and without drafts in turns, and print a line."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    stats = Stats()
    for pair in range(pairs + 1):
        for drafts in (False, True) if pair % 2 else (True, False):
            done = run(drafts)
            stats = done if drafts else stats
            if pair:
                rates[drafts].append(done.decode_rate)
    ratios = sorted(drafted / plain for plain, drafted in zip(rates[False], rates[True], strict=True))
    plain, drafted = (statistics.median(rates[drafts]) for drafts in (False, True))
    print(
        f"{name:<24} {plain:8.1f} -> {drafted:8.1f} tok/s  {statistics.median(ratios):5.2f}x "
        f"({ratios[0]:.2f}-{ratios[-1]:.2f})  {stats.tokens_per_pass:5.2f} tokens a pass  "
        f"{stats.accepted_tokens} of {stats.drafted_tokens} right",
        flush=True,
    )


def _once(model: Model, prompt: list[int], text: list[int], drafting: Drafting, on: bool) -> Stats:
    """One measurement, with drafts or without."""
    return measured(model, prompt, text, drafting if on else None)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Replies with and without drafts, in turns.")
    parser.add_argument("model", nargs="?", default=str(MODEL_IN_THE_BOX), help="default: the one in the box")
    parser.add_argument("--small", help="a smaller model.bin, whose guesses are measured, too")
    parser.add_argument("--acceptance", type=float, default=0.7, help="of its guesses (default: 0.7)")
    parser.add_argument("--tokens", type=int, default=1024, help="prompt and reply (default: 1024)")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--only", action="append", help="a task, or small; repeatable")
    args = parser.parse_args(argv)

    model = Model(args.model, args.threads)
    wanted = tasks(model, min(args.tokens, model.config.context))
    options: Any = {name: name for name in (args.only or [*wanted, "small"])}
    for name, (prompt, text) in wanted.items():
        if name in options:
            compare(name, args.pairs, partial(_once, model, prompt, text, Drafting(model)))
    if args.small and "small" in options:
        small = Model(args.small, args.threads)
        prompt, text = wanted["prose"]
        drafting = Drafting(model, small)
        drafting.small = Replayed(small, prompt + text, args.acceptance)
        compare(
            f"small, {args.acceptance:.0%} right", args.pairs,
            lambda on: measured(model, prompt, text, drafting if on else None),
        )  # fmt: skip


if __name__ == "__main__":
    main()
