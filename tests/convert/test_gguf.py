"""A GGUF file gives the model it was made from, Q8_0 code for code, or one line that names the fault.

python -m pytest tests/convert/test_gguf.py
QWEN3C_TOKENIZER=path/to/Qwen3-0.6B python -m pytest tests/convert/test_gguf.py  # 200,000 strings
"""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray
from small_gguf import (
    CONTROL,
    NORMAL,
    Q8_0_BLOCK,
    UNUSED,
    Keys,
    Tensors,
    encode,
    gguf_name,
    pair_rows,
    random_blocks,
    small_gguf,
    vocabulary_keys,
    write_gguf,
)
from small_models import small_weights, tokenizer_json, write_small_model
from test_tokenizer import N_STRINGS, REAL, strings

from qwen3c import Model
from qwen3c.cli.export import main
from qwen3c.convert import gguf_header
from qwen3c.convert.directory import Directory
from qwen3c.convert.export import export
from qwen3c.convert.gguf import GGUF
from qwen3c.convert.gguf_vocabulary import PRE_TOKENIZERS, GGUFVocabulary
from qwen3c.convert.huggingface import Checkpoint
from qwen3c.convert.source import Keys as NamedKeys, SourceError
from qwen3c.format import MAGIC, ModelFile

MOE: dict[str, Any] = {"architecture": "qwen3_moe", "n_experts": 5, "expert_hidden_dim": 64, "dim": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES: list[dict[str, Any]] = [
    {},
    {"tied": False, "n_layers": 3, "rope_theta": 5e6, "rms_eps": 1e-5, "thinking": "always"},
    # k and v of 24 rows: tiles that hold rows of two tensors; 500 rows of vocabulary: a tile that is not full
    {"dim": 96, "n_heads": 8, "n_kv_heads": 2, "head_dim": 12, "vocab_size": 500, "context": 77},
    {"architecture": "qwen2", "n_heads": 2, "n_kv_heads": 1, "rope": {"rope_type": "linear", "factor": 3.0}},
    {
        "architecture": "llama",
        "rope_theta": 5e5,
        "head_dim": 24,
        "dim": 96,
        "rope": LLAMA3,
        "context": 131072,
        "tied": False,
    },
    {"rope": YARN, "context": 131072, "n_layers": 1},
    {"rope": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, "context": 131072, "n_layers": 1},
]


def read(path: Path, **options: Any) -> Checkpoint:
    with GGUF(path) as files:
        return Checkpoint(files, **options)


def write_small(tmp_path: Path, dtype: str = "F32", **shape: Any) -> Path:
    return write_gguf(tmp_path / "model.gguf", *small_gguf(dtype, **shape))


# ----------------------------------------------------------------------------
# The same model as from the directory


@pytest.mark.parametrize("shape", [*SHAPES, MOE])
def test_numbers_and_texts_are_those_of_the_directory(tmp_path: Path, shape: dict[str, Any]) -> None:
    found = read(write_small(tmp_path, **shape), group_size=32)
    with Directory(write_small_model(tmp_path / "source", **shape)) as files:
        expected = Checkpoint(files, 32, name="Small")
    assert (found.config, found.rope, found.template) == (expected.config, expected.rope, expected.template)
    assert found.metadata["source"].pop("licence") == "apache-2.0"
    for metadata in (found.metadata, expected.metadata):
        del metadata["source"]["config"], metadata["source"]["dtypes"]
        metadata["source"].pop("transformers_version", None)
    assert found.metadata == expected.metadata


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [*SHAPES, MOE])
def test_weights_are_those_of_the_directory(tmp_path: Path, shape: dict[str, Any], dtype: str) -> None:
    export(write_small_model(tmp_path / "source", **shape), tmp_path / "directory.bin", group_size=32)
    export(write_small(tmp_path, dtype, **shape), tmp_path / "gguf.bin", group_size=32)
    directory, file = ModelFile(tmp_path / "directory.bin"), ModelFile(tmp_path / "gguf.bin")
    assert (file.config, file.checksums) == (directory.config, directory.checksums)


def test_two_keys_have_the_defaults_of_the_specification(tmp_path: Path) -> None:
    keys, tensors = small_gguf(n_heads=4, n_kv_heads=4, dim=64, head_dim=16)
    for key in ("head_count_kv", "key_length", "value_length"):
        del keys[f"qwen3.attention.{key}"]
    config = read(write_gguf(tmp_path / "model.gguf", keys, tensors)).config
    assert (config.n_kv_heads, config.head_dim) == (4, 16)


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_alignment_is_what_the_file_says(tmp_path: Path, alignment: int) -> None:
    keys, tensors = small_gguf("F16")
    path = write_gguf(tmp_path / "model.gguf", keys | {"general.alignment": alignment}, tensors)
    export(path, tmp_path / "model.bin")
    export(write_small_model(tmp_path / "source"), tmp_path / "expected.bin")
    assert ModelFile(tmp_path / "model.bin").checksums == ModelFile(tmp_path / "expected.bin").checksums


def test_files_of_the_gguf_package_are_read(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    keys, tensors = small_gguf("Q8_0")
    writer = package.GGUFWriter(tmp_path / "package.gguf", "qwen3")
    for key, value in keys.items():
        if key != "general.architecture":
            kind = package.GGUFValueType.get_type(value)
            sub = package.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(key, value, kind, sub_type=sub)
    for name, (kind, shape, data) in tensors.items():
        array = np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1)
        writer.add_tensor(name, array, raw_dtype=package.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    export(tmp_path / "package.gguf", tmp_path / "package.bin")
    export(write_gguf(tmp_path / "ours.gguf", keys, tensors), tmp_path / "ours.bin")
    assert (tmp_path / "package.bin").read_bytes() == (tmp_path / "ours.bin").read_bytes()


def test_kinds_of_tensors_have_the_names_ggml_gives_them() -> None:
    package = pytest.importorskip("gguf")
    for kind in package.GGMLQuantizationType:
        assert gguf_header.TENSOR_KINDS.get(kind.value, kind.name) == kind.name


# ----------------------------------------------------------------------------
# Q8_0


@pytest.mark.parametrize("shape", SHAPES)
def test_q8_0_weights_are_exactly_those_of_the_package(tmp_path: Path, shape: dict[str, Any]) -> None:
    package = pytest.importorskip("gguf")
    weights = {n: w for n, w in small_weights(**shape).items() if w.ndim == 2}
    keys, tensors = small_gguf(**shape)
    q8_0 = package.GGMLQuantizationType.Q8_0
    for name, w in weights.items():
        if shape.get("architecture") == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            w = pair_rows(w, shape["head_dim"])
        tensors[gguf_name(name)] = ("Q8_0", w.shape, package.quants.quantize(w, q8_0).tobytes())
    export(write_gguf(tmp_path / "model.gguf", keys, tensors), tmp_path / "model.bin")
    assert all(sound for _, sound in ModelFile(tmp_path / "model.bin").verify())
    model = Model(tmp_path / "model.bin")
    for name, w in weights.items():
        blocks = np.frombuffer(tensors[gguf_name(name)][2], np.uint8).reshape(w.shape[0], -1)
        expected = package.quants.dequantize(blocks, q8_0)
        if shape.get("architecture") == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            expected = expected.reshape(-1, shape["head_dim"] // 2, 2, w.shape[1]).swapaxes(1, 2)
        assert (model.weight(name) == expected.reshape(w.shape)).all(), name


@pytest.mark.parametrize(
    "shape",
    [
        {"n_heads": 2, "n_kv_heads": 1, "head_dim": 128, "tied": False},
        {"architecture": "qwen2", "n_heads": 2, "n_kv_heads": 1, "context": 512},
        {"architecture": "llama", "dim": 96, "n_heads": 4, "n_kv_heads": 2, "head_dim": 24, "tied": False},
    ],
)
def test_logits_are_those_of_transformers_on_the_same_file(tmp_path: Path, shape: dict[str, Any]) -> None:
    """The oracle is transformers' own GGUF reader: names, row order, dequantisation and numbers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    path = write_small(tmp_path, "Q8_0", **shape)
    export(path, tmp_path / "model.bin")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ids = list(range(5, 200))
    with torch.no_grad():
        expected = hf(torch.tensor([ids])).logits[0].numpy().astype(np.float64)
    model = Model(tmp_path / "model.bin", activations="float32", kv="f32")
    error = model.session().forward(ids, logits="all") - expected
    assert (error**2).sum() <= 1e-10 * (expected**2).sum()


def test_q8_0_experts_are_exactly_those_of_the_package(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    keys, tensors = small_gguf("Q8_0", **MOE)
    dequantised = {}
    for name, (kind, dims, data) in tensors.items():
        if kind == "Q8_0":
            blocks = np.frombuffer(data, np.uint8).reshape(*dims[:-1], -1)
            dequantised[name] = package.quants.dequantize(blocks, package.GGMLQuantizationType.Q8_0)
    export(write_gguf(tmp_path / "model.gguf", keys, tensors), tmp_path / "model.bin")
    assert all(sound for _, sound in ModelFile(tmp_path / "model.bin").verify())
    model = Model(tmp_path / "model.bin")
    for name, weights in small_weights(**MOE).items():
        before, experts, after = name.partition(".mlp.experts.")
        if experts:
            expert, kind, _ = after.split(".")
            expected = dequantised[gguf_name(f"{before}{experts}{kind}")][int(expert)]
        else:
            expected = dequantised.get(gguf_name(name), weights)
        assert (model.weight(name) == expected).all(), name


def test_logits_of_experts_are_those_of_transformers(tmp_path: Path) -> None:
    """Compared on exact weights, because transformers' GGUF reader cannot load such models."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from test_oracle import NMSE_BOUND, nmse, oracle, oracle_logits

    export(write_small(tmp_path, "Q8_0", **MOE), tmp_path / "model.bin")
    model = Model(tmp_path / "model.bin", activations="float32", kv="f32")
    config = transformers.AutoConfig.from_pretrained(write_small_model(tmp_path / "source", **MOE))
    ids = np.arange(5, 200)
    with torch.no_grad():
        expected = oracle_logits(oracle(model, config), ids)
    assert nmse(model.session().forward(ids, logits="all"), expected) <= NMSE_BOUND


def odd_blocks(n: int) -> NDArray[Any]:
    """Every code, and scales that are zero, negative, subnormal and the largest there is."""
    r = np.random.default_rng(0)
    blocks = np.empty(n, Q8_0_BLOCK)
    blocks["codes"] = r.integers(-127, 128, (n, 32))
    blocks["scale"] = r.standard_normal(n) / 100
    odd = [0.0, -0.0, 6e-8, -6e-8, 3e-5, 65504.0, -65504.0]
    blocks["scale"][: len(odd)] = odd
    return blocks


@pytest.mark.parametrize("slice_weights", [1, 1 << 20])
def test_odd_scales_are_taken_over_and_dtypes_may_differ_within_a_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slice_weights: int
) -> None:
    monkeypatch.setattr("qwen3c.convert.quantise.SLICE_WEIGHTS", slice_weights)
    shape = SHAPES[2]
    keys, tensors = small_gguf("F16", **shape)
    expected = {}
    for name in ("blk.0.attn_k.weight", "blk.1.attn_q.weight", "blk.1.ffn_up.weight", "token_embd.weight"):
        dims = tensors[name][1]
        blocks = odd_blocks(dims[0] * dims[1] // 32)
        tensors[name] = ("Q8_0", dims, blocks.tobytes())
        values = blocks["scale"].astype(np.float32)[:, None] * blocks["codes"]
        expected[name] = values.reshape(dims)
    export(write_gguf(tmp_path / "mixed.gguf", keys, tensors), tmp_path / "mixed.bin")
    export(write_small(tmp_path, "F16", **shape), tmp_path / "plain.bin", group_size=32)
    assert all(sound for _, sound in ModelFile(tmp_path / "mixed.bin").verify())
    mixed, plain = Model(tmp_path / "mixed.bin"), Model(tmp_path / "plain.bin")
    for name in small_weights(**shape):
        right = expected.get(gguf_name(name))
        assert (mixed.weight(name) == (plain.weight(name) if right is None else right)).all(), name


def test_group_size_follows_q8_0_and_can_be_no_other(tmp_path: Path) -> None:
    path = write_small(tmp_path, "Q8_0")
    assert read(path).config.group_size == 32
    with pytest.raises(SourceError, match=r"is Q8_0: group_size is 64, but its codes and scales fit 32 only"):
        read(path, group_size=64)
    assert read(write_small(tmp_path, "F16")).config.group_size == 64


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("codes", -128, r"blk\.0\.ffn_up\.weight\[1, 37\] is -\d\S*; only finite .* no code -128"),
        ("scale", np.nan, r"blk\.0\.ffn_up\.weight\[1, 32\] is nan; only finite"),
        ("scale", np.inf, r"blk\.0\.ffn_up\.weight\[1, 32\] is -?(inf|nan); only finite"),
    ],
)
def test_what_no_tile_can_hold_is_refused_by_place(
    tmp_path: Path, field: str, value: float, reason: str
) -> None:
    keys, tensors = small_gguf("Q8_0")
    kind, dims, data = tensors["blk.0.ffn_up.weight"]
    blocks = np.frombuffer(data, Q8_0_BLOCK).copy()
    if field == "codes":
        blocks["codes"][3, 5] = value  # 64 columns: the second block of row 1
    else:
        blocks["scale"][3] = value
    tensors["blk.0.ffn_up.weight"] = (kind, dims, blocks.tobytes())
    with pytest.raises(SourceError, match=reason):
        export(write_gguf(tmp_path / "model.gguf", keys, tensors), tmp_path / "model.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


# ----------------------------------------------------------------------------
# Tokenizers, rebuilt


def rebuilt(keys: Keys) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(GGUFVocabulary(NamedKeys(Path("model.gguf"), keys)).tokenizer_json())


def byte_level_tokenizer(pre: str) -> dict[str, Any]:
    """tokenizer.json of a vocabulary in the manner of Qwen (the real one if there is) or of Llama 3."""
    if pre == "qwen2":
        return json.loads((Path(REAL) / "tokenizer.json").read_text() if REAL else tokenizer_json())
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(strings(11, 3000), trainer)
    # words that no merges lead to: only a tokenizer that looks them up first finds them
    vocabulary = json.loads(tokenizer.to_str())
    for word in ("Ġquick", "zqzqzq", "12345", "987", "Ġnaïve"):
        vocabulary["model"]["vocab"].setdefault(word, len(vocabulary["model"]["vocab"]))
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(vocabulary))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    begin = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[begin]
    )
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_rebuilt_tokenizer_is_the_source_tokenizer(pre: str) -> None:
    source = byte_level_tokenizer(pre)
    expected = tokenizers.Tokenizer.from_str(json.dumps(source))
    keys = vocabulary_keys(source, expected.get_vocab_size() + 9, pre)
    if pre == "llama-bpe":
        keys |= {"tokenizer.ggml.bos_token_id": expected.token_to_id("<|begin_of_text|>")}
        keys |= {"tokenizer.ggml.add_bos_token": True}
    found = rebuilt(keys)
    assert found.get_vocab(True) == expected.get_vocab(True)
    texts = strings(12, N_STRINGS) + [" quick zqzqzq 12345 98765 naïve", "a<|eot_id|>b <think> 1234"]
    for special in (False, True):
        right = expected.encode_batch(texts, add_special_tokens=special)
        for text, a, b in zip(
            texts, right, found.encode_batch(texts, add_special_tokens=special), strict=True
        ):
            assert a.ids == b.ids, repr(text)
            assert expected.decode(a.ids, False) == found.decode(a.ids, False), repr(text)


def test_deepseeks_distillates_of_qwen_split_as_qwen() -> None:
    assert PRE_TOKENIZERS["deepseek-r1-qwen"] == PRE_TOKENIZERS["qwen2"]


def test_text_ends_on_every_token_that_ends_texts(tmp_path: Path) -> None:
    keys, tensors = small_gguf()
    ids = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"])}
    keys |= {
        "tokenizer.ggml.eos_token_id": ids["<|im_start|>"],
        "tokenizer.ggml.eot_token_id": ids["<|im_end|>"],
    }
    found = read(write_gguf(tmp_path / "model.gguf", keys, tensors)).metadata["eos_token_ids"]
    assert found == [ids[token] for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]


def test_begin_token_is_one_only_where_it_is_put(tmp_path: Path) -> None:
    keys, tensors = small_gguf()
    assert read(write_gguf(tmp_path / "a.gguf", keys, tensors)).metadata["special_tokens"] == {
        "eos_token": "<|im_end|>"
    }
    keys["tokenizer.ggml.add_bos_token"] = True
    checkpoint = read(write_gguf(tmp_path / "b.gguf", keys, tensors))
    assert checkpoint.metadata["special_tokens"]["bos_token"] == "<|endoftext|>"
    tokenizer = tokenizers.Tokenizer.from_buffer(checkpoint.tokenizer)
    assert tokenizer.encode("a").ids[0] == keys["tokenizer.ggml.bos_token_id"]


# ----------------------------------------------------------------------------
# Refused


def refusal(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message


def removed(name: str) -> Callable[[Keys, Tensors], object]:
    return lambda keys, tensors: keys.pop(name, None) or tensors.pop(name)


def changed(**values: Any) -> Callable[[Keys, Tensors], object]:
    """Keys written with __ for the dot."""
    return lambda keys, tensors: keys.update({key.replace("__", "."): value for key, value in values.items()})


def retyped(name: str, kind: str) -> Callable[[Keys, Tensors], object]:
    return lambda keys, tensors: tensors.update({name: (kind, *tensors[name][1:])})


def renamed(name: str, new: str) -> Callable[[Keys, Tensors], object]:
    return lambda keys, tensors: tensors.update({new: tensors.pop(name)})


def token_kind(i: int, kind: int) -> Callable[[Keys, Tensors], object]:
    return lambda keys, tensors: keys["tokenizer.ggml.token_type"].__setitem__(i, kind)


def list_item(key: str, i: int, value: str) -> Callable[[Keys, Tensors], object]:
    return lambda keys, tensors: keys[f"tokenizer.ggml.{key}"].__setitem__(i, value)


def to_llama(keys: Keys, tensors: Tensors, factors: NDArray[np.float64]) -> None:
    """Open a Llama whose file has these frequency divisors, without a check of superfluous tensors."""
    for key in [key for key in keys if key.startswith("qwen3.")]:
        keys["llama." + key.removeprefix("qwen3.")] = keys.pop(key)
    keys["general.architecture"] = "llama"
    tensors["rope_freqs.weight"] = encode(factors.astype(np.float32), "F32")


FAULTS: dict[str, tuple[Callable[[Keys, Tensors], object], str]] = {
    "architecture": (changed(general__architecture="gemma3"), "architecture 'gemma3' is not supported"),
    "adapter": (changed(general__type="adapter"), "general.type is 'adapter', expected 'model'"),
    "part of a split": (changed(split__count=3), "is one of 3 parts; join them"),
    "IQ3_S": (retyped("blk.0.attn_q.weight", "IQ3_S"),
              "'blk.0.attn_q.weight' is IQ3_S, supported: BF16, F16, F32, Q4_0, Q4_1, Q5_0"),
    "short rows": (retyped("token_embd.weight", "Q6_K"),
                   "'token_embd.weight' is Q6_K, but its rows have 64 weights"),
    "cut blocks": (retyped("blk.0.attn_q.weight", "Q4_0"), "is at byte"),
    "a vector of blocks": (
        lambda keys, tensors: tensors.update({"output_norm.weight": random_blocks("Q4_0", (64,))}),
        "output_norm.weight is a vector of Q4_0, expected BF16, F16 or F32",
    ),
    "no layers": (removed("qwen3.block_count"), "required key 'qwen3.block_count' is missing"),
    "no rope base": (removed("qwen3.rope.freq_base"), "required key 'qwen3.rope.freq_base' is missing"),
    "no heads": (changed(qwen3__attention__head_count=0), "n_heads = 0 is outside"),
    "heads by layer": (changed(qwen3__attention__head_count=[4, 4]),
                       "head_count is [4, 4], expected an integer"),
    "negative": (changed(qwen3__embedding_length=-64), "-64 is outside"),
    "value length": (changed(qwen3__attention__value_length=64), "value_length is 64, supported: 32"),
    "partial rope": (changed(qwen3__rope__dimension_count=16), "dimension_count is 16, supported: 32"),
    "not causal": (changed(qwen3__attention__causal=False), "causal is False, supported: True"),
    "unknown key": (changed(qwen3__logit_scale=2.0), "key 'qwen3.logit_scale' is not supported"),
    "attention factor": (changed(qwen3__rope__scaling__attn_factor=0.5),
                         "attn_factor is 0.5, supported: 1.0"),
    "rope kind": (changed(qwen3__rope__scaling__type="longrope"), "rope type 'longrope' is not supported"),
    "experts of a dense model": (changed(qwen3__expert_count=8), "key 'qwen3.expert_count' is not supported"),
    "head of no size": (changed(qwen3__attention__key_length="x"), "head_dim is 'x', expected an integer"),
    "factors of no Llama": (
        lambda keys, tensors: to_llama(keys, tensors, np.linspace(1, 8, 16)),
        "rope_freqs.weight is not that of a Llama 3",
    ),
    "factors that are few": (
        lambda keys, tensors: to_llama(keys, tensors, np.ones(8)),
        "rope_freqs.weight is F32 [8], expected F32 [16]",
    ),
    "factors that are no numbers": (
        lambda keys, tensors: to_llama(keys, tensors, np.full(16, np.nan)),
        "factor is nan, expected a finite number",
    ),
    "epsilon": (changed(qwen3__attention__layer_norm_rms_epsilon=float("nan")),
                "rms_norm_eps is nan, expected a finite number"),
    "no embedding": (removed("token_embd.weight"), "tensor token_embd.weight is missing"),
    "no norm": (removed("blk.1.ffn_norm.weight"), "post_attention_layernorm.weight [64] is missing"),
    "foreign tensor": (renamed("blk.1.attn_q_norm.weight", "rope_freqs.weight"),
                       "unexpected tensor 'rope_freqs.weight'"),
    "name of the other kind": (renamed("output_norm.weight", "model.norm.weight"),
                               "unexpected tensor 'model.norm.weight'"),
    "fewer layers": (changed(qwen3__block_count=1), "unexpected tensor blk.1."),
    "more layers": (changed(qwen3__block_count=3), "model.layers.2.input_layernorm.weight [64] is missing"),
    "other width": (changed(qwen3__feed_forward_length=128), "has shape [192, 64], expected [128, 64]"),
    "alignment": (changed(general__alignment=48), "general.alignment is 48, expected a power of two"),
    "sentencepiece": (changed(tokenizer__ggml__model="llama"),
                      "tokenizer.ggml.model is 'llama', supported: 'gpt2'"),
    "no split": (removed("tokenizer.ggml.pre"), "required key 'tokenizer.ggml.pre' is missing"),
    "other split": (changed(tokenizer__ggml__pre="deepseek-v3"),
                    "tokenizer.ggml.pre is 'deepseek-v3', supported: qwen2"),
    "no tokens": (removed("tokenizer.ggml.tokens"), "required key 'tokenizer.ggml.tokens' is missing"),
    "tokens are numbers": (changed(tokenizer__ggml__tokens=[1, 2]), "tokens is not a list of texts"),
    "few kinds": (changed(tokenizer__ggml__token_type=[1, 1]),
                  "512 tokens, but tokenizer.ggml.token_type has 2"),
    "token twice": (list_item("tokens", 7, "b"), "are both 'b'"),
    "hole in the vocabulary": (token_kind(5, UNUSED), "which cannot be there"),
    "control token among words": (token_kind(5, CONTROL), "has kind 1, which cannot be there"),
    "unknown kind": (token_kind(5, 77), "token 5 ('&') has kind 77"),
    "merge of three": (list_item("merges", 0, "a b c"), "merges[0] is 'a b c', expected two tokens"),
    "merge of nothing": (list_item("merges", 0, ""), "merges[0] is '', expected two tokens"),
    "merge of no token": (list_item("merges", 0, "Ġ ☃"), "☃"),
    "end token": (changed(tokenizer__ggml__eos_token_id=9999), "eos_token_id is 9999, but tokens end at 390"),
    "end token in the padding": (changed(tokenizer__ggml__eos_token_id=400),
                                 "eos_token_id is 400, but tokens end"),
    "template": (changed(tokenizer__chat_template=7), "tokenizer.chat_template is 7, expected text"),
    "more tokens than rows": (
        lambda keys, tensors: keys.update(
            {
                "tokenizer.ggml.tokens": keys["tokenizer.ggml.tokens"] + ["<extra>"],
                "tokenizer.ggml.token_type": [
                    *([NORMAL] * 384 + [CONTROL] * 128),
                    CONTROL,
                ],
            }
        ),
        "token '<extra>' has id 512, but vocab_size is 512",
    ),
}  # fmt: skip


EXPERT_FAULTS: dict[str, tuple[Callable[[Keys, Tensors], object], str]] = {
    "no count": (removed("qwen3moe.expert_count"), "required key 'qwen3moe.expert_count' is missing"),
    "no number used": (removed("qwen3moe.expert_used_count"),
                       "required key 'qwen3moe.expert_used_count' is missing"),
    "no width": (
        removed("qwen3moe.expert_feed_forward_length"),
        "required key 'qwen3moe.expert_feed_forward_length' is missing",
    ),
    "no experts": (changed(qwen3moe__expert_count=0), "n_experts_per_token is 2, but n_experts = 0"),
    "none used": (changed(qwen3moe__expert_used_count=0), "n_experts_per_token = 0, but n_experts = 5"),
    "more used than there are": (changed(qwen3moe__expert_used_count=6), "= 6 exceeds n_experts = 5"),
    "count is text": (changed(qwen3moe__expert_count="5"), "is '5', expected an integer"),
    "fewer experts": (changed(qwen3moe__expert_count=4),
                      "mlp.gate.weight has shape [5, 128], expected [4, 128]"),
    "other width": (changed(qwen3moe__expert_feed_forward_length=128),
                    "has shape [64, 128], expected [128, 128]"),
    "shared expert": (changed(qwen3moe__expert_shared_count=1),
                      "key 'qwen3moe.expert_shared_count' is not supported"),
    "other gating": (changed(qwen3moe__expert_gating_func=2),
                     "key 'qwen3moe.expert_gating_func' is not supported"),
    "no router": (removed("blk.1.ffn_gate_inp.weight"), "model.layers.1.mlp.gate.weight [5, 128] is missing"),
    "no up": (removed("blk.1.ffn_up_exps.weight"),
              "model.layers.1.mlp.experts.0.up_proj.weight [64, 128] is missing"),
    "dense layer": (
        lambda keys, tensors: tensors.update({"blk.1.ffn_up.weight": encode(np.ones((192, 128), np.float32),
                                                                            "F32")}),
        "unexpected tensor blk.1.ffn_up.weight",
    ),
    "experts one by one": (
        renamed("blk.1.ffn_up_exps.weight", "blk.1.ffn_up.0.weight"),
        "unexpected tensor 'blk.1.ffn_up.0.weight'",
    ),
    "experts of no layer": (changed(qwen3moe__block_count=1), "unexpected tensor blk.1."),
    "two dimensions": (
        lambda keys, tensors: tensors.update(
            {"blk.1.ffn_up_exps.weight": ("F32", (320, 128), tensors["blk.1.ffn_up_exps.weight"][2])}
        ),
        "experts.0.up_proj.weight [64, 128] is missing",
    ),
    "IQ3_S": (retyped("blk.0.ffn_down_exps.weight", "IQ3_S"),
              "'blk.0.ffn_down_exps.weight' is IQ3_S, supported"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "fault"), [*(({}, fault) for fault in FAULTS), *((MOE, fault) for fault in EXPERT_FAULTS)]
)
def test_fault_is_refused_in_one_line(tmp_path: Path, shape: dict[str, Any], fault: str) -> None:
    damage, reason = (EXPERT_FAULTS if shape else FAULTS)[fault]
    keys, tensors = small_gguf(**shape)
    damage(keys, tensors)
    assert reason in refusal(write_gguf(tmp_path / "model.gguf", keys, tensors))


def test_weight_of_an_expert_that_is_no_number_is_refused_by_place(tmp_path: Path) -> None:
    keys, tensors = small_gguf(**MOE)
    kind, dims, data = tensors["blk.1.ffn_up_exps.weight"]
    weights = np.frombuffer(data, "<f4").reshape(dims).copy()
    weights[3, 7, 11] = np.nan
    tensors["blk.1.ffn_up_exps.weight"] = (kind, dims, weights.tobytes())
    with pytest.raises(SourceError, match=r"blk\.1\.ffn_up_exps\.weight\[3, 0:64\]\[7, 11\] is nan"):
        export(write_gguf(tmp_path / "model.gguf", keys, tensors), tmp_path / "model.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "starts with b''; expected a directory or a GGUF file"),
    "other magic": (lambda data: b"GGML" + data[4:], "starts with b'GGML'"),
    "old version": (
        lambda data: data[:4] + struct.pack("<I", 1) + data[8:],
        "GGUF version is 1, supported: 2, 3",
    ),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "(big-endian), supported: 2, 3"),
    "many tensors": (lambda data: data[:8] + b"\xff" * 8 + data[16:], "tensors, at most 65536 are accepted"),
    "many keys": (lambda data: data[:16] + b"\xff" * 8 + data[24:], "keys, at most 65536 are accepted"),
    "long key": (
        lambda data: data[:24] + b"\xff" * 8 + data[32:],
        "18446744073709551615 bytes at 32, but the file",
    ),
    "cut in the header": (lambda data: data[:1000], "but the file has 1000 (cut short?)"),
    "cut in the data": (lambda data: data[:-1000], "its header describes"),
    "longer": (lambda data: data + bytes(64), "its header describes"),
}


@pytest.mark.parametrize("fault", BYTES)
def test_damaged_bytes_are_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    damage, reason = BYTES[fault]
    path = write_small(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert reason in refusal(path)


def damaged(r: random.Random, data: bytes, header: int) -> bytes:
    """The file with one of the things that happen to files, most of them in the header."""
    at = r.randrange(header)
    kind = r.randrange(6)
    if kind == 0:
        return data[: r.randrange(len(data))]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at + r.randrange(1, 40) :]
    if kind == 3:
        return data[:at] + r.randbytes(r.randrange(1, 40)) + data[at:]
    if kind == 4:
        wrong = r.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)])
        return data[:at] + struct.pack("<Q", wrong) + data[at + 8 :]
    source, n = r.randrange(header), r.randrange(1, 200)
    return data[:at] + data[source : source + n] + data[at + n :]


@pytest.mark.parametrize("shape", [MOE, {"architecture": "llama", "rope": LLAMA3}])
def test_thousands_of_damaged_files_end_in_one_line_or_in_a_model(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    """A damaged file gives a SourceError or a model, no other exception. GGUF has no checksums."""
    keys, tensors = small_gguf(n_layers=1, **shape)
    words = keys["tokenizer.ggml.tokens"][:256] + ["<|im_end|>"]
    keys |= {"tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": [NORMAL] * 256 + [CONTROL]}
    keys |= {
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.bos_token_id": 0,
    }
    path = write_gguf(tmp_path / "model.gguf", keys, tensors)
    data, r, refused = path.read_bytes(), random.Random(0), 0
    header = len(data) - sum(len(content) for _, _, content in tensors.values())
    assert read(path).config.n_layers == 1
    for _ in range(1000):
        path.write_bytes(damaged(r, data, header))
        try:
            read(path)
        except SourceError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 500 < refused < 1000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.bin", MAGIC + b"\0" * 100, "is a model.bin already: run.py {}/model.bin runs it"),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{}", "is a safetensors file: give its directory, {}"),
        ("config.json", b'{"a": 1}', "is a JSON file: give the directory of the model, {}"),
        ("pytorch_model.bin", b"PK\x03\x04", "is a PyTorch file, which is never opened"),
        ("model.gguf", b"<!DOCTYPE html>", "is a web page: download the file that the page is about"),
        ("model.gguf", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        ("model.gguf", b"GGML", "starts with b'GGML'; expected a directory or a GGUF file"),
    ],
)
def test_a_file_that_is_no_gguf_is_called_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path / name), str(tmp_path / "out.bin")]) == 2
    assert f"{tmp_path / name}: {said.format(tmp_path)}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["u1", "u2", "i4", "f4"])
def test_an_array_that_nobody_needs_takes_no_memory(tmp_path: Path, kind: str) -> None:
    """tokenizer.ggml.scores of many files, or whatever a damaged length makes of it: 12 MB here."""
    array = np.random.default_rng(0).integers(0, 200, 12_000_000 // np.dtype(kind).itemsize).astype(kind)
    keys, tensors = small_gguf()
    expected = read(write_gguf(tmp_path / "plain.gguf", keys, tensors))
    path = write_gguf(tmp_path / "model.gguf", keys | {"tokenizer.ggml.scores": array}, tensors)
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000
    assert (found.config, found.tokenizer) == (expected.config, expected.tokenizer)


@pytest.mark.parametrize("key", ["tokenizer.ggml.merges", "tokenizer.ggml.token_type", "some.texts"])
def test_arrays_with_more_items_than_any_vocabulary_are_refused(tmp_path: Path, key: str) -> None:
    keys, tensors = small_gguf()
    data = write_gguf(tmp_path / "model.gguf", keys | {"some.texts": ["a", "b"]}, tensors).read_bytes()
    at = data.index(key.encode()) + len(key) + 8  # past the name and the kinds of the value and of its items
    path = tmp_path / "model.gguf"
    path.write_bytes(data[:at] + struct.pack("<Q", gguf_header.MAX_ITEMS + 1) + data[at + 8 :])
    assert (
        f"'{key}': {gguf_header.MAX_ITEMS + 1} items, at most {gguf_header.MAX_ITEMS} in all arrays"
        in refusal(path)
    )


@pytest.mark.parametrize("texts", [["a"] * 1000, ["a"] * 999 + ["\u00e9"]])
def test_texts_that_nobody_needs_are_passed_by(tmp_path: Path, texts: list[str]) -> None:
    keys, tensors = small_gguf()
    path = write_gguf(tmp_path / "model.gguf", keys | {"some.texts": texts}, tensors)
    assert read(path).tokenizer == read(write_gguf(tmp_path / "plain.gguf", keys, tensors)).tokenizer
    data = path.read_bytes()
    at = data.index(b"some.texts") + 10 + 16  # the length of the first text
    path.write_bytes(data[:at] + struct.pack("<Q", 2**62) + data[at + 8 :])
    assert f"'some.texts'[0]: {2**62} bytes at {at + 8}, but" in refusal(path)


def test_a_long_array_in_place_of_a_number_is_shown_as_what_it_is(tmp_path: Path) -> None:
    keys, tensors = small_gguf()
    for key, expected in (
        ("qwen3.attention.head_count", "head_count is an array of 1000 items, expected an integer"),
        ("general.sampling.temp", "temperature is an array of 1000 items, expected a finite number"),
        ("tokenizer.chat_template", "chat_template is an array of 1000 items, expected text"),
    ):
        path = write_gguf(tmp_path / "model.gguf", keys | {key: np.ones(1000, "u4")}, tensors)
        assert expected in refusal(path)


def test_damaged_file_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_small(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    assert main([str(path), str(tmp_path / "model.bin")]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and "cut short?" in output.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_file_is_never_its_own_target(tmp_path: Path) -> None:
    path = write_small(tmp_path)
    with pytest.raises(SourceError, match="is a file of the model that is read"):
        export(path, path)
