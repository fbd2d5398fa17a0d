"""A Hugging Face directory with random weights in the shape of a real model, to measure speed with.

    python benchmarks/random_model.py models/random-0.6B --size 0.6B

Matrices are normal with standard deviation 0.02, norms near 1, BF16, a function of the seed alone. Without
--tokenizer the vocabulary is made up too, of Qwen3's size. Memory stays below 200 MB for any size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from qwen3c.format import ARCHITECTURES, ROPE_TENSOR, Config, tensors

QWEN3_0_6B = Config(
    dim=1024,
    hidden_dim=3072,
    n_layers=28,
    n_heads=16,
    n_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    n_tokens=151646,
    context=40960,
    group_size=64,
    tied_embedding=True,
    rms_eps=1e-6,
    rope_theta=1e6,
)
SIZES = {
    "0.6B": QWEN3_0_6B,
    "1.7B": replace(QWEN3_0_6B, dim=2048, hidden_dim=6144),
    "4B": replace(QWEN3_0_6B, dim=2560, hidden_dim=9728, n_layers=36, n_heads=32),
    "8B": replace(QWEN3_0_6B, dim=4096, hidden_dim=12288, n_layers=36, n_heads=32, tied_embedding=False),
    # 4 of the 48 layers of Qwen3-30B-A3B
    "A3B-cut": replace(
        QWEN3_0_6B, dim=2048, hidden_dim=6144, n_layers=4, n_heads=32, n_kv_heads=4, tied_embedding=False,
        architecture=2, n_experts=128, n_experts_per_token=8, expert_hidden_dim=768, norm_topk_prob=True,
        decoder_sparse_step=1,
    ),
    # Qwen2.5-0.5B and Llama-3.2-1B
    "qwen2-0.5B": replace(
        QWEN3_0_6B, dim=896, hidden_dim=4864, n_layers=24, n_heads=14, n_kv_heads=2, head_dim=64,
        context=32768,
        architecture=3, qk_norm=False, qkv_bias=True,
    ),
    "llama-1B": replace(
        QWEN3_0_6B, dim=2048, hidden_dim=8192, n_layers=16, n_heads=32, head_dim=64, vocab_size=128256,
        n_tokens=128256, context=131072, rms_eps=1e-5, rope_theta=5e5, architecture=4, qk_norm=False,
    ),
}  # fmt: skip
CLASSES = {1: "Qwen3ForCausalLM", 2: "Qwen3MoeForCausalLM", 3: "Qwen2ForCausalLM", 4: "LlamaForCausalLM"}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SLICE = 1 << 22  # weights made at a time


def write_random_model(
    directory: Path, config: Config = QWEN3_0_6B, tokenizer: Path | None = None, seed: int = 0
) -> None:
    """Write `directory`; the tokenizer files come from the directory `tokenizer`, or are made up."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config_json(config))
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, directory / name)
    else:
        _write_json(directory / "tokenizer.json", random_tokenizer_json(config.n_tokens, seed))
        names = {"eos_token": SPECIAL_TOKENS[-1], "pad_token": SPECIAL_TOKENS[0]}
        _write_json(
            directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        )
    shapes = {
        part.name: (part.rows, *tensor.shape[1:])
        for tensor in tensors(config)
        if tensor.name != ROPE_TENSOR
        for part in tensor.parts
    }
    write_safetensors(directory / "model.safetensors", shapes, np.random.default_rng(seed))


def config_json(c: Config) -> dict[str, object]:
    """config.json in the dialect of transformers 4."""
    experts = {
        "decoder_sparse_step": c.decoder_sparse_step,
        "mlp_only_layers": list(c.mlp_only_layers),
        "moe_intermediate_size": c.expert_hidden_dim,
        "norm_topk_prob": c.norm_topk_prob,
        "num_experts": c.n_experts,
        "num_experts_per_tok": c.n_experts_per_token,
    }
    # keys that older families omit, and keys that only they have
    own = {
        1: {"attention_bias": False, "head_dim": c.head_dim},
        2: {"attention_bias": False, "head_dim": c.head_dim, **experts},
        3: {},
        4: {"head_dim": c.head_dim, "mlp_bias": False},
    }
    return {
        "architectures": [CLASSES[c.architecture]],
        **own[c.architecture],  # type: ignore[dict-item]
        "eos_token_id": c.n_tokens - 1,
        "hidden_act": "silu",
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "max_position_embeddings": c.context,
        "model_type": ARCHITECTURES[c.architecture],
        "num_attention_heads": c.n_heads,
        "num_hidden_layers": c.n_layers,
        "num_key_value_heads": c.n_kv_heads,
        "rms_norm_eps": c.rms_eps,
        "rope_scaling": None,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied_embedding,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": c.vocab_size,
    }


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], random: np.random.Generator) -> None:
    """Random BF16 tensors of the given shapes, made and written slice by slice."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.writelines(_random_bf16(shape, random))


def _random_bf16(shape: tuple[int, ...], random: np.random.Generator) -> Iterator[bytes]:
    n = int(np.prod(shape))
    for start in range(0, n, SLICE):
        x = random.standard_normal(min(SLICE, n - start), np.float32)
        x = x * np.float32(0.02) if len(shape) == 2 else 1 + x * np.float32(0.1)
        # round to nearest BF16, the upper half of a float32
        yield ((x.view(np.uint32) + np.uint32(0x8000)) >> 16).astype("<u2").tobytes()


def random_tokenizer_json(n_tokens: int, seed: int) -> dict[str, object]:
    """A byte-level BPE of n_tokens tokens in Qwen's manner, with random merges."""
    from tokenizers import pre_tokenizers

    random = np.random.default_rng(seed)
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    known, merges = set(vocabulary), []
    n_ordinary = n_tokens - len(SPECIAL_TOKENS)
    while len(vocabulary) < n_ordinary:
        # short and early tokens are merged most often, as in a trained vocabulary
        for a, b in (random.random((4096, 2)) ** 2 * len(vocabulary)).astype(int):
            pair = (vocabulary[a], vocabulary[b])
            token = "".join(pair)
            if len(token) <= 12 and token not in known and len(vocabulary) < n_ordinary:
                known.add(token)
                vocabulary.append(token)
                merges.append(pair)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": n_ordinary + i, "content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)]
    bpe: dict[str, object] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
    }
    bpe |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    ids = {token: i for i, token in enumerate(vocabulary)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {**bpe, "vocab": ids, "merges": merges},
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", metavar="DIR", type=Path, help="directory to write")
    parser.add_argument("--size", choices=SIZES, default="0.6B", help="whose shape (default: 0.6B)")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="take tokenizer.json from here")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        write_random_model(args.directory, SIZES[args.size], args.tokenizer, args.seed)
    except OSError as error:
        print(f"random_model.py: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
