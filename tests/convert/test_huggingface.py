"""A Hugging Face directory is read in every dialect, or refused in one line that names the fault.

python -m pytest tests/convert/test_huggingface.py
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import (
    DEFAULTS,
    TEMPLATES,
    config_json,
    encode_tensor,
    generation_config_json,
    small_weights,
    token_id,
    tokenizer_json,
    write_json,
    write_safetensors,
    write_small_model,
)

from qwen3c import format
from qwen3c.convert.directory import Directory
from qwen3c.convert.huggingface import Checkpoint, thinking_kind
from qwen3c.convert.source import SourceError

INDEX = "model.safetensors.index.json"


def read(source: Path, **options: Any) -> Checkpoint:
    with Directory(source) as files:
        return Checkpoint(files, **options)


def change(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; DELETE removes one."""
    values = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in values.items() if value is not DELETE})


DELETE = object()
Damage = Callable[[Path], object]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_small_model(tmp_path / "source")


# ----------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("dialect", [4, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_every_number_is_read(tmp_path: Path, dialect: int, tied: bool) -> None:
    shape: dict[str, Any] = {"dim": 128, "hidden_dim": 192, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2}
    shape |= {"head_dim": 64, "vocab_size": 400, "context": 77, "rope_theta": 5e6, "rms_eps": 1e-5}
    write_small_model(tmp_path, **shape, tied=tied, dialect=dialect)
    expected = format.Config(**shape, tied_embedding=tied, group_size=64, n_tokens=1 + token_id("</think>"))
    assert read(tmp_path).config == expected


def test_both_dialects_describe_the_same_model(tmp_path: Path) -> None:
    four, five = (read(write_small_model(tmp_path / str(d), dialect=d)) for d in (4, 5))
    assert (four.config, four.rope, four.template) == (five.config, five.rope, five.template)


# ----------------------------------------------------------------------------
# Metadata


def test_metadata_says_where_text_ends_and_how_to_sample(source: Path) -> None:
    checkpoint = read(source)
    assert checkpoint.metadata["eos_token_ids"] == [token_id("<|im_end|>"), token_id("<|endoftext|>")]
    assert checkpoint.metadata["generation"] == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert checkpoint.metadata["special_tokens"] == {"eos_token": "<|im_end|>"}
    format.check_metadata(checkpoint.metadata, checkpoint.config)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(3, [4, 3], [3, 4]), ([5, 3], None, [5, 3]), (None, 7, [7]), (None, None, []), (DELETE, [2], [2])],
)
def test_eos_is_the_union_of_both_files(
    source: Path, config: Any, generation: Any, expected: list[int]
) -> None:
    change(source / "config.json", eos_token_id=config)
    change(source / "generation_config.json", eos_token_id=generation)
    assert read(source).metadata["eos_token_ids"] == expected


def test_optional_files_may_be_missing(source: Path) -> None:
    (source / "generation_config.json").unlink()
    (source / "tokenizer_config.json").unlink()
    checkpoint = read(source)
    assert checkpoint.template == ""
    assert checkpoint.metadata["thinking"] == "none"
    assert checkpoint.metadata["generation"] == {}
    assert checkpoint.metadata["eos_token_ids"] == [token_id("<|im_end|>")]


def test_name_comes_from_the_flag_then_the_config_then_the_size(source: Path) -> None:
    assert read(source, name="Mine").metadata["name"] == "Mine"
    assert read(source).metadata["name"] == "Qwen3 156K"
    for path in ("someone/Qwen3-0.6B", "/data/Qwen3-0.6B/", "C:\\models\\Qwen3-0.6B"):
        change(source / "config.json", _name_or_path=path)
        assert read(source).metadata["name"] == "Qwen3-0.6B"


def test_provenance_is_the_contents_alone(tmp_path: Path) -> None:
    """Metadata depend neither on the directory's name nor on its shards."""
    one, two = (write_small_model(tmp_path / name, shards=n) for name, n in (("a", 1), ("b", 3)))
    for directory in (one, two):
        (directory / "README.md").write_text(
            "---\nlicense: apache-2.0\ntags: [x]\n---\n# Card\nlicense: no\n"
        )
    assert read(one).metadata == read(two).metadata
    source = read(one).metadata["source"]
    assert source["licence"] == "apache-2.0"
    assert source["dtypes"] == ["BF16"]
    assert source["config"] == config_json()
    assert source["exporter"].startswith("qwen3c ")


# ----------------------------------------------------------------------------
# Chat template


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("dialect", [4, 5])
def test_thinking_kind_is_read_off_the_template(tmp_path: Path, kind: str, dialect: int) -> None:
    checkpoint = read(write_small_model(tmp_path, thinking=kind, dialect=dialect))
    assert checkpoint.template == TEMPLATES[kind]
    assert checkpoint.metadata["thinking"] == kind


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("", "none"),
        ("{{ messages }}", "none"),
        # history with thoughts in it, but a prompt without
        (
            "{{ '<think>' + m.reasoning }}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}",
            "none",
        ),
        # opened and closed: the switch is stuck at off
        ("{% if add_generation_prompt %}{{ 'a\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}", "none"),
        ("{% if add_generation_prompt %}{{ 'a\\n<think>\\n' }}{% endif %}", "always"),
        ("{% if add_generation_prompt %}{% if enable_thinking %}<think>{% endif %}{% endif %}", "hybrid"),
    ],
)
def test_thinking_kind_of_other_templates(template: str, kind: str) -> None:
    assert thinking_kind(template) == kind


def test_template_is_looked_up_in_order(source: Path) -> None:
    write_json(source / "chat_template.json", {"chat_template": "third"})
    change(source / "tokenizer_config.json", chat_template=DELETE)
    assert read(source).template == "third"
    change(source / "tokenizer_config.json", chat_template="second")
    assert read(source).template == "second"
    (source / "chat_template.jinja").write_text("first")
    assert read(source).template == "first"


def test_default_is_chosen_among_named_templates(source: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    change(source / "tokenizer_config.json", chat_template=named)
    assert read(source).template == "chat"


# ----------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_byte_of_every_tensor_is_found(tmp_path: Path, dtype: str, shards: int) -> None:
    shape = {"tied": False, "n_kv_heads": 4}
    write_small_model(tmp_path, **shape, dtype=dtype, shards=shards)
    weights = small_weights(**shape)
    with Directory(tmp_path) as files:
        checkpoint = Checkpoint(files)
        assert checkpoint.tensors.keys() == weights.keys()
        for name, tensor in checkpoint.tensors.items():
            stored_dtype, dims, data = encode_tensor(weights[name], dtype)
            assert (tensor.dtype, tensor.shape, tensor.size) == (stored_dtype, dims, len(data))
            for start, stop in ((0, len(data)), (6, 20), (len(data) - 2, len(data))):
                found = bytearray(stop - start)
                tensor.read(start, memoryview(found))
                assert found == data[start:stop]


def test_copies_of_what_is_known_are_ignored(source: Path) -> None:
    """A tied model's lm_head, and rotary buffers, are ignored whatever they hold."""
    weights = small_weights()
    head = np.full_like(weights["model.embed_tokens.weight"], np.nan)
    buffer = np.zeros(16, np.float32)
    more = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": buffer}
    write_safetensors(
        source / "model.safetensors", {n: encode_tensor(w, "BF16") for n, w in (weights | more).items()}
    )
    assert read(source).tensors.keys() == weights.keys()


def test_single_file_wins_over_an_index(source: Path) -> None:
    """The order is that of transformers."""
    (source / INDEX).write_text("not even JSON")
    assert len(read(source).tensors) == len(small_weights())


# ----------------------------------------------------------------------------
# What transformers itself writes


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_is_read(tmp_path: Path, tied: bool) -> None:
    reason = "needs torch and transformers: `make oracles`"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    s = DEFAULTS
    config = transformers.Qwen3Config(
        hidden_size=s["dim"],
        intermediate_size=s["hidden_dim"],
        num_hidden_layers=2,
        num_attention_heads=s["n_heads"],
        num_key_value_heads=s["n_kv_heads"],
        head_dim=s["head_dim"],
        vocab_size=s["vocab_size"],
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        eos_token_id=5,
    )
    model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    assert (tmp_path / INDEX).exists()
    checkpoint = read(tmp_path)
    assert checkpoint.config.tied_embedding == tied
    assert checkpoint.config.context == 64
    assert checkpoint.metadata["eos_token_ids"] == [5]
    parameters = dict(model.named_parameters())
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        name: tuple(parameter.shape) for name, parameter in parameters.items()
    }


# ----------------------------------------------------------------------------
# Damaged and unsupported sources


def edit_config(**changes: Any) -> Damage:
    return lambda source: change(source / "config.json", **changes)


def edit_json(name: str, **changes: Any) -> Damage:
    return lambda source: change(source / name, **changes)


def write(name: str, content: str | bytes) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda source: (source / name).write_bytes(data)


def unlink(name: str) -> Damage:
    return lambda source: (source / name).unlink()


def put_instead(name: str, make: Damage) -> Damage:
    """Remove a file and make something else in its place."""

    def replace(source: Path) -> None:
        (source / name).unlink()
        make(source / name)

    return replace


def edit_tokenizer(change_it: Callable[[dict[str, Any]], Any]) -> Damage:
    def edit(source: Path) -> None:
        values = json.loads(tokenizer_json())
        change_it(values)
        write_json(source / "tokenizer.json", values)

    return edit


def edit_tensors(change_it: Callable[[dict[str, Any]], Any]) -> Damage:
    def edit(source: Path) -> None:
        stored = {name: encode_tensor(w, "BF16") for name, w in small_weights().items()}
        change_it(stored)
        write_safetensors(source / "model.safetensors", stored)

    return edit


def edit_bytes(change_it: Callable[[bytes], bytes]) -> Damage:
    def edit(source: Path) -> None:
        path = source / "model.safetensors"
        path.write_bytes(change_it(path.read_bytes()))

    return edit


def edit_header(old: str, new: str) -> Damage:
    """Replace text in the safetensors header, its length adapted."""

    def edit(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + size].decode()
        assert old in header
        changed = header.replace(old, new, 1).encode()
        return len(changed).to_bytes(8, "little") + changed + data[8 + size :]

    return edit_bytes(edit)


def retype(name: str, dtype: str, item_size: int) -> Callable[[dict[str, Any]], None]:
    def edit(stored: dict[str, Any]) -> None:
        shape = stored[name][1]
        stored[name] = (dtype, shape, bytes(item_size * int(np.prod(shape))))

    return edit


Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
EXPERTS = "model.layers.1.mlp.experts."
NO_WIDTH = YARN | {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}
OVERLAP = '"data_offsets": [0, 65536]', '"data_offsets": [64, 65600]'

# what is done to a sound directory -> what the one line says
FAULTS: dict[str, tuple[Damage, str]] = {
    "no config": (unlink("config.json"), "config.json: No such file"),
    "config not JSON": (write("config.json", "{'a': 1}"), "config.json: is not valid JSON"),
    "config a list": (write("config.json", "[]"), "config.json: is a JSON list, expected an object"),
    "config not UTF-8": (write("config.json", b'{"a": "\xff"}'), "config.json: is not valid JSON"),
    "config nested too deeply": (write("config.json", "[" * 99999), "config.json: is not valid JSON"),
    "config with a key twice": (write("config.json", '{"a": 1, "a": 2}'), "key 'a' is given twice"),
    "config with NaN": (write("config.json", '{"a": NaN}'), "NaN is not a JSON number"),
    "architecture missing": (edit_config(architectures=DELETE), "required key 'architectures' is missing"),
    "architecture unknown": (edit_config(architectures=["Gemma"]), "['Gemma'], supported: Qwen3ForCausalLM"),
    "architecture odd": (edit_config(architectures=[["x"]]), "supported: Qwen3ForCausalLM"),
    "experts without numbers": (
        edit_config(architectures=["Qwen3MoeForCausalLM"]),
        "required key 'num_experts' is missing",
    ),
    "shared expert": (
        edit_config(shared_expert_intermediate_size=64),
        "shared_expert_intermediate_size is 64, supported: 0",
    ),
    "heads odd": (edit_config(num_key_value_heads=3), "n_heads = 4 is not a multiple of n_kv_heads = 3"),
    "zero heads": (edit_config(num_key_value_heads=0), "num_key_value_heads: n_kv_heads = 0 is outside"),
    "zero layers": (edit_config(num_hidden_layers=0), "num_hidden_layers: n_layers = 0 is outside 1..1024"),
    "negative width": (edit_config(hidden_size=-64), "hidden_size: dim = -64 is outside"),
    "huge width": (edit_config(hidden_size=2**70), "hidden_size: dim = 1180591620717411303424 is outside"),
    "width a fraction": (edit_config(hidden_size=64.5), "hidden_size is 64.5, expected an integer"),
    "width text": (edit_config(hidden_size="64"), "hidden_size is '64', expected an integer"),
    "width true": (edit_config(hidden_size=True), "hidden_size is True, expected an integer"),
    "head_dim null": (edit_config(head_dim=None), "head_dim is None, expected an integer"),
    "eps zero": (edit_config(rms_norm_eps=0), "rms_norm_eps: rms_eps = 0.0 is outside"),
    "eps text": (edit_config(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6', expected a finite number"),
    "theta zero": (edit_config(rope_theta=0), "rope_theta = 0.0 is outside"),
    "theta of 400 digits": (edit_config(rope_theta=10**400), "expected a finite number"),
    "tie text": (
        edit_config(tie_word_embeddings="yes"),
        "tie_word_embeddings is 'yes', expected true or false",
    ),
    "other activation": (edit_config(hidden_act="gelu"), "hidden_act is 'gelu', supported: 'silu'"),
    "attention bias": (edit_config(attention_bias=True), "attention_bias is True, supported: False"),
    "sliding window": (edit_config(use_sliding_window=True), "use_sliding_window is True, supported: False"),
    "sliding layers": (edit_config(layer_types=["sliding_attention"]), "layer_types has 'sliding_attention'"),
    "layer types odd": (edit_config(layer_types=5), "layer_types has 5, supported"),
    "partial rotary": (
        edit_config(partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5, supported: 1.0",
    ),
    "quantised by config": (
        edit_config(quantization_config={"quant_method": "awq"}),
        "quantization_config says 'awq': already quantised",
    ),
    "quantised odd": (edit_config(quantization_config=[]), "quantization_config says []: already quantised"),
    "rope unknown": (edit_config(rope_scaling={"type": "longrope"}), "rope type 'longrope' is not supported"),
    "linear without factor": (
        edit_config(rope_scaling={"type": "linear"}),
        "required key 'factor' is missing",
    ),
    "yarn without context": (
        edit_config(rope_scaling={"type": "yarn", "factor": 4}),
        "required key 'original_max_position_embeddings' is missing",
    ),
    "yarn with an unknown key": (
        edit_config(rope_scaling=YARN | {"x": 1}),
        "unknown key 'x' beside rope type",
    ),
    "yarn that shrinks": (edit_config(rope_scaling=YARN | {"factor": 0.5}), "factor = 0.5 is out of range"),
    "yarn with limits swapped": (
        edit_config(rope_scaling=YARN | {"beta_fast": 1, "beta_slow": 32}),
        "beta_slow = 32.0 is out of range",
    ),
    "yarn of a huge scale": (
        edit_config(rope_scaling=YARN | {"attention_factor": 1e9}),
        "rope_attention_scale = 1000000000.0 is outside",
    ),
    "llama3 without a width": (edit_config(rope_scaling=NO_WIDTH), "low_freq_factor = 4.0 is out of range"),
    "rope type odd": (edit_config(rope_scaling={"rope_type": ["x"]}), "rope type ['x'] is not supported"),
    "rope key unknown": (
        edit_config(rope_scaling={"factor": 2}),
        "unknown key 'factor' beside rope type 'default'",
    ),
    "rope a number": (edit_config(rope_scaling=4), "rope_scaling is 4, expected an object"),
    "rope nested oddly": (
        edit_config(rope_parameters={"full_attention": 1}),
        "rope_parameters is 1, expected",
    ),
    "rope twice": (
        edit_config(rope_scaling={"type": "default"}, rope_parameters={"rope_type": "default"}),
        "rope_parameters and rope_scaling contradict each other",
    ),
    "two thetas": (
        edit_config(rope_parameters={"rope_theta": 1e4}),
        "rope_theta is 1000000.0 and, in rope_parameters",
    ),
    "part of the rotation": (
        edit_config(rope_scaling={"partial_rotary_factor": 0.5}),
        "partial_rotary_factor is 0.5",
    ),
    "eos beyond the tokens": (edit_config(eos_token_id=511), "eos_token_id 511 is not a token id below 391"),
    "eos text": (edit_config(eos_token_id="</s>"), "eos_token_id '</s>' is not a token id"),
    "other eos negative": (
        edit_json("generation_config.json", eos_token_id=[-1]),
        "generation_config.json: eos_",
    ),
    "temperature text": (
        edit_json("generation_config.json", temperature="hot"),
        "temperature is 'hot', expected a",
    ),
    "generation not JSON": (
        write("generation_config.json", "{"),
        "generation_config.json: is not valid JSON",
    ),
    "no tokenizer": (unlink("tokenizer.json"), "tokenizer.json: No such file"),
    "tokenizer empty": (write("tokenizer.json", ""), "tokenizer.json: "),
    "tokenizer not JSON": (write("tokenizer.json", "BPE"), "tokenizer.json: "),
    "tokenizer of nothing": (write("tokenizer.json", "{}"), "tokenizer.json: "),
    "tokenizer cut short": (write("tokenizer.json", tokenizer_json()[:5000]), "tokenizer.json: "),
    "tokenizer of another kind": (edit_tokenizer(lambda t: t["model"].update(type="X")), "tokenizer.json: "),
    "token beyond the embedding": (
        edit_tokenizer(lambda t: t["model"]["vocab"].update(beyond=512)),
        "tokenizer.json: token 'beyond' has id 512, but vocab_size is 512",
    ),
    "embedding too small": (edit_config(vocab_size=390), "has id 390, but vocab_size is 390"),
    "template not UTF-8": (
        write("chat_template.jinja", b"\xff"),
        "chat_template.jinja: is not UTF-8: byte 0",
    ),
    "template a number": (edit_json("tokenizer_config.json", chat_template=3), "chat_template is not text"),
    "templates without default": (
        edit_json("tokenizer_config.json", chat_template=[{"name": "tools", "template": "x"}]),
        "chat_template is not text, nor a list with an entry 'default'",
    ),
    "no weights": (
        unlink("model.safetensors"),
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "tensor missing": (edit_tensors(lambda t: t.pop(Q)), f"tensor {Q} [128, 64] is missing"),
    "tensor unexpected": (edit_tensors(lambda t: t.update(extra=t[NORM])), "unexpected tensor extra"),
    "bias nobody asked for": (
        edit_tensors(lambda t: t.update({Q.replace("weight", "bias"): t[NORM]})),
        "unexpected tensor model.layers.1.self_attn.q_proj.bias",
    ),
    "layer too many": (edit_config(num_hidden_layers=1), "unexpected tensor model.layers.1."),
    "layer too few": (
        edit_config(num_hidden_layers=3),
        "tensor model.layers.2.input_layernorm.weight [64] is",
    ),
    "untied without a head": (
        edit_config(tie_word_embeddings=False),
        "tensor lm_head.weight [512, 64] is missing",
    ),
    "shape": (edit_config(num_attention_heads=8), "q_proj.weight has shape [128, 64], expected [256, 64]"),
    "transposed": (
        edit_tensors(lambda t: t.update({Q: (t[Q][0], t[Q][1][::-1], t[Q][2])})),
        f"{Q} has shape [64, 128], expected [128, 64]",
    ),
    "eight-bit floats": (edit_tensors(retype(Q, "F8_E4M3", 1)), f"{Q} is F8_E4M3: already quantised"),
    "eight-bit integers": (edit_tensors(retype(Q, "I8", 1)), f"{Q} is I8: already quantised"),
    "packed integers": (edit_tensors(retype(Q, "I32", 4)), f"{Q} is I32: already quantised"),
    "doubles": (edit_tensors(retype(Q, "F64", 8)), f"{Q} is F64: expected BF16, F16 or F32"),
    "cut by a byte": (edit_bytes(lambda data: data[:-1]), "its header describes"),
    "cut in half": (edit_bytes(lambda data: data[: len(data) // 2]), "its header describes"),
    "cut in the header": (edit_bytes(lambda data: data[:100]), "in a file of 100 (cut short?)"),
    "cut in the length": (edit_bytes(lambda data: data[:5]), "in a file of 5 (cut short?)"),
    "empty weights": (edit_bytes(lambda data: b""), "in a file of 0 (cut short?)"),
    "a byte too many": (edit_bytes(lambda data: data + b"\0"), "its header describes"),
    "header of 2^63 bytes": (
        edit_bytes(lambda data: b"\xff" * 8 + data[8:]),
        "header of 18446744073709551615 bytes",
    ),
    "header not JSON": (edit_header('"BF16"', "BF16"), "model.safetensors: is not valid JSON"),
    "header a tensor twice": (edit_header(f'"{NORM}"', '"model.embed_tokens.weight"'), "is given twice"),
    "header without shape": (edit_header('"shape"', '"shaqe"'), "dtype, shape or data_offsets is wrong"),
    "header with odd offsets": (
        edit_header('"data_offsets": [0,', '"data_offsets": ["0",'),
        "data_offsets is wrong",
    ),
    "header with one offset": (
        edit_header('"data_offsets": [0, ', '"data_offsets": ['),
        "data_offsets is wrong",
    ),
    "tensors overlap": (edit_header(*OVERLAP), "model.safetensors: Error while deserializing header"),
    "unknown dtype": (edit_header('"BF16"', '"BF17"'), "unknown variant"),
    "weights a directory": (
        put_instead("model.safetensors", lambda path: path.mkdir()),
        "model.safetensors: is not a regular file",
    ),
    "config a FIFO": (put_instead("config.json", os.mkfifo), "config.json: is not a regular file"),
    "dangling link": (
        put_instead("tokenizer.json", lambda path: path.symlink_to("gone")),
        "tokenizer.json: No such file",
    ),
    "only a pickle": (
        lambda source: (source / "model.safetensors").rename(source / "pytorch_model.bin"),
        "(pytorch_model.bin is never opened: only safetensors are read)",
    ),
}
OPTIONAL_KEYS = {
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",  # generation_config.json has it too
    "initializer_range",
    "max_window_layers",
    "model_type",
    "rope_scaling",
    "sliding_window",
    "use_cache",
    "use_sliding_window",
}


def refusal(source: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read(source)
    message = str(caught.value)
    assert message.startswith(str(source))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_in_one_line(source: Path, fault: str) -> None:
    damage, expected = FAULTS[fault]
    damage(source)
    assert expected in refusal(source)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda t: t.update({EXPERTS + "0.up_proj.weight": ("F32", (64, 64), bytes(1 << 14))}),
            f"has {EXPERTS}0.up_proj.weight, and so has ",
        ),
        (
            lambda t: t.update({EXPERTS + "gate_up_proj": ("F32", (6, 129, 64), bytes(4 * 6 * 129 * 64))}),
            f"{EXPERTS}0.gate_proj.weight [64, 64] is missing",
        ),
        (
            lambda t: t.update({EXPERTS + "down_proj": ("F32", (5, 64, 64), bytes(4 * 5 * 64 * 64))}),
            f"{EXPERTS}0.down_proj.weight [64, 64] is missing",
        ),
    ],
    ids=["an expert twice", "halves that are none", "another number of experts"],
)
def test_fused_experts_of_another_shape_are_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], expected: str
) -> None:
    shape: dict[str, Any] = {"architecture": "qwen3_moe", "fused_experts": True}
    source = write_small_model(tmp_path / "source", **shape)
    stored = {name: encode_tensor(w, "F32") for name, w in small_weights(**shape).items()}
    damage(stored)
    write_safetensors(source / "model.safetensors", stored)
    with pytest.raises(SourceError, match=re.escape(expected)), Directory(source) as files:
        Checkpoint(files)


@pytest.mark.parametrize("dialect", [4, 5])
def test_key_the_forward_pass_needs_has_no_default(tmp_path: Path, dialect: int) -> None:
    source = write_small_model(tmp_path, dialect=dialect)
    config = config_json(dialect=dialect)
    optional = OPTIONAL_KEYS | {"transformers_version", "torch_dtype", "dtype", "pad_token_id", "layer_types"}
    required = config.keys() - optional
    assert len(required) >= 13
    for key in sorted(config):
        write_json(source / "config.json", {k: v for k, v in config.items() if k != key})
        if key in required:
            missing = "rope_theta" if key == "rope_parameters" else key
            assert f"config.json: required key '{missing}' is missing" in refusal(source)
        else:
            read(source)


def test_yarn_is_asked_for_at_export(tmp_path: Path) -> None:
    source = write_small_model(tmp_path, context=40960)
    with Directory(source) as files:
        checkpoint = Checkpoint(files, yarn=4.0)
        assert checkpoint.config.context == 131072  # of the 32768 Qwen3 was trained on
        assert checkpoint.metadata["rope"] == {
            "type": "yarn",
            "theta": 1e6,
            "attention_scale": 0.1 * math.log(4) + 1,
            "factor": 4.0,
            "original_context": 32768,
        }
        change(source / "config.json", rope_scaling=YARN)
        assert Checkpoint(files).rope == checkpoint.rope
        assert Checkpoint(files, yarn_attn_factor=1.0).config.rope_attention_scale == 1.0
        for wrong, reason in (
            ({"yarn": 2.0}, "the rope is 'yarn' already"),
            ({"yarn_attn_factor": math.nan}, "rope_attention_scale = nan is outside"),
        ):
            with pytest.raises(SourceError, match=reason):
                Checkpoint(files, **wrong)  # type: ignore[arg-type]
        change(source / "config.json", rope_scaling=None)
        for wrong, reason in (
            ({"yarn": 1.0}, "the factor must be more than 1"),
            ({"yarn": math.inf}, "factor = inf is out of range"),
            ({"yarn": 1e5}, "context = 3276800000 is outside"),
            ({"yarn_attn_factor": 1.0}, "the rope is 'default', not 'yarn'"),
        ):
            with pytest.raises(SourceError, match=reason):
                Checkpoint(files, **wrong)  # type: ignore[arg-type]


def test_eos_must_be_named_somewhere(source: Path) -> None:
    change(source / "config.json", eos_token_id=DELETE)
    write_json(source / "generation_config.json", {})
    assert "config.json: required key 'eos_token_id' is missing" in refusal(source)


def test_group_size_must_divide_every_width(tmp_path: Path) -> None:
    source = write_small_model(tmp_path, dim=96, hidden_dim=192, n_heads=4, head_dim=32)
    assert read(source, group_size=32).config.group_size == 32
    for group_size, reason in (
        (64, "^--group-size 64: .*config.json: dim = 96 is not a multiple of group_size = 64; 32 fits$"),
        (128, "^--group-size 128: .*config.json: dim = 96 is not a multiple of group_size = 128; 32 fits$"),
        (48, "^--group-size is 48, not one of 32, 64, 128, 256$"),
        (0, "^--group-size is 0, not one of 32, 64, 128, 256$"),
    ):
        with pytest.raises(SourceError, match=reason):
            read(source, group_size=group_size)


def test_generation_defaults_are_those_that_are_numbers(source: Path) -> None:
    values = generation_config_json() | {"min_p": None, "top_k": 0, "presence_penalty": 1.5, "max_length": 5}
    write_json(source / "generation_config.json", values)
    expected = {"temperature": 0.6, "top_k": 0, "top_p": 0.95, "presence_penalty": 1.5}
    assert read(source).metadata["generation"] == expected
