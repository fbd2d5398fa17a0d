"""Read this first: the whole model in plain NumPy, float32, from a model.bin.

    python -m qwen3c.reference model.bin "def fibonacci(n):"

This is what the engine computes, without its speed: no cache, no threads, no integers. Every step is a few
lines of array code with its shapes beside it; tests compare the engine with it. n is the number of tokens,
and a weight matrix is (outputs, inputs), so that a linear layer is x @ w.T.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .format import ROPE_TENSOR, Config, ModelFile, Tensor, codes_and_scales

Array = NDArray[np.float32]


# ----------------------------------------------------------------------------
# Weights: from tiles of codes and fp16 scales to float32 matrices


def load_weights(file: ModelFile) -> dict[str, Array]:
    """Every weight by its Hugging Face name, dequantised; the rotary frequencies under ROPE_TENSOR."""
    weights = {}
    for tensor in file.tensors:
        data = dequantize(file, tensor) if tensor.quantized else np.frombuffer(file.data(tensor), "<f4")
        data = data.reshape(tensor.shape)
        weights[tensor.name] = data
        for part in tensor.parts:  # q, k and v are stored as one matrix, gate and up as another
            weights[part.name] = data[part.row : part.row + part.rows]
    return weights


def dequantize(file: ModelFile, tensor: Tensor) -> Array:
    """A stored matrix as float32 (rows, columns): weight = scale of its group * code."""
    weights = dequantize_tile_rows(file.tile_rows(tensor))
    return weights[: tensor.shape[0]]  # the last tiles may be padded with zero rows


def dequantize_tile_rows(tile_rows: NDArray[Any]) -> Array:
    """16 rows of weights for each tile row."""
    # a tile: 16 rows x one group, its codes in blocks of 4 columns, then one scale per row
    codes, scales = codes_and_scales(tile_rows)  # (rows, columns), (rows, groups)
    return np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1) * codes


# ----------------------------------------------------------------------------
# Blocks


def rmsnorm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019)."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + np.float32(eps)) * weight


def rotate(x: Array, frequencies: Array, scale: float) -> Array:
    """Rotary embedding (Su et al. 2021): turn the pair (x[i], x[i + half]) by position * frequency[i].

    x (n, heads, head_dim), frequencies (head_dim / 2,) in radians per position.
    """
    positions = np.arange(len(x), dtype=np.float32)
    angles = np.outer(positions, frequencies)[:, None, :]  # (n, 1, half)
    cosine, sine = np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(scale)
    x0, x1 = np.split(x, 2, axis=-1)
    return np.concatenate([x0 * cosine - x1 * sine, x1 * cosine + x0 * sine], axis=-1)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(x: Array, c: Config, w: dict[str, Array], prefix: str) -> Array:
    """Causal attention of x (n, dim)."""
    return heads(x, c, w, prefix) @ w[prefix + "o_proj.weight"].T


def heads(x: Array, c: Config, w: dict[str, Array], prefix: str) -> Array:
    """What every head found, (n, q_dim); n_heads / n_kv_heads query heads share each KV head."""
    n = len(x)
    q, k, v = (x @ w[f"{prefix}{name}_proj.weight"].T for name in "qkv")
    if c.qkv_bias:  # Qwen2
        q, k, v = (y + w[f"{prefix}{name}_proj.bias"] for name, y in zip("qkv", (q, k, v), strict=True))
    q = q.reshape(n, c.n_heads, c.head_dim)
    k = k.reshape(n, c.n_kv_heads, c.head_dim)
    v = v.reshape(n, c.n_kv_heads, c.head_dim)

    if c.qk_norm:  # Qwen3 normalises every head of q and k before it rotates them by position
        q = rmsnorm(q, w[prefix + "q_norm.weight"], c.rms_eps)
        k = rmsnorm(k, w[prefix + "k_norm.weight"], c.rms_eps)
    q = rotate(q, w[ROPE_TENSOR], c.rope_attention_scale)
    k = rotate(k, w[ROPE_TENSOR], c.rope_attention_scale)

    group = c.n_heads // c.n_kv_heads
    future = np.triu(np.full((n, n), -np.inf, np.float32), 1)  # token t sees positions 0..t
    out = np.empty_like(q)  # (n, n_heads, head_dim)
    for head in range(c.n_heads):
        keys, values = k[:, head // group], v[:, head // group]  # (n, head_dim)
        scores = q[:, head] @ keys.T / np.sqrt(np.float32(c.head_dim))  # (n, n)
        out[:, head] = softmax(scores + future) @ values
    return out.reshape(n, c.q_dim)


def feed_forward(x: Array, w: dict[str, Array], prefix: str) -> Array:
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)). x (n, dim)."""
    return gated(x, w, prefix) @ w[prefix + "down_proj.weight"].T


def gated(x: Array, w: dict[str, Array], prefix: str) -> Array:
    """silu(gate(x)) * up(x), (n, hidden_dim)."""
    gate = x @ w[prefix + "gate_proj.weight"].T  # (n, hidden_dim)
    up = x @ w[prefix + "up_proj.weight"].T
    silu = gate / (1 + np.exp(-gate))
    return silu * up


def mixture(x: Array, c: Config, w: dict[str, Array], prefix: str) -> Array:
    """Mixture of experts: each token of x (n, dim) goes through the experts its router scores highest."""
    chosen, shares = route(x, c, w, prefix)
    y = np.zeros_like(x)
    for expert in range(c.n_experts):
        tokens, rank = np.nonzero(chosen == expert)
        out = feed_forward(x[tokens], w, f"{prefix}experts.{expert}.")
        y[tokens] += shares[tokens, rank, None] * out
    return y


def route(x: Array, c: Config, w: dict[str, Array], prefix: str) -> tuple[NDArray[np.intp], Array]:
    """The experts that each token goes through and their shares, both (n, n_experts_per_token)."""
    probabilities = softmax(x @ w[prefix + "gate.weight"].T)  # (n, n_experts)
    chosen = np.argsort(-probabilities, axis=-1, kind="stable")[:, : c.n_experts_per_token]
    shares = np.take_along_axis(probabilities, chosen, axis=-1)
    if c.norm_topk_prob:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    return chosen, shares


# ----------------------------------------------------------------------------
# The forward pass


def forward(c: Config, w: dict[str, Array], ids: Sequence[int]) -> Array:
    """Logits (n, vocab_size) of every token: row t says what may come after ids[: t + 1]."""
    x = w["model.embed_tokens.weight"][np.asarray(ids)]  # (n, dim), the residual stream
    for layer in range(c.n_layers):
        prefix = f"model.layers.{layer}."
        h = rmsnorm(x, w[prefix + "input_layernorm.weight"], c.rms_eps)
        x = x + attention(h, c, w, prefix + "self_attn.")
        h = rmsnorm(x, w[prefix + "post_attention_layernorm.weight"], c.rms_eps)
        x = x + (
            mixture(h, c, w, prefix + "mlp.") if c.has_experts(layer) else feed_forward(h, w, prefix + "mlp.")
        )
    x = rmsnorm(x, w["model.norm.weight"], c.rms_eps)
    head = "model.embed_tokens.weight" if c.tied_embedding else "lm_head.weight"
    return x @ w[head].T


def main() -> None:
    """Greedy completion that recomputes the whole text for every token: slow but plain."""
    from .text.tokenizer import Tokenizer

    path, prompt = sys.argv[1:3]
    file = ModelFile(path)
    weights, tokenizer = load_weights(file), Tokenizer(file.tokenizer)
    ids = list(tokenizer.encode(prompt))
    for _ in range(32):
        logits = forward(file.config, weights, ids)
        ids.append(int(logits[-1, : file.config.n_tokens].argmax()))
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main()
