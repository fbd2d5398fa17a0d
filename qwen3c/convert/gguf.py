"""A GGUF file as a Source: its keys and tensors under the names that transformers uses.

    general.*, ARCH.*        -> the keys of config.json and generation_config.json
    tokenizer.ggml.*         -> tokenizer.json, rebuilt (gguf_vocabulary.py), and special tokens
    tokenizer.chat_template  -> the chat template
    blk.N.attn_q.weight...   -> model.layers.N.self_attn.q_proj.weight..., rows in transformers' order

The file itself is read by gguf_header.py.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from .gguf_blocks import KINDS
from .gguf_header import Header, Info
from .gguf_vocabulary import GGUFVocabulary
from .rope import inverse_frequencies, read_rope
from .source import BLOCKS, Keys, SourceError, StoredTensor, open_regular, shown, to_float32

# general.architecture -> the class transformers runs it with
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = (
    "rope_freqs.weight"  # (head_dim / 2,) divisors of the rotary frequencies, of Llama 3.1 and later
)
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


class GGUF:
    """One GGUF file; a Source. Leaving the `with` block closes it.

    Raises SourceError, one line naming the file, if it is damaged, or holds what cannot be exported.
    """

    template_places = "tokenizer.chat_template"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.location = Path(path)
        self.opened: list[FileIO] = []
        try:
            self._read()
        except BaseException:
            self.__exit__()
            raise

    def _read(self) -> None:
        header = Header(self.location, open_regular(self.location, self.opened))
        self._keys, self._infos = header.read()
        self.architecture = _check_kind(self._keys)
        for info in self._infos.values():
            if info.kind not in BLOCKS:
                fault = f"{shown(info.name)} is {info.kind}, supported: {', '.join(BLOCKS)}"
                raise SourceError(f"{self.location}: {fault}; take a Q4_K_M, Q8_0 or BF16 file of the model")
        header.check_layout(self._infos)
        self.group_size = 32 if any(info.kind in KINDS for info in self._infos.values()) else 64
        self._vocabulary = GGUFVocabulary(self._keys)

    def __enter__(self) -> GGUF:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.opened:
            file.close()

    def config(self) -> Keys:
        """The keys of config.json; head_count_kv and key_length have their defaults of the GGUF
        specification.
        """
        keys, own = self._keys, f"{self.architecture}."
        expert_keys = _EXPERT_KEYS if self.architecture == "qwen3moe" else {}
        self._check_keys({*_KNOWN_KEYS, *expert_keys.values()})
        required = _CONFIG_KEYS | expert_keys
        config = {name: keys.require(own + key) for name, key in required.items()}
        if expert_keys:  # GGUF has no key for these; llama.cpp always does so
            config |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
        n_heads = keys.integer(f"{own}attention.head_count")
        embedding = self._infos.get("token_embd.weight")
        if embedding is None:
            raise SourceError(f"{keys.path}: tensor token_embd.weight is missing")
        return Keys(self.location, config | {
            "architectures": [ARCHITECTURES[self.architecture]],
            "_name_or_path": _text(keys, "general.name"),
            "attention_bias": False,
            "eos_token_id": self._vocabulary.eos_ids,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "num_key_value_heads": keys.values.get(f"{own}attention.head_count_kv", n_heads),
            "rope_scaling": self._llama3_scaling(config) or _rope_scaling(keys, self.architecture),
            "tie_word_embeddings": "output.weight" not in self._infos,
            "vocab_size": embedding.shape[0],
        })  # fmt: skip

    @functools.cached_property
    def head_dim(self) -> int:
        keys, own = self._keys, f"{self.architecture}."
        n_heads, dim = keys.integer(f"{own}attention.head_count"), keys.integer(f"{own}embedding_length")
        head_dim = keys.values.get(f"{own}attention.key_length", dim // n_heads if n_heads else 0)
        return Keys(self.location, {"head_dim": head_dim}).integer("head_dim")

    def _check_keys(self, known: set[str]) -> None:
        """SourceError for a key of this architecture that is not in `known`, or that asks for what the engine
        lacks.
        """
        keys, own = self._keys, f"{self.architecture}."
        for key in keys.values:
            if key.startswith(own) and key.removeprefix(own) not in known:
                raise SourceError(f"{keys.path}: key {shown(key)} is not supported")
        for key, only in (
            ("attention.value_length", self.head_dim),
            ("rope.dimension_count", self.head_dim),
            ("attention.causal", True),
            # refused otherwise: converters disagree about what it multiplies
            ("rope.scaling.attn_factor", 1.0),
        ):
            value = keys.values.get(own + key, only)
            if value != only:
                raise SourceError(f"{keys.path}: {own}{key} is {shown(value)}, supported: {only!r}")

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """rope_scaling of config.json, recovered from the frequency divisors that follow from it; None
        without them.

        Known Llamas differ in `factor` alone; divisors that no `factor` gives are refused.
        """
        import numpy as np

        info = self._infos.get(_ROPE_FACTORS)
        if info is None or self.architecture != "llama":
            return None
        if (info.kind, info.shape) != ("F32", (self.head_dim // 2,)):
            expected = f"expected F32 [{self.head_dim // 2}]"
            raise SourceError(
                f"{self.location}: {_ROPE_FACTORS} is {info.kind} {list(info.shape)}, {expected}"
            )
        data = memoryview(bytearray(info.size))
        self._tensor(info).read(0, data)
        factors = to_float32(data, info.kind)
        scaling = {"rope_type": "llama3", "factor": float(factors.max())}
        scaling |= {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        with np.errstate(all="ignore"):  # an invalid base is refused later, with the other numbers
            plain, scaled = (
                inverse_frequencies(read_rope(Keys(self.location, config | rope), self.head_dim))
                for rope in ({}, {"rope_scaling": scaling})
            )
            fit = np.allclose(plain, scaled * factors, rtol=1e-4, atol=0)
        if not fit:
            raise SourceError(f"{self.location}: {_ROPE_FACTORS} is not that of a Llama 3")
        return scaling

    def generation(self) -> Keys:
        values = self._keys.values
        return Keys(
            self.location, {name: values[key] for name, key in _SAMPLING_KEYS.items() if key in values}
        )

    def tokenizer(self) -> tuple[Path, bytes]:
        return self.location, self._vocabulary.tokenizer_json().encode()

    def template(self) -> str:
        return _text(self._keys, "tokenizer.chat_template")

    def special_tokens(self) -> dict[str, str]:
        return self._vocabulary.special_tokens

    def licence(self) -> str | None:
        return _text(self._keys, "general.license").strip() or None

    def tensors(self) -> dict[str, StoredTensor]:
        known = {_ROPE_FACTORS} if self.architecture == "llama" else set()
        infos = [info for info in self._infos.values() if info.name not in known]
        return {self._hugging_face_name(info.name): self._tensor(info) for info in infos}

    def _tensor(self, info: Info) -> StoredTensor:
        place = (info.name, info.kind, info.shape, self.location, self.opened[0], info.offset)
        if self.architecture == "llama" and re.fullmatch(r"blk\.\d+\.attn_[qk]\.weight", info.name):
            return _PairedRows(*place, head_dim=self.head_dim)
        return StoredTensor(*place)

    def _hugging_face_name(self, name: str) -> str:
        experts = _EXPERTS.fullmatch(name)
        if experts:
            return f"model.layers.{experts[1]}.mlp.experts.{experts[2]}_proj"
        layer = re.fullmatch(r"blk\.(0|[1-9][0-9]*)\.(\w+)\.(weight|bias)", name)
        if layer and layer[2] in _LAYER_NAMES:
            return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
        if name not in _NAMES:
            raise SourceError(f"{self.location}: unexpected tensor {shown(name)}")
        return _NAMES[name]


@dataclass(frozen=True)
class _PairedRows(StoredTensor):
    """q_proj or k_proj of a Llama, whose heads GGUF stores for a rotary embedding of neighbouring rows.

    In the file, pair i of a head is rows 2i and 2i + 1; read() gives rows i and i + head_dim / 2, as
    transformers does.
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
    """The architecture. SourceError unless the file is one whole model of a supported architecture."""
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
    """rope_scaling of config.json, from the keys rope.scaling.*; rope.py checks its type and numbers."""
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


def _text(keys: Keys, key: str) -> str:
    value = keys.values.get(key, "")
    if not isinstance(value, str):
        raise SourceError(f"{keys.path}: {key} is {shown(value)}, expected text")
    return value
