"""model.bin: the header, the metadata and the ONE ordered list of tensors.

The exporter writes by this list, the engine maps by it, `info` prints it and the tests walk it.
docs/FORMAT.md is the same contract for people who write another reader.

    header      512 bytes, every number the forward pass needs
    metadata    JSON: generation defaults, thinking kind, provenance
    tokenizer   tokenizer.json as it came
    template    the chat template (Jinja), may be empty
    encodings   one byte per matrix; only in files that hold another encoding than INT8
    checksums   one CRC-32 per tensor, in list order
    tensors     page-aligned, in the order the forward pass reads them, each 64-byte aligned

Everything is little-endian. A matrix is INT8, INT6 or INT4 in groups along its input dimension, stored in
tiles of 16 output rows x one group: the codes interleaved by 4 columns, then the tile's 16 fp16 scales.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import json
import math
import mmap
import os
import re
import secrets
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

from .system import mistakes
from .system.files import LOCKS, lock, sync_directory

MAGIC = mistakes.MODEL_BIN
VERSION = 1  # of files whose matrices are all INT8
VERSION_WITH_ENCODINGS = 2
HEADER_SIZE = 512
PAGE = 16384  # the tensor region starts on a multiple of this (the largest page size in common use)
ALIGNMENT = 64  # every section and tensor starts on a multiple of this
TILE_ROWS = 16
CODEBOOK = 16  # codes that INT4 chooses among
CODEBOOK_BYTES = 32  # in front of a tile row: the codebook, then zeros
GROUP_SIZES = (32, 64, 128, 256)
# for people: the other fields say what to compute
ARCHITECTURES = {1: "qwen3", 2: "qwen3_moe", 3: "qwen2", 4: "llama"}
ROPE_TYPES = {
    0: "default",
    1: "linear",
    2: "yarn",
    3: "llama3",
}  # for people: the forward pass needs only the table of inverse frequencies
KV_TYPES = ("int8", "f16", "f32")  # types of the KV cache, smallest first
THINKING_KINDS = ("hybrid", "always", "none")
TEXTS = ("metadata", "tokenizer", "template")
MAX_JSON = 1 << 20  # bytes of metadata a reader accepts
MAX_DEPTH = 32  # nested objects and lists in the metadata
MAX_TOKENIZER = 64 << 20
MAX_TEMPLATE = 1 << 20


class ModelFileError(ValueError):
    """The file is not a model.bin that this version can run; the message is one line."""


# ----------------------------------------------------------------------------
# Header: the fields in file order, with the range a reader accepts

_U32 = (0, 2**32 - 1)
_U64 = (0, 2**63 - 1)
_FLAG = (0, 1)

# (name, struct code, (smallest, largest) accepted value); every 8-byte field is aligned
HEADER_FIELDS: tuple[tuple[str, str, tuple[float, float]], ...] = (
    ("version", "I", _U32),
    ("header_size", "I", (HEADER_SIZE, HEADER_SIZE)),
    ("file_size", "Q", _U64),
    ("metadata_offset", "Q", _U64),
    ("metadata_size", "Q", (2, MAX_JSON)),
    ("tokenizer_offset", "Q", _U64),
    ("tokenizer_size", "Q", (2, MAX_TOKENIZER)),
    ("template_offset", "Q", _U64),
    ("template_size", "Q", (0, MAX_TEMPLATE)),
    ("checksums_offset", "Q", _U64),
    ("checksums_size", "Q", _U64),
    ("tensors_offset", "Q", _U64),
    ("tensors_size", "Q", _U64),
    ("rms_eps", "d", (1e-12, 1.0)),
    ("rope_theta", "d", (1.0, 1e12)),
    ("rope_attention_scale", "d", (1e-3, 1e3)),  # factor on cos and sin
    ("architecture", "I", (1, len(ARCHITECTURES))),
    ("dim", "I", (2, 1 << 17)),
    ("hidden_dim", "I", (2, 1 << 18)),
    ("n_layers", "I", (1, 1024)),
    ("n_heads", "I", (1, 1024)),
    ("n_kv_heads", "I", (1, 1024)),
    ("head_dim", "I", (2, 1024)),
    ("vocab_size", "I", (1, 1 << 22)),
    ("n_tokens", "I", (1, 1 << 22)),  # tokens that exist; embedding rows beyond are padding
    ("context", "I", (1, 1 << 24)),
    ("group_size", "I", (GROUP_SIZES[0], GROUP_SIZES[-1])),
    ("tied_embedding", "I", _FLAG),
    ("qk_norm", "I", _FLAG),
    ("qkv_bias", "I", _FLAG),
    ("n_experts", "I", (0, 1024)),  # mixture of experts: this and the next four are 0 without one
    ("n_experts_per_token", "I", (0, 64)),
    ("expert_hidden_dim", "I", (0, 1 << 18)),
    ("norm_topk_prob", "I", _FLAG),
    ("decoder_sparse_step", "I", (0, 1024)),
    ("rope_type", "I", (0, len(ROPE_TYPES) - 1)),
    ("sections_crc", "I", _U32),  # CRC-32 of the fields above, then of header_size .. tensors_offset
)
_RANGES = {name: limits for name, _, limits in HEADER_FIELDS}
_STRUCT = struct.Struct("<" + "".join(code for _, code, _ in HEADER_FIELDS))
_FIELDS_OFFSET = len(MAGIC)
_SECTIONS_CRC_OFFSET = _FIELDS_OFFSET + _STRUCT.size - 4
_LAYERS_OFFSET, _LAYERS_SIZE = _FIELDS_OFFSET + _STRUCT.size, 128  # mlp_only_layers, one bit per layer
MAX_EXPERTS = 1 << 16  # in all layers together; bounds the length of the list of tensors
_CRC_OFFSET = HEADER_SIZE - 4  # the last four bytes: CRC-32 of all before them; zeros fill the gap


@dataclass(frozen=True)
class Config:
    """The numbers of the forward pass, as stored in the header (names as in HEADER_FIELDS)."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    n_tokens: int
    context: int
    group_size: int
    tied_embedding: bool
    rms_eps: float
    rope_theta: float
    architecture: int = 1
    qk_norm: bool = True
    qkv_bias: bool = False
    rope_type: int = 0
    rope_attention_scale: float = 1.0
    n_experts: int = 0
    n_experts_per_token: int = 0
    expert_hidden_dim: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 0
    mlp_only_layers: tuple[int, ...] = ()  # ascending

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward of this layer is a mixture of experts."""
        return (
            self.n_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def n_parameters(self) -> int:
        """How many weights; a tied embedding counts once."""
        return sum(math.prod(t.shape) for t in tensors(self) if t.role is not Role.ROPE_FREQUENCIES)

    def kv_bytes_per_token(self, kv: str) -> int:
        """Bytes of KV cache that one position takes. kv: one of KV_TYPES."""
        padded = -(-self.head_dim // 16) * 16
        head = {
            "int8": 2 * (padded + 2),  # key and value: codes and an fp16 scale each
            "f16": 2 * (self.head_dim + padded),
            "f32": 4 * (self.head_dim + padded),
        }[kv]
        return self.n_layers * self.n_kv_heads * head


# ----------------------------------------------------------------------------
# Tensors: the one ordered list

ROPE_TENSOR = "rope.inverse_frequencies"
# the router of a layer with experts; float32, because rounding could change which experts are chosen
ROUTER = "mlp.gate.weight"


class Role(enum.Enum):
    """What a tensor is to the forward pass."""

    ROPE_FREQUENCIES = "rope frequencies"
    EMBEDDING = "embedding"  # an embedding that is not also the LM_HEAD
    ATTENTION_NORM = "attention norm"
    QKV = "qkv"
    QKV_BIAS = "qkv bias"
    Q_NORM = "q norm"
    K_NORM = "k norm"
    O = "o"  # noqa: E741
    FFN_NORM = "ffn norm"
    ROUTER = "router"
    GATE_UP = "gate up"  # with experts: one tensor for each, in order
    DOWN = "down"
    FINAL_NORM = "final norm"
    LM_HEAD = "lm head"


class Encoding(enum.Enum):
    """How the numbers of a tensor are stored."""

    FLOAT32 = "float32"
    INT8 = "int8"  # tiles of codes and fp16 scales
    INT4 = "int4"  # the same, a code being an index into the codebook in front of its tile row
    INT6 = "int6"

    @property
    def bits(self) -> int:
        """Bits of a code, or of a float."""
        return int(re.sub(r"[a-z]+", "", self.value))


# Encodings of matrices, in the order of their numbers in the section `encodings`
ENCODINGS = (Encoding.INT8, Encoding.INT4, Encoding.INT6)
Encodings = Mapping[str, Encoding]  # of matrices by their Hugging Face name; one that is missing is INT8


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor and the rows of the stored tensor that hold it."""

    name: str
    row: int
    rows: int


@dataclass(frozen=True)
class Tensor:
    """One stored tensor; `offset` counts from the start of the tensor region."""

    name: str
    role: Role
    layer: int | None  # None outside of the layers
    shape: tuple[int, ...]  # (rows, columns) of a matrix, (n,) of a vector
    parts: tuple[Part, ...]  # in row order; none for a tensor that is computed at export
    encoding: Encoding
    offset: int
    size: int

    @property
    def quantized(self) -> bool:
        """Whether it is stored as codes with scales; vectors and routers are float32."""
        return self.encoding is not Encoding.FLOAT32


def sections(version: int) -> tuple[str, ...]:
    """What lies between the header and the tensors, in this order."""
    return (*TEXTS, "checksums") if version == VERSION else (*TEXTS, "encodings", "checksums")


def align(offset: int, alignment: int = ALIGNMENT) -> int:
    return -(-offset // alignment) * alignment


def tile_row_size(columns: int, group_size: int, encoding: Encoding = Encoding.INT8) -> int:
    """Bytes of 16 rows of a matrix: its codebook if it is INT4, then columns / group_size tiles."""
    tile = TILE_ROWS * (group_size * encoding.bits // 8 + 2)
    return CODEBOOK_BYTES * (encoding is Encoding.INT4) + columns // group_size * tile


def matrix_size(rows: int, columns: int, group_size: int, encoding: Encoding = Encoding.INT8) -> int:
    """Bytes of a stored matrix: ceil(rows / 16) tile rows."""
    return align(rows, TILE_ROWS) // TILE_ROWS * tile_row_size(columns, group_size, encoding)


def tile_row_type(columns: int, group_size: int, encoding: Encoding = Encoding.INT8) -> np.dtype[Any]:
    """A tile row as numpy sees it: "codebook" if it is INT4, then "tiles".

    A tile has "scales", one per row, and its codes in blocks of 4 columns of 16 rows: int8 "codes"; or
    "nibbles", 4 bits of two such blocks in one byte, and of INT6 "crumbs", 2 more bits of four blocks.
    """
    import numpy as np

    def plane(name: str, kind: str, block: int) -> tuple[str, str, tuple[int, ...]]:
        return name, kind, (group_size // block, TILE_ROWS, 4)

    planes = {
        Encoding.INT8: [plane("codes", "i1", 4)],
        Encoding.INT4: [plane("nibbles", "u1", 8)],
        Encoding.INT6: [plane("nibbles", "u1", 8), plane("crumbs", "u1", 16)],
    }[encoding]
    tile = np.dtype([*planes, ("scales", "<f2", TILE_ROWS)])
    tiles = ("tiles", tile, columns // group_size)
    codebook = [("codebook", "i1", CODEBOOK), ("zeros", "i1", CODEBOOK_BYTES - CODEBOOK)]
    return np.dtype([*codebook, tiles] if encoding is Encoding.INT4 else [tiles])


def codes_and_scales(tile_rows: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes (n, columns) and scales (n, groups) of n = 16 x len(tile_rows) rows; weight = scale * code.

    tile_rows: (len,) of a tile_row_type.
    """
    import numpy as np

    tiles = tile_rows["tiles"]  # (tile rows, groups)
    names = tiles.dtype.names or ()
    if "codes" in names:
        codes = tiles["codes"]  # (tile rows, groups, blocks, 16, 4)
    else:
        nibbles = tiles["nibbles"]  # (tile rows, groups, pairs of blocks, 16, 4)
        codes = np.stack([nibbles & 15, nibbles >> 4], axis=3)
        codes = codes.reshape(*tiles.shape, -1, TILE_ROWS, 4).astype(np.int8)
        if "crumbs" in names:
            crumbs = np.stack([tiles["crumbs"] >> 2 * k & 3 for k in range(4)], axis=3)
            codes += (crumbs.reshape(codes.shape) * 16).astype(np.int8) - np.int8(32)
        else:
            codebooks = tile_rows["codebook"].reshape(len(tile_rows), 1, 1, 1, CODEBOOK)
            codes = np.take_along_axis((codebooks + 32 & 63) - 32, codes, axis=-1)  # their low 6 bits
    groups = tiles.shape[1]
    codes = codes.transpose(0, 3, 1, 2, 4).reshape(len(tile_rows) * TILE_ROWS, -1)
    scales = tiles["scales"].transpose(0, 2, 1).reshape(-1, groups)
    return codes, scales.astype(np.float32)


_Planned = tuple[Role, int | None, str, tuple[int, ...], list[tuple[str, int]]]


def _planned(c: Config) -> Iterator[_Planned]:
    """(role, layer, name, shape, [(Hugging Face name, rows), ...]) in the order of the forward pass."""
    yield Role.ROPE_FREQUENCIES, None, ROPE_TENSOR, (c.head_dim // 2,), []
    embedding = "model.embed_tokens.weight"
    if not c.tied_embedding:
        yield Role.EMBEDDING, None, embedding, (c.vocab_size, c.dim), [(embedding, c.vocab_size)]
    for layer in range(c.n_layers):
        yield from _planned_layer(c, layer)
    yield _vector(Role.FINAL_NORM, None, "model.norm.weight", c.dim)
    head = embedding if c.tied_embedding else "lm_head.weight"
    yield Role.LM_HEAD, None, head, (c.vocab_size, c.dim), [(head, c.vocab_size)]


def _planned_layer(c: Config, layer: int) -> Iterator[_Planned]:
    # q, k and v read the same input, so they are stored as one matrix, read in one sweep; so are gate and up
    p = f"model.layers.{layer}."
    qkv = [(f"{p}self_attn.{x}_proj", n) for x, n in (("q", c.q_dim), ("k", c.kv_dim), ("v", c.kv_dim))]
    q_k_v_rows = c.q_dim + 2 * c.kv_dim
    qkv_weights, qkv_biases = [[(n + end, r) for n, r in qkv] for end in (".weight", ".bias")]
    yield _vector(Role.ATTENTION_NORM, layer, p + "input_layernorm.weight", c.dim)
    yield Role.QKV, layer, p + "self_attn.qkv_proj.weight", (q_k_v_rows, c.dim), qkv_weights
    if c.qkv_bias:
        yield Role.QKV_BIAS, layer, p + "self_attn.qkv_proj.bias", (q_k_v_rows,), qkv_biases
    if c.qk_norm:
        yield _vector(Role.Q_NORM, layer, p + "self_attn.q_norm.weight", c.head_dim)
        yield _vector(Role.K_NORM, layer, p + "self_attn.k_norm.weight", c.head_dim)
    o_proj = p + "self_attn.o_proj.weight"
    yield Role.O, layer, o_proj, (c.dim, c.q_dim), [(o_proj, c.dim)]
    yield _vector(Role.FFN_NORM, layer, p + "post_attention_layernorm.weight", c.dim)
    # one feed-forward block; or the router, gate_up of every expert, then down of every expert: the order in
    # which the chosen experts are read
    blocks, hidden_dim = [p + "mlp."], c.hidden_dim
    if c.has_experts(layer):
        yield Role.ROUTER, layer, p + ROUTER, (c.n_experts, c.dim), [(p + ROUTER, c.n_experts)]
        blocks, hidden_dim = [f"{p}mlp.experts.{e}." for e in range(c.n_experts)], c.expert_hidden_dim
    for block in blocks:
        gate_up = [(f"{block}{x}_proj.weight", hidden_dim) for x in ("gate", "up")]
        yield Role.GATE_UP, layer, block + "gate_up_proj.weight", (2 * hidden_dim, c.dim), gate_up
    for block in blocks:
        down_proj = block + "down_proj.weight"
        yield Role.DOWN, layer, down_proj, (c.dim, hidden_dim), [(down_proj, c.dim)]


def _vector(role: Role, layer: int | None, name: str, n: int) -> _Planned:
    return role, layer, name, (n,), [(name, n)]


def matrices(config: Config) -> list[str]:
    """Hugging Face names of all matrices that have an Encoding, in file order."""
    matrices = (parts for role, _, _, shape, parts in _planned(config) if _has_tiles(role, shape))
    return [name for parts in matrices for name, _ in parts]


def _has_tiles(role: Role, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and role is not Role.ROUTER


def tensors(config: Config, encodings: Encodings | None = None) -> list[Tensor]:
    """Every tensor of the file, in file order, with its offset. The project has no second such list.

    Of q, k and v, neighbours of the same encoding are one matrix. ValueError if a gate and its up differ.
    """
    result: list[Tensor] = []
    offset = 0
    for role, layer, name, shape, parts in _planned(config):
        for piece, pieces, encoding in _runs(role, name, shape, parts, encodings or {}):
            rows = sum(part.rows for part in pieces) if pieces else shape[0]
            size = 4 * math.prod(shape)
            if encoding is not Encoding.FLOAT32:
                size = matrix_size(rows, shape[-1], config.group_size, encoding)
            result.append(Tensor(piece, role, layer, (rows, *shape[1:]), pieces, encoding, offset, size))
            offset = align(offset + size)
    return result


_Run = tuple[str, tuple[Part, ...], Encoding]


def _runs(
    role: Role, name: str, shape: tuple[int, ...], parts: list[tuple[str, int]], encodings: Encodings
) -> Iterator[_Run]:
    """The stored tensors that a planned one becomes: one, or several if its parts differ in encoding."""
    if not _has_tiles(role, shape):
        yield name, _stacked(parts), Encoding.FLOAT32
        return
    runs = [
        (encoding, list(run))
        for encoding, run in itertools.groupby(parts, lambda part: encodings.get(part[0], Encoding.INT8))
    ]
    if len(runs) > 1 and role is not Role.QKV:
        told = ", ".join(f"{run[0][0]} is {encoding.value}" for encoding, run in runs)
        raise ValueError(f"{told}: they are stored as one matrix and have one encoding")
    for encoding, run in runs:
        # of qkv_proj the letters that are left
        letters = "".join(re.findall(r"(\w)_proj", " ".join(part for part, _ in run)))
        yield name if len(runs) == 1 else name.replace("qkv", letters), _stacked(run), encoding


def _stacked(parts: list[tuple[str, int]]) -> tuple[Part, ...]:
    ends = itertools.accumulate(rows for _, rows in parts)
    return tuple(Part(name, end - rows, rows) for (name, rows), end in zip(parts, ends, strict=True))


def described(config: Config, encodings: Encodings) -> str:
    """The encodings of a file for people, such as "INT4 and INT6 in groups of 32, 5.09 bits a weight".

    The one of most weights comes first; the bits per weight, scales included, follow unless all is INT8.
    """
    weights = _weights_by_encoding(config, encodings)
    text = f"{' and '.join(e.value.upper() for e in weights)} in groups of {config.group_size}"
    if set(weights) == {Encoding.INT8}:
        return text
    size = sum(tensor.size for tensor in tensors(config, encodings) if tensor.quantized)
    return f"{text}, {8 * size / sum(weights.values()):.2f} bits a weight"


def label(config: Config, encodings: Encodings) -> str:
    """The same in a word or two: "int8 g64", "int4+int6 g32"."""
    return f"{'+'.join(e.value for e in _weights_by_encoding(config, encodings))} g{config.group_size}"


def _weights_by_encoding(config: Config, encodings: Encodings) -> dict[Encoding, int]:
    """How many weights have each encoding, the most first."""
    weights: dict[Encoding, int] = {}
    for tensor in tensors(config, encodings):
        if tensor.quantized:
            weights[tensor.encoding] = weights.get(tensor.encoding, 0) + math.prod(tensor.shape)
    return dict(sorted(weights.items(), key=lambda item: -item[1]))


def check_range(field: str, value: float) -> None:
    """Raise ValueError unless header field `field` may have this value."""
    low, high = _RANGES[field]
    if not low <= value <= high:  # false for NaN too
        raise ValueError(f"{field} = {value} is outside {low}..{high}")


def check_config(c: Config) -> None:
    """Raise ValueError, with the numbers, where a field is out of range or fields contradict each other."""
    for field in Config.__dataclass_fields__.keys() & _RANGES.keys():
        check_range(field, getattr(c, field))
    _check_experts(c)
    if c.group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {c.group_size}, not one of {', '.join(map(str, GROUP_SIZES))}")
    has_experts = {c.has_experts(layer) for layer in range(c.n_layers)}
    for name, columns, used in (
        ("dim", c.dim, True),
        ("hidden_dim", c.hidden_dim, False in has_experts),
        ("expert_hidden_dim", c.expert_hidden_dim, True in has_experts),
        ("n_heads * head_dim", c.q_dim, True),
    ):
        if used and columns % c.group_size:
            raise ValueError(f"{name} = {columns} is not a multiple of group_size = {c.group_size}")
    if c.n_heads % c.n_kv_heads:
        raise ValueError(f"n_heads = {c.n_heads} is not a multiple of n_kv_heads = {c.n_kv_heads}")
    if c.head_dim % 2:
        raise ValueError(f"head_dim = {c.head_dim} is odd; rotary embedding needs pairs")
    if c.n_tokens > c.vocab_size:
        raise ValueError(f"n_tokens = {c.n_tokens} exceeds vocab_size = {c.vocab_size}")


def _check_experts(c: Config) -> None:
    numbers = ("n_experts_per_token", "expert_hidden_dim", "norm_topk_prob", "decoder_sparse_step")
    for field in (*numbers, "mlp_only_layers"):
        value = getattr(c, field)
        if c.n_experts == 0 and value:
            raise ValueError(f"{field} is {value}, but n_experts = 0")
        if c.n_experts > 0 and not value and field not in ("norm_topk_prob", "mlp_only_layers"):
            raise ValueError(f"{field} = 0, but n_experts = {c.n_experts}")
    if c.n_experts_per_token > c.n_experts:
        raise ValueError(f"n_experts_per_token = {c.n_experts_per_token} exceeds n_experts = {c.n_experts}")
    if c.n_layers * c.n_experts > MAX_EXPERTS:
        raise ValueError(f"n_layers = {c.n_layers} of n_experts = {c.n_experts} are more than {MAX_EXPERTS}")
    layers = c.mlp_only_layers
    if list(layers) != sorted({*layers}) or any(not 0 <= layer < c.n_layers for layer in layers):
        raise ValueError(f"mlp_only_layers is {list(layers)}, not layers below {c.n_layers} in order")


# ----------------------------------------------------------------------------
# Reader


class ModelFile:
    """A checked, read-only memory map of a model.bin.

    Raises ModelFileError (one line, naming the path, the field and both numbers) if anything about
    the header, the sections or the size is wrong, or a vector holds a NaN or an infinity. The bytes of
    matrices are only read by `verify`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        with open(self._open(), "rb") as file:
            self.file_size = os.fstat(file.fileno()).st_size
            header = file.read(HEADER_SIZE)
            fields = self._read_header(header)
            self._check_layout(fields, file)
            # the size was checked before, so the map covers exactly the file; nothing is read yet
            try:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise MemoryError(
                    f"{self.path}: its {self.file_size:,} bytes cannot be mapped: {error.strerror} (see "
                    "`ulimit -v`)"
                ) from None
        self._fields = fields
        self.weights = memoryview(self.map)[fields["tensors_offset"] :]
        crc = sections_crc(header, memoryview(self.map)[HEADER_SIZE : fields["tensors_offset"]])
        self._expect("sections_crc", crc, fields["sections_crc"])
        self._check_gaps()
        self.metadata = self._read_metadata()
        self.checksums = struct.unpack(f"<{len(self.tensors)}I", self._section("checksums"))
        self._check_vectors()

    @property
    def tensors_offset(self) -> int:
        """Where the tensor region starts in the file."""
        return int(self._fields["tensors_offset"])

    @property
    def tokenizer(self) -> bytes:
        return self._section("tokenizer")

    @property
    def template(self) -> str:
        return self._section("template").decode()

    def fields(self) -> dict[str, Any]:
        """Header fields by name, in file order."""
        return dict(self._fields)

    def data(self, tensor: Tensor) -> memoryview:
        """The stored bytes of one tensor, in place."""
        return self.weights[tensor.offset : tensor.offset + tensor.size]

    def use_copy(self, weights: memoryview) -> None:
        """Read tensors from `weights`, a copy of self.weights, from now on; the mapped pages are released."""
        self.weights = weights
        if hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Release the map. Views of it that are still alive keep it mapped."""
        with contextlib.suppress(BufferError):
            self.weights.release()
            self.map.close()

    def verify(self) -> Iterator[tuple[Tensor, bool]]:
        """Read every tensor; yield it with whether it is sound.

        Sound: the checksum matches, the gap before the tensor is zero, no code is -128 (of INT6: -32), every
        scale is finite and, but of INT4, not negative, every number of a vector is finite.
        """
        end = self.tensors_offset
        for tensor, checksum in zip(self.tensors, self.checksums, strict=True):
            start = self.tensors_offset + tensor.offset
            gap = memoryview(self.map)[end:start]
            end = start + tensor.size
            intact = zlib.crc32(self.data(tensor)) == checksum and not any(gap)
            yield tensor, intact and (not tensor.quantized or self._has_sound_tiles(tensor))

    def tile_rows(self, tensor: Tensor) -> NDArray[Any]:
        """A matrix as an array (tile rows,) of tile_row_type, in place."""
        import numpy as np

        row_type = tile_row_type(tensor.shape[1], self.config.group_size, tensor.encoding)
        return np.frombuffer(self.data(tensor), row_type)

    def _has_sound_tiles(self, tensor: Tensor) -> bool:
        import numpy as np

        rows = self.tile_rows(tensor)
        step = max((1 << 20) // tensor.shape[1] // TILE_ROWS, 1)  # some rows at a time, to bound the memory
        lowest = -31 if tensor.encoding is Encoding.INT6 else -127
        for i in range(0, len(rows), step):
            codes, scales = codes_and_scales(rows[i : i + step])
            if codes.min() < lowest or not np.isfinite(scales).all():
                return False
            if tensor.encoding is Encoding.INT4:
                codebooks = rows["codebook"][i : i + step]
                if codebooks.min() < -32 or codebooks.max() > 31 or rows["zeros"][i : i + step].any():
                    return False
            elif (scales < 0).any():
                return False
        return True

    def _open(self) -> int:
        # a FIFO would block and a device has no end: only regular files go further
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            descriptor = os.open(self.path, flags)
        except OSError as error:
            hint = mistakes.missing_model_bin(self.path) if isinstance(error, FileNotFoundError) else ""
            raise ModelFileError(f"{self.path}: {error.strerror}{hint}") from None
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            os.close(descriptor)
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            hint = mistakes.directory_for_model_bin(Path(self.path)) if stat.S_ISDIR(mode) else ""
            raise ModelFileError(f"{self.path}: is {kind}, not a model.bin{hint}")
        return descriptor

    def _read_header(self, header: bytes) -> dict[str, Any]:
        if not header.startswith(MAGIC):
            start = header[: len(MAGIC)]
            kind = mistakes.in_place_of_model_bin(self.path, header[: mistakes.START])
            if kind:
                raise ModelFileError(f"{self.path}: not a model.bin but {kind}")
            raise ModelFileError(f"{self.path}: not a model.bin: starts with {start!r}, expected {MAGIC!r}")
        if len(header) < HEADER_SIZE:
            raise ModelFileError(f"{self.path}: header is {len(header)} bytes, expected {HEADER_SIZE}")
        names = [name for name, _, _ in HEADER_FIELDS]
        fields = dict(zip(names, _STRUCT.unpack_from(header, _FIELDS_OFFSET), strict=True))
        version = fields["version"]
        if version not in (VERSION, VERSION_WITH_ENCODINGS):
            known = f"{VERSION} and {VERSION_WITH_ENCODINGS}"
            raise ModelFileError(f"{self.path}: format version {version}, this program reads {known}")
        (stored_crc,) = struct.unpack_from("<I", header, _CRC_OFFSET)
        self._expect("header CRC", zlib.crc32(header[:_CRC_OFFSET]), stored_crc)
        if any(header[_LAYERS_OFFSET + _LAYERS_SIZE : _CRC_OFFSET]):
            raise ModelFileError(f"{self.path}: reserved header bytes are not zero")
        try:
            for name, value in fields.items():
                check_range(name, value)
        except ValueError as error:
            raise ModelFileError(f"{self.path}: header field {error}") from None
        bits = int.from_bytes(header[_LAYERS_OFFSET : _LAYERS_OFFSET + _LAYERS_SIZE], "little")
        fields["mlp_only_layers"] = tuple(layer for layer in range(8 * _LAYERS_SIZE) if bits >> layer & 1)
        return fields

    def _check_layout(self, fields: dict[str, Any], file: BinaryIO) -> None:
        """Sections and tensors follow each other without holes or overlap and end at the end of the file."""
        self._expect("file_size", fields["file_size"], self.file_size)
        arguments = {name: fields[name] for name in Config.__dataclass_fields__}
        for flag in ("tied_embedding", "qk_norm", "qkv_bias", "norm_topk_prob"):
            arguments[flag] = bool(arguments[flag])
        self.config = Config(**arguments)
        try:
            check_config(self.config)
        except ValueError as error:
            raise ModelFileError(f"{self.path}: header: {error}") from None
        # count tensors before listing them, so that a small hostile file cannot ask for a long list
        n_tensors, n_matrices = 0, 0
        for role, _, _, shape, parts in _planned(self.config):
            n_tensors += 1
            n_matrices += len(parts) if _has_tiles(role, shape) else 0
        # q, k and v may be stored apart
        apart = 2 * self.config.n_layers if fields["version"] == VERSION_WITH_ENCODINGS else 0
        if not 4 * n_tensors <= fields["checksums_size"] <= 4 * (n_tensors + apart):
            self._expect("checksums_size", fields["checksums_size"], 4 * n_tensors)
        self._places: dict[str, tuple[int, int]] = {}  # (offset, size) of each section, and of the tensors
        offset = HEADER_SIZE
        for section in sections(fields["version"]):
            size = n_matrices if section == "encodings" else fields[f"{section}_size"]
            if section != "encodings":
                self._expect(f"{section}_offset", fields[f"{section}_offset"], offset)
            self._places[section] = offset, size
            offset = align(offset + size)
        self.encodings = self._read_encodings(file)
        try:
            self.tensors = tensors(self.config, self.encodings)
        except ValueError as error:
            raise ModelFileError(f"{self.path}: encodings: {error}") from None
        self._expect("checksums_size", fields["checksums_size"], 4 * len(self.tensors))
        self._expect("tensors_offset", fields["tensors_offset"], align(offset, PAGE))
        last = self.tensors[-1]
        self._expect("tensors_size", fields["tensors_size"], last.offset + last.size)
        self._expect("file_size", self.file_size, fields["tensors_offset"] + fields["tensors_size"])
        self._places["tensors"] = fields["tensors_offset"], fields["tensors_size"]
        if self.encodings and set(self.encodings.values()) == {Encoding.INT8}:
            raise ModelFileError(f"{self.path}: format version {fields['version']}, but all of it is INT8")

    def _read_encodings(self, file: BinaryIO) -> Encodings:
        """The section `encodings`, which is read before the file is mapped: sizes follow from it."""
        if "encodings" not in self._places:
            return {}
        start, size = self._places["encodings"]
        file.seek(start)
        names, numbers = matrices(self.config), file.read(size)
        self._expect("size of encodings", len(numbers), size)
        for name, number in zip(names, numbers, strict=True):
            if number >= len(ENCODINGS):
                fault = f"{name} has the number {number}, known are 0..{len(ENCODINGS) - 1}"
                raise ModelFileError(f"{self.path}: encodings: {fault} (file damaged?)")
        return {name: ENCODINGS[number] for name, number in zip(names, numbers, strict=True)}

    def _check_gaps(self) -> None:
        """Texts hold no zero byte, gaps nothing but zeros; so a size that is slightly wrong is noticed."""
        end = HEADER_SIZE
        for part, (start, size) in self._places.items():
            if any(self.map[end:start]):
                raise ModelFileError(f"{self.path}: bytes {end}..{start - 1} before {part} are not zero")
            end = start + size
            zero = self.map.find(b"\0", start, end) if part in TEXTS else -1
            if zero >= 0:
                raise ModelFileError(f"{self.path}: {part} is {size} bytes, but byte {zero - start} is zero")

    def _check_vectors(self) -> None:
        """Vectors must be finite. They are few bytes, and one NaN in them would reach every logit."""
        import numpy as np

        for tensor in self.tensors:
            if not tensor.quantized:
                finite = np.isfinite(np.frombuffer(self.data(tensor), "<f4"))
                if not finite.all():
                    at = int(finite.argmin())
                    raise ModelFileError(f"{self.path}: {tensor.name}: value {at} is not a finite number")

    def _read_metadata(self) -> dict[str, Any]:
        section = "template"
        try:
            self._section("template").decode()
            section = "metadata"
            metadata: dict[str, Any] = json.loads(self._section("metadata"))
            check_metadata(metadata, self.config)
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"{self.path}: {section}: {error}") from None
        return metadata

    def _section(self, name: str) -> bytes:
        start, size = self._places[name]
        return self.map[start : start + size]

    def _expect(self, what: str, found: int, expected: int) -> None:
        if found != expected:
            expectation = f"{what} is {found}, expected {expected}"
            raise ModelFileError(f"{self.path}: {expectation} (file damaged or cut short?)")


def check_metadata(metadata: Any, config: Config) -> None:
    """Raise ValueError, naming the key, unless the keys every reader relies on are sound (docs/FORMAT.md).

    Other keys may hold any JSON that every reader can print: no lone surrogate, no NaN, no integer of more
    than 64 bits, nothing nested deeper than MAX_DEPTH.
    """
    if not isinstance(metadata, dict):
        raise ValueError("is not a JSON object")
    _check_printable(metadata, "", MAX_DEPTH)
    if not isinstance(metadata.get("name"), str):
        raise ValueError(f"name is {_shown(metadata.get('name'))}, not a string")
    thinking = metadata.get("thinking")
    if thinking not in THINKING_KINDS:
        raise ValueError(f"thinking is {_shown(thinking)}, not one of {', '.join(THINKING_KINDS)}")
    eos = metadata.get("eos_token_ids")
    if not isinstance(eos, list) or not all(type(i) is int and 0 <= i < config.n_tokens for i in eos):
        raise ValueError(f"eos_token_ids is {_shown(eos)}, not a list of token ids below {config.n_tokens}")
    for key in ("generation", "source", "special_tokens"):
        if not isinstance(metadata.get(key, {} if key != "generation" else None), dict):
            raise ValueError(f"{key} is {_shown(metadata.get(key))}, not an object")
    for key, value in metadata["generation"].items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{_place('generation', key)} is {_shown(value)}, not a finite number")
    for key, value in metadata.get("special_tokens", {}).items():
        if not isinstance(value, str):
            raise ValueError(f"{_place('special_tokens', key)} is {_shown(value)}, not a string")


def _check_printable(value: Any, where: str, depth: int) -> None:
    if isinstance(value, (dict, list)):
        if depth == 0:
            raise ValueError(f"{where[:80]}...: nested deeper than {MAX_DEPTH}")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            place = _place(where, key)
            _check_printable(key, f"the key {place}", depth)
            _check_printable(item, place, depth - 1)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} has a lone surrogate at position {error.start}") from None
    elif isinstance(value, int):
        if value.bit_length() > 64:
            raise ValueError(f"{where} is an integer of {value.bit_length()} bits, at most 64 are accepted")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value!r}, not a finite number")


def _place(where: str, key: str | int) -> str:
    """The place of a key or index within `where`, as code writes it: a.b or a[0]."""
    if isinstance(key, str) and key.isidentifier() and len(key) <= 40:
        return f"{where}.{key}" if where else key
    return f"{where}[{_shown(key)}]"


def _shown(value: Any) -> str:
    """`value` for an error message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ----------------------------------------------------------------------------
# Writer


class ModelWriter:
    """Writes a model.bin so that the target is either the old file or the whole new one.

    with ModelWriter(path, config, metadata, tokenizer, template, encodings) as writer:
        for tensor in writer.tensors:
            writer.write(piece)                 # any number of pieces, in file order
            writer.end_tensor()

    The temporary file gets its header (and so its magic) last, is fsynced, renamed over the target,
    and the directory fsynced. On any exception the temporary file is removed and the target untouched.
    Raises ValueError, before anything is written, if a section or number is one that no reader accepts.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Config,
        metadata: dict[str, Any],
        tokenizer: bytes,
        template: str,
        encodings: Encodings | None = None,
    ) -> None:
        check_config(config)
        check_metadata(metadata, config)
        self.path = Path(path)
        self.config = config
        self.tensors = tensors(config, encodings)
        given = encodings or {}
        numbers = bytes(ENCODINGS.index(given.get(name, Encoding.INT8)) for name in matrices(config))
        self._version = VERSION_WITH_ENCODINGS if any(numbers) else VERSION
        self._sections = {
            "metadata": json.dumps(metadata, ensure_ascii=False, sort_keys=True, allow_nan=False).encode(),
            "tokenizer": tokenizer,
            "template": template.encode(),
        } | ({"encodings": numbers} if any(numbers) else {})
        self._fields = self._layout()
        self._checksums: list[int] = []
        self._crc = 0
        self._written = 0  # bytes of the tensor region so far
        self._temporary = self._new_name()

    @property
    def file_size(self) -> int:
        """Bytes of the finished file."""
        return int(self._fields["file_size"])

    def __enter__(self) -> ModelWriter:
        self._remove_leftovers()
        try:
            self._create_temporary()
            self._file.seek(self._fields["tensors_offset"])
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise
        return self

    def write(self, piece: bytes | memoryview) -> None:
        """Append bytes of the current tensor."""
        self._crc = zlib.crc32(piece, self._crc)
        self._file.write(piece)
        self._written += len(piece)

    def end_tensor(self) -> None:
        tensor = self.tensors[len(self._checksums)]
        end = tensor.offset + tensor.size
        if self._written != end:
            raise ValueError(f"{tensor.name}: wrote up to {self._written}, expected {end}")
        self._checksums.append(self._crc)
        self._crc = 0
        if len(self._checksums) < len(self.tensors):
            gap = self.tensors[len(self._checksums)].offset - self._written
            self._file.write(bytes(gap))
            self._written += gap

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
                # Windows cannot rename an open file; elsewhere it stays open, and locked, until it is renamed
                if not LOCKS:
                    self._file.close()
                os.replace(self._temporary, self.path)
                sync_directory(self.path.parent)
        finally:
            try:
                self._file.close()
            finally:
                self._temporary.unlink(missing_ok=True)

    def _create_temporary(self) -> None:
        """Open a locked file beside the target. The lock marks it as in use; a killed writer leaves an
        unlocked one.
        """
        while True:
            self._file = open(self._temporary, "xb")
            lock(self._file, wait=True)
            if os.fstat(self._file.fileno()).st_nlink:
                return
            self._file.close()  # before it was locked, another writer took it for a leftover and removed it
            self._temporary = self._new_name()

    def _new_name(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")

    def _remove_leftovers(self) -> None:
        pattern = re.compile(rf"\.{re.escape(self.path.name)}\.[0-9a-f]{{8}}\.tmp")
        for leftover in self.path.parent.iterdir():
            if pattern.fullmatch(leftover.name):
                with contextlib.suppress(OSError), open(leftover, "rb") as file:
                    lock(file, wait=False)
                    leftover.unlink()

    def _layout(self) -> dict[str, Any]:
        fields: dict[str, Any] = {name: 0 for name, _, _ in HEADER_FIELDS}
        fields.update({name: getattr(self.config, name) for name in Config.__dataclass_fields__})
        fields.update(version=self._version, header_size=HEADER_SIZE)
        offset = HEADER_SIZE
        sizes = {name: len(data) for name, data in self._sections.items()}
        sizes["checksums"] = 4 * len(self.tensors)
        for section in sections(self._version):
            fields[f"{section}_offset"], fields[f"{section}_size"] = offset, sizes[section]
            offset = align(offset + sizes[section])
        last = self.tensors[-1]
        fields["tensors_offset"], fields["tensors_size"] = align(offset, PAGE), last.offset + last.size
        fields["file_size"] = fields["tensors_offset"] + fields["tensors_size"]
        for name in _RANGES:
            check_range(name, fields[name])
        for section in TEXTS:
            if b"\0" in self._sections[section]:
                raise ValueError(f"{section} has a zero byte")
        return fields

    def _finish(self) -> None:
        """Write all parts before the tensors; last the header, when everything else is on the disk."""
        if len(self._checksums) != len(self.tensors):
            raise ValueError(f"wrote {len(self._checksums)} of {len(self.tensors)} tensors")
        checksums = {"checksums": struct.pack(f"<{len(self._checksums)}I", *self._checksums)}
        body = bytearray(self._fields["tensors_offset"] - HEADER_SIZE)
        for name, data in (self._sections | checksums).items():
            start = self._fields[f"{name}_offset"] - HEADER_SIZE
            body[start : start + len(data)] = data
        self._fields["sections_crc"] = sections_crc(pack_header(self._fields), body)
        self._file.seek(HEADER_SIZE)
        self._file.write(body)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        self._file.write(pack_header(self._fields))
        self._file.flush()
        os.fsync(self._file.fileno())


def pack_header(fields: dict[str, Any]) -> bytes:
    """The 512 header bytes for `fields` (names as in HEADER_FIELDS), CRC included."""
    header = MAGIC + _STRUCT.pack(*(fields[name] for name, _, _ in HEADER_FIELDS))
    header += sum(1 << layer for layer in fields["mlp_only_layers"]).to_bytes(_LAYERS_SIZE, "little")
    header = header.ljust(_CRC_OFFSET, b"\0")
    return header + struct.pack("<I", zlib.crc32(header))


def sections_crc(header: bytes, sections: bytes | bytearray | memoryview) -> int:
    """A CRC over numbers and texts, so that a number changed together with the header CRC is noticed."""
    crc = zlib.crc32(sections, zlib.crc32(header[_FIELDS_OFFSET:_SECTIONS_CRC_OFFSET]))
    # trailing zeros are stripped, so a model without mlp_only_layers hashes nothing here
    return zlib.crc32(header[_LAYERS_OFFSET : _LAYERS_OFFSET + _LAYERS_SIZE].rstrip(b"\0"), crc)
