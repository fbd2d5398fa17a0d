"""Parameters, memory and FLOPs of a model, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import format

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT = 4  # bytes: weights, gradients and the two moments of AdamW are float32


@dataclass(frozen=True)
class TrainingEstimate:
    """An estimate: n_parameters, FLOPs of one token, all else in bytes."""

    n_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int  # what the forward pass keeps for the backward pass, and the loss's own buffers
    peak: int  # most memory of training, without that of the libraries
    file: int  # model.bin, without the tokenizer
    kv_per_token: int
    inference_flops: int
    training_flops: int


def estimate(model: PreTrainedModel, micro_batch: int, context: int, accumulates: bool) -> TrainingEstimate:
    """Estimate for micro-batches of (micro_batch, context) tokens. accumulates: a step has several."""
    c = model.config
    n = sum(p.numel() for p in model.parameters())
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    activations = _activations(model, micro_batch, context)
    # gradients are freed after each step: they exist beside activations only when micro-batches add them up
    peak = 3 * FLOAT * n + max(activations + FLOAT * n * accumulates, FLOAT * n)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    if not c.tie_word_embeddings:
        matrices -= c.vocab_size * c.hidden_size  # the embedding is looked up, not multiplied
    # q k^T and its product with v, over half the context on average
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * head_dim * context // 2
    flops = 2 * matrices + attention
    return TrainingEstimate(
        n_parameters=n,
        weights=FLOAT * n,
        gradients=FLOAT * n,
        optimizer=2 * FLOAT * n,
        activations=activations,
        peak=peak,
        file=sum(_stored_size(p.shape) for p in model.parameters()),
        kv_per_token=2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * 2,
        inference_flops=flops,
        training_flops=3 * flops,
    )


def _stored_size(shape: tuple[int, ...], group_size: int = 64) -> int:
    if len(shape) == 1:
        return FLOAT * shape[0]
    return format.matrix_size(shape[0], shape[1], group_size)


def _activations(model: PreTrainedModel, micro_batch: int, context: int) -> int:
    """Bytes that autograd keeps, counted in a forward pass of tensors without memory (device "meta")."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    kept: dict[int, int] = {}
    alive: list[Any] = []  # keeps the tensors alive, because ids of dead objects are reused

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            alive.append(storage)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        factory: Any = AutoModelForCausalLM
        copy = factory.from_config(model.config)
        weights = {p.untyped_storage()._cdata for p in copy.parameters()}
        tokens = torch.zeros((micro_batch, context), dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = copy(input_ids=tokens, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    # the backward pass begins with two more tensors of the size of the logits
    return sum(kept.values()) + 2 * FLOAT * micro_batch * context * model.config.vocab_size


def lines(e: TrainingEstimate, micro_batch: int, context: int) -> Iterator[str]:
    yield f"parameters      {e.n_parameters:>16,}"
    yield "training"
    for name in ("weights", "gradients", "optimizer", "activations"):
        yield f"  {name:<14}{_megabytes(getattr(e, name))}"
    yield (
        f"  {'peak':<14}{_megabytes(e.peak)}   micro-batches of {micro_batch} x {context}; libraries and "
        "what malloc keeps not counted"
    )
    yield f"  {'FLOPs a token':<14}{e.training_flops / 1e6:>13,.1f} M"
    yield "inference"
    yield f"  {'model.bin':<14}{_megabytes(e.file)}   INT8, without the tokenizer"
    for n in sorted({context, 2048, 32768}):
        if n <= context:
            yield f"  KV cache {n:>6}{_megabytes(n * e.kv_per_token)}   f16"
    yield f"  {'FLOPs a token':<14}{e.inference_flops / 1e6:>13,.1f} M"


def _megabytes(n: int) -> str:
    return f"{n / 1e6:>12,.1f} MB"


def print_estimate(model: PreTrainedModel, micro_batch: int, context: int, accumulates: bool) -> None:
    print(*lines(estimate(model, micro_batch, context, accumulates), micro_batch, context), sep="\n")
