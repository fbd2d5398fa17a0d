"""Bits against KL divergence: our recipes and encodings, and llama.cpp's types, on one trained model.

    python benchmarks/lowbits.py path/to/model --text heldout.txt
    python benchmarks/lowbits.py path/to/model --text heldout.txt --ggml path/to/libggml-base.so
    python benchmarks/lowbits.py path/to/model --text heldout.txt --recipe mine.toml --only-recipes
    python benchmarks/lowbits.py path/to/model --text heldout.txt --only-recipes --calibrate text.txt

The reference is transformers in float32 with the original weights. Every candidate is a full set of matrices
in its place, with float activations, so that nothing but the weights is compared: ours are exported and read
back from the model.bin; llama.cpp's are quantised by its own library and dequantised by the package gguf.
Types of superblocks (256 weights, K) take rows as they follow each other: where a width is no multiple of
256, llama.cpp itself falls back to types of more bits. Mixes are those of llama-quantize: Q4_K_M gives v and
down of some layers, and the output, Q6_K.
KL divergence is sum p ln(p / q) in nats per token; bits are those of all matrices, scales included.
Needs torch and transformers (`make oracles`); --ggml needs gguf.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3c import format
from qwen3c.convert import recipe
from qwen3c.convert.calibration_text import CalibrationOptions
from qwen3c.convert.export import export
from qwen3c.reference import load_weights

Weights = dict[str, NDArray[np.float32]]
Candidate = tuple[str, float, Weights]  # name, bits per weight, matrices by Hugging Face name
ENCODINGS = ("int4", "int6", "int8")
# llama-quantize: type of most matrices, of v and down in the layers that recipes call "more", of the output
MIXES = {
    "Q4_0": ("Q4_0", "Q4_0", "Q6_K"),
    "IQ4_NL": ("IQ4_NL", "IQ4_NL", "Q6_K"),
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
    "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K"),
    "Q6_K": ("Q6_K", "Q6_K", "Q6_K"),
    "Q8_0": ("Q8_0", "Q8_0", "Q8_0"),
}
ROWS = 512  # rows of logits compared at a time


class Reference:
    """The model in transformers, whose matrices can be replaced, and what it says of a text."""

    def __init__(self, source: Path, text: Path, window: int, windows: int | None) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise SystemExit(f"lowbits.py: error: {error}; `make oracles` installs the reference") from None
        from tokenizers import Tokenizer

        library: Any = transformers
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
        self.torch = torch
        self.model = library.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
        n = min(len(ids) // window, windows or len(ids))
        if not n:
            raise SystemExit(f"lowbits.py: error: {text} has {len(ids)} tokens, a window is {window}")
        self.ids = torch.tensor(ids[: n * window]).view(n, window)
        self.parameters: dict[str, Any] = dict(self.model.named_parameters())
        self.original: Weights = {k: p.detach().numpy().copy() for k, p in self.parameters.items()}
        self.expected = [self._log_probabilities(ids) for ids in self.ids]

    def _log_probabilities(self, ids: Any) -> Any:
        with self.torch.no_grad():
            return self.torch.log_softmax(self.model(ids[None]).logits[0].float(), -1)

    def matrices(self) -> Weights:
        """The original weights of every matrix that has an encoding."""
        return {k: w for k, w in self.original.items() if w.ndim == 2 and not k.endswith(format.ROUTER)}

    def compared(self, weights: Weights) -> tuple[float, float]:
        """With these matrices in place of the original ones: mean KL divergence, in nats per token, and
        perplexity beside that of the original ones.
        """
        with self.torch.no_grad():
            for name, parameter in self.parameters.items():
                stored = np.array(weights.get(name, self.original[name]))
                parameter.copy_(self.torch.from_numpy(stored))
        total, nats = 0.0, 0.0
        for ids, expected in zip(self.ids, self.expected, strict=True):
            found = self._log_probabilities(ids)
            for start in range(0, len(ids), ROWS):
                p, q = (x[start : start + ROWS].double() for x in (expected, found))
                total += float((p.exp() * (p - q)).sum())
            more = (expected - found)[:-1].gather(1, ids[1:, None])
            nats += float(more.double().sum())
        return total / self.ids.numel(), math.exp(nats / (self.ids.numel() - len(self.ids)))


def ours(source: Path, work: Path, recipes: list[recipe.Recipe], text: str | None) -> Iterator[Candidate]:
    """Exports by each recipe, read back; with a text also weighed by it, and calibrated on it."""
    for made in recipes:
        ways: dict[str, CalibrationOptions | None] = {"": None}
        if text is not None and _has_few_bits(made):
            ways |= {
                " --importance": CalibrationOptions(text, feedback=False),
                " --calibrate": CalibrationOptions(text),
            }
        for way, calibrate in ways.items():
            path = work / "model.bin"
            export(source, path, recipe=made, calibrate=calibrate)
            file = format.ModelFile(path)
            matrices = [tensor for tensor in file.tensors if tensor.quantized]
            weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in matrices)
            bits = 8 * sum(tensor.size for tensor in matrices) / weights
            yield made.location + way, bits, load_weights(file)


def _has_few_bits(made: recipe.Recipe) -> bool:
    return any(
        e is not format.Encoding.INT8 for e in (made.encoding, *(rule.encoding for rule in made.rules))
    )


def llama_cpp(library: Path, originals: Weights, n_layers: int) -> Iterator[Candidate]:
    """llama.cpp's mixes."""
    quantized = _quantizer(library)
    tied = "lm_head.weight" not in originals
    for name, (most, better, output) in MIXES.items():
        bits, weights = 0.0, {}
        for matrix, values in originals.items():
            is_output = matrix == ("model.embed_tokens.weight" if tied else "lm_head.weight")
            kind = output if is_output else better if _gets_more(matrix, n_layers) else most
            weights[matrix], per_weight = quantized(values, kind)
            bits += per_weight * values.size
        yield f"llama.cpp {name}", bits / sum(w.size for w in originals.values()), weights


def _gets_more(name: str, n_layers: int) -> bool:
    found = re.match(r"model\.layers\.(\d+)\..*\b(v_proj|down_proj)\.", name)
    return found is not None and recipe.gets_more(int(found[1]), n_layers)


def _quantizer(
    path: Path,
) -> Callable[[NDArray[np.float32], str], tuple[NDArray[np.float32], float]]:
    """A function (weights, type) -> (the weights as that type keeps them, its bits per weight)."""
    try:
        import gguf
    except ImportError as error:
        raise SystemExit(f"lowbits.py: error: {error}; `pip install gguf`") from None
    library = ctypes.CDLL(str(path))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    integers = [ctypes.c_int64] * 3
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *integers, ctypes.c_void_p]

    def quantized(weights: NDArray[np.float32], kind: str) -> tuple[NDArray[np.float32], float]:
        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        rows = np.ascontiguousarray(weights.reshape(-1, block))
        out = np.empty((len(rows), size), np.uint8)
        quantize(int(number), rows.ctypes.data, out.ctypes.data, 0, len(rows), block, None)
        return gguf.dequantize(out, number).reshape(weights.shape), 8 * size / block

    return quantized


def main() -> int:
    args = parse()
    recipes = [recipe.of_bits(bits) for bits in recipe.BITS] + [recipe.read(path) for path in args.recipe]
    if not args.only_recipes:
        recipes += [recipe.parse({"encoding": encoding}, f"all {encoding}") for encoding in ENCODINGS]
    reference = Reference(args.source, args.text, args.window, args.windows)
    n_layers = json.loads((args.source / "config.json").read_text())["num_hidden_layers"]
    print(f"{reference.ids.numel()} tokens of {args.text.name} in windows of {args.window}\n")
    print("| | bits a weight | KL divergence, nats | perplexity |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        candidates = [ours(args.source, Path(work), recipes, args.calibrate)]
        if args.ggml:
            candidates.append(llama_cpp(args.ggml, reference.matrices(), n_layers))
        for some in candidates:
            for name, bits, weights in some:
                lost, perplexity = reference.compared(weights)
                print(f"| {name} | {bits:.3f} | {lost:.5f} | {perplexity - 1:+.2%} |", flush=True)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="Hugging Face directory: the reference")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="UTF-8 text, held out")
    parser.add_argument("--window", metavar="N", type=int, default=512, help="tokens (default: 512)")
    parser.add_argument("--windows", metavar="N", type=int, help="how many (default: all of the text)")
    parser.add_argument("--recipe", metavar="FILE", nargs="+", default=[], help="recipes of one's own too")
    parser.add_argument("--only-recipes", action="store_true", help="leave out uniform encodings")
    parser.add_argument("--calibrate", metavar="TEXT", nargs="?", const="", help="calibrate on this too")
    parser.add_argument("--ggml", metavar="SO", type=Path, help="libggml-base of llama.cpp, to compare with")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
