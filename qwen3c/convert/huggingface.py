"""A Source -> a Checkpoint: everything the exporter needs to know of a model, read and checked.

    config.json (transformers 4 and 5 dialects)    -> format.Config
    generation_config.json, special tokens         -> metadata: where a text ends, sampling defaults, origin
    tokenizer.json, chat template                  -> stored as the source gives them
    tensors                                        -> exactly those of format.tensors(config)

Opening a Checkpoint reads no weights, yet finds every fault that does not sit in a weight itself. A key that
the forward pass needs and config.json lacks is an error, never a default; so is a key or a tensor that means
something this engine would not do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from .. import format
from ..text import tokenizer_json
from .recipe import GROUP_SIZE, Recipe, of_source
from .rope import Rope, read_rope, stretched
from .source import (
    BLOCKS,
    TAKE_UNQUANTIZED,
    Keys,
    Source,
    SourceError,
    StoredTensor,
    check_dtype,
    cut,
    shown,
)


@dataclass(frozen=True)
class Architecture:
    """What is known of an architecture by its name alone, without its config.json."""

    number: int  # its number in format.ARCHITECTURES
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

MAX_NAME = 200  # characters of a model's name, and of its licence


class CheckpointOptions(TypedDict, total=False):
    """What is chosen for a model, whatever its source: keywords of Checkpoint, export and estimate.

    None counts as not given.
    """

    # weights that share a scale (default: the recipe's; without one 64, of a GGUF file of blocks 32)
    group_size: int | None
    name: str | None  # what the model calls itself (default: from config.json)
    yarn: float | None  # stretch the context of a model of default rope by this factor
    yarn_attn_factor: float | None  # on cos and sin (default: what transformers computes from config.json)
    recipe: Recipe | None  # the encoding of each matrix (default: INT8, of GGUF's blocks as recipe.of_source)


class Checkpoint:
    """A checked model: its numbers, its texts, its tensors.

    config     format.Config, group size included
    encodings  of its matrices, as the recipe or the source says; {}: all are INT8
    rope       what inverse_frequencies needs
    metadata   what the metadata section of model.bin holds (docs/FORMAT.md)
    tokenizer  the bytes of tokenizer.json
    template   the chat template, "" if there is none
    tensors    Hugging Face name -> StoredTensor, exactly those of format.tensors(config)

    Raises SourceError, before any weight is read, if anything is missing, contradictory or unsupported.
    """

    def __init__(
        self,
        source: Source,
        group_size: int | None = None,
        name: str | None = None,
        yarn: float | None = None,
        yarn_attn_factor: float | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """The options: see CheckpointOptions."""
        self.source = source
        if group_size is not None and group_size not in format.GROUP_SIZES:
            sizes = ", ".join(map(str, format.GROUP_SIZES))
            raise SourceError(f"--group-size is {shown(group_size)}, not one of {sizes}")
        keys = source.config()
        architecture = supported_architecture(keys)
        self.tokenizer, n_tokens = _read_tokenizer(source, keys.integer("vocab_size"))
        self.rope = read_rope(keys, _head_dim(keys, ARCHITECTURES[architecture]))
        if yarn is not None or yarn_attn_factor is not None:
            self.rope = stretched(keys, self.rope, yarn, yarn_attn_factor)
        if group_size is None:
            own = source.group_size if recipe is None or recipe.is_int8 else GROUP_SIZE
            group_size = own if recipe is None else recipe.group_size or own
        self.config = _read_config(keys, ARCHITECTURES[architecture], self.rope, n_tokens, group_size)
        if yarn is not None:
            self.config = _longer(keys, self.config, self.rope)
        self.template = source.template()
        stored = source.tensors()
        if "embed_tokens.weight" in stored:
            # saved without a head, as Qwen3-Embedding is: use the embedding as the head
            stored = {f"model.{tensor}": stored[tensor] for tensor in stored}
            self.config = replace(self.config, tied_embedding=True)
        self.tensors = _open_tensors(source, stored, self.config)
        self.metadata = self._metadata(keys, name) | {"source": self._provenance(architecture, keys.values)}
        self.encodings: format.Encodings = {}
        if recipe is None:
            recipe = of_source({name: tensor.dtype for name, tensor in self.tensors.items()}, self.config)
        if recipe is not None:
            self.encodings = recipe.encodings(self.config)
        if recipe is not None and not recipe.is_int8:
            self.metadata["recipe"] = recipe.table

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def _metadata(self, keys: Keys, name: str | None) -> dict[str, Any]:
        """The metadata section of model.bin (docs/FORMAT.md)."""
        generation = self.source.generation()
        return {
            "name": name or _base_name(keys.values) or _describe_size(self.config),
            "thinking": thinking_kind(self.template),
            "eos_token_ids": _eos_token_ids(keys, generation, self.config.n_tokens),
            "generation": generation.numbers(_GENERATION_KEYS),
            "rope": self.rope.description(),
            "special_tokens": self.source.special_tokens(),
        }

    def _provenance(self, architecture: str, config: dict[str, Any]) -> dict[str, Any]:
        """Where the model comes from: a function of the contents of files, never of their names, split or
        dates.
        """
        from .. import __version__

        licence = self.source.licence()
        source = {
            "architecture": architecture,
            "dtypes": sorted({tensor.dtype for tensor in self.tensors.values()}),
            "exporter": f"qwen3c {__version__}",
            "licence": cut(licence, MAX_NAME) if licence else None,
            "transformers_version": config.get("transformers_version"),
            "config": config,
        }
        return {key: value for key, value in source.items() if value is not None}


# ----------------------------------------------------------------------------
# config.json


def supported_architecture(keys: Keys) -> str:
    """The architecture's name. SourceError if it, or a key that changes the pass, is not supported."""
    for key in ("quantization_config", "compression_config"):
        quantization = keys.values.get(key)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise SourceError(f"{keys.path}: {key} says {shown(method)}: {TAKE_UNQUANTIZED}")
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
        format.check_config(config)  # checks the range of every field, rope_theta too
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
    """The fields of format.Config that only a mixture of experts has."""
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
    """head_dim; Qwen2 and Llama may omit it, then it is hidden_size / num_attention_heads."""
    if "head_dim" not in architecture.implied or keys.values.get("head_dim") is not None:
        return keys.integer("head_dim")
    dim, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if n_heads < 1 or dim % n_heads:
        raise SourceError(
            f"{keys.path}: hidden_size = {dim} is not a multiple of num_attention_heads = {n_heads}"
        )
    return dim // n_heads


def _longer(keys: Keys, config: format.Config, rope: Rope) -> format.Config:
    """`config` with the longer context of a rope that the user has stretched (--yarn)."""
    config = replace(config, context=int(rope.factor * rope.original_context))
    try:
        format.check_config(config)
    except ValueError as error:
        raise SourceError(f"{keys.path}: --yarn {rope.factor:g}: {cut(error)}") from None
    return config


# ----------------------------------------------------------------------------
# Tokenizer and metadata


def _read_tokenizer(source: Source, vocab_size: int) -> tuple[bytes, int]:
    """The bytes of tokenizer.json and the number of tokens, which is the highest id + 1."""
    path, data = source.tokenizer()
    try:
        vocabulary = tokenizer_json.load(data).get_vocab(with_added_tokens=True)
    except ValueError as error:
        raise SourceError(f"{path}: {cut(error)}") from None
    if not vocabulary:
        raise SourceError(f"{path}: has no tokens")
    token, highest = max(vocabulary.items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise SourceError(f"{path}: token {shown(token)} has id {highest}, but vocab_size is {vocab_size}")
    return data, highest + 1


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
    """The union of eos_token_id of config.json and generation_config.json: each may lack an id (Qwen3)."""
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


def _base_name(config: dict[str, Any]) -> str:
    path = config.get("_name_or_path")
    return cut(re.split(r"[/\\]", path.rstrip("/\\"))[-1], MAX_NAME) if isinstance(path, str) else ""


def _describe_size(config: format.Config) -> str:
    """A name for a model without one, such as "Qwen3 596M"."""
    n = config.n_parameters
    unit, letter = next((u, letter) for u, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if n >= u)
    return f"{format.ARCHITECTURES[config.architecture].capitalize()} {n / unit:.3g}{letter}"


# ----------------------------------------------------------------------------
# Tensors


def _open_tensors(
    source: Source, stored: dict[str, StoredTensor], config: format.Config
) -> dict[str, StoredTensor]:
    """The tensors of format.tensors(config), no fewer and no more, each with its shape and a known dtype."""
    for tensor in stored.values():
        check_dtype(tensor)
        if tensor.dtype == "Q8_0" and config.group_size != 32:
            fault = f"is Q8_0: group_size is {config.group_size}, but its codes and scales fit 32 only"
            raise SourceError(f"{tensor.path}: {cut(tensor.name)} {fault}")
        if len(tensor.shape) == 1 and BLOCKS[tensor.dtype][0] > 1:
            fault = f"is a vector of {tensor.dtype}, expected BF16, F16 or F32"
            raise SourceError(f"{tensor.path}: {cut(tensor.name)} {fault}")
    stored = _split_experts(stored, config)
    expected = {part.name: (part.rows, *t.shape[1:]) for t in format.tensors(config) for part in t.parts}
    for name, shape in expected.items():
        if name not in stored:
            raise SourceError(f"{source.location}: tensor {name} {list(shape)} is missing")
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
    """`stored` with each tensor of fused experts (n_experts, rows, columns) replaced by the experts'
    matrices.

    gate_up holds, for each expert, the rows of gate, then of up. GGUF has three tensors: gate, up and down.
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
    """The matrices in a fused tensor by name. kinds: the projections it holds for each expert, in order."""
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


def _is_redundant(name: str, config: format.Config) -> bool:
    """Whether a tensor can be ignored: a tied head (it copies the embedding), or inverse frequencies."""
    return (name == "lm_head.weight" and config.tied_embedding) or name.endswith("rotary_emb.inv_freq")
