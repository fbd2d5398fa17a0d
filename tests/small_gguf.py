"""Small GGUF files for tests, written by hand so that tests can also write wrong ones.

    keys, tensors = small_gguf(n_layers=3, tied=False, dtype="Q8_0")
    path = write_gguf(tmp_path / "model.gguf", keys, tensors)

For a given shape it is the model of small_models.write_small_model, as llama.cpp's converter would write it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from small_models import (
    TEMPLATES,
    config_json,
    encode_tensor,
    generation_config_json,
    small_weights,
    tokenizer_json,
)

from qwen3c.convert import gguf_blocks as blocks

KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11,
         "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ3_S": 21, "IQ4_XS": 23, "BF16": 30,
         "MXFP4": 39}  # fmt: skip
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
Q8_0_BLOCK = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])

Keys = dict[str, Any]
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]

_NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.gate_proj": "ffn_gate_exps.weight",
    "mlp.experts.up_proj": "ffn_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def small_gguf(dtype: str = "F32", **shape: Any) -> tuple[Keys, Tensors]:
    """Keys and tensors of a small model; matrices as `dtype`, vectors as F32."""
    architecture = shape.get("architecture", "qwen3").replace("_", "")
    config, generation = config_json(**shape), generation_config_json()
    thinking = shape.get("thinking", "hybrid")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    keys: Keys = {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": "Small",
        "general.license": "apache-2.0",
        "qwen3.block_count": config["num_hidden_layers"],
        "qwen3.context_length": config["max_position_embeddings"],
        "qwen3.embedding_length": config["hidden_size"],
        "qwen3.feed_forward_length": config["intermediate_size"],
        "qwen3.attention.head_count": config["num_attention_heads"],
        "qwen3.attention.head_count_kv": config["num_key_value_heads"],
        "qwen3.attention.key_length": head_dim,
        "qwen3.attention.value_length": head_dim,
        "qwen3.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "qwen3.rope.freq_base": config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
        "general.sampling.top_k": generation["top_k"],
        "general.sampling.top_p": generation["top_p"],
        "general.sampling.temp": generation["temperature"],
    }
    keys = {key.replace("qwen3.", f"{architecture}."): value for key, value in keys.items()}
    keys |= {"general.architecture": architecture} | rope_keys(architecture, shape.get("rope", {}))
    keys |= vocabulary_keys(json.loads(tokenizer_json()), config["vocab_size"], "qwen2")
    keys["tokenizer.chat_template"] = TEMPLATES[thinking]
    tensors: Tensors = {}
    if architecture == "qwen3moe":
        keys |= {
            "qwen3moe.expert_count": config["num_experts"],
            "qwen3moe.expert_used_count": config["num_experts_per_tok"],
            "qwen3moe.expert_feed_forward_length": config["moe_intermediate_size"],
        }
    for name, weights in stacked_experts(small_weights(**shape)).items():
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weights = pair_rows(weights, head_dim)
        tensors[gguf_name(name)] = encode(
            weights, "F32" if weights.ndim == 1 or name.endswith("mlp.gate.weight") else dtype
        )
    if shape.get("rope", {}).get("rope_type") == "llama3":
        factors = llama3_factors(shape["rope"], keys["llama.rope.freq_base"], head_dim)
        tensors["rope_freqs.weight"] = encode(factors, "F32")
    return keys, tensors


def stacked_experts(weights: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The matrices of a layer's experts as one (n_experts, rows, columns), under `...mlp.experts.up_proj`."""
    result: dict[str, Any] = {}
    for name, matrix in weights.items():
        before, experts, after = name.partition(".mlp.experts.")
        if experts:
            kind = after.split(".")[1]
            result.setdefault(f"{before}{experts}{kind}", []).append(matrix)
        else:
            result[name] = matrix
    return {name: np.stack(matrix) if isinstance(matrix, list) else matrix for name, matrix in result.items()}


def pair_rows(weights: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of q or k of a Llama as the converter orders them: i and i + head_dim / 2 become neighbours."""
    heads = weights.reshape(-1, 2, head_dim // 2, weights.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(weights.shape)


def rope_keys(architecture: str, rope: dict[str, Any]) -> Keys:
    names = {
        "rope_type": "type",
        "factor": "factor",
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    if rope.get("rope_type") == "llama3":
        return {}
    return {f"{architecture}.rope.scaling.{names[key]}": value for key, value in rope.items()}


def llama3_factors(rope: dict[str, Any], theta: float, head_dim: int) -> NDArray[np.float32]:
    """The divisor of each frequency: 1 for many turns in the original context, `factor` for few."""
    factors = []
    for i in range(head_dim // 2):
        turns = rope["original_max_position_embeddings"] * theta ** (-2 * i / head_dim) / (2 * np.pi)
        if turns > rope["high_freq_factor"]:
            factors.append(1.0)
        elif turns < rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            width = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (turns - rope["low_freq_factor"]) / width
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def vocabulary_keys(tokenizer: dict[str, Any], vocab_size: int, pre: str) -> Keys:
    """tokenizer.ggml.* from a tokenizer.json; ids it does not use are padding."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for token in tokenizer["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": ids.get("<|im_end|>", 0),
        "tokenizer.ggml.bos_token_id": ids.get("<|endoftext|>", 0),
        "tokenizer.ggml.add_bos_token": False,
    }


def gguf_name(name: str) -> str:
    for long, short in _NAMES.items():
        name = name.replace(long, short)
    return name


def encode(weights: NDArray[np.float32], dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    if dtype != "Q8_0":
        return encode_tensor(weights, dtype)
    groups = weights.reshape(-1, 32)
    blocks = np.empty(len(groups), Q8_0_BLOCK)
    blocks["scale"] = np.abs(groups).max(axis=1) / np.float32(127)
    scales = np.maximum(blocks["scale"].astype(np.float32), np.float32(1e-30))
    blocks["codes"] = np.clip(np.rint(groups / scales[:, None]), -127, 127)
    return dtype, weights.shape, blocks.tobytes()


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor of this shape as blocks of random codes, with scales as a model's weights have them."""
    layout, r = blocks.KINDS[kind], np.random.default_rng(seed)
    n = math.prod(shape) // layout.weights
    found = np.frombuffer(r.bytes(n * layout.size), [*layout.fields]).copy()
    for field, smallest in (("scale", 1e-5), ("minimum", 1e-5)):
        if field in (found.dtype.names or ()):
            found[field] = r.uniform(smallest, 1e-3, n) * r.choice([-1, 1], n)
    if kind == "MXFP4":
        found["exponent"] = r.integers(104, 143, n)  # of these every scale is an fp16
    if kind == "Q8_0":
        found["codes"] = np.maximum(found["codes"], -127)
    return kind, shape, found.tobytes()


def of_blocks(kinds: Mapping[str, str] | str, **shape: Any) -> tuple[Keys, Tensors]:
    """small_gguf with matrices as random blocks. kinds: of every matrix; or of those that are named so."""
    keys, tensors = small_gguf("F16", **shape)
    for seed, (name, (_, dims, _)) in enumerate([*tensors.items()]):
        if len(dims) > 1 and "ffn_gate_inp" not in name:
            kind = kinds if isinstance(kinds, str) else next((k for n, k in kinds.items() if n in name), None)
            if kind in blocks.KINDS:
                tensors[name] = random_blocks(kind, dims, seed)
    return keys, tensors


def write_gguf(
    path: Path, keys: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]
) -> Path:
    """Write a GGUF file of version 3: integers as u32 or, if negative, i32; floats as f32; arrays as they
    are.
    """
    alignment = keys.get("general.alignment", 32)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    header += b"".join(_text(key) + _value(value) for key, value in keys.items())
    data = b""
    for name, (kind, shape, content) in tensors.items():
        header += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", KINDS[kind], len(data))
        data += content + b"\0" * (-len(content) % alignment)
    path.write_bytes(header + b"\0" * (-len(header) % alignment) + data)
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        code = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6}[value.dtype.str[1:]]
        return struct.pack("<IIQ", 9, code, len(value)) + value.tobytes()
    if isinstance(value, list):
        code, items = (8, b"".join(map(_text, value))) if value and isinstance(value[0], str) else (5, b"")
        items = items or struct.pack(f"<{len(value)}i", *value)
        return struct.pack("<IIQ", 9, code, len(value)) + items
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    letter, kind = {bool: ("?", 7), float: ("f", 6), int: ("I", 4)}[type(value)]
    if letter == "I" and value < 0:
        letter, kind = "i", 5
    return struct.pack("<I" + letter, kind, value)
