"""Matrices of INT4 and INT6 quantised for what they will be multiplied with: --calibrate, --importance.

    text       tokens in windows (calibration_text.py)
    block      the inputs of q, k and v -> these quantised -> with them the inputs of o -> o quantised -> ...
               each input comes from what is quantised already: the blocks before, and the matrices before in
               the same block
    state      what is done, kept beside the target until the end (calibration_state.py)

The arithmetic of a block is reference.py's, in float32. The engine starts at tokens and knows stored matrices
alone; a calibration goes on from the residual stream between two blocks, and needs inputs in the middle of a
block whose other matrices are not quantised yet. So each block is computed once, with what is in memory;
tests hold the inputs to those that the engine has in its float mode. The bytes of the result depend on the
text, and in their last bits on the BLAS that NumPy has and its threads.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import format, reference
from ..format import Encoding, Role, Tensor
from ..memory import gib
from . import taking_over
from .calibration_state import CalibrationState, Errors, Stored
from .calibration_text import CalibrationOptions, CalibrationText
from .feedback import Factor, Inputs, factor, round_with_feedback
from .huggingface import Checkpoint
from .lora import MergedTensor
from .quantise import Converted, Slice, buffer, convert, slices, source_size, weights
from .source import SourceError

Array = NDArray[np.float32]

SLICE_WEIGHTS = (
    1 << 23
)  # weights that are rounded together: columns long enough that NumPy's calls cost little
ROUNDING = 500  # multiply-adds that take as long as rounding one weight
BY_DATA = (Encoding.INT4, Encoding.INT6)  # INT8 loses too little to be worth it


@dataclass(frozen=True)
class Plan:
    """What a calibration will take.

    feedback: whether codes take over each other's loss, or columns are weighted alone.
    """

    config: format.Config
    tensors: Sequence[Tensor]
    rows: int  # tokens of the text
    feedback: bool

    def blocks(self) -> list[list[Tensor]]:
        """The matrices of each layer; last the output matrix, unless that is the embedding."""
        matrices = [t for t in self.tensors if t.quantized]
        layers = [[t for t in matrices if t.layer == layer] for layer in range(self.config.n_layers)]
        head = [t for t in self.tensors if t.role is Role.LM_HEAD and not self.config.tied_embedding]
        return [*layers, head]

    def work(self, block: Sequence[Tensor]) -> float:
        """Multiply-adds, about, of one of the blocks."""
        apart = [t for t in block if t.role is Role.QKV and t.encoding in BY_DATA][1:]
        return sum(self.of_tensor(t) + self.of_inputs(t) * (t not in apart) for t in block)

    def of_tensor(self, tensor: Tensor) -> float:
        """Of quantising a matrix and multiplying with it."""
        rows, columns = tensor.shape
        rounding = columns / 2 + ROUNDING if self.feedback and tensor.encoding in BY_DATA else 20
        return rows * columns * (self._seen(tensor) + rounding)

    def of_inputs(self, tensor: Tensor) -> float:
        """Of what is learned about its inputs; with q, k and v apart, that is done once for all of them."""
        if not self.feedback or tensor.encoding not in BY_DATA:
            return 0.0
        columns = float(tensor.shape[1])
        return columns**2 * (self._seen(tensor) + columns / 3)

    def _seen(self, tensor: Tensor) -> float:
        """Rows of the text that a matrix sees; an expert sees its share."""
        c = self.config
        return self.rows * (c.n_experts_per_token / c.n_experts if ".experts." in tensor.name else 1)

    def state_bytes(self) -> int:
        """Of the folder that keeps what is done."""
        return sum(t.size for block in self.blocks() for t in block) + 8 * self.rows * self.config.dim

    def memory(self) -> int:
        """Bytes at the most, about, beside the program."""
        c = self.config
        widths = {t.shape[1] for block in self.blocks() for t in block}
        inputs = 4 * max(widths) ** 2 * 4 if self.feedback else 0
        held = 4 * self.rows * (4 * c.dim + max(widths))
        shared = [[t for t in block if ".experts." not in t.name] for block in self.blocks()[:-1]]
        largest = max(sum(4 * math.prod(t.shape) for t in block) for block in shared)
        return inputs + held + largest + 5 * 4 * SLICE_WEIGHTS

    def seconds(self, blocks: Sequence[Sequence[Tensor]]) -> float:
        """How long these blocks take, by how fast this machine multiplies now."""
        x = np.ones((512, 1024), np.float32)
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            x @ x.T
            best = min(best, time.perf_counter() - start)
        return sum(map(self.work, blocks)) * best / (512 * 512 * 1024)


class Calibration:
    """A calibration of `checkpoint` for the file `target`, checked; nothing is done yet.

    Tells the metadata of the checkpoint. SourceError if the text is none, no matrix is to be calibrated, or
    what another calibration left is in the way.
    """

    def __init__(self, checkpoint: Checkpoint, target: Path, options: CalibrationOptions) -> None:
        self._checkpoint, self._config, self._options = checkpoint, checkpoint.config, options
        tensors = format.tensors(checkpoint.config, checkpoint.encodings)
        if not any(map(self._by_data, tensors)):
            fault = "all matrices become INT8, or have few bits already; give --bits 4, or a --recipe"
            raise SourceError(f"{options.option}: {fault}")
        self._text = CalibrationText(checkpoint, options.text)
        self._ids = self._text.windows
        self.plan = Plan(checkpoint.config, tensors, self._ids.size, options.feedback)
        method = "feedback" if options.feedback else "importance"
        checkpoint.metadata["source"]["calibration"] = {"method": method, "tokens": self._ids.size}
        self.state = CalibrationState(target, self._depends_on())
        self._done = sum(map(self.plan.work, self.plan.blocks()[: self.state.done]))
        self._total = sum(map(self.plan.work, self.plan.blocks()))

    def _depends_on(self) -> dict[str, Any]:
        """What the result depends on, as JSON; of files not their bytes, which would take too long."""
        c = self._checkpoint
        files = [(os.fspath(file.name), os.fstat(file.fileno())) for file in _files(c)]
        return {
            "metadata": c.metadata,
            "group_size": c.config.group_size,
            "ids": hashlib.sha256(self._ids.tobytes()).hexdigest(),
            "window": self._ids.shape[1],
            "files": sorted([name, stat.st_size, stat.st_mtime_ns] for name, stat in files),
        }

    def ready(self, piece: Slice) -> Converted | None:
        """A slice that is calibrated, as it is stored."""
        found = self.state.slice(piece)
        dtypes = dict.fromkeys(self._checkpoint.tensors[part.name].dtype for part in piece.tensor.parts)
        size = source_size(self._checkpoint, piece)
        return found and found._replace(source_size=size, dtypes=" and ".join(dtypes))

    def _described(self) -> str:
        """What it will take, in a line."""
        plan, done = self.plan, self.state.done
        seconds = plan.seconds(plan.blocks()[done:])
        took = f"{seconds / 60:.0f} min" if seconds >= 100 else f"{max(seconds, 1):.0f} s"
        since = f", from block {done + 1} on" if done else ""
        return (
            f"calibrating {self._config.n_layers} blocks on {plan.rows:,} tokens of {self._text.name}{since}"
            f": about {took}, {gib(plan.memory())} of memory, {gib(plan.state_bytes())} on disk until the end"
        )

    def _tick(self, work: float) -> None:
        self._done += work
        self._options.progress(self._done, self._total)

    def run(self) -> None:
        """Do the blocks that are not done. SourceError for a weight that cannot be stored."""
        blocks = self.plan.blocks()
        if self.state.done < len(blocks):
            self._options.say(self._described())
        self.state.create()
        self._rope = self._vector(next(t for t in self.plan.tensors if t.role is Role.ROPE_FREQUENCIES))
        x = self.state.x() if self.state.done else self._embedded()
        for layer in range(self.state.done, self._config.n_layers):
            stored = self._block(layer, x)
            self.state.save(stored, x)
        if self.state.done < len(blocks):
            norm = next(t for t in self.plan.tensors if t.role is Role.FINAL_NORM)
            stored = {}
            if blocks[-1]:
                h = reference.rmsnorm(x, self._vector(norm), self._config.rms_eps)
                self._settle(blocks[-1], h, stored, {}, kept=False)
            self.state.save(stored, x[:0])
        self._options.progress(self._total, self._total)

    def _block(self, layer: int, x: Array) -> Stored:
        """Quantise the matrices of a layer; x (windows, tokens, dim) becomes what is behind it."""
        c, prefix = self._config, f"model.layers.{layer}."
        tensors: dict[Role, list[Tensor]] = {}
        for tensor in self.plan.tensors:
            if tensor.layer == layer:
                tensors.setdefault(tensor.role, []).append(tensor)
        stored: Stored = {}
        w: dict[str, Array] = {format.ROPE_TENSOR: self._rope}
        for some in tensors.values():
            w |= {p.name: v for t in some if not t.quantized for p, v in _parts(t, self._vector(t))}

        h = reference.rmsnorm(x, w[prefix + "input_layernorm.weight"], c.rms_eps)
        self._settle(tensors[Role.QKV], h, stored, w)
        found = np.stack([reference.heads(window, c, w, prefix + "self_attn.") for window in h])
        self._settle(tensors[Role.O], found, stored, w)
        x += found @ w.pop(prefix + "self_attn.o_proj.weight").T
        del found
        h = reference.rmsnorm(x, w[prefix + "post_attention_layernorm.weight"], c.rms_eps)
        if c.has_experts(layer):
            x += self._mixture(tensors, h, stored, w, prefix + "mlp.")
        else:
            x += self._feed_forward(tensors[Role.GATE_UP], tensors[Role.DOWN], h, stored, w, prefix + "mlp.")
        return stored

    def _feed_forward(
        self,
        gate_up: list[Tensor],
        down: list[Tensor],
        h: Array,
        stored: Stored,
        w: dict[str, Array],
        prefix: str,
    ) -> Array:
        """Quantise a feed-forward by its inputs h (..., dim); what it makes of them."""
        self._settle(gate_up, h, stored, w)
        hidden = reference.gated(h, w, prefix)
        self._settle(down, hidden, stored, w)
        return np.asarray(hidden @ w[prefix + "down_proj.weight"].T)

    def _mixture(
        self, tensors: dict[Role, list[Tensor]], h: Array, stored: Stored, w: dict[str, Array], prefix: str
    ) -> Array:
        """The same for experts, each by the rows that are routed to it."""
        rows = h.reshape(-1, h.shape[-1])
        chosen, shares = reference.route(rows, self._config, w, prefix)
        y = np.zeros_like(rows)
        for expert in range(self._config.n_experts):
            tokens, rank = np.nonzero(chosen == expert)
            of_expert: dict[str, Array] = {}
            out = self._feed_forward(
                [tensors[Role.GATE_UP][expert]],
                [tensors[Role.DOWN][expert]],
                rows[tokens],
                stored,
                of_expert,
                f"{prefix}experts.{expert}.",
            )
            y[tokens] += shares[tokens, rank, None] * out
        return y.reshape(h.shape)

    def _settle(
        self, tensors: list[Tensor], x: Array, stored: Stored, w: dict[str, Array], kept: bool = True
    ) -> None:
        """Quantise matrices that all have the inputs x (..., columns): into `stored`, and float32 into w."""
        x = x.reshape(-1, x.shape[-1])
        by_data = [t for t in tensors if self._by_data(t) and len(x)]  # no row came to some experts
        importance: Array | None = None
        taken: Factor | None = None
        if by_data:
            inputs = Inputs(x.shape[1], self.plan.feedback)
            for rows in np.array_split(x, max(len(x) // 512, 1)):
                inputs.add(rows)
            if self.plan.feedback:
                taken = factor(inputs)
            else:
                importance = inputs.importance
            self._tick(self.plan.of_inputs(by_data[0]))
        for tensor in tensors:
            with_data = (importance, taken) if tensor in by_data else (None, None)
            data, errors, floats = self._quantized(tensor, *with_data, kept)
            stored[tensor.name] = data, errors
            w.update({part.name: rows for part, rows in _parts(tensor, floats)})

    def _by_data(self, tensor: Tensor) -> bool:
        """Whether a matrix is calibrated: it has few bits, and its codes are not in the source already."""
        stored = (self._checkpoint.tensors[part.name] for part in tensor.parts)
        group_size = self._config.group_size
        return tensor.encoding in BY_DATA and not any(
            taking_over.can_hold(part.dtype, group_size, tensor.encoding) for part in stored
        )

    def _quantized(
        self, tensor: Tensor, importance: Array | None, taken: Factor | None, kept: bool
    ) -> tuple[NDArray[np.uint8], Errors, Array]:
        """A matrix as it is stored, its errors, and, if `kept`, as float32 again (else no rows)."""
        c = self._config
        target = np.empty(tensor.size, np.uint8)
        tile_rows = target.view(format.tile_row_type(tensor.shape[1], c.group_size, tensor.encoding))
        worst, squares, of_weights, as_it_was, floats = 0.0, 0.0, 0.0, 0, []
        for piece in slices(tensor, SLICE_WEIGHTS):
            first = piece.row // format.TILE_ROWS
            part = tile_rows[first : first + -(-piece.rows // format.TILE_ROWS)]
            source = buffer(4 * piece.rows * piece.columns)
            converted = convert(self._checkpoint, piece, source, part.view(np.uint8).data, importance)
            errors = converted.worst, converted.squared_error
            if taken is not None:
                given = weights(self._checkpoint, piece, source)
                errors = round_with_feedback(given, part, tensor.encoding, taken)
            worst, squares = max(worst, errors[0]), squares + errors[1]
            of_weights += converted.squared_weight
            as_it_was += converted.taken_over
            if kept:
                floats.append(reference.dequantize_tile_rows(part)[: piece.rows])
            self._tick(self.plan.of_tensor(tensor) * piece.rows / tensor.shape[0])
        none = [np.empty((0, 0), np.float32)]
        return target, (worst, squares, of_weights, as_it_was), np.concatenate(floats or none)

    def _vector(self, tensor: Tensor) -> Array:
        """A tensor that stays float32."""
        piece = next(slices(tensor))
        data = convert(self._checkpoint, piece, buffer(4 * math.prod(tensor.shape)), buffer(0)).data
        return np.frombuffer(data, "<f4").reshape(tensor.shape)

    def _embedded(self) -> Array:
        """The rows of the stored embedding that belong to the tokens, (windows, tokens, dim)."""
        roles = (Role.LM_HEAD if self._config.tied_embedding else Role.EMBEDDING,)
        tensor = next(t for t in self.plan.tensors if t.role in roles)
        rows, columns = tensor.shape
        used, places = np.unique(self._ids // format.TILE_ROWS, return_inverse=True)
        row_type = format.tile_row_type(columns, self._config.group_size, tensor.encoding)
        tile_rows = np.empty(len(used), row_type)
        source = buffer(4 * format.TILE_ROWS * columns)
        for i, tile in enumerate(used * format.TILE_ROWS):
            piece = Slice(tensor, int(tile), min(format.TILE_ROWS, rows - int(tile)))
            convert(self._checkpoint, piece, source, tile_rows[i : i + 1].view(np.uint8).data)
        found = reference.dequantize_tile_rows(tile_rows)
        lanes = places.reshape(self._ids.shape) * format.TILE_ROWS + self._ids % format.TILE_ROWS
        return np.asarray(found[lanes])


def _parts(tensor: Tensor, values: Array) -> Iterator[tuple[format.Part, Array]]:
    """The Hugging Face tensors within a stored one."""
    for part in tensor.parts:
        yield part, values[part.row : part.row + part.rows]


def _files(checkpoint: Checkpoint) -> set[FileIO]:
    """The open files that the weights are read from."""
    found: set[FileIO] = set()
    for tensor in checkpoint.tensors.values():
        of_adapter = (tensor.a, tensor.b) if isinstance(tensor, MergedTensor) else ()
        found |= {part.file for part in (tensor, *of_adapter)}
    return found
