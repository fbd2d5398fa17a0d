"""A trained Qwen3 as a Qwen2, a Llama and a Qwen3-MoE, to measure what INT8 costs on models that predict.

    python benchmarks/relatives.py model.bin text.txt build/relatives
    python train.py pretrain texts/ --model build/relatives/llama -o build/llama

    Qwen2, Llama   have no norm of queries and keys: norm weight / mean rms is multiplied into the projection
    Qwen2          has biases: the projection of the mean input becomes the bias
    Qwen3-MoE      an expert has as many hidden units as the feed-forward, drawn from it with replacement

They predict text a little worse than the Qwen3 does; some training makes up for it. Mean rms and mean
input are measured on the text. Needs a model.bin of a Qwen3, whose dequantised weights are the start.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from qwen3c import Model

Weights = dict[str, NDArray[np.float32]]

CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
N_EXPERTS, N_EXPERTS_PER_TOKEN = 8, 2


def write_relative(
    directory: Path, model: Model, architecture: str, ids: list[int], rope: dict[str, Any] | None = None
) -> None:
    """Write a Hugging Face directory; ids: the text, rope: what config.json says of it besides theta."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [part.name for tensor in model.file.tensors for part in tensor.parts]
    weights = {name: model.weight(name) for name in names}
    if architecture in ("qwen2", "llama"):
        _drop_norms(model, weights, ids, biases=architecture == "qwen2")
    elif architecture == "qwen3_moe":
        _draw_experts(model, weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    _write_json(directory / "config.json", config_json(model, architecture, rope or {}))
    _write_json(directory / "tokenizer_config.json", model.metadata["special_tokens"])
    (directory / "tokenizer.json").write_bytes(model.file.tokenizer)


def config_json(model: Model, architecture: str, rope: dict[str, Any]) -> dict[str, Any]:
    c = model.config
    config = {
        "architectures": [CLASSES[architecture]],
        "attention_bias": False,
        "eos_token_id": model.metadata["eos_token_ids"],
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "max_position_embeddings": c.context,
        "model_type": architecture,
        "num_attention_heads": c.n_heads,
        "num_hidden_layers": c.n_layers,
        "num_key_value_heads": c.n_kv_heads,
        "rms_norm_eps": c.rms_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta} | rope,
        "tie_word_embeddings": c.tied_embedding,
        "vocab_size": c.vocab_size,
    }
    if architecture == "qwen3_moe":
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": c.hidden_dim,
            "norm_topk_prob": True,
            "num_experts": N_EXPERTS,
            "num_experts_per_tok": N_EXPERTS_PER_TOKEN,
        }
    return config


def _drop_norms(model: Model, weights: Weights, ids: list[int], biases: bool) -> None:
    for layer in range(model.config.n_layers):
        prefix = f"model.layers.{layer}."
        seen = model.trace(ids, [f"{prefix}input_layernorm", f"{prefix}self_attn.[qk]_proj"])
        for kind in "qk":
            norm = weights.pop(f"{prefix}self_attn.{kind}_norm.weight")
            heads = seen[f"{prefix}self_attn.{kind}_proj"].reshape(len(ids), -1, len(norm))
            usual = (1 / np.sqrt(np.square(heads).mean(-1))).mean(0)  # (heads,)
            weights[f"{prefix}self_attn.{kind}_proj.weight"] *= np.outer(usual, norm).reshape(-1, 1)
        for kind in "qkv" if biases else "":
            name = f"{prefix}self_attn.{kind}_proj"
            mean = seen[f"{prefix}input_layernorm"].mean(0)  # (dim,)
            weights[f"{name}.bias"] = bias = weights[f"{name}.weight"] @ mean
            weights[f"{name}.weight"] -= np.outer(bias, mean / (mean @ mean))


def _draw_experts(model: Model, weights: Weights) -> None:
    """Experts that on average equal the dense layer, and a router that uses all of them."""
    random, dim, hidden_dim = np.random.default_rng(0), model.config.dim, model.config.hidden_dim
    for layer in range(model.config.n_layers):
        prefix = f"model.layers.{layer}.mlp."
        gate, up, down = (weights.pop(f"{prefix}{kind}_proj.weight") for kind in ("gate", "up", "down"))
        weights[f"{prefix}gate.weight"] = random.standard_normal((N_EXPERTS, dim), np.float32) / dim**0.5
        for expert in range(N_EXPERTS):
            units = random.integers(0, hidden_dim, hidden_dim)
            weights[f"{prefix}experts.{expert}.gate_proj.weight"] = gate[units]
            weights[f"{prefix}experts.{expert}.up_proj.weight"] = up[units]
            weights[f"{prefix}experts.{expert}.down_proj.weight"] = np.ascontiguousarray(down[:, units])


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="BIN", type=Path, help="a trained Qwen3")
    parser.add_argument("text", metavar="TEXT", type=Path, help="UTF-8 text such as it knows")
    parser.add_argument("directory", metavar="DIR", type=Path, help="gets a directory for each architecture")
    args = parser.parse_args()
    try:
        model = Model(str(args.model))
        ids = model.tokenizer.encode(args.text.read_text(encoding="utf-8"))[: min(1024, model.config.context)]
        for architecture in CLASSES:
            write_relative(args.directory / architecture, model, architecture, ids)
    except (OSError, ValueError) as error:
        print(f"relatives.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
