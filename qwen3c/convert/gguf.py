"""A GGUF file, read and checked, and seen as the Hugging Face directory it was made from.

    general.*, ARCH.*      -> config.json and generation_config.json, by the names transformers uses
    tokenizer.ggml.*       -> tokenizer.json, rebuilt, and tokenizer_config.json
    tokenizer.chat_template -> chat_template.jinja
    blk.N.attn_q.weight... -> model.layers.N.self_attn.q_proj.weight..., rows in transformers' order

So huggingface.Checkpoint checks it as it checks a directory, and the exporter knows no difference. The layout:

    "GGUF", version, number of tensors, number of keys
    keys         name, kind, value; a value may be an array
    tensors      name, dimensions (fastest first), kind, offset
    data         each tensor at a multiple of the alignment, without holes

Every count, offset and size is checked against the bytes there are before it is used; nothing is mapped.
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from .. import format, mistakes
from .huggingface import (
    BLOCKS,
    Files,
    Keys,
    SourceError,
    StoredTensor,
    inverse_frequencies,
    read_rope,
    shown,
    to_float32,
)

MAGIC = mistakes.GGUF
VERSIONS = (2, 3)
MAX_HEADER = 64 << 20  # bytes before the data, most of them the vocabulary
MAX_ENTRIES = 1 << 16  # keys, and tensors
MAX_ITEMS = (
    1 << 21
)  # of all arrays that are read item by item; a vocabulary of 262,144 tokens has half as many
SHORT = 64  # items of an array that is read whatever it is called
MAX_DIMENSIONS = 4

# general.architecture -> the class transformers runs it with
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}

# kind of a value -> struct code; 8 and 9 are texts and arrays
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY, _FLOAT32 = 8, 9, 6
# The arrays that are read, whatever their length
_READ = {f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")}

# kind of a tensor -> its name in ggml
_KINDS = dict(enumerate(
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S "
    "IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 "
    "IQ4_NL_4_8 IQ4_NL_8_8 MXFP4 NVFP4".split()
))  # fmt: skip

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"  # (head_dim / 2,): what divides each frequency of Llama 3.1 and later
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}

_EXPERTS = re.compile(r"blk\.(0|[1-9][0-9]*)\.ffn_(gate|up|down)_exps\.weight")  # (n_experts, rows, columns)

# key of config.json -> key of the file, after "ARCH."
_CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_KNOWN_KEYS = {
    *_CONFIG_KEYS.values(),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.causal"),
    *("rope.dimension_count", "vocab_size", "pooling_type"),
    *(f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "finetuned")),
    *(f"rope.scaling.{key}" for key in ("attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
}
_EXPERT_KEYS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


class GGUF(Files):
    """One GGUF file under the interface of a directory; errors name the file.

    Raises SourceError, one line, if the file is damaged, or holds what cannot be exported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.directory = Path(path)
        self.opened = []
        try:
            self._read()
        except BaseException:
            self.__exit__()
            raise

    def _read(self) -> None:
        header = _Header(self.directory, self.open(""))
        self._keys, self._infos = header.read()
        self.architecture = architecture = _check_kind(self._keys)
        for info in self._infos.values():
            if info.kind not in BLOCKS:
                fault = f"{shown(info.name)} is {info.kind}, supported: {', '.join(BLOCKS)}"
                raise SourceError(f"{self.directory}: {fault}; take an F16, BF16 or Q8_0 file of the model")
        header.check_layout(self._infos)
        self.group_size = 32 if any(info.kind == "Q8_0" for info in self._infos.values()) else 64
        config, vocabulary = self._config(architecture), Vocabulary(self._keys)
        self._texts = {
            "config.json": json.dumps(config | {"eos_token_id": vocabulary.eos_ids}, default=repr),
            "generation_config.json": json.dumps(self._generation(), default=repr),
            "tokenizer.json": vocabulary.tokenizer_json(),
            "tokenizer_config.json": json.dumps(vocabulary.special_tokens),
            "chat_template.jinja": _text(self._keys, "tokenizer.chat_template", ""),
            "README.md": f"---\nlicense: {_text(self._keys, 'general.license', '')}\n---\n",
        }

    def path(self, name: str) -> Path:
        return self.directory

    def exists(self, name: str) -> bool:
        return name in self._texts

    def bytes(self, name: str, limit: int = format.MAX_TOKENIZER) -> bytes:
        return self._texts[name].encode()

    def tensors(self) -> dict[str, StoredTensor]:
        known = {_ROPE_FACTORS} if self.architecture == "llama" else set()
        infos = [info for info in self._infos.values() if info.name not in known]
        return {self._hugging_face_name(info.name): self._tensor(info) for info in infos}

    def _tensor(self, info: _Info) -> StoredTensor:
        place = (info.name, info.kind, info.shape, self.directory, self.opened[0], info.offset)
        if self.architecture == "llama" and re.fullmatch(r"blk\.\d+\.attn_[qk]\.weight", info.name):
            return _PairedRows(*place, head_dim=self._head_dim)
        return StoredTensor(*place)

    def _hugging_face_name(self, name: str) -> str:
        experts = _EXPERTS.fullmatch(name)
        if experts:
            return f"model.layers.{experts[1]}.mlp.experts.{experts[2]}_proj"
        layer = re.fullmatch(r"blk\.(0|[1-9][0-9]*)\.(\w+)\.(weight|bias)", name)
        if layer and layer[2] in _LAYER_NAMES:
            return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
        if name not in _NAMES:
            raise SourceError(f"{self.directory}: unexpected tensor {shown(name)}")
        return _NAMES[name]

    def _config(self, architecture: str) -> dict[str, Any]:
        """config.json. Two keys have defaults, those the specification gives them."""
        keys = self._keys
        expert_keys = _EXPERT_KEYS if architecture == "qwen3moe" else {}
        known = {f"{architecture}.{key}" for key in (*_KNOWN_KEYS, *expert_keys.values())}
        for key in keys.values:
            if key.startswith(f"{architecture}.") and key not in known:
                raise SourceError(f"{keys.path}: key {shown(key)} is not supported")
        required = _CONFIG_KEYS | expert_keys
        config = {name: keys.require(f"{architecture}.{key}") for name, key in required.items()}
        if expert_keys:  # what GGUF does not say, llama.cpp does always
            config |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
        n_heads = keys.integer(f"{architecture}.attention.head_count")
        dim = keys.integer(f"{architecture}.embedding_length")
        optional = {
            name: keys.values.get(f"{architecture}.{key}", default)
            for name, key, default in (
                ("num_key_value_heads", "attention.head_count_kv", n_heads),
                ("head_dim", "attention.key_length", dim // n_heads if n_heads else 0),
            )
        }
        self._head_dim = Keys(self.directory, optional).integer("head_dim")
        for key, only in (
            ("attention.value_length", optional["head_dim"]),
            ("rope.dimension_count", optional["head_dim"]),
            ("attention.causal", True),
            ("rope.scaling.attn_factor", 1.0),  # converters do not agree what it multiplies
        ):
            value = keys.values.get(f"{architecture}.{key}", only)
            if value != only:
                raise SourceError(f"{keys.path}: {architecture}.{key} is {shown(value)}, supported: {only!r}")
        embedding = self._infos.get("token_embd.weight")
        if embedding is None:
            raise SourceError(f"{keys.path}: tensor token_embd.weight is missing")
        return config | optional | {
            "architectures": [ARCHITECTURES[architecture]],
            "_name_or_path": _text(keys, "general.name", ""),
            "attention_bias": False,
            "hidden_act": "silu",
            "rope_scaling": self._llama3_scaling(config) or _rope_scaling(keys, architecture),
            "tie_word_embeddings": "output.weight" not in self._infos,
            "vocab_size": embedding.shape[0],
        }  # fmt: skip

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """rope_scaling of config.json from the factors that follow from it, if the file has them.

        Only `factor` differs between the Llamas there are; factors that come of other numbers are refused.
        """
        import numpy as np

        info = self._infos.get(_ROPE_FACTORS)
        if info is None or self.architecture != "llama":
            return None
        if (info.kind, info.shape) != ("F32", (self._head_dim // 2,)):
            expected = f"expected F32 [{self._head_dim // 2}]"
            raise SourceError(
                f"{self.directory}: {_ROPE_FACTORS} is {info.kind} {list(info.shape)}, {expected}"
            )
        data = memoryview(bytearray(info.size))
        self._tensor(info).read(0, data)
        factors = to_float32(data, info.kind)
        scaling = {"rope_type": "llama3", "factor": float(factors.max())}
        scaling |= {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        with np.errstate(all="ignore"):  # a base that is no base is refused with the other numbers
            plain, scaled = (
                inverse_frequencies(read_rope(Keys(self.directory, config | rope), self._head_dim))
                for rope in ({}, {"rope_scaling": scaling})
            )
            fit = np.allclose(plain, scaled * factors, rtol=1e-4, atol=0)
        if not fit:
            raise SourceError(f"{self.directory}: {_ROPE_FACTORS} is not that of a Llama 3")
        return scaling

    def _generation(self) -> dict[str, Any]:
        return {
            name: self._keys.values[key] for name, key in _SAMPLING_KEYS.items() if key in self._keys.values
        }


@dataclass(frozen=True)
class _PairedRows(StoredTensor):
    """q_proj or k_proj of a Llama, whose heads GGUF stores for a rotary embedding of neighbouring rows.

    There pair i of a head is rows 2i and 2i + 1; here, as in transformers, rows i and i + head_dim / 2.
    """

    head_dim: int

    def read(self, start: int, out: memoryview) -> None:
        """Fill `out` with whole rows from byte `start` on, in transformers' order."""
        row_size = self.size // self.shape[0]
        for at in range(0, len(out), row_size):
            head, row = divmod((start + at) // row_size, self.head_dim)
            half, pair = divmod(row, self.head_dim // 2)
            stored = head * self.head_dim + 2 * pair + half
            super().read(stored * row_size, out[at : at + row_size])


def _check_kind(keys: Keys) -> str:
    """The architecture, if the file is one whole model of a supported one."""
    kind = keys.values.get("general.type", "model")
    if kind != "model":
        raise SourceError(f"{keys.path}: general.type is {shown(kind)}, expected 'model'")
    if keys.values.get("split.count", 1) not in (0, 1):
        n = keys.values["split.count"]
        raise SourceError(
            f"{keys.path}: is one of {shown(n)} parts; join them with llama-gguf-split --merge first"
        )
    architecture = keys.require("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise SourceError(
            f"{keys.path}: architecture {shown(architecture)} is not supported (supported: {supported})"
        )
    return architecture


def _rope_scaling(keys: Keys, architecture: str) -> dict[str, Any] | None:
    """rope_scaling of config.json; what kinds there are, and what each needs, is checked there."""
    prefix = f"{architecture}.rope.scaling."
    kind = keys.values.get(f"{prefix}type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind}
    for name, key in (
        ("factor", "factor"),
        ("original_max_position_embeddings", "original_context_length"),
        ("beta_fast", "yarn_beta_fast"),
        ("beta_slow", "yarn_beta_slow"),
    ):
        if prefix + key in keys.values:
            scaling[name] = keys.values[prefix + key]
    return scaling


def _text(keys: Keys, key: str, default: str) -> str:
    value = keys.values.get(key, default)
    if not isinstance(value, str):
        raise SourceError(f"{keys.path}: {key} is {shown(value)}, expected text")
    return value


# ----------------------------------------------------------------------------
# The header


@dataclass(frozen=True)
class _Info:
    """What the header says about one tensor."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first, as everywhere else
    kind: str
    offset: int  # of its first byte in the file

    @property
    def size(self) -> int:
        weights, size = BLOCKS[self.kind]
        return math.prod(self.shape) // weights * size


class _Skipped:
    """Stands for an array that nothing here needs; a message that shows it says what it is."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __repr__(self) -> str:
        return f"an array of {self.n} items"


class _Header:
    """The header of an open file, read from the start; no step past its end or past MAX_HEADER."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self.file = open(file.fileno(), "rb", closefd=False)
        self.file_size = os.fstat(file.fileno()).st_size
        self.position = 0
        self.items = 0  # of arrays, read so far

    def read(self) -> tuple[Keys, dict[str, _Info]]:
        """The keys, and the tensors in file order."""
        magic = self.take(min(4, self.file_size), "magic")
        if magic != MAGIC:
            hint = mistakes.in_place_of_source(self.path, magic + self.file.read(mistakes.START))
            expected = f"starts with {magic!r}; expected a directory or a GGUF file, {MAGIC!r}"
            raise self.fault(hint or expected)
        version = self.number("I", "version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
            hint = " (big-endian)" if swapped else ""
            raise self.fault(f"GGUF version is {version}{hint}, supported: 2, 3")
        n_tensors, n_keys = self.number("Q", "tensor count"), self.number("Q", "key count")
        for name, n in (("tensors", n_tensors), ("keys", n_keys)):
            if n > MAX_ENTRIES:
                raise self.fault(f"{n} {name}, at most {MAX_ENTRIES} are accepted")
        values: dict[str, Any] = {}
        for i in range(n_keys):
            key = self.text(f"name of key {i}")
            if key in values:
                raise self.fault(f"key {shown(key)} is given twice")
            values[key] = self.value(self.number("I", f"kind of {shown(key)}"), key)
        infos: dict[str, _Info] = {}
        for i in range(n_tensors):
            info = self.info(i)
            if info.name in infos:
                raise self.fault(f"tensor {shown(info.name)} is given twice")
            infos[info.name] = info
        return Keys(self.path, values), self.placed(infos, values.get("general.alignment", 32))

    def take(self, n: int, what: str) -> bytes:
        self.check(n, what)
        data = self.file.read(n)
        if len(data) != n:
            raise self.fault(f"ended inside {what}; did the file change?")
        self.position += n
        return data

    def check(self, n: int, what: str) -> None:
        """The next n bytes are in the file, and before MAX_HEADER."""
        if n > min(self.file_size, MAX_HEADER) - self.position:
            of_file = f"the file has {self.file_size}"
            limit = of_file if self.file_size < MAX_HEADER else f"at most {MAX_HEADER}"
            raise self.fault(f"{what}: {n} bytes at {self.position}, but {limit} (cut short?)")

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.fault(f"{what} is not UTF-8: byte {error.start}") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _TEXT:
            return self.text(shown(key))
        if kind == _ARRAY:
            kind, n = self.number("I", f"kind of {shown(key)}"), self.number("Q", f"length of {shown(key)}")
            return self.array(kind, key, n)
        return self.scalars(kind, key, 1)[0]

    def array(self, kind: int, key: str, n: int) -> list[Any] | _Skipped:
        """The items of an array that is needed or short. Of any other no more is kept than how many there are."""
        name, is_read = shown(key), key in _READ or n <= SHORT
        if is_read or kind == _TEXT:
            self.items += n
            if self.items > MAX_ITEMS:
                raise self.fault(f"{name}: {n} items, at most {MAX_ITEMS} in all arrays are accepted")
        if kind == _TEXT and is_read:
            return [*self.texts(name, n)]
        if is_read:
            return self.scalars(kind, key, n)
        if kind == _TEXT:
            collections.deque(self.texts(name, n), maxlen=0)
        else:
            self.check(n * self.scalar_size(kind, key), name)
            self.position = self.file.seek(n * self.scalar_size(kind, key), os.SEEK_CUR)
        return _Skipped(n)

    def texts(self, name: str, n: int) -> Iterator[str]:
        """n texts, one after the other; there may be a million, so nothing is called for each that need not be."""
        read, end = self.file.read, min(self.file_size, MAX_HEADER)
        for i in range(n):
            size = int.from_bytes(read(8), "little")
            self.position += 8
            if self.position + size > end:
                self.check(size, f"{name}[{i}]")
            self.position += size
            try:
                yield read(size).decode()
            except UnicodeDecodeError as error:
                raise self.fault(f"{name}[{i}] is not UTF-8: byte {error.start}") from None

    def scalars(self, kind: int, key: str, n: int) -> list[Any]:
        data = self.take(n * self.scalar_size(kind, key), shown(key))
        if kind != _FLOAT32:
            return list(struct.unpack(f"<{n}{_SCALARS[kind]}", data))
        import numpy as np

        # the shortest decimal: 1e-06, as config.json says it, not 9.999999974752427e-07
        return [float(str(x)) for x in np.frombuffer(data, "<f4")]

    def scalar_size(self, kind: int, key: str) -> int:
        if kind not in _SCALARS:
            raise self.fault(f"kind of {shown(key)} is {kind}, which GGUF does not have here")
        return struct.calcsize("<" + _SCALARS[kind])

    def info(self, i: int) -> _Info:
        name = self.text(f"name of tensor {i}")
        n = self.number("I", f"dimensions of {shown(name)}")
        if not 1 <= n <= MAX_DIMENSIONS:
            raise self.fault(f"tensor {shown(name)} has {n} dimensions, expected 1 to {MAX_DIMENSIONS}")
        shape = tuple(reversed([self.number("Q", f"shape of {shown(name)}") for _ in range(n)]))
        if not all(shape) or math.prod(shape) >= 2**48:
            raise self.fault(f"tensor {shown(name)} has shape {list(shape)}")
        kind = self.number("I", f"kind of {shown(name)}")
        kind = _KINDS.get(kind, f"kind {kind}")
        if shape[-1] % BLOCKS.get(kind, (1, 0))[0]:
            raise self.fault(f"tensor {shown(name)} is {kind}, but its rows have {shape[-1]} weights")
        return _Info(name, shape, kind, self.number("Q", f"offset of {shown(name)}"))

    def placed(self, infos: dict[str, _Info], alignment: Any) -> dict[str, _Info]:
        """The tensors, their offsets counted from the start of the file."""
        if type(alignment) is not int or not 8 <= alignment <= 65536 or alignment & (alignment - 1):
            raise self.fault(
                f"general.alignment is {shown(alignment)}, expected a power of two from 8 to 65536"
            )
        self.alignment = alignment
        self.start = format.align(self.position, alignment)
        return {
            name: _Info(name, info.shape, info.kind, self.start + info.offset) for name, info in infos.items()
        }

    def check_layout(self, infos: dict[str, _Info]) -> None:
        """Tensors follow each other without holes or overlap and end where the file ends."""
        end = padded = self.start
        for info in infos.values():
            if info.offset != padded:
                raise self.fault(f"tensor {shown(info.name)} is at byte {info.offset}, expected {padded}")
            end = info.offset + info.size
            padded = format.align(end, self.alignment)
        if not end <= self.file_size <= padded:
            raise self.fault(f"{self.file_size} bytes, its header describes {end} (cut short?)")

    def fault(self, message: str) -> SourceError:
        return SourceError(f"{self.path}: {message}")


# ----------------------------------------------------------------------------
# The vocabulary

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def _pattern(digits: str) -> str:
    """The split of GPT-4's kind: contractions, words, `digits`, punctuation, newlines, spaces."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True)
class _PreTokenizer:
    """What the name in tokenizer.ggml.pre stands for."""

    pattern: str
    nfc: bool
    ignore_merges: bool  # a whole word that is a token is that token, whatever the merges
    add_bos: bool  # where tokenizer.ggml.add_bos_token does not say


_QWEN2 = _PreTokenizer(_pattern(r"\p{N}"), nfc=True, ignore_merges=False, add_bos=False)
_LLAMA3 = _PreTokenizer(_pattern(r"\p{N}{1,3}"), nfc=False, ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {"qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "llama-bpe": _LLAMA3}

# Control tokens that end a text whoever the model's maker is; the file names but one or two ids
_END_TOKENS = {
    *("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
    "<｜end▁of▁sentence｜>",
}


class Vocabulary:
    """The tables tokenizer.ggml.*: byte-level BPE, as tokenizer.json has it.

    Ids must be ordinary tokens, then control and added tokens, then unused ones: the only order that
    Hugging Face's tokenizers can have. The flags of added tokens (lstrip, rstrip, ...) are not in GGUF.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        model = keys.require("tokenizer.ggml.model")
        if model != "gpt2":
            raise SourceError(f"{keys.path}: tokenizer.ggml.model is {shown(model)}, supported: 'gpt2'")
        pre = keys.require("tokenizer.ggml.pre")
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            supported = ", ".join(PRE_TOKENIZERS)
            raise SourceError(f"{keys.path}: tokenizer.ggml.pre is {shown(pre)}, supported: {supported}")
        self.pre = PRE_TOKENIZERS[pre]
        self.tokens, self.kinds = self._tokens()
        self.add_bos = keys.values.get("tokenizer.ggml.add_bos_token", self.pre.add_bos)
        self.eos_ids = self._eos_ids()
        self.special_tokens = self._special_tokens()

    def tokenizer_json(self) -> str:
        """tokenizer.json; what is wrong in the merges, tokenizers itself will say."""
        n = self.kinds.count(_NORMAL)
        added = [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": self.kinds[i] == _CONTROL}
            for i, token in enumerate(self.tokens)
            if self.kinds[i] in (_CONTROL, _USER_DEFINED)
        ]
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        split = {
            "type": "Split",
            "pattern": {"Regex": self.pre.pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        model = {"type": "BPE", "ignore_merges": self.pre.ignore_merges, "byte_fallback": False}
        model |= {"dropout": None, "unk_token": None, "fuse_unk": False}
        model |= {"vocab": {token: i for i, token in enumerate(self.tokens[:n])}, "merges": self._merges()}
        tokenizer = {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "NFC"} if self.pre.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": self._bos_processor() if self.add_bos else byte_level,
            "decoder": byte_level,
            "model": model,
        }
        return json.dumps(tokenizer, ensure_ascii=False)

    def _tokens(self) -> tuple[list[str], list[int]]:
        """Tokens and their kinds by id, without the unused ones at the end."""
        tokens, kinds = (
            self._list(f"tokenizer.ggml.{name}", kind)
            for name, kind in (("tokens", str), ("token_type", int))
        )
        if len(tokens) != len(kinds):
            raise self._fault(f"{len(tokens)} tokens, but tokenizer.ggml.token_type has {len(kinds)}")
        used = len(kinds)
        while used and kinds[used - 1] == _UNUSED:
            used -= 1
        tokens, kinds = tokens[:used], kinds[:used]
        rank = {_NORMAL: 0, _CONTROL: 1, _USER_DEFINED: 1}
        highest = 0
        for i, kind in enumerate(kinds):
            if rank.get(kind, -1) < highest:
                raise self._fault(f"token {i} ({shown(tokens[i])}) has kind {kind}, which cannot be there")
            highest = rank[kind]
        last = {token: i for i, token in enumerate(tokens)}
        for i, token in enumerate(tokens):
            if last[token] != i:
                raise self._fault(f"tokens {i} and {last[token]} are both {shown(token)}")
        return tokens, kinds

    def _merges(self) -> list[list[str]]:
        merges = [merge.split(" ") for merge in self._list("tokenizer.ggml.merges", str)]
        for i, merge in enumerate(merges):
            if len(merge) != 2 or not all(merge):
                raise self._fault(
                    f"tokenizer.ggml.merges[{i}] is {shown(' '.join(merge))}, expected two tokens"
                )
        return merges

    def _bos_processor(self) -> dict[str, Any]:
        """Puts the begin-of-text token before a text, where special tokens are asked for."""
        bos = self.special_tokens.get("bos_token")
        if bos is None:
            raise self._fault("tokenizer.ggml.add_bos_token is set, but there is no bos_token_id")
        first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        second = {"Sequence": {"id": "B", "type_id": 1}}
        return {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [self.tokens.index(bos)], "tokens": [bos]}},
        }

    def _eos_ids(self) -> list[int]:
        """eos, end of turn, end of message, and what else ends a text by its name."""
        ids = [self._id("eos"), self._id("eot"), self._id("eom")]
        ids += [i for i, t in enumerate(self.tokens) if t in _END_TOKENS and self.kinds[i] == _CONTROL]
        found = list(dict.fromkeys(i for i in ids if i is not None))
        if not found:
            self.keys.require("tokenizer.ggml.eos_token_id")
        return found

    def _special_tokens(self) -> dict[str, str]:
        """bos_token and the like. One that is never put is none: Qwen's files name <|endoftext|>."""
        ids = {
            name: self._id(name)
            for name in ("bos", "eos", "padding", "unknown")
            if name != "bos" or self.add_bos
        }
        short = {"padding": "pad", "unknown": "unk"}
        return {f"{short.get(name, name)}_token": self.tokens[i] for name, i in ids.items() if i is not None}

    def _id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.keys.values:
            return None
        token = self.keys.integer(key)
        if not 0 <= token < len(self.tokens):
            raise self._fault(f"{key} is {token}, but tokens end at {len(self.tokens) - 1}")
        return token

    def _list(self, key: str, kind: type) -> list[Any]:
        values = self.keys.require(key)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise self._fault(f"{key} is not a list of {'texts' if kind is str else 'integers'}")
        return values

    def _fault(self, message: str) -> SourceError:
        return SourceError(f"{self.keys.path}: {message}")
