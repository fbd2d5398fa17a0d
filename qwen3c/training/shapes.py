"""The sizes of a new model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, named as in format.Config; the embedding is tied."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context: int

    def check(self) -> None:
        """TrainingError, with the numbers, if no model of this shape can be built, exported and run."""
        for name, value in vars(self).items():
            if value < 1:
                raise TrainingError(f"{name} is {value}, at least 1 is needed")
        for name, value in (("dim", self.dim), ("hidden_dim", self.hidden_dim),
                            ("n_heads * head_dim", self.n_heads * self.head_dim)):  # fmt: skip
            if value % 32:
                raise TrainingError(
                    f"{name} = {value} is not a multiple of 32, the smallest group of INT8 weights"
                )
        if self.n_heads % self.n_kv_heads:
            raise TrainingError(
                f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise TrainingError(f"head_dim = {self.head_dim} is odd; rotary embedding needs pairs")


#                dim  hidden layers heads kv head_dim context      parameters with a vocabulary of 4096
PRESETS = {
    "nano": Shape(128, 384, 4, 4, 2, 32, 256),  #                  1.3 M
    "micro": Shape(192, 512, 6, 6, 2, 32, 512),  #                 3.1 M
    "tiny": Shape(256, 768, 6, 4, 2, 64, 512),  #                  5.8 M
    "small": Shape(384, 1024, 8, 6, 2, 64, 512),  #               14.1 M
    "mini": Shape(512, 1408, 8, 8, 4, 64, 512),  #                25.7 M
}


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A Qwen3ForCausalLM with random weights, a function of the shape, the vocabulary and the seed alone.

    Matrices are N(0, 0.02^2); those that write into the residual stream are smaller by sqrt(2 n_layers), so
    that its variance does not grow with depth (GPT-2, section 2.3).
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from .vocabulary import end_of_text

    shape.check()
    end, end_of_turn = end_of_text(tokenizer), tokenizer.eos_token_id
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden_dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=end if end_of_turn is None else end_of_turn,
        pad_token_id=end,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * shape.n_layers))
    generation = model.generation_config
    generation.eos_token_id = sorted({end_of_turn, end} - {None})
    generation.pad_token_id = end
    # a small model's distribution is wide: sampled closer to greedy it makes more sense
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = True, 0.3, 0.9, 20
    return model
