"""What INT8 costs: probabilities of model.bin, and of llama.cpp's Q8_0, against float32 transformers.

    python benchmarks/fidelity.py Qwen3-0.6B --text heldout.txt
    python benchmarks/fidelity.py Qwen3-0.6B --windows 4 --window 128 --llama-cpp
    python benchmarks/fidelity.py build/llama --text heldout.txt --rope llama3

The reference is transformers in float32 with the original weights. Text is cut into windows, each read from
an empty cache. --rope gives the model another rotary embedding, stretched from 256 positions, for both
sides. Without --text the tokens are uniformly random. Per token, with p the reference's
probabilities and q the candidate's: KL divergence sum p ln(p / q) in nats, whether both prefer the same
token, the loss of the token that really comes next.
Needs torch and transformers (`make oracles`); --llama-cpp needs llama-cpp-python and gguf.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3c import engine
from qwen3c.convert.export import export
from qwen3c.system.machine import default_threads

Ids = NDArray[np.int64]
Forward = Callable[[Ids], NDArray[np.float32]]  # (n,) tokens from an empty cache -> (n, vocab_size) logits
ROWS = 64  # rows of logits compared at a time, in float64

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@dataclass
class Expected:
    """The reference's results for a window."""

    logits: NDArray[np.float32]  # (n, vocab_size)
    log_probabilities: NDArray[np.float64]


@dataclass
class Difference:
    """How far a candidate's probabilities are from the reference's, over all windows so far."""

    tokens: int = 0
    predictions: int = 0  # tokens whose successor is known
    divergence: float = 0.0
    worst_divergence: float = 0.0
    same_top: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    squared_error: float = 0.0
    squared_logits: float = 0.0

    def add(self, found: NDArray[np.float32], expected: Expected, ids: Ids) -> None:
        for start in range(0, len(ids), ROWS):
            rows = slice(start, start + ROWS)
            p, q = expected.log_probabilities[rows], log_softmax(found[rows])
            divergence = (np.exp(p) * (p - q)).sum(-1)
            self.divergence += float(divergence.sum())
            self.worst_divergence = max(self.worst_divergence, float(divergence.max()))
            self.same_top += int((p.argmax(-1) == q.argmax(-1)).sum())
            following = ids[start + 1 : start + 1 + ROWS]
            self.reference_loss -= float(p[np.arange(len(following)), following].sum())
            self.loss -= float(q[np.arange(len(following)), following].sum())
            error = found[rows].astype(np.float64) - expected.logits[rows]
            self.squared_error += float(np.square(error).sum())
            self.squared_logits += float(np.square(expected.logits[rows].astype(np.float64)).sum())
        self.tokens += len(ids)
        self.predictions += len(ids) - 1

    def row(self, name: str) -> str:
        ratio = math.exp((self.loss - self.reference_loss) / self.predictions)
        cells = (
            name,
            f"{self.divergence / self.tokens:.3e}",
            f"{self.worst_divergence:.1e}",
            f"{self.same_top / self.tokens:.2%}",
            f"{math.exp(self.loss / self.predictions):.5g}",
            f"{ratio - 1:+.3%}",
            f"{self.squared_error / self.squared_logits:.2e}",
        )
        return "| " + " | ".join(cells) + " |"


HEADER = """\
| | mean KL divergence (nats) | worst | same top token | perplexity | to the reference's | NMSE of logits |
|---|---|---|---|---|---|---|"""


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# ----------------------------------------------------------------------------
# Reference and candidates


def reference(source: Path) -> Forward:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SystemExit(f"fidelity.py: error: {error}; `make oracles` installs the reference") from None
    library: Any = transformers
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    model = library.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def forward(ids: Ids) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        return logits

    return forward


def ours(path: Path, kv: engine.KV, activations: engine.Activations) -> Forward:
    model = engine.Engine(str(path), kv=kv, activations=activations)
    return lambda ids: model.session().forward(ids, logits="all")


def llama_cpp(path: Path, context: int) -> Forward:
    from llamacpp import Session

    session = Session(path, default_threads(), context)

    def forward(ids: Ids) -> NDArray[np.float32]:
        session.rewind(0)
        return session.forward(ids, logits="all")

    return forward


def candidates(args: argparse.Namespace, work: Path) -> Iterator[tuple[str, Forward]]:
    """(name, forward) of every model.bin, in every mode asked for, and of llama.cpp."""
    models = {path.name: path for path in args.model}
    for group_size in args.group_size if not models else ():
        models[f"qwen3c, group {group_size}"] = path = work / f"group-{group_size}.bin"
        export(args.source, path, group_size=group_size)
    for name, path in models.items():
        for activations in args.activations:
            for kv in args.kv:
                yield f"{name}, {kv} cache, {activations} activations", ours(path, kv, activations)
    if args.llama_cpp:
        from gguf_model import write_gguf

        write_gguf(args.source, work / "q8_0.gguf")
        yield "llama.cpp Q8_0, f16 cache", llama_cpp(work / "q8_0.gguf", args.window)


# ----------------------------------------------------------------------------
# Windows of tokens


def with_rope(source: Path, target: Path, kind: str) -> Path:
    """The same model, but for its rotary embedding, in the directory `target`."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path.resolve())
    config = json.loads((source / "config.json").read_text())
    theta = (config.pop("rope_parameters", None) or config)["rope_theta"]
    config["rope_theta"], config["rope_scaling"] = theta, {"rope_type": kind} | ROPES[kind]
    (target / "config.json").write_text(json.dumps(config))
    return target


def windows(args: argparse.Namespace) -> list[Ids]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.source / "tokenizer.json"))
    if args.text:
        ids = np.array(tokenizer.encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False).ids)
    else:
        n_tokens = tokenizer.get_vocab_size(with_added_tokens=False)
        ids = np.random.default_rng(args.seed).integers(0, n_tokens, (args.windows or 4) * args.window)
    cut = [ids[start : start + args.window] for start in range(0, len(ids), args.window)]
    cut = [window for window in cut if len(window) > 1]
    return cut[: args.windows] if args.windows else cut


def measure(args: argparse.Namespace) -> dict[str, Difference]:
    """The difference of every candidate over all windows."""
    with tempfile.TemporaryDirectory() as work:
        if args.rope:
            args.source = with_rope(args.source, Path(work) / "source", args.rope)
        forward = reference(args.source)
        models = dict(candidates(args, Path(work)))
        differences = {name: Difference() for name in models}
        texts = windows(args)
        for i, ids in enumerate(texts):
            if sys.stderr.isatty():
                print(f"\rwindow {i + 1} of {len(texts)} ", end="", file=sys.stderr, flush=True)
            logits = forward(ids)
            expected = Expected(logits, log_softmax(logits))
            for name, model in models.items():
                differences[name].add(model(ids), expected, ids)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return differences


def main() -> int:
    args = parse()
    try:
        differences = measure(args)
    except (OSError, ValueError) as error:
        print(f"fidelity.py: error: {error}", file=sys.stderr)
        return 2
    first = next(iter(differences.values()))
    of = args.text.name if args.text else "uniformly random"
    perplexity = math.exp(first.reference_loss / first.predictions)
    print(
        f"{first.tokens} tokens ({of}) in windows of {args.window}; reference perplexity {perplexity:.5g}\n"
    )
    print(HEADER, *(difference.row(name) for name, difference in differences.items()), sep="\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="Hugging Face directory: the reference")
    parser.add_argument(
        "--model",
        metavar="BIN",
        type=Path,
        nargs="+",
        default=[],
        help="files to compare (default: export SRC)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        nargs="+",
        default=[64, 32],
        help="of the exports made here (default: 64 32)",
    )
    parser.add_argument(
        "--kv", choices=("int8", "f16", "f32"), nargs="+", default=["f16"], help="default: f16"
    )
    parser.add_argument(
        "--activations", choices=("int8", "float32"), nargs="+", default=["int8"], help="default: int8"
    )
    parser.add_argument("--rope", choices=ROPES, help="of all, in place of the model's own")
    parser.add_argument("--llama-cpp", action="store_true", help="compare llama.cpp's Q8_0 too")
    parser.add_argument("--text", metavar="FILE", type=Path, help="UTF-8 text (default: random tokens)")
    parser.add_argument("--window", metavar="N", type=int, default=1024, help="tokens (default: 1024)")
    parser.add_argument(
        "--windows", metavar="N", type=int, help="how many (default: all of a text, 4 of random tokens)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random tokens")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
