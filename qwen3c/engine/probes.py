"""The activations that Engine.trace can return, in one table for the engine and for -m trace.

An activation has the name of the module in transformers whose output it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..format import Config

# The arrays that the engine fills, in the order of its enum Array
ARRAYS = (
    "embedding",
    "attention_norm",
    "qkv",
    "q_norm",
    "k_norm",
    "attention",
    "heads",
    "o",
    "ffn_norm",
    "gate_up",
    "hidden",
    "down",
    "router",
    "shares",
    "expert_gate_up",
    "expert_hidden",
    "expert_down",
    "experts",
    "x",
    "final_norm",
)


@dataclass(frozen=True)
class Probe:
    """One activation.

    name: of its module within the layer ("x": the layer itself), or from "model." on outside of the layers.
    array: one of ARRAYS; several probes of one array are its columns, in order. "" for the logits, which the
    pass returns anyway.
    shape: names, n (tokens) or fields of Config. source: the activation it is computed from. what: a line for
    people.
    """

    name: str
    array: str
    shape: str
    source: str
    what: str

    def shape_of(self, config: Config, n: int) -> tuple[int, ...]:
        """The shape for n tokens."""
        return tuple(n if size == "n" else getattr(config, size) for size in self.shape.split())

    def is_in(self, config: Config, layer: int) -> bool:
        """Whether a layer computes it."""
        if self.array in ("q_norm", "k_norm"):
            return config.qk_norm
        if self.array in ("router", "shares", "expert_gate_up", "expert_hidden", "expert_down", "experts"):
            return config.has_experts(layer)
        return self.array not in ("gate_up", "hidden", "down") or not config.has_experts(layer)


def _probes(*rows: tuple[str, str, str, str, str]) -> tuple[Probe, ...]:
    return tuple(Probe(*row) for row in rows)


_HEADS = "heads of {head_dim}"
_SHARES = "of the {n_experts_per_token} likeliest experts; they sum to 1 or stay as they are"
_EACH = "n n_experts_per_token expert_hidden_dim"
_NORM = "x / rms(x) * weight"

# name, array, shape, source, what
BEFORE_LAYERS = _probes(
    (
        "model.embed_tokens",
        "embedding",
        "n dim",
        "ids",
        "the row of the embedding that belongs to each token",
    ),
)
IN_LAYER = _probes(
    ("input_layernorm", "attention_norm", "n dim", "x", _NORM),
    ("self_attn.q_proj", "qkv", "n q_dim", "input_layernorm", f"queries: {{n_heads}} {_HEADS}"),
    (
        "self_attn.k_proj",
        "qkv",
        "n kv_dim",
        "input_layernorm",
        f"keys: {{n_kv_heads}} {_HEADS}, to the KV cache",
    ),
    (
        "self_attn.v_proj",
        "qkv",
        "n kv_dim",
        "input_layernorm",
        f"values: {{n_kv_heads}} {_HEADS}, to the KV cache",
    ),
    (
        "self_attn.q_norm",
        "q_norm",
        "n n_heads head_dim",
        "self_attn.q_proj",
        "every head / its rms * weight, then turned by position",
    ),
    ("self_attn.k_norm", "k_norm", "n n_kv_heads head_dim", "self_attn.k_proj", "the same for the keys"),
    (
        "self_attn.attn_weights",
        "attention",
        "n_heads n n",
        "self_attn.q_proj",
        "softmax(q k^T / sqrt({head_dim})), of every head",
    ),
    (
        "self_attn.o_proj.input",
        "heads",
        "n q_dim",
        "self_attn.attn_weights",
        "attention weights times values",
    ),
    ("self_attn.o_proj", "o", "n dim", "self_attn.o_proj.input", "back to the width of x, added to x"),
    ("post_attention_layernorm", "ffn_norm", "n dim", "x", _NORM),
    ("mlp.gate_proj", "gate_up", "n hidden_dim", "post_attention_layernorm", "wider"),
    ("mlp.up_proj", "gate_up", "n hidden_dim", "post_attention_layernorm", "wider"),
    ("mlp.down_proj.input", "hidden", "n hidden_dim", "mlp.gate_proj", "silu(gate) * up"),
    ("mlp.down_proj", "down", "n dim", "mlp.down_proj.input", "back to the width of x, added to x"),
    (
        "mlp.gate",
        "router",
        "n n_experts",
        "post_attention_layernorm",
        "router: a logit for each of {n_experts} experts",
    ),
    ("mlp.gate.shares", "shares", "n n_experts", "mlp.gate", _SHARES),
    (
        "mlp.experts.gate_proj",
        "expert_gate_up",
        _EACH,
        "post_attention_layernorm",
        "wider, by each of its experts, in order of number",
    ),
    (
        "mlp.experts.up_proj",
        "expert_gate_up",
        _EACH,
        "post_attention_layernorm",
        "wider, by each of its experts",
    ),
    ("mlp.experts.down_proj.input", "expert_hidden", _EACH, "mlp.experts.gate_proj", "silu(gate) * up"),
    (
        "mlp.experts.down_proj",
        "expert_down",
        "n n_experts_per_token dim",
        "mlp.experts.down_proj.input",
        "what each expert makes of x",
    ),
    ("mlp.experts", "experts", "n dim", "mlp.experts.down_proj", "sum of share * expert, added to x"),
    ("x", "x", "n dim", "x", "x, the residual stream, after the layer"),
)
AFTER_LAYERS = _probes(
    ("model.norm", "final_norm", "n dim", "x", _NORM),
    ("lm_head", "", "n vocab_size", "model.norm", "one logit for every token of the vocabulary"),
)
PROBES = {probe.name: probe for probe in (*BEFORE_LAYERS, *IN_LAYER, *AFTER_LAYERS)}


def places(config: Config) -> list[tuple[str, int, Probe]]:
    """(full name, layer, probe) of every activation that the engine copies, in the order of the forward pass.

    Activations outside of the layers have layer 0.
    """
    result = [(probe.name, 0, probe) for probe in BEFORE_LAYERS]
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}"
        result += [
            (prefix if probe.name == "x" else f"{prefix}.{probe.name}", layer, probe)
            for probe in IN_LAYER
            if probe.is_in(config, layer)
        ]
    return result + [(probe.name, 0, probe) for probe in AFTER_LAYERS if probe.array]
