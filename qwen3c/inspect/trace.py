"""The data that flows through a model for one text: what -m trace prints. trace_page.py draws it.

    input_flow   module by module: what goes in, what comes out, what happens between
    compact      every activation: shape, range, size
    verbose      also type, bytes, spread and INT8 error of every activation, and every weight

The activations come from Model.trace, so from the engine's own forward pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import engine, memory
from ..engine.probes import PROBES
from ..format import TILE_ROWS, Encoding, ModelFile, Role, Tensor, codes_and_scales
from ..model import Model
from ..system.terminal import REPORT_WIDTH, wrapped
from .info import LAYER, layer_of, likewise

LEVELS = ("input_flow", "compact", "verbose")
ALTERNATIVES = 10  # most likely tokens shown for each position
LEAST_WORDS = 24  # columns that a description needs to stand beside the figures
SLICE_WEIGHTS = 1 << 22  # weights dequantised at a time for their statistics

Array = NDArray[np.float32]

MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}

BARS = "·▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Text:
    """The tokens that are traced: the prompt and what the model went on with."""

    ids: list[int]
    n_prompt: int
    seed: int = 0  # seed of the sampling


def continue_text(model: Model, prompt: Sequence[int], max_tokens: int, **options: Any) -> Text:
    """Let the model go on from `prompt` by at most `max_tokens`; options: of Model.generate."""
    generation = model.generate(prompt, max_tokens, **options)
    for _ in generation:
        pass
    return Text([*prompt, *generation.tokens], len(prompt), generation.stats.seed)


@dataclass(frozen=True)
class Prediction:
    """What a row of logits says of the next token, before penalties and temperature."""

    tokens: list[int]  # the likeliest first
    probabilities: list[float]  # their probabilities
    chance: float | None = None  # probability of the actual next token


def predict(model: Model, logits: Array, n: int, came: int | None = None) -> Prediction:
    """The n likeliest existing tokens by logits (vocab_size,). came: the actual next token."""
    logits = logits[: model.config.n_tokens].copy()
    logits[model.undefined_tokens] = -np.inf
    total = engine.log_sum_exp(logits)
    tokens = engine.top_k(logits, min(n, len(logits)))
    probabilities = np.exp(logits[tokens] - np.float32(total))
    chance = None if came is None or came >= len(logits) else math.exp(float(logits[came]) - total)
    return Prediction(tokens.tolist(), probabilities.tolist(), chance)


def alternatives(model: Model, text: Text, logits: Array) -> list[Prediction]:
    """The Prediction for each token but the first, from the logits (n, vocab_size) of the tokens."""
    return [
        predict(model, row, ALTERNATIVES, came) for row, came in zip(logits[:-1], text.ids[1:], strict=True)
    ]


# ----------------------------------------------------------------------------
# Rows: one for every activation


@dataclass(frozen=True)
class Statistics:
    """Statistics of the numbers of one array."""

    minimum: float
    maximum: float
    mean: float
    std: float
    rms: float


def statistics(values: Array) -> Statistics:
    mean, square = float(np.mean(values, dtype=np.float64)), float(np.vdot(values, values)) / values.size
    std = max(square - mean * mean, 0.0) ** 0.5
    return Statistics(float(values.min()), float(values.max()), mean, std, square**0.5)


@dataclass(frozen=True)
class Row:
    """One activation: its name in transformers, what goes in and what comes out."""

    name: str
    source: tuple[int, ...]
    shape: tuple[int, ...]
    what: str
    statistics: Statistics
    error: float | None = None  # relative rms of what INT8 activations and the type of the KV cache change

    @property
    def layer(self) -> str | None:
        match = LAYER.match(self.name)
        return match[0] if match else None

    @property
    def module(self) -> str:
        return _module(self.name)

    @property
    def bytes(self) -> int:
        return 4 * math.prod(self.shape)


def _module(name: str) -> str:
    """The name of an activation within its layer; "x" is the layer's own output."""
    return LAYER.sub("", name).removeprefix(".") or "x"


def rows(model: Model, trace: dict[str, Array], exact: dict[str, Array] | None = None) -> Iterator[Row]:
    """A Row for every activation of a trace, in order. exact: the trace with which `error` is measured."""
    n = len(trace["lm_head"])
    shapes = {"ids": (n,), "x": (n, model.config.dim)}
    numbers = dataclasses.asdict(model.config)
    for name, values in trace.items():
        error = None if exact is None else relative_error(values, exact[name])
        module = _module(name)
        probe = PROBES[module]
        shapes[module] = values.shape
        found = statistics(np.ascontiguousarray(values))
        yield Row(name, shapes[probe.source], values.shape, probe.what.format(**numbers), found, error)


def routing(trace: dict[str, Array]) -> dict[str, NDArray[np.int64]]:
    """How many tokens each expert got, (n_experts,), by layer."""
    ends = ".mlp.gate.shares"
    return {name.removesuffix(ends): (a > 0).sum(0) for name, a in trace.items() if name.endswith(ends)}


def exact_trace(model: Model, ids: Sequence[int]) -> dict[str, Array]:
    """The trace of the same file with float32 activations and a float32 KV cache."""
    return engine.Engine(model.path, model.threads, "f32", "float32").trace(ids)


def relative_error(values: Array, exact: Array) -> float:
    """rms(values - exact) / rms(exact)"""
    off = (values - exact).ravel()
    size = float(np.vdot(exact, exact))
    return (float(np.vdot(off, off)) / size) ** 0.5 if size else 0.0


# ----------------------------------------------------------------------------
# Weights


@dataclass(frozen=True)
class Weight:
    """A stored tensor."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    statistics: Statistics
    error: float  # relative rms of rounding to codes: step / sqrt(12), for evenly distributed values


def weights(file: ModelFile) -> Iterator[Weight]:
    """Every tensor of the file. All of its bytes are read."""
    for tensor in file.tensors:
        kind = tensor.encoding.value + (f" g{file.config.group_size}" if tensor.quantized else "")
        if tensor.role is not Role.ROPE_FREQUENCIES:
            found, error = _stored_statistics(file, tensor)
            yield Weight(tensor.name, kind, tensor.shape, tensor.size, found, error)


def _stored_statistics(file: ModelFile, tensor: Tensor) -> tuple[Statistics, float]:
    """(Statistics, rms of step / sqrt(12) / rms of the weights), computed some rows at a time."""
    if not tensor.quantized:
        return statistics(np.frombuffer(file.data(tensor), "<f4").astype(np.float32)), 0.0
    tile_rows, columns = file.tile_rows(tensor), tensor.shape[1]
    low, high, total, square, step_square = np.inf, -np.inf, 0.0, 0.0, 0.0
    step = max(SLICE_WEIGHTS // (columns * TILE_ROWS), 1)
    for start in range(0, len(tile_rows), step):
        part = tile_rows[start : start + step]
        codes, group_scales = codes_and_scales(part)
        scales = np.repeat(group_scales, file.config.group_size, axis=1)
        values = codes * scales
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        total += float(np.sum(values, dtype=np.float64))
        square += float(np.vdot(values, values))
        steps = scales * _steps(codes, part) if tensor.encoding is Encoding.INT4 else scales
        step_square += float(np.vdot(steps, steps))
    # padding rows of the last tile are zero and add nothing to the sums
    n = tensor.shape[0] * columns
    mean = total / n
    found = Statistics(low, high, mean, max(square / n - mean * mean, 0.0) ** 0.5, (square / n) ** 0.5)
    return found, (step_square / 12 / square) ** 0.5 if square else 0.0


def _steps(codes: NDArray[np.int8], tile_rows: NDArray[Any]) -> NDArray[np.float32]:
    """Half the distance between the neighbours of each code in its codebook: what is rounded to it."""
    result = np.empty(codes.shape, np.float32)
    for i, codebook in enumerate(tile_rows["codebook"]):
        known = np.unique(codebook).astype(np.int64)
        step = np.zeros(256, np.float32)
        step[known] = np.gradient(known) if len(known) > 1 else 0
        rows = slice(i * TILE_ROWS, (i + 1) * TILE_ROWS)
        result[rows] = step[codes[rows]]  # a negative code counts from the end
    return result


# ----------------------------------------------------------------------------
# For people, and as plain data


def lines(model: Model, text: Text, level: str) -> Iterator[str]:
    """The trace of a text for people, on 80 columns."""
    verbose = level == "verbose"
    trace = model.trace(text.ids)
    yield from _token_lines(model, text, trace["lm_head"])
    found = list(rows(model, trace, exact_trace(model, text.ids) if verbose else None))
    yield ""
    yield from _flow_lines(found) if level == "input_flow" else _activation_lines(found, verbose)
    if level != "input_flow" and model.config.n_experts:
        yield ""
        yield from _routing_lines(routing(trace))
    if verbose:
        yield ""
        yield from _weight_lines(model.file)
        yield ""
        for line in memory.lines(model.config, model.file.file_size, len(model.file.tokenizer)):
            yield from wrapped(line)


def describe(model: Model, text: Text, level: str) -> dict[str, Any]:
    """The trace as plain data; each level includes the levels below it."""
    verbose, file = level == "verbose", model.file
    trace = model.trace(text.ids)
    activations = []
    for row in rows(model, trace, exact_trace(model, text.ids) if verbose else None):
        entry: dict[str, Any] = {"name": row.name, "in": row.source, "shape": row.shape, "what": row.what}
        if level != "input_flow":
            entry |= dataclasses.asdict(row.statistics)
        if verbose:
            entry |= {"dtype": "float32", "bytes": row.bytes, "error": row.error}
        activations.append(entry)
    result: dict[str, Any] = {
        "tokens": [{"token": id, "text": model.tokenizer.decode([id])} for id in text.ids],
        "prompt_tokens": text.n_prompt,
        "seed": text.seed,
        "alternatives": [dataclasses.asdict(place) for place in alternatives(model, text, trace["lm_head"])],
        "activations": activations,
    }
    if level != "input_flow" and model.config.n_experts:
        result["routing"] = {name: counts.tolist() for name, counts in routing(trace).items()}
    if verbose:
        result["weights"] = [dataclasses.asdict(weight) for weight in weights(file)]
        result["memory"] = memory.table(model.config, file.file_size, len(file.tokenizer))
    return result


def _token_lines(model: Model, text: Text, logits: Array) -> Iterator[str]:
    """The prompt; then every later token with its probability and the alternatives."""
    tokens = [token_text(model, id) for id in text.ids]
    prompt = [f"{token}|" for token in tokens[: text.n_prompt]]
    prompt[-1] = prompt[-1][:-1]
    yield from _listed(f"{text.n_prompt} tokens: ", prompt, "")
    for i, place in list(enumerate(alternatives(model, text, logits), 1))[text.n_prompt - 1 :]:
        best = zip(place.tokens, place.probabilities, strict=True)
        others = [f"{token_text(model, id)} {p:.1%}" for id, p in best if id != text.ids[i]]
        yield from _listed(f"  {tokens[i]:<14} {place.chance or 0:>6.1%}   else ", others[:4], "  ")
    place = predict(model, logits[-1], 5)
    best = zip(place.tokens, place.probabilities, strict=True)
    yield from _listed("next: ", [f"{token_text(model, id)} {p:.1%}" for id, p in best], "  ")


def _listed(head: str, items: Sequence[str], between: str) -> Iterator[str]:
    """Items behind `head`, wrapped between items."""
    line, is_first = head, True
    for item in items:
        longer = line + ("" if is_first else between) + item
        if len(longer) > REPORT_WIDTH and not is_first:
            yield line
            longer = " " * min(len(head), REPORT_WIDTH // 2) + item
        line, is_first = longer, False
    yield line


def _flow_lines(found: list[Row]) -> Iterator[str]:
    """The input_flow of all rows; layers equal to the layer before them share one line."""
    widths = [
        max(len(_label(row)) for row in found),
        max(len(_shape(row.source)) for row in found),
        max(len(_shape(row.shape)) for row in found),
    ]
    yield from _flow_line(widths, "module", "in", "  ", "out", "what")
    like: list[Any] = []
    same: list[str] = []
    for layer, members in itertools.groupby(found, lambda row: row.layer):
        layer_rows = list(members)
        pattern = [(row.module, row.source, row.shape) for row in layer_rows]
        if layer and pattern == like:
            same.append(layer)
            continue
        yield from likewise(same)
        like, same = pattern, []
        yield from [layer] if layer else []
        for row in layer_rows:
            yield from _flow_line(widths, _label(row), _shape(row.source), "->", _shape(row.shape), row.what)


def _flow_line(widths: list[int], *cells: str) -> list[str]:
    """A line of cells: module, input, arrow, output, words; words without room go to the next line."""
    module, source, arrow, shape, what = cells
    start = f"{module:<{widths[0]}} {source:<{widths[1]}} {arrow} {shape:<{widths[2]}}  "
    if len(start) + LEAST_WORDS > REPORT_WIDTH:
        return [start.rstrip(), *wrapped(f"      {what}", indent=6)]
    return wrapped(start + what, indent=len(start))


def _label(row: Row) -> str:
    return f"  {row.module}" if row.layer else row.name


def _activation_lines(found: list[Row], verbose: bool) -> Iterator[str]:
    """A line for each activation, two if verbose; those of a layer below its name."""
    cells = [_shape(row.shape) for row in found] + [f"float32 {row.bytes}" for row in found] * verbose
    width = max(map(len, cells))
    yield f"{'activation':<29} {'shape':<{width}} {'min':>9} {'max':>9} {'rms':>9}"
    if verbose:
        yield f"{'':<29} {'type, bytes':<{width}} {'mean':>9} {'std':>9} {'error':>9}"
    for layer, members in itertools.groupby(found, lambda row: row.layer):
        yield from [layer] if layer else []
        for row in members:
            s, shape = row.statistics, _shape(row.shape)
            yield f"{_label(row):<29} {shape:<{width}} {s.minimum:>9.3g} {s.maximum:>9.3g} {s.rms:>9.3g}"
            if verbose:
                size = f"float32 {row.bytes}"
                yield f"{'':<29} {size:<{width}} {s.mean:>9.2g} {s.std:>9.3g} {row.error:>9.3%}"


def _routing_lines(counts: dict[str, NDArray[np.int64]]) -> Iterator[str]:
    """A histogram for each layer, with a bar for each expert: how many tokens it got."""
    head = f"{'routing':<17} {'idle':>6} {'busiest':>12}  "
    yield from wrapped(head + "tokens of each expert, the highest bar is the busiest", indent=len(head))
    in_line = REPORT_WIDTH - len(head)
    for layer, tokens in counts.items():
        best = int(tokens.argmax())
        bars = "".join(BARS[-(-int(n) * (len(BARS) - 1) // int(tokens[best]))] for n in tokens)
        start = f"{layer:<17} {int((tokens == 0).sum()):>6} {f'{best}: {tokens[best]}':>12}  "
        for first in range(0, len(bars), in_line):
            yield (" " * len(head) if first else start) + bars[first : first + in_line]


def _weight_lines(file: ModelFile) -> Iterator[str]:
    """Two lines for each weight; those of a layer below its name."""
    yield f"{'weight':<40} {'type':<9} {'bytes':>13}"
    yield f"{'':<29} {'min':>9} {'max':>9} {'mean':>9} {'std':>9} {'rounding':>9}"
    for layer, members in itertools.groupby(weights(file), lambda weight: layer_of(weight.name)):
        yield from [layer] if layer else []
        for weight in members:
            s, name = weight.statistics, "  " * bool(layer) + weight.name.removeprefix(f"{layer}.")
            yield f"{name:<40} {weight.type:<9} {weight.bytes:>13}"
            yield (
                f"{'':<29} {s.minimum:>9.3g} {s.maximum:>9.3g} {s.mean:>9.2g} {s.std:>9.3g} "
                f"{weight.error:>9.3%}"
            )


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def token_text(model: Model, id: int) -> str:
    """A token's text on one line; its bytes, if they are only a part of a character."""
    text = model.tokenizer.decode([id])
    if "\ufffd" in text:
        return "".join(f"\\x{byte:02x}" for byte in model.tokenizer.token_bytes(id))
    return visible(text)


def visible(text: str) -> str:
    """`text` on one line: blanks marked, invisible characters as their code points."""
    return "".join(MARKS.get(c, c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in text)
