"""Do qwen3c and llama.cpp choose the same tokens, given the same GGUF file?

    python benchmarks/gguf_model.py path/to/model model.gguf
    python benchmarks/agreement.py model.gguf --text heldout.txt
    python benchmarks/agreement.py model.gguf --text heldout.txt --exact

Both engines read the text in windows, each from an empty cache, and the likeliest next tokens are compared.
Both round activations, in different ways, so near ties may fall either way. A position's noise is the
standard deviation, over the vocabulary, of the difference between the engines' logits, times sqrt(2) for the
difference of two logits. Each position has its own, because in a mixture the engines may choose different
experts at a near tie, and then differ by more. Where the gap between llama.cpp's two largest logits is
several times the noise, the tokens must agree.

--exact: neither rounds activations. qwen3c computes in float32, and llama.cpp reads the file's weights as
F32. Needs llama-cpp-python and gguf.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf_model import write_gguf
from llamacpp import Session
from numpy.typing import NDArray

from qwen3c import Model
from qwen3c.convert.export import export

MARGINS = (1, 2, 4)  # multiples of the noise for which agreement is printed


def windows(model: Model, text: Path | None, window: int, n: int) -> list[NDArray[np.int64]]:
    """At most n windows of the text, or n windows of random tokens."""
    if text is None:
        return list(np.random.default_rng(0).integers(0, model.config.n_tokens, (n, window)))
    ids = np.array(model.tokenizer.encode(text.read_text(encoding="utf-8")))
    return np.split(ids[: len(ids) // window * window], len(ids) // window)[:n]


def measure(
    model: Model, peer: Session, pieces: list[NDArray[np.int64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """For every position, (n,) each: llama.cpp's gap, the noise, whether the engines agree."""
    gaps, noises, agrees = [], [], []
    for ids in pieces:
        peer.rewind(0)
        theirs = peer.forward(ids, logits="all").astype(np.float64)
        ours = model.session().forward(ids, logits="all").astype(np.float64)
        best = np.sort(theirs, axis=-1)[:, -2:]
        gaps.append(best[:, 1] - best[:, 0])
        noises.append((ours - theirs).std(-1) * 2**0.5)
        agrees.append(ours.argmax(-1) == theirs.argmax(-1))
    return np.concatenate(gaps), np.concatenate(noises), np.concatenate(agrees)


def report(gaps: NDArray[np.float64], noises: NDArray[np.float64], agrees: NDArray[np.bool_]) -> str:
    lines = [
        f"{len(gaps)} tokens, {np.mean(agrees):.2%} the same; median noise {np.median(noises):.3g}, largest "
        f"{noises.max():.3g}, median gap {np.median(gaps):.3g}"
    ]
    for margin in MARGINS:
        wide = gaps > margin * noises
        lines.append(f"  gap over {margin} x noise: {wide.sum()} tokens, {(wide & ~agrees).sum()} differ")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", metavar="GGUF", type=Path)
    parser.add_argument("--text", metavar="FILE", type=Path, help="UTF-8 text (default: random tokens)")
    parser.add_argument("--window", metavar="N", type=int, default=512, help="tokens (default: 512)")
    parser.add_argument("--windows", metavar="N", type=int, default=16, help="at most (default: 16)")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="of both (default: 1)")
    parser.add_argument("--exact", action="store_true", help="without rounding activations")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as work:
            path, peer_path = Path(work) / "model.bin", args.source
            export(args.source, path, group_size=32)
            if args.exact:
                peer_path = Path(work) / "f32.gguf"
                write_gguf(args.source, peer_path, "F32")
            model = Model(str(path), args.threads, activations="float32" if args.exact else "int8")
            peer = Session(peer_path, args.threads, args.window)
            print(report(*measure(model, peer, windows(model, args.text, args.window, args.windows))))
    except (OSError, ValueError) as error:
        print(f"agreement.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
