"""A Hugging Face directory, read and checked: everything the exporter needs and nothing it has to guess.

    config.json (transformers 4 and 5 dialects)    -> format.Config
    generation_config.json, tokenizer_config.json  -> metadata: where a text ends, sampling defaults, origin
    tokenizer.json, chat template                  -> stored as they are (but see _with_opening)
    *.safetensors                                  -> the bytes of each tensor, read a few rows at a time

Opening a Checkpoint reads no weights, yet finds every fault that does not sit in a weight itself. A key that
the forward pass needs and config.json lacks is an error, never a default; so is a key or a tensor that means
something this engine would not do. Nothing from the directory is executed: no pickle, no Python.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import reprlib
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import format, mistakes
from ..files import reason
from ..terminal import escaped
from ..text import tokenizer_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class SourceError(ValueError):
    """The directory cannot be exported; the message is one line naming the file and the key or tensor.

    Control characters, such as those of an escape sequence in a tensor's name, are spelled out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong, _SHORT.maxlevel = 60, 60, 40, 2


def shown(value: Any) -> str:
    """A value of a file as a message shows it: its repr, cut in the middle where it is long."""
    return cut(_SHORT.repr(value))


def cut(text: object, length: int = 120) -> str:
    """A name, or a message of a library, in one line of at most `length` characters; the middle goes."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[: length - 33]}...{line[-30:]}"


@dataclass(frozen=True)
class Architecture:
    """What the name of an architecture says and its config.json does not."""

    number: int  # in format.ARCHITECTURES
    qk_norm: bool
    qkv_bias: bool
    experts: bool = False
    implied: tuple[str, ...] = ()  # keys that config.json need not state


_IMPLIED = ("attention_bias", "head_dim")
ARCHITECTURES = {
    "Qwen3ForCausalLM": Architecture(1, qk_norm=True, qkv_bias=False),
    "Qwen3Model": Architecture(1, qk_norm=True, qkv_bias=False),
    "Qwen3MoeForCausalLM": Architecture(2, qk_norm=True, qkv_bias=False, experts=True),
    "Qwen2ForCausalLM": Architecture(3, qk_norm=False, qkv_bias=True, implied=_IMPLIED),
    "LlamaForCausalLM": Architecture(4, qk_norm=False, qkv_bias=False, implied=_IMPLIED),
}

# Config field -> key of config.json; all required
_KEY_OF = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "rms_eps": "rms_norm_eps",
}

# Keys that change the forward pass, with the only value this engine runs
_FIXED_KEYS = {"hidden_act": "silu", "attention_bias": False}
_OPTIONAL_FIXED_KEYS = {
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "shared_expert_intermediate_size": 0,
}

_GENERATION_KEYS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)

# dtype -> weights and bytes of its smallest unit; Q8_0 (GGUF alone) is an fp16 scale and 32 codes
BLOCKS = {"BF16": (1, 2), "F16": (1, 2), "F32": (1, 4), "Q8_0": (32, 34)}
_QUANTIZED_DTYPE = re.compile(r"[IU]\d+$|F[468](_|$)|BOOL$")
_TAKE_UNQUANTIZED = "already quantised; take the model's original BF16, F16 or F32 repository instead"
MAX_TEXT = 16 << 20  # bytes accepted of any text file other than tokenizer.json
MAX_DEPTH = 100  # of lists and objects in JSON
MAX_NAME = 200  # characters of what config.json calls the model, and of its licence
MAX_INTEGER = 1 << 127  # what is larger is no count of anything

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Checkpoint:
    """A checked Hugging Face directory, or a GGUF file seen as one: its numbers, its texts, its tensors.

    config     format.Config, group size included
    rope       what inverse_frequencies needs
    metadata   what the metadata section of model.bin holds (docs/FORMAT.md)
    tokenizer  the bytes of tokenizer.json
    template   the chat template, "" if there is none
    tensors    Hugging Face name -> StoredTensor, exactly those of format.tensors(config)

    Raises SourceError, before any weight is read, if anything is missing, contradictory or unsupported.
    """

    def __init__(
        self,
        files: Files,
        group_size: int | None = None,
        name: str | None = None,
        yarn: float | None = None,
        yarn_attn_factor: float | None = None,
    ) -> None:
        """yarn: stretch a model of default rope by this factor. yarn_attn_factor: its factor on cos and sin."""
        self.files = files
        if group_size is not None and group_size not in format.GROUP_SIZES:
            sizes = ", ".join(map(str, format.GROUP_SIZES))
            raise SourceError(f"--group-size is {shown(group_size)}, not one of {sizes}")
        hint = "" if files.exists("config.json") else mistakes.directory_without_config(files.directory)
        if hint:
            raise SourceError(f"{files.directory}: {hint}")
        keys = files.keys("config.json")
        architecture = _supported_architecture(keys)
        self.tokenizer, n_tokens = _read_tokenizer(files, keys.integer("vocab_size"))
        self.rope = read_rope(keys, _head_dim(keys, ARCHITECTURES[architecture]))
        if yarn is not None or yarn_attn_factor is not None:
            self.rope = _stretched(keys, self.rope, yarn, yarn_attn_factor)
        self.config = _read_config(
            keys, ARCHITECTURES[architecture], self.rope, n_tokens, group_size or files.group_size
        )
        if yarn is not None:
            self.config = _longer(keys, self.config, self.rope)
        self.template = _read_template(files)
        stored = files.tensors()
        if (
            "embed_tokens.weight" in stored
        ):  # saved without a head, as Qwen3-Embedding is: the embedding stands in
            stored = {f"model.{tensor}": stored[tensor] for tensor in stored}
            self.config = replace(self.config, tied_embedding=True)
        self.tensors = _open_tensors(files, stored, self.config)
        generation = files.keys("generation_config.json", optional=True)
        self.metadata: dict[str, Any] = {
            "name": name or _base_name(keys.values) or _describe_size(self.config),
            "thinking": thinking_kind(self.template),
            "eos_token_ids": _eos_token_ids(keys, generation, n_tokens),
            "generation": generation.numbers(_GENERATION_KEYS),
            "rope": self.rope.description(),
            "special_tokens": _special_tokens(files.keys("tokenizer_config.json", optional=True)),
            "source": self._provenance(architecture, keys.values),
        }

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def _provenance(self, architecture: str, config: dict[str, Any]) -> dict[str, Any]:
        """A function of the files' contents, never of their names, their split or the date."""
        from .. import __version__

        source = {
            "architecture": architecture,
            "dtypes": sorted({tensor.dtype for tensor in self.tensors.values()}),
            "exporter": f"qwen3c {__version__}",
            "licence": _licence(self.files),
            "transformers_version": config.get("transformers_version"),
            "config": config,
        }
        return {key: value for key, value in source.items() if value is not None}


# ----------------------------------------------------------------------------
# Files


class Files:
    """The files of a directory; leaving the `with` block closes those that were opened."""

    group_size = 64  # of the weights, where the caller has no wish

    def __init__(self, directory: str | os.PathLike[str], expected: str = "config.json") -> None:
        self.directory = path = Path(directory)
        self.opened: list[FileIO] = []
        if not path.is_dir():
            problem = "is not a directory" if path.exists() else "no such directory"
            hint = "" if path.exists() else mistakes.missing_source(os.fspath(directory))
            hint = hint or f"expected one with {expected} and *.safetensors"
            raise SourceError(f"{directory}: {problem}; {hint}")

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.opened:
            file.close()

    def path(self, name: str) -> Path:
        return self.directory / name

    def exists(self, name: str) -> bool:
        return os.path.lexists(self.path(name))

    def open(self, name: str) -> FileIO:
        """A regular file, unbuffered."""
        path = self.path(name)
        try:
            # a FIFO would block and a device has no end: only regular files are opened
            if not stat.S_ISREG(path.stat().st_mode):
                raise SourceError(f"{path}: is not a regular file")
            file = open(path, "rb", buffering=0)
        except OSError as error:
            raise SourceError(f"{path}: {reason(error)}") from None
        self.opened.append(file)
        hint = mistakes.in_place_of_part(os.pread(file.fileno(), mistakes.START, 0))
        if hint:
            raise SourceError(f"{path}: {hint}")
        return file

    def bytes(self, name: str, limit: int = MAX_TEXT) -> bytes:
        file = self.open(name)
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise SourceError(f"{self.path(name)}: {size} bytes, at most {limit} are accepted")
        return file.readall()

    def text(self, name: str) -> str:
        try:
            return self.bytes(name).decode()
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.path(name)}: is not UTF-8: byte {error.start}") from None

    def keys(self, name: str, optional: bool = False) -> Keys:
        """The JSON object in a file; a file that may be missing is then an empty object."""
        path = self.path(name)
        return Keys(path, {} if optional and not self.exists(name) else parse_json(path, self.bytes(name)))

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of every safetensors file, by its Hugging Face name."""
        stored: dict[str, StoredTensor] = {}
        for file_name, names in _shards(self).items():
            found = open_safetensors(self, file_name)
            path = self.path(file_name)
            for name in sorted(found.keys() & stored.keys()):
                raise SourceError(f"{path}: {cut(name)} is also in {stored[name].path.name}")
            for name in sorted(found.keys() ^ names) if names is not None else ():
                fault = "is here, but not by" if name in found else "is missing, though here by"
                raise SourceError(f"{path}: {cut(name)} {fault} {INDEX_NAME}")
            stored |= found
        return stored


class Keys:
    """The object in a JSON file, read key by key with errors that name both."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def require(self, key: str) -> Any:
        if key not in self.values:
            raise SourceError(f"{self.path}: required key {key!r} is missing")
        return self.values[key]

    def integer(self, key: str) -> int:
        value = self.require(key)
        if type(value) is not int:
            raise SourceError(f"{self.path}: {key} is {shown(value)}, expected an integer")
        if abs(value) > MAX_INTEGER:
            raise SourceError(f"{self.path}: {key} is {shown(value)}, expected a smaller integer")
        return value

    def number(self, key: str) -> float:
        value = self.require(key)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # integers may be longer
            raise SourceError(f"{self.path}: {key} is {shown(value)}, expected a finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.require(key)
        if type(value) is not bool:
            raise SourceError(f"{self.path}: {key} is {shown(value)}, expected true or false")
        return value

    def numbers(self, keys: tuple[str, ...]) -> dict[str, int | float]:
        """Those of `keys` that are present and not null, each a finite number."""
        present = [key for key in keys if self.values.get(key) is not None]
        for key in present:
            self.number(key)
        return {key: self.values[key] for key in present}


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """The object in `data`. A key given twice, NaN and Infinity are errors: readers differ on them.

    So are numbers beyond a float, lone surrogates, which no file can hold, and objects nested deeper than MAX_DEPTH.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"key {shown(key)} is given twice")
            result[key] = value
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is not valid JSON: {cut(error)}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path}: is a JSON {type(value).__name__}, expected an object")
    _check_values(path, value)
    return value


def _check_values(path: Path, values: dict[str, Any]) -> None:
    """Everything in the JSON object can be written as JSON again."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [
        ((), values)
    ]  # the keys that lead to a value, and the value
    while waiting:
        place, value = waiting.pop()
        if len(place) > MAX_DEPTH:
            raise SourceError(f"{path}: {_dotted(place)} is nested deeper than {MAX_DEPTH}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SourceError(f"{path}: {_dotted(place)} is not a finite number")
        if any(_has_surrogate(text) for text in (value, *place[-1:])):
            raise SourceError(f"{path}: {_dotted(place)} is not Unicode: surrogates not allowed")
        if isinstance(value, dict):
            waiting.extend(((*place, key), inner) for key, inner in value.items())
        elif isinstance(value, list):
            waiting.extend(((*place, i), inner) for i, inner in enumerate(value))


def _dotted(place: tuple[Any, ...]) -> str:
    return cut(".".join(map(str, place)))


def _has_surrogate(text: Any) -> bool:
    return isinstance(text, str) and not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


# ----------------------------------------------------------------------------
# config.json


def _supported_architecture(keys: Keys) -> str:
    """The architecture's name, if it and every key that would change the forward pass are supported."""
    for key in ("quantization_config", "compression_config"):
        quantization = keys.values.get(key)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise SourceError(f"{keys.path}: {key} says {shown(method)}: {_TAKE_UNQUANTIZED}")
    names = keys.require("architectures")
    if not isinstance(names, list) or len(names) != 1 or str(names[0]) not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise SourceError(f"{keys.path}: architectures is {shown(names)}, supported: {supported}")
    for key, only in _FIXED_KEYS.items():
        if key not in ARCHITECTURES[names[0]].implied:
            keys.require(key)
        if keys.values.get(key, only) != only:
            raise SourceError(f"{keys.path}: {key} is {shown(keys.values[key])}, supported: {only!r}")
    for key, only in _OPTIONAL_FIXED_KEYS.items():
        if keys.values.get(key) not in (None, only):
            raise SourceError(f"{keys.path}: {key} is {shown(keys.values[key])}, supported: {only!r}")
    layer_types = keys.values.get("layer_types") or []
    for kind in layer_types if isinstance(layer_types, list) else [layer_types]:
        if kind != "full_attention":
            raise SourceError(f"{keys.path}: layer_types has {shown(kind)}, supported: 'full_attention'")
    return str(names[0])


def _read_config(
    keys: Keys, architecture: Architecture, rope: Rope, n_tokens: int, group_size: int
) -> format.Config:
    values: dict[str, Any] = {"head_dim": rope.head_dim}
    for field, key in {**_KEY_OF, "head_dim": "head_dim"}.items():
        if field != "head_dim":
            values[field] = keys.number(key) if field == "rms_eps" else keys.integer(key)
        try:
            format.check_range(field, values[field])
        except ValueError as error:
            raise SourceError(f"{keys.path}: {key}: {cut(error)}") from None
    config = format.Config(
        **values,
        **(_read_experts(keys) if architecture.experts else {}),
        rope_theta=rope.theta,
        n_tokens=n_tokens,
        group_size=group_size,
        tied_embedding=keys.flag("tie_word_embeddings"),
        rope_attention_scale=rope.attention_scale,
        rope_type=rope.number,
        architecture=architecture.number,
        qk_norm=architecture.qk_norm,
        qkv_bias=architecture.qkv_bias,
    )
    try:
        format.check_config(config)  # also that rope_theta is in range
    except ValueError as error:
        others = [size for size in format.GROUP_SIZES if _is_sound(replace(config, group_size=size))]
        if others:
            fitting = " or ".join(map(str, others))
            raise SourceError(f"--group-size {group_size}: {keys.path}: {error}; {fitting} fits") from None
        raise SourceError(f"{keys.path}: {cut(error)}") from None
    return config


def _is_sound(config: format.Config) -> bool:
    try:
        format.check_config(config)
        return True
    except ValueError:
        return False


def _read_experts(keys: Keys) -> dict[str, Any]:
    """The fields of format.Config that a mixture of experts has."""
    names = [name for name in ("num_experts", "num_local_experts") if keys.values.get(name) is not None]
    counts = {keys.integer(name) for name in names or ["num_experts"]}
    if len(counts) > 1:
        raise SourceError(f"{keys.path}: num_experts and num_local_experts contradict each other")
    dense = keys.require("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise SourceError(f"{keys.path}: mlp_only_layers is {shown(dense)}, expected a list of layers")
    return {
        "n_experts": counts.pop(),
        "n_experts_per_token": keys.integer("num_experts_per_tok"),
        "expert_hidden_dim": keys.integer("moe_intermediate_size"),
        "norm_topk_prob": keys.flag("norm_topk_prob"),
        "decoder_sparse_step": keys.integer("decoder_sparse_step"),
        "mlp_only_layers": tuple(sorted({*dense})),
    }


def _head_dim(keys: Keys, architecture: Architecture) -> int:
    """head_dim, which Qwen2 and Llama leave to hidden_size / num_attention_heads."""
    if "head_dim" not in architecture.implied or keys.values.get("head_dim") is not None:
        return keys.integer("head_dim")
    dim, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if n_heads < 1 or dim % n_heads:
        raise SourceError(
            f"{keys.path}: hidden_size = {dim} is not a multiple of num_attention_heads = {n_heads}"
        )
    return dim // n_heads


# ----------------------------------------------------------------------------
# Rotary embedding


@dataclass(frozen=True)
class Rope:
    """Everything config.json says about the rotary embedding; `factor` is how far it is stretched."""

    type: str
    theta: float
    head_dim: int
    attention_scale: float = 1.0  # factor on cos and sin
    factor: float = 1.0
    original_context: int = 0  # positions before it was stretched: yarn, llama3
    beta_fast: float = 32.0  # yarn: turns in that context above which a frequency stays
    beta_slow: float = 1.0  # and below which it is divided by `factor`
    truncate: bool = True  # yarn: between whole pairs
    low_freq_factor: float = 1.0  # llama3: the same two limits
    high_freq_factor: float = 4.0

    @property
    def number(self) -> int:
        return next(n for n, name in format.ROPE_TYPES.items() if name == self.type)

    def description(self) -> dict[str, Any]:
        """For the metadata: the numbers of this type."""
        fields = ["type", "theta", "attention_scale", *_ROPE_FIELDS[self.type]]
        return {field: getattr(self, field) for field in dict.fromkeys(fields)}


def _default_frequencies(rope: Rope) -> NDArray[np.float64]:
    """theta^(-2i / head_dim), i = 0 .. head_dim / 2 - 1 (Su et al. 2021, equation 15)."""
    import numpy as np

    return rope.theta ** (-2.0 * np.arange(rope.head_dim // 2) / rope.head_dim)


def _linear_frequencies(rope: Rope) -> NDArray[np.float64]:
    """Every frequency divided by `factor` (position interpolation, Chen et al. 2023)."""
    return _default_frequencies(rope) / rope.factor


def _yarn_frequencies(rope: Rope) -> NDArray[np.float64]:
    """Fast frequencies stay, slow ones are divided by `factor`, a ramp between (YaRN, Peng et al. 2023, 3.2)."""
    import numpy as np

    def pair(turns: float) -> float:
        """The index i whose frequency makes so many turns in the original context."""
        period = rope.original_context / (turns * 2 * math.pi)
        return rope.head_dim * math.log(period) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(rope.head_dim // 2) - low) / (high - low), 0, 1)
    frequencies = _default_frequencies(rope)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _llama3_frequencies(rope: Rope) -> NDArray[np.float64]:
    """As in YaRN, but the ramp runs over turns in the original context, between the two `freq_factor`s."""
    import numpy as np

    frequencies = _default_frequencies(rope)
    turns = rope.original_context * frequencies / (2 * math.pi)
    width = rope.high_freq_factor - rope.low_freq_factor
    kept = np.clip((turns - rope.low_freq_factor) / width, 0, 1)
    return frequencies / rope.factor * (1 - kept) + frequencies * kept


_FREQUENCIES: dict[str, Callable[[Rope], NDArray[np.float64]]] = {
    "default": _default_frequencies,
    "linear": _linear_frequencies,
    "yarn": _yarn_frequencies,
    "llama3": _llama3_frequencies,
}
# Field of Rope -> key of the rope dict; those of _ROPE_OPTIONS may be missing
_ROPE_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "yarn": {"factor": "factor", "original_context": "original_max_position_embeddings"},
    "llama3": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
}
_ROPE_OPTIONS = {"yarn": ("beta_fast", "beta_slow", "truncate")}
_ANY_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# DeepSeek-R1-0528-Qwen3-8B has attn_factor, which transformers ignores: see export.py --yarn-attn-factor
_YARN_SCALE_KEYS = {"attention_factor", "mscale", "mscale_all_dim", "attn_factor"}


def read_rope(keys: Keys, head_dim: int) -> Rope:
    """rope_parameters (transformers 5) or rope_scaling and rope_theta (transformers 4)."""
    found = [key for key in ("rope_parameters", "rope_scaling") if keys.values.get(key)]
    if len(found) == 2 and keys.values[found[0]] != keys.values[found[1]]:
        raise SourceError(f"{keys.path}: rope_parameters and rope_scaling contradict each other")
    values = keys.values[found[0]] if found else {}
    if isinstance(values, dict) and values.keys() == {
        "full_attention"
    }:  # transformers 5 may nest by layer type
        values = values["full_attention"]
    if not isinstance(values, dict):
        raise SourceError(f"{keys.path}: {found[0]} is {shown(values)}, expected an object")
    rope_type = values.get("rope_type", values.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _FREQUENCIES:
        supported = ", ".join(_FREQUENCIES)
        raise SourceError(
            f"{keys.path}: rope type {shown(rope_type)} is not supported (supported: {supported})"
        )
    known = _ANY_ROPE_KEYS | {*_ROPE_FIELDS[rope_type].values(), *_ROPE_OPTIONS.get(rope_type, ())}
    unknown = sorted(values.keys() - known - (_YARN_SCALE_KEYS if rope_type == "yarn" else set()))
    if unknown:
        raise SourceError(f"{keys.path}: unknown key {shown(unknown[0])} beside rope type {rope_type!r}")
    if values.get("partial_rotary_factor") not in (None, 1.0):
        factor = values["partial_rotary_factor"]
        raise SourceError(f"{keys.path}: partial_rotary_factor is {shown(factor)}, supported: 1.0")
    nested = Keys(keys.path, values)
    theta = nested.number("rope_theta") if "rope_theta" in values else keys.number("rope_theta")
    if keys.values.get("rope_theta") is not None and keys.number("rope_theta") != theta:
        other = keys.values["rope_theta"]
        raise SourceError(f"{keys.path}: rope_theta is {shown(other)} and, in {found[0]}, {theta!r}")
    return _checked(keys, _read_rope_numbers(nested, Rope(rope_type, theta, head_dim)))


def _read_rope_numbers(keys: Keys, rope: Rope) -> Rope:
    """`rope` with the numbers of its type from its dict."""
    numbers: dict[str, Any] = {}
    for field, key in _ROPE_FIELDS[rope.type].items():
        numbers[field] = keys.integer(key) if field == "original_context" else keys.number(key)
    for key in _ROPE_OPTIONS.get(rope.type, ()):
        if keys.values.get(key) is not None:
            numbers[key] = keys.flag(key) if key == "truncate" else keys.number(key)
    if rope.type == "yarn":
        scales = keys.numbers(("attention_factor", "mscale", "mscale_all_dim"))
        numbers["attention_scale"] = float(
            scales.get("attention_factor", _yarn_scale(numbers["factor"], scales))
        )
    return replace(rope, **numbers)


def _yarn_scale(factor: float, scales: dict[str, int | float]) -> float:
    """0.1 ln(factor) + 1 (YaRN, 3.4), or DeepSeek's ratio of two such if the dict has both numbers."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    numerator, denominator = scales.get("mscale"), scales.get("mscale_all_dim")
    if not numerator or not denominator:
        return scale(1)
    return scale(numerator) / (scale(denominator) or math.nan)  # not a number: refused with the other numbers


def _checked(keys: Keys, rope: Rope) -> Rope:
    """`rope`, if its frequencies can be computed."""
    limits = (
        ("factor", 1 <= rope.factor <= 1e6),
        ("original_context", 1 <= rope.original_context <= 1 << 24 or rope.type in ("default", "linear")),
        ("beta_slow", 1e-6 <= rope.beta_slow < rope.beta_fast <= 1e6),
        ("low_freq_factor", 0 <= rope.low_freq_factor < rope.high_freq_factor <= 1e6),
        ("theta", rope.theta > 1 or rope.type != "yarn"),
    )
    for field, sound in limits:
        if not sound:
            value = shown(getattr(rope, field))
            raise SourceError(f"{keys.path}: rope type {rope.type!r}: {field} = {value} is out of range")
    return rope


def _stretched(keys: Keys, rope: Rope, factor: float | None, attention_scale: float | None) -> Rope:
    """`rope` with YaRN by `factor`, or with another factor on cos and sin; None leaves what there is."""
    if factor is not None:
        if rope.type != "default":
            raise SourceError(f"{keys.path}: --yarn {factor:g}: the rope is {rope.type!r} already")
        if not factor > 1:
            raise SourceError(f"{keys.path}: --yarn {factor:g}: the factor must be more than 1")
        context = keys.integer("max_position_embeddings")
        # Qwen3 was trained on 32,768 positions; its config.json adds 8,192 (its model card)
        original = 32768 if context == 40960 else context
        scale = _yarn_scale(factor, {})
        rope = replace(rope, type="yarn", factor=factor, original_context=original, attention_scale=scale)
    if attention_scale is not None:
        if rope.type != "yarn":
            raise SourceError(f"{keys.path}: --yarn-attn-factor: the rope is {rope.type!r}, not 'yarn'")
        rope = replace(rope, attention_scale=attention_scale)
    return _checked(keys, rope)


def _longer(keys: Keys, config: format.Config, rope: Rope) -> format.Config:
    """`config` with the context that a rope stretched by the user reaches."""
    config = replace(config, context=int(rope.factor * rope.original_context))
    try:
        format.check_config(config)
    except ValueError as error:
        raise SourceError(f"{keys.path}: --yarn {rope.factor:g}: {cut(error)}") from None
    return config


def inverse_frequencies(rope: Rope) -> NDArray[np.float32]:
    """Radians per position of each pair, shape (head_dim / 2,): float64 rounded once to float32."""
    import numpy as np

    return _FREQUENCIES[rope.type](rope).astype(np.float32)


# ----------------------------------------------------------------------------
# Tokenizer, template, metadata


def _read_tokenizer(files: Files, vocab_size: int) -> tuple[bytes, int]:
    """tokenizer.json and the number of tokens: the highest id + 1."""
    path, data = files.path("tokenizer.json"), files.bytes("tokenizer.json", format.MAX_TOKENIZER)
    try:
        vocabulary = tokenizer_json.load(data).get_vocab(with_added_tokens=True)
    except ValueError as error:
        raise SourceError(f"{path}: {cut(error)}") from None
    if not vocabulary:
        raise SourceError(f"{path}: has no tokens")
    token, highest = max(vocabulary.items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise SourceError(f"{path}: token {shown(token)} has id {highest}, but vocab_size is {vocab_size}")
    return _with_opening(files, data), highest + 1


def _with_opening(files: Files, data: bytes) -> bytes:
    """tokenizer.json, made to put bos_token first if tokenizer_config.json alone asks for it.

    transformers does so for LlamaTokenizerFast, which is what DeepSeek's distilled models name.
    """
    keys = files.keys("tokenizer_config.json", optional=True)
    if keys.values.get("add_bos_token") is not True:
        return data
    bos, tokenizer = _special_tokens(keys).get("bos_token"), tokenizer_json.load(data)
    id = None if bos is None else tokenizer.token_to_id(bos)
    if id is None:
        raise SourceError(f"{keys.path}: add_bos_token is true, but bos_token {shown(bos)} is no token")
    try:
        with tokenizer_json.library_errors():
            if id in tokenizer.encode("a").ids[:1]:
                return data
    except ValueError as error:
        raise SourceError(f"{files.path('tokenizer.json')}: {cut(error)}") from None
    own, first = json.loads(data), {"SpecialToken": {"id": bos, "type_id": 0}}
    text, other = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    opening = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, other],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }
    steps = [step for step in (own.get("post_processor"), opening) if step]
    own["post_processor"] = {"type": "Sequence", "processors": steps}
    return json.dumps(own, ensure_ascii=False).encode()


def _read_template(files: Files) -> str:
    """The chat template: chat_template.jinja, else tokenizer_config.json, else chat_template.json."""
    if files.exists("chat_template.jinja"):
        return files.text("chat_template.jinja")
    for name in ("tokenizer_config.json", "chat_template.json"):
        keys = files.keys(name, optional=True)
        template = keys.values.get("chat_template")
        if isinstance(template, list):  # several templates by name; "default" is the one for chat
            default = (t for t in template if isinstance(t, dict) and t.get("name") == "default")
            template = next(default, {}).get("template", template)
        if isinstance(template, str):
            return template
        if template is not None:
            raise SourceError(f"{keys.path}: chat_template is not text, nor a list with an entry 'default'")
    return ""


def thinking_kind(template: str) -> str:
    """One of format.THINKING_KINDS, read off the chat template.

    hybrid  the template has a switch (`enable_thinking`)
    always  the generation prompt itself opens <think> and leaves it open
    none    neither
    """
    if "enable_thinking" in template:
        return "hybrid"
    generation_prompt = template.rpartition("add_generation_prompt")[2]
    opened, closed = generation_prompt.rfind("<think>"), generation_prompt.rfind("</think>")
    return "always" if opened > closed else "none"


def _eos_token_ids(config: Keys, generation: Keys, n_tokens: int) -> list[int]:
    """The union of both files' eos_token_id: Qwen3 ends on ids that only one of them names."""
    found = []
    for keys in (config, generation):
        value = keys.values.get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int or not 0 <= token < n_tokens:
                raise SourceError(
                    f"{keys.path}: eos_token_id {shown(token)} is not a token id below {n_tokens}"
                )
            found.append(token)
    if "eos_token_id" not in generation.values:
        config.require("eos_token_id")
    return list(dict.fromkeys(found))


def _special_tokens(tokenizer_config: Keys) -> dict[str, str]:
    """bos_token, eos_token, ... for templates that print them; in the file, text or {"content": text}."""
    result = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = tokenizer_config.values.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            result[key] = text
    return result


def _licence(files: Files) -> str | None:
    """`license:` in the front matter of the model card."""
    if not files.path("README.md").is_file():
        return None
    card = files.bytes("README.md").decode(errors="replace")
    front_matter = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    line = re.search(r"^license:[ \t]*(\S.*)$", front_matter[1], re.MULTILINE) if front_matter else None
    return cut(line[1], MAX_NAME) if line else None


def _base_name(config: dict[str, Any]) -> str:
    path = config.get("_name_or_path")
    return cut(re.split(r"[/\\]", path.rstrip("/\\"))[-1], MAX_NAME) if isinstance(path, str) else ""


def _describe_size(config: format.Config) -> str:
    """Such as "Qwen3 596M"."""
    n = config.n_parameters
    unit, letter = next((u, letter) for u, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if n >= u)
    return f"{format.ARCHITECTURES[config.architecture].capitalize()} {n / unit:.3g}{letter}"


# ----------------------------------------------------------------------------
# Safetensors


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file: row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    file: FileIO
    offset: int  # of its first byte in the file

    @property
    def size(self) -> int:
        weights, size = BLOCKS[self.dtype]
        return math.prod(self.shape) // weights * size

    def read(self, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the tensor from byte `start` on; threads may share the file."""
        position = self.offset + start
        while len(out):
            n = os.preadv(self.file.fileno(), [out], position)
            if not n:
                raise SourceError(f"{self.path}: ended inside {self.name}; did the file change?")
            out, position = out[n:], position + n


def to_float32(data: memoryview, dtype: str) -> NDArray[np.float32]:
    """The numbers of whole units (BLOCKS) of a tensor, shape (n,); exact."""
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "Q8_0":
        blocks = np.frombuffer(data, [("scale", "<f2"), ("codes", "i1", 32)])
        with np.errstate(invalid="ignore"):  # a scale that is no number is found by who uses the weights
            return (blocks["scale"].astype(np.float32)[:, None] * blocks["codes"]).ravel()
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def _open_tensors(
    files: Files, stored: dict[str, StoredTensor], config: format.Config
) -> dict[str, StoredTensor]:
    """The tensors of format.tensors(config), no fewer and no more, each with its shape and a known dtype."""
    for tensor in stored.values():
        check_dtype(tensor)
        if tensor.dtype == "Q8_0" and config.group_size != 32:
            fault = f"is Q8_0: group_size is {config.group_size}, but its codes and scales fit 32 only"
            raise SourceError(f"{tensor.path}: {cut(tensor.name)} {fault}")
    stored = _split_experts(stored, config)
    expected = {part.name: (part.rows, *t.shape[1:]) for t in format.tensors(config) for part in t.parts}
    for name, shape in expected.items():
        if name not in stored:
            raise SourceError(f"{files.directory}: tensor {name} {list(shape)} is missing")
        if stored[name].shape != shape:
            found_shape = list(stored[name].shape)
            raise SourceError(
                f"{stored[name].path}: {name} has shape {shown(found_shape)}, expected {list(shape)}"
            )
    for name in sorted(stored.keys() - expected.keys()):
        if not _is_redundant(name, config):
            raise SourceError(f"{stored[name].path}: unexpected tensor {cut(stored[name].name)}")
    return {name: stored[name] for name in expected}


def _split_experts(stored: dict[str, StoredTensor], config: format.Config) -> dict[str, StoredTensor]:
    """`stored` with the matrices of experts that are fused into one tensor, (n_experts, rows, columns), by name.

    gate_up holds the rows of gate, then those of up, of each expert; GGUF has a tensor for each of the three.
    """
    result: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        fused = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up|gate|up|down)_proj", name)
        kinds = fused[2].split("_") if fused else []
        stacked = len(tensor.shape) == 3 and 0 < config.n_experts == tensor.shape[0]
        parts = {name: tensor}
        if fused and stacked and tensor.shape[1] % len(kinds) == 0:
            parts = _experts_of(tensor, fused[1], kinds)
        for part in sorted(parts.keys() & result.keys()):
            raise SourceError(f"{tensor.path}: {tensor.name} has {part}, and so has {result[part].name}")
        result |= parts
    return result


def _experts_of(tensor: StoredTensor, prefix: str, kinds: list[str]) -> dict[str, StoredTensor]:
    """The matrices in a fused tensor, by name; what each is called says where in the tensor it is."""
    n_experts, rows, columns = tensor.shape
    rows //= len(kinds)
    result, offset = {}, tensor.offset
    for expert in range(n_experts):
        for i, kind in enumerate(kinds):
            name = f"{tensor.name}[{expert}, {i * rows}:{(i + 1) * rows}]"
            part = replace(tensor, name=name, shape=(rows, columns), offset=offset)
            result[f"{prefix}.{expert}.{kind}_proj.weight"] = part
            offset += part.size
    return result


def check_dtype(tensor: StoredTensor) -> None:
    """Raise SourceError unless the tensor's numbers can be read."""
    if tensor.dtype not in BLOCKS:
        fault = _TAKE_UNQUANTIZED if _QUANTIZED_DTYPE.match(tensor.dtype) else "expected BF16, F16 or F32"
        raise SourceError(f"{tensor.path}: {cut(tensor.name)} is {cut(tensor.dtype)}: {fault}")


def _is_redundant(name: str, config: format.Config) -> bool:
    """A tied head is a copy of the embedding; inverse frequencies follow from rope_theta."""
    return (name == "lm_head.weight" and config.tied_embedding) or name.endswith("rotary_emb.inv_freq")


def _shards(files: Files) -> dict[str, set[str] | None]:
    """Safetensors file -> the tensors the index places there; None if there is one file and no index."""
    if files.exists(SINGLE_NAME):
        return {SINGLE_NAME: None}
    if not files.exists(INDEX_NAME):
        hint = mistakes.directory_without_weights(files.directory)
        raise SourceError(f"{files.directory}: has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")
    index = files.keys(INDEX_NAME)
    weight_map = index.require("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index.path}: weight_map is not an object that names tensors")
    shards: dict[str, set[str] | None] = {}
    for name, file_name in sorted(weight_map.items()):
        # only files beside the index: no path, no drive
        if not isinstance(file_name, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", file_name):
            raise SourceError(
                f"{index.path}: {cut(name)}: {shown(file_name)} is not the name of a safetensors file"
            )
        shards[file_name] = (shards.get(file_name) or set()) | {name}
    return shards


def open_safetensors(files: Files, file_name: str) -> dict[str, StoredTensor]:
    """The tensors of one file: u64 header length, JSON header, tensor bytes without holes."""
    from safetensors import SafetensorError, safe_open

    path, file = files.path(file_name), files.open(file_name)
    file_size = os.fstat(file.fileno()).st_size
    header_size = int.from_bytes(file.read(8), "little")
    if header_size > min(file_size - 8, mistakes.MAX_SAFETENSORS_HEADER):
        raise SourceError(f"{path}: header of {header_size} bytes in a file of {file_size} (cut short?)")
    header = parse_json(path, file.read(header_size))
    header.pop("__metadata__", None)
    start = 8 + header_size
    tensors, end = {}, start
    for name, entry in header.items():
        try:
            first, last = (start + offset for offset in entry["data_offsets"])
            tensors[name] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, file, first)
            end = max(end, last)
        except (TypeError, KeyError, ValueError):
            raise SourceError(f"{path}: {cut(name)}: dtype, shape or data_offsets is wrong") from None
    if end != file_size:
        raise SourceError(f"{path}: {file_size} bytes, its header describes {end} (cut short?)")
    try:
        # the library's own checks: overlap, holes, sizes that do not follow from dtype and shape
        with safe_open(path, "numpy"):
            return tensors
    except SafetensorError as error:
        raise SourceError(f"{path}: {cut(error)}") from None
    except OSError:  # it is open already: what the library says, no such file, is not so
        limit = reason(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        raise SourceError(f"{path}: cannot be opened a second time: {limit}") from None
