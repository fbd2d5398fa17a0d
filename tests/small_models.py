"""Small random models for tests: a Hugging Face directory of any shape, or the model.bin made from one.

    source = write_small_model(tmp_path / "src", n_layers=3, tied=False, dtype="F32", dialect=5, shards=2)
    path = export_small_model(tmp_path, dim=128, group_size=32)

The weights are a function of the seed and the shape alone, so the same shape saved in another dtype, dialect
or number of shards is the same model. Only NumPy and `tokenizers` are needed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A trained Qwen3 of 4 million parameters that can think, for tests that random weights do not serve
TINY_QWEN3 = Path(__file__).with_name("tiny-qwen3.bin")

# The options of write_small_model and their defaults
DEFAULTS: dict[str, Any] = {
    "dim": 64,
    "hidden_dim": 192,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,  # the tokenizer has fewer tokens: the rest are padding rows
    "context": 256,
    "tied": True,
    "rope_theta": 1e6,
    "rms_eps": 1e-6,
    "dtype": "BF16",  # or F16, F32
    "dialect": 4,  # of config.json and the tokenizer files: transformers 4 or 5
    "shards": 1,
    "std": 0.1,  # large enough that a small model's logits are far from flat
    "seed": 0,
    "architecture": "qwen3",  # or qwen3_moe, qwen2, llama
    "n_experts": 6,  # this and the next six: of qwen3_moe
    "n_experts_per_token": 2,
    "expert_hidden_dim": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "fused_experts": False,  # one tensor per layer on disk, (n_experts, rows, columns)
    "rope": {},  # the rope dict: {"rope_type": "yarn", "factor": 4.0, ...}
    "thinking": "hybrid",  # picks the chat template: hybrid, always, none
}

CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# What config.json of the older families does not state (with head_dim = dim / n_heads)
IMPLIED_KEYS = {"qwen2": ("attention_bias", "head_dim"), "llama": ("attention_bias",)}

# Qwen's pattern: contractions, words, single digits, punctuation, newlines, spaces
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAG_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")  # tokens that skip_special_tokens keeps

_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{{GENERATION_PROMPT}}{%- endif %}"""
TEMPLATES = {
    "hybrid": _TEMPLATE.replace(
        "{{GENERATION_PROMPT}}",
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
        "    {%- endif %}\n",
    ),
    "always": _TEMPLATE.replace("{{GENERATION_PROMPT}}", "    {{- '<think>\\n' }}\n"),
    "none": _TEMPLATE.replace("{{GENERATION_PROMPT}}", ""),
}


def write_small_model(directory: Path, **shape: Any) -> Path:
    """Write a Hugging Face directory (created if need be) and return it; `shape` overrides DEFAULTS."""
    s = _with_defaults(shape)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config_json(**shape))
    write_json(directory / "generation_config.json", generation_config_json())
    (directory / "tokenizer.json").write_text(tokenizer_json())
    tokenizer_config = {"eos_token": "<|im_end|>", "bos_token": None}
    if s["dialect"] == 5:
        (directory / "chat_template.jinja").write_text(TEMPLATES[s["thinking"]])
    else:
        tokenizer_config["chat_template"] = TEMPLATES[s["thinking"]]
    write_json(directory / "tokenizer_config.json", tokenizer_config)

    stored = {name: encode_tensor(w, s["dtype"]) for name, w in small_weights(**shape).items()}
    if s["shards"] == 1:
        write_safetensors(directory / "model.safetensors", stored)
        return directory
    weight_map = {}
    for i, names in enumerate(np.array_split(sorted(stored), s["shards"])):
        shard = f"model-{i + 1:05d}-of-{s['shards']:05d}.safetensors"
        write_safetensors(directory / shard, {str(name): stored[name] for name in names})
        weight_map.update({str(name): shard for name in names})
    size = sum(len(data) for _, _, data in stored.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": weight_map},
    )
    return directory


# Every encoding, in matrices that are read together and in others (convert/recipe.py)
MIXED_RECIPE: dict[str, Any] = {
    "encoding": "int4",
    "matrices": [
        {"names": ["*.v_proj.weight", "output"], "encoding": "int6"},
        {"names": ["*.o_proj.weight"], "layers": [-1], "encoding": "int8"},
    ],
}


def export_small_model(tmp_path: Path, group_size: int = 64, recipe: Any = None, **shape: Any) -> Path:
    """A model.bin of the given shape: tmp_path / "model.bin", exported from tmp_path / "source"."""
    from qwen3c.convert.export import export
    from qwen3c.convert.recipe import parse

    source = write_small_model(Path(tmp_path) / "source", **shape)
    target = Path(tmp_path) / "model.bin"
    export(source, target, group_size=group_size, recipe=parse(recipe, "recipe") if recipe else None)
    return target


def small_weights(**shape: Any) -> dict[str, NDArray[np.float32]]:
    """Hugging Face name -> float32 weights, all of them exact in BF16 and F16."""
    s = _with_defaults(shape)
    random = np.random.default_rng(s["seed"])

    def normal(*dims: int) -> NDArray[np.float32]:
        return _coarse(random.standard_normal(dims, np.float32) * np.float32(s["std"]))

    def near_one(n: int) -> NDArray[np.float32]:
        return _coarse(1 + random.standard_normal(n, np.float32) * np.float32(0.2))

    dim, hidden_dim, head_dim = s["dim"], s["hidden_dim"], s["head_dim"]
    q_dim, kv_dim = s["n_heads"] * head_dim, s["n_kv_heads"] * head_dim
    weights = {"model.embed_tokens.weight": normal(s["vocab_size"], dim), "model.norm.weight": near_one(dim)}
    for layer in range(s["n_layers"]):
        if _has_experts(s, layer):
            weights |= _expert_weights(s, f"model.layers.{layer}.mlp.", normal)
        if s["architecture"] == "qwen2":
            for name, n in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
                weights[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = normal(n)
        weights |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": near_one(dim),
                "self_attn.q_proj": normal(q_dim, dim),
                "self_attn.k_proj": normal(kv_dim, dim),
                "self_attn.v_proj": normal(kv_dim, dim),
                "self_attn.o_proj": normal(dim, q_dim),
                "self_attn.q_norm": near_one(head_dim),
                "self_attn.k_norm": near_one(head_dim),
                "post_attention_layernorm": near_one(dim),
                "mlp.gate_proj": normal(hidden_dim, dim),
                "mlp.up_proj": normal(hidden_dim, dim),
                "mlp.down_proj": normal(dim, hidden_dim),
            }.items()
            if s["architecture"].startswith("qwen3") or name not in ("self_attn.q_norm", "self_attn.k_norm")
            if not (_has_experts(s, layer) and name.startswith("mlp."))
        }
    if not s["tied"]:
        weights["lm_head.weight"] = normal(s["vocab_size"], dim)
    return weights


def _has_experts(s: dict[str, Any], layer: int) -> bool:
    sparse = layer not in s["mlp_only_layers"] and (layer + 1) % s["decoder_sparse_step"] == 0
    return bool(s["architecture"] == "qwen3_moe" and sparse)


def _expert_weights(s: dict[str, Any], prefix: str, normal: Any) -> dict[str, NDArray[np.float32]]:
    n, dim, hidden_dim = s["n_experts"], s["dim"], s["expert_hidden_dim"]
    gate_up, down = normal(n, 2 * hidden_dim, dim), normal(n, dim, hidden_dim)
    weights = {prefix + "gate.weight": normal(n, dim)}
    if s["fused_experts"]:
        return weights | {prefix + "experts.gate_up_proj": gate_up, prefix + "experts.down_proj": down}
    for e in range(n):
        gate, up = np.split(gate_up[e], 2)
        for name, matrix in {"gate": gate, "up": up, "down": down[e]}.items():
            weights[f"{prefix}experts.{e}.{name}_proj.weight"] = np.ascontiguousarray(matrix)
    return weights


def config_json(**shape: Any) -> dict[str, Any]:
    """config.json as the given dialect of transformers writes it."""
    s = _with_defaults(shape)
    torch_dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[s["dtype"]]
    config = {
        "architectures": [CLASSES[s["architecture"]]],
        "model_type": s["architecture"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "head_dim": s["head_dim"],
        "hidden_act": "silu",
        "hidden_size": s["dim"],
        "initializer_range": 0.02,
        "intermediate_size": s["hidden_dim"],
        "max_position_embeddings": s["context"],
        "max_window_layers": s["n_layers"],
        "num_attention_heads": s["n_heads"],
        "num_hidden_layers": s["n_layers"],
        "num_key_value_heads": s["n_kv_heads"],
        "rms_norm_eps": s["rms_eps"],
        "sliding_window": None,
        "tie_word_embeddings": s["tied"],
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": s["vocab_size"],
    }
    for key in IMPLIED_KEYS.get(s["architecture"], ()):
        del config[key]
    if s["architecture"] == "qwen3_moe":
        experts = "num_local_experts" if s["dialect"] == 5 else "num_experts"
        config |= {
            experts: s["n_experts"],
            "num_experts_per_tok": s["n_experts_per_token"],
            "moe_intermediate_size": s["expert_hidden_dim"],
            "norm_topk_prob": s["norm_topk_prob"],
            "decoder_sparse_step": s["decoder_sparse_step"],
            "mlp_only_layers": s["mlp_only_layers"],
        }
    if s["architecture"] == "llama":
        config["mlp_bias"] = False
    if s["dialect"] == 4:
        rope = {"rope_scaling": s["rope"] or None, "rope_theta": s["rope_theta"]}
        return config | rope | {"torch_dtype": torch_dtype, "transformers_version": "4.51.0"}
    rope = {"rope_parameters": {"rope_theta": s["rope_theta"], "rope_type": "default"} | s["rope"]}
    layer_types = ["full_attention"] * s["n_layers"]
    config |= {"layer_types": layer_types, "pad_token_id": None, "dtype": torch_dtype}
    return config | rope | {"transformers_version": "5.23.0"}


def generation_config_json() -> dict[str, Any]:
    """generation_config.json in the manner of Qwen3: two ids that end a text."""
    return {
        "bos_token_id": token_id("<|endoftext|>"),
        "do_sample": True,
        "eos_token_id": [token_id("<|im_end|>"), token_id("<|endoftext|>")],
        "pad_token_id": token_id("<|endoftext|>"),
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }


@functools.cache
def tokenizer_json() -> str:
    """A byte-level BPE in Qwen's manner, with a few merges and the chat tokens, as tokenizer.json text."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([__doc__, SPLIT_PATTERN, *TEMPLATES.values()], trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in TAG_TOKENS])
    return tokenizer.to_str()


@functools.cache
def token_id(token: str) -> int:
    """The id of an added token in tokenizer_json()."""
    added = json.loads(tokenizer_json())["added_tokens"]
    return next(entry["id"] for entry in added if entry["content"] == token)


# ----------------------------------------------------------------------------
# Files, written by hand so that tests can also write wrong ones


def encode_tensor(weights: NDArray[np.float32], dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    """(safetensors dtype, shape, little-endian bytes); BF16 is the upper half of a float32, cut."""
    if dtype == "BF16":
        return dtype, weights.shape, (weights.view(np.uint32) >> 16).astype("<u2").tobytes()
    return dtype, weights.shape, weights.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """One .safetensors file: header length (u64), JSON header, tensor bytes without holes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, dims, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2))


def _with_defaults(shape: dict[str, Any]) -> dict[str, Any]:
    unknown = shape.keys() - DEFAULTS.keys()
    if unknown:
        raise TypeError(f"unknown shape keys {sorted(unknown)}")
    return DEFAULTS | shape


def _coarse(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keep 8 significant bits, and none below 2**-20: exact in BF16, F16 and F32."""
    kept = (weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return (np.round(kept * 2.0**20) / 2.0**20).astype(np.float32)
