"""model.bin: what is written can be read, what is damaged is refused, a killed writer leaves no trace.

python -m pytest tests/test_format.py
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import pickle
import re
import stat
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantization_oracle

from qwen3c import format
from qwen3c.format import HEADER_SIZE, ModelFile, ModelFileError, ModelWriter

DOCUMENT = Path(__file__).parent.parent / "docs" / "FORMAT.md"
MAX_ALLOCATION = 64 << 20

# head_dim 40 leaves gaps between tensors; 3 kv heads of 40 leave a tile row with rows of padding
CONFIG = format.Config(
    dim=96,
    hidden_dim=160,
    n_layers=2,
    n_heads=12,
    n_kv_heads=3,
    head_dim=40,
    vocab_size=90,
    n_tokens=80,
    context=128,
    group_size=32,
    tied_embedding=False,
    rms_eps=1e-6,
    rope_theta=1e6,
)
EXPERTS = {"n_experts": 6, "n_experts_per_token": 5, "expert_hidden_dim": 32, "decoder_sparse_step": 1}
CONFIGS = {
    "qwen3": CONFIG,
    "qwen3_moe": format.Config(**vars(CONFIG) | EXPERTS | {"mlp_only_layers": (0,)}),
    "qwen2": format.Config(**vars(CONFIG) | {"architecture": 3, "qk_norm": False, "qkv_bias": True}),
    "mixed": CONFIG,
}
FEWER_BITS = {"v_proj": "int6", "o_proj": "int6", "down_proj": "int6", "embed_tokens": "int8"}
ENCODINGS = {
    "mixed": {
        name: format.Encoding(FEWER_BITS.get(name.split(".")[-2], "int4")) for name in format.matrices(CONFIG)
    }
}
NEEDED: dict[str, Any] = {
    "name": "small",
    "thinking": "none",
    "eos_token_ids": [79, 3],
    "generation": {"top_k": 20},
}
METADATA = NEEDED | {"source": {"config": "x" * 20_000}}
TOKENIZER = b'{"not": "read by the format"}' * 10
TEMPLATE = "{{ messages }} é"


def random_bytes(tensor: format.Tensor, group_size: int) -> bytes:
    """A tensor as it may be stored: codes that its encoding has, scales and numbers finite."""
    random = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    if not tensor.quantized:
        return random.standard_normal(tensor.shape).astype("<f4").tobytes()
    largest = 127 if tensor.encoding is format.Encoding.INT8 else 31
    codes = random.integers(-largest, largest + 1, tensor.shape, np.int8)
    if tensor.encoding is format.Encoding.INT4:
        codes = random.choice(quantization_oracle.CODEBOOK, tensor.shape)
    scales = random.random((tensor.shape[0], tensor.shape[1] // group_size)).astype(np.float16)
    if tensor.encoding is format.Encoding.INT4:
        scales[::2] *= -1
    return quantization_oracle.tiles(codes, scales, tensor.encoding.value)


def write_model(
    path: Path,
    config: format.Config = CONFIG,
    piece_size: int = 1000,
    encodings: format.Encodings | None = None,
) -> dict[str, bytes]:
    """Write random tensors in pieces; returns them by name."""
    stored = {}
    with ModelWriter(path, config, METADATA, TOKENIZER, TEMPLATE, encodings) as writer:
        for tensor in writer.tensors:
            data = stored[tensor.name] = random_bytes(tensor, config.group_size)
            for start in range(0, len(data), piece_size):
                writer.write(data[start : start + piece_size])
            writer.end_tensor()
    return stored


@pytest.fixture(scope="module", params=CONFIGS)
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("format") / "model.bin"
    write_model(path, CONFIGS[request.param], encodings=ENCODINGS.get(request.param))
    return path


def refusal(path: Path) -> str:
    """The one line with which a file is refused, without asking for more memory than MAX_ALLOCATION."""
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as caught:
            ModelFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert peak < MAX_ALLOCATION, f"{peak} bytes were allocated: {message}"
    return message


# ----------------------------------------------------------------------------
# Written and read


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_is_written_is_read(tmp_path: Path, tied: bool, architecture: str) -> None:
    config = format.Config(**vars(CONFIGS[architecture]) | {"tied_embedding": tied})
    encodings = ENCODINGS.get(architecture)
    if encodings:  # a tied embedding has no lm_head
        encodings = {name: encodings[name] for name in format.matrices(config)}
    stored = write_model(tmp_path / "model.bin", config, encodings=encodings)
    file = ModelFile(tmp_path / "model.bin")
    assert file.encodings == (encodings or {})
    assert file.config == config
    assert file.metadata == METADATA
    assert file.tokenizer == TOKENIZER
    assert file.template == TEMPLATE
    assert [tensor.name for tensor in file.tensors] == list(stored)
    assert all(bytes(file.data(tensor)) == stored[tensor.name] for tensor in file.tensors)
    assert all(sound for _, sound in file.verify())


def test_bytes_do_not_depend_on_the_pieces_they_were_written_in(tmp_path: Path, model: Path) -> None:
    file = ModelFile(model)
    write_model(tmp_path / "other.bin", file.config, piece_size=1 << 20, encodings=file.encodings)
    assert (tmp_path / "other.bin").read_bytes() == model.read_bytes()


def test_tensors_follow_each_other_aligned(model: Path) -> None:
    file = ModelFile(model)
    end = 0
    for tensor in file.tensors:
        assert tensor.offset == format.align(end)
        end = tensor.offset + tensor.size
    assert any(b.offset > a.offset + a.size for a, b in itertools.pairwise(file.tensors)), "no gap is tested"
    assert file.tensors_offset % format.PAGE == 0
    assert file.tensors_offset + end == model.stat().st_size


def test_sizes_beyond_four_gigabytes_are_exact() -> None:
    """A 32B-shaped model: no offset wraps."""
    values = vars(CONFIG) | {"dim": 5120, "hidden_dim": 25600, "n_layers": 64, "n_heads": 64, "n_kv_heads": 8}
    config = format.Config(**values | {"head_dim": 128, "vocab_size": 151936, "group_size": 64})
    assert config.n_parameters == 32_762_123_264
    last = format.tensors(config)[-1]
    weights = config.n_parameters * 66 // 64
    assert weights < last.offset + last.size < weights * 1.001


# ----------------------------------------------------------------------------
# The document


def table_after(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading of the document, header rows left out."""
    lines = iter(DOCUMENT.read_text().partition(f"\n## {heading}\n")[2].splitlines())
    rows = itertools.takewhile(
        lambda line: line.startswith("|"), itertools.dropwhile(lambda x: x[:1] != "|", lines)
    )
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][2:]


def test_document_has_every_header_field_at_its_offset() -> None:
    first, *documented, layers, reserved, crc = table_after("2. Header")
    assert first[:3] == ["0", "8 bytes", "magic"]
    assert bytes.fromhex(first[3].strip("`")) == format.MAGIC
    types = {"I": "u32", "Q": "u64", "d": "f64"}
    offset = len(format.MAGIC)
    for row, (name, code, (low, high)) in zip(documented, format.HEADER_FIELDS, strict=True):
        assert row[:3] == [str(offset), types[code], name]
        assert offset % struct.calcsize(code) == 0, f"{name} is not aligned"
        accepted = [eval(limit.replace("^", "**"), {}) for limit in row[3].split("..")]  # such as 0..2^63-1
        expected = (
            [format.VERSION, format.VERSION_WITH_ENCODINGS]
            if name == "version"
            else [HEADER_SIZE]
            if name == "header_size"
            else [low, high]
        )
        assert accepted == expected, name
        offset += struct.calcsize(code)
    assert layers[:3] == [str(offset), "128 bytes", "mlp_only_layers"]
    offset += 128
    assert reserved[:2] == [str(offset), f"{HEADER_SIZE - 4 - offset} bytes"]
    assert crc[:3] == [str(HEADER_SIZE - 4), "u32", "header CRC"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("qk_norm", "qkv_bias"), [(True, False), (False, True)])
def test_document_has_every_tensor_in_order(tied: bool, qk_norm: bool, qkv_bias: bool) -> None:
    values = vars(CONFIG) | {"tied_embedding": tied, "qk_norm": qk_norm, "qkv_bias": qkv_bias}
    config = format.Config(**values)
    sizes = {name: getattr(config, name) for name in ("dim", "hidden_dim", "head_dim", "vocab_size")}
    sizes |= {"q_dim": config.q_dim, "kv_dim": config.kv_dim}
    expected, block = [], []
    for name, shape, condition, *_ in table_after("4. Tensors"):
        flag, _, value = condition.partition(" = ")
        if condition != "always" and int(values[flag]) != int(value):
            continue
        formula = re.sub(r"(\d) (\w)", r"\1 * \2", shape).replace("/", "//")
        dims = eval(f"({formula.strip('()')},)", sizes)
        if ".layers.N." in name:
            block.append((name.strip("`"), dims))
            continue
        if block:
            for layer, (part, part_dims) in itertools.product(range(config.n_layers), block):
                expected.append((part.replace("N", str(layer), 1), part_dims))
            block = []
        expected.append((name.strip("`"), dims))
    assert [(tensor.name, tensor.shape) for tensor in format.tensors(config)] == expected


def test_document_has_the_tensors_of_experts_in_order() -> None:
    config = CONFIGS["qwen3_moe"]  # layer 1 has experts
    sizes = {name: getattr(config, name) for name in ("dim", "n_experts", "expert_hidden_dim")}
    expected = []
    for name, shape, _ in table_after("4.1 Layers with experts"):
        formula = re.sub(r"(\d) (\w)", r"\1 * \2", shape).strip("()")
        dims = eval(f"({formula},)", sizes)
        experts = range(config.n_experts if ".E." in name else 1)
        expected += [(name.strip("`").replace("N", "1", 1).replace(".E.", f".{e}."), dims) for e in experts]
    found = [(t.name, t.shape) for t in format.tensors(config) if t.name.startswith("model.layers.1.mlp.")]
    assert found == expected
    router = next(t for t in format.tensors(config) if t.name.endswith(format.ROUTER))
    assert not router.quantized and router.size == 4 * 6 * 96


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(16, 32, 32), (37, 192, 64), (128, 512, 256)])
def test_code_in_the_document_finds_every_weight(rows: int, columns: int, group_size: int) -> None:
    snippet = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert snippet
    namespace: dict[str, Any] = {}
    exec(snippet[1], namespace)
    random = np.random.default_rng(0)
    codes = random.integers(-127, 128, (rows, columns), np.int8)
    scales = random.random((rows, columns // group_size)).astype(np.float16)
    stored = quantization_oracle.tiles(codes, scales)
    assert len(stored) == format.matrix_size(rows, columns, group_size)
    for row, column in itertools.product(range(rows), range(columns)):
        place = row, column, columns, group_size
        assert struct.unpack_from("<b", stored, namespace["code_offset"](*place))[0] == codes[row, column]
        scale = struct.unpack_from("<e", stored, namespace["scale_offset"](*place))[0]
        assert scale == scales[row, column // group_size]
    back = quantization_oracle.untile(stored, rows, columns, group_size)
    assert (back[0] == codes).all()
    assert (back[1] == scales).all()


@pytest.mark.parametrize("encoding", ["int4", "int6"])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(16, 32, 32), (37, 192, 64)])
def test_code_in_the_document_finds_every_code_of_fewer_bits(
    rows: int, columns: int, group_size: int, encoding: str
) -> None:
    namespace: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        exec(snippet, namespace)
    random = np.random.default_rng(0)
    codes = random.integers(-31, 32, (rows, columns), np.int8)
    if encoding == "int4":
        codes = random.choice(quantization_oracle.CODEBOOK, (rows, columns))
    scales = random.random((rows, columns // group_size)).astype(np.float16)
    stored = quantization_oracle.tiles(codes, scales, encoding)
    assert len(stored) == format.matrix_size(rows, columns, group_size, format.Encoding(encoding))
    for row, column in itertools.product(range(rows), range(columns)):
        assert namespace[f"{encoding}_code"](stored, row, column, columns, group_size) == codes[row, column]
    tile_rows = np.frombuffer(stored, format.tile_row_type(columns, group_size, format.Encoding(encoding)))
    found_codes, found_scales = format.codes_and_scales(tile_rows)
    assert (found_codes[:rows] == codes).all() and (found_scales[:rows] == scales).all()


def test_example_in_the_document_is_right() -> None:
    namespace: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1], namespace)  # type: ignore[index]
    text = " ".join(DOCUMENT.read_text().split())
    assert f"+ 2 = {namespace['code_offset'](17, 70, 128, 64)}, and" in text
    assert f"+ 2 = {namespace['scale_offset'](17, 70, 128, 64)}." in text


# ----------------------------------------------------------------------------
# Damaged files


def extremes(code: str, value: float) -> list[float]:
    """Values a header field may have been given by accident or by malice, none the one it has."""
    if code == "d":
        candidates = [math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 5e-324, 1e308, -value, value * 2]
    else:
        largest = 2 ** (8 * struct.calcsize(code)) - 1
        near_powers = [2**bits + change for bits in (15, 16, 31, 32, 62, 63) for change in (-1, 0, 1)]
        candidates = [
            0,
            1,
            2,
            value - 1,
            value + 1,
            value * 2,
            value // 2,
            largest,
            largest - 1,
            *near_powers,
        ]
        candidates = [candidate for candidate in candidates if 0 <= candidate <= largest]
    return [candidate for candidate in dict.fromkeys(candidates) if candidate != value]


def describes_another_sound_model(name: str, value: float, config: format.Config) -> bool:
    """Whether a file with all CRCs right may have this value though no byte elsewhere changes."""
    low, high = next(limits for field, _, limits in format.HEADER_FIELDS if field == name)
    if name == "n_experts_per_token":
        return 1 <= value <= config.n_experts
    if name == "decoder_sparse_step":  # 1 or 2: layer 1 has experts
        return config.n_experts > 0 and value == 2
    if name == "norm_topk_prob":
        return config.n_experts > 0 and value == 1
    if name == "n_tokens":
        return max(METADATA["eos_token_ids"]) < value <= CONFIG.vocab_size
    if name == "vocab_size":  # rows within the last tile
        return CONFIG.n_tokens <= value <= format.align(CONFIG.vocab_size, format.TILE_ROWS)
    free = {"context", "rms_eps", "rope_theta", "rope_attention_scale", "architecture", "rope_type"}
    return name in free and low <= value <= high


def with_header(data: bytes, fields: dict[str, Any]) -> bytes:
    """The file under a header with a CRC that fits, but the sections_crc of `fields`."""
    return format.pack_header(fields) + data[HEADER_SIZE:]


def with_fitting_crcs(data: bytes, fields: dict[str, Any]) -> bytes:
    """The file under a header with both CRCs right: what someone writes who means it."""
    sections = data[HEADER_SIZE : fields["tensors_offset"]]
    crc = format.sections_crc(format.pack_header(fields), sections)
    return with_header(data, fields | {"sections_crc": crc})


def test_every_header_field_at_extremes_is_refused(tmp_path: Path, model: Path) -> None:
    """Under the old header CRC; under one that fits; and with all CRCs right."""
    path, data, file = tmp_path / "model.bin", model.read_bytes(), ModelFile(model)
    fields, refused = file.fields(), 0
    faults = [(name, x) for name, code, _ in format.HEADER_FIELDS for x in extremes(code, fields[name])]
    for name, value in faults:
        changed = fields | {name: value}
        path.write_bytes(with_header(data, changed)[: HEADER_SIZE - 4] + data[HEADER_SIZE - 4 :])
        assert "CRC" in refusal(path) or name == "version", f"{name} = {value}"
        path.write_bytes(with_header(data, changed))
        assert re.search(r"\d", refusal(path)), f"{name} = {value}"
        refused += 2
        if name != "sections_crc" and not describes_another_sound_model(name, value, file.config):
            path.write_bytes(with_fitting_crcs(data, changed))
            assert re.search(r"\d", refusal(path)), f"{name} = {value}"
            refused += 1
    assert refused > 900


def test_pairs_of_header_fields_are_refused(tmp_path: Path, model: Path) -> None:
    """Two wrong fields under a matching CRC do not cancel out, such as swapped sizes."""
    path, data, fields = tmp_path / "model.bin", model.read_bytes(), ModelFile(model).fields()
    integers = [name for name, code, _ in format.HEADER_FIELDS if code != "d" and "crc" not in name]
    refused = 0
    for first, second in itertools.combinations(integers, 2):
        if fields[first] == fields[second]:
            continue
        path.write_bytes(with_fitting_crcs(data, fields | {first: fields[second], second: fields[first]}))
        refusal(path)
        refused += 1
    assert refused > 300


def boundaries(file: ModelFile) -> Iterator[int]:
    """Every offset at which a part or tensor starts or ends."""
    fields = file.fields()
    yield from (0, len(format.MAGIC), HEADER_SIZE - 4, HEADER_SIZE)
    for section in ("metadata", "tokenizer", "template", "checksums"):
        yield fields[f"{section}_offset"]
        yield fields[f"{section}_offset"] + fields[f"{section}_size"]
    for tensor in file.tensors:
        yield file.tensors_offset + tensor.offset
        yield file.tensors_offset + tensor.offset + tensor.size


def test_file_cut_at_any_boundary_is_refused(tmp_path: Path, model: Path) -> None:
    path, data = tmp_path / "model.bin", model.read_bytes()
    sizes = {at + change for at in boundaries(ModelFile(model)) for change in (-1, 0, 1)}
    sizes = {size for size in sizes if 0 <= size != len(data)}
    assert len(sizes) > 90
    for size in sizes:
        path.write_bytes(data[:size].ljust(size, b"\0"))
        message = refusal(path)
        assert size < HEADER_SIZE or str(size) in message, message


def test_file_with_something_appended_is_refused(tmp_path: Path, model: Path) -> None:
    path, data = tmp_path / "model.bin", model.read_bytes()
    for extra in (b"\0", b"x" * 63, bytes(4096), data):
        path.write_bytes(data + extra)
        assert str(len(data) + len(extra)) in refusal(path)


def test_flipped_bit_before_the_tensors_is_refused(tmp_path: Path, model: Path) -> None:
    path, file = tmp_path / "model.bin", ModelFile(model)
    damaged = bytearray(model.read_bytes())
    fields = file.fields()
    places = list(range(HEADER_SIZE))
    for section in ("metadata", "tokenizer", "template", "checksums"):
        start, size = fields[f"{section}_offset"], fields[f"{section}_size"]
        places += range(start, start + size, max(size // 40, 1))
        places.append(start + size)  # the gap after it
    assert len(places) > 600
    for place in places:
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        refusal(path)
        damaged[place] ^= 1 << place % 8
    path.write_bytes(damaged)
    ModelFile(path)  # and undamaged it is accepted


def with_section(data: bytes, fields: dict[str, Any], name: str, content: bytes) -> bytes:
    """The file with a section replaced by one of the same length, and CRCs that fit."""
    start, size = fields[f"{name}_offset"], fields[f"{name}_size"]
    assert len(content) == size
    data = data[:start] + content + data[start + size :]
    return with_fitting_crcs(data, fields)


BAD_METADATA: dict[str, Any] = {
    "not JSON": b"{",
    "not UTF-8": b'{"name": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "nested too deeply": b"[" * 20_000,
    "no name": {"name": None},
    "name a number": {"name": 5},
    "no thinking": {"thinking": None},
    "unknown thinking": {"thinking": "maybe"},
    "eos beyond the tokens": {"eos_token_ids": [80]},
    "eos negative": {"eos_token_ids": [-1]},
    "eos true": {"eos_token_ids": [True]},
    "eos a number": {"eos_token_ids": 3},
    "eos a fraction": {"eos_token_ids": [1.5]},
    "generation a list": {"generation": []},
    "generation text": {"generation": {"top_k": "20"}},
    "generation NaN": {"generation": {"top_p": math.nan}},
    "generation infinite": {"generation": {"top_p": math.inf}},
    "generation true": {"generation": {"top_k": True}},
    "generation of 401 digits": {"generation": {"temperature": 10**400}},
    "generation of a long name": {"generation": {"x" * 500: None}},
    "source a number": {"source": 3},
    "source null": {"source": None},
    "special_tokens a list": {"special_tokens": ["<s>"]},
    "special_tokens of numbers": {"special_tokens": {"bos_token": 1}},
    "eos of 401 digits": {"eos_token_ids": [10**400]},
    "eos of many": {"eos_token_ids": [-1] * 3000},
    "name a long list": {"name": ["x"] * 3000},
    "another key of 401 digits": {"other": [{"a": -(10**400)}]},
    "another key infinite": {"other": -math.inf},
    "another key with a surrogate in it": {"other": {"a": ["x\ud800"]}},
    "another key that is a surrogate": {"other": {"\udfff": 1}},
    "another key nested deeply": {"other": json.loads("[" * 40 + "]" * 40)},
}


@pytest.mark.parametrize("fault", BAD_METADATA)
def test_metadata_is_checked(tmp_path: Path, model: Path, fault: str) -> None:
    path, data, fields = tmp_path / "model.bin", model.read_bytes(), ModelFile(model).fields()
    bad = BAD_METADATA[fault]
    content = bad if isinstance(bad, bytes) else json.dumps(NEEDED | bad).encode()
    path.write_bytes(with_section(data, fields, "metadata", content.ljust(fields["metadata_size"])))
    message = refusal(path)
    assert "metadata: " in message and len(message) < len(str(path)) + 250
    message.encode()
    if isinstance(bad, dict):
        assert next(iter(bad)) in message


def test_the_writer_refuses_what_readers_refuse(tmp_path: Path) -> None:
    for bad in BAD_METADATA.values():
        if isinstance(bad, dict):
            with pytest.raises(ValueError, match=next(iter(bad))):
                ModelWriter(tmp_path / "model.bin", CONFIG, METADATA | bad, TOKENIZER, TEMPLATE)


def test_template_must_be_text(tmp_path: Path, model: Path) -> None:
    path, data, fields = tmp_path / "model.bin", model.read_bytes(), ModelFile(model).fields()
    content = b"\xff".ljust(fields["template_size"])
    path.write_bytes(with_section(data, fields, "template", content))
    assert "template: " in refusal(path)


class Canary:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.path, "executed")


def test_wrong_kinds_of_file_are_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    contents = {
        "empty": b"",
        "one byte": b"Q",
        "magic alone": format.MAGIC,
        "text": b"hello\n" * 1000,
        "zeros": bytes(100_000),
        "safetensors": (2).to_bytes(8, "little") + b"{}" + bytes(1000),
        "gguf": b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(1000),
        "pickle": pickle.dumps(Canary(canary)),
        "zip": b"PK\x03\x04" + bytes(1000),
        "llama2.c": struct.pack("<7i", 288, 768, 6, 6, 6, 32000, 256) + bytes(1000),
        "big-endian": format.MAGIC[::-1] + bytes(1000),
        "magic in another line-ending": format.MAGIC.replace(b"\n", b"\r\n") + bytes(1000),
    }
    for kind, content in contents.items():
        path = tmp_path / f"{kind}.bin"
        path.write_bytes(content)
        message = refusal(path)
        assert "not a model.bin" in message or "header is 8 bytes" in message, kind
    assert not canary.exists()


def test_other_versions_are_refused_by_number(tmp_path: Path, model: Path) -> None:
    """A file of another version is named as such, even if its header has another form."""
    path = tmp_path / "model.bin"
    for version in (0, 3, 99, 2**32 - 1):
        path.write_bytes(format.MAGIC + version.to_bytes(4, "little") + os.urandom(5000))
        assert f"format version {version}, this program reads 1 and 2" in refusal(path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    kinds = {
        tmp_path: "is a directory",
        tmp_path / "missing": "No such file",
        tmp_path / "link": "No such file",
        tmp_path / "loop": "symbolic links",
        tmp_path / "fifo": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        Path("/dev/null"): "not a regular file",
    }
    for path, reason in kinds.items():
        assert reason in refusal(path)


def test_unreadable_file_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: str, flags: int) -> int:  # what open() does to a file of mode 000, unless root asks
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", deny)
    assert "Permission denied" in refusal(model)


def test_huge_file_of_nothing_is_refused(tmp_path: Path, model: Path) -> None:
    """A sparse terabyte under a header that says so: nothing is read but the header, and `encodings`."""
    path, fields = tmp_path / "model.bin", ModelFile(model).fields()
    with open(path, "wb") as file:
        file.write(format.pack_header(fields | {"file_size": 2**40}))
        file.truncate(2**40)
    wrong = "checksums_size" if fields["version"] == format.VERSION_WITH_ENCODINGS else str(2**40)
    assert wrong in refusal(path)


# ----------------------------------------------------------------------------
# verify


def unsound(path: Path) -> list[str]:
    return [tensor.name for tensor, sound in ModelFile(path).verify() if not sound]


def test_verify_finds_a_flipped_bit_in_any_tensor(tmp_path: Path, model: Path) -> None:
    path, file = tmp_path / "model.bin", ModelFile(model)
    damaged = bytearray(model.read_bytes())
    for i, tensor in enumerate(file.tensors):
        for place in (0, tensor.size // 2 + i, tensor.size - 1):
            place = file.tensors_offset + tensor.offset + min(place, tensor.size - 1)
            damaged[place] ^= 1 << i % 8
            path.write_bytes(damaged)
            assert unsound(path) == [tensor.name]
            damaged[place] ^= 1 << i % 8
    path.write_bytes(damaged)
    assert unsound(path) == []


def test_verify_finds_bytes_hidden_between_tensors(tmp_path: Path, model: Path) -> None:
    path, file, damaged = tmp_path / "model.bin", ModelFile(model), bytearray(model.read_bytes())
    for before, after in itertools.pairwise(file.tensors):
        if before.offset + before.size < after.offset:
            damaged[file.tensors_offset + after.offset - 1] = 1
            path.write_bytes(damaged)
            assert unsound(path) == [after.name]
            damaged[file.tensors_offset + after.offset - 1] = 0


def with_values(model: Path, tensor: format.Tensor, place: int, content: bytes) -> bytes:
    """The file with other bytes in a tensor, under a checksum that fits."""
    file, data = ModelFile(model), model.read_bytes()
    start = file.tensors_offset + tensor.offset
    data = data[: start + place] + content + data[start + place + len(content) :]
    checksums = list(file.checksums)
    checksums[file.tensors.index(tensor)] = zlib.crc32(data[start : start + tensor.size])
    packed = struct.pack(f"<{len(checksums)}I", *checksums)
    return with_section(data, file.fields(), "checksums", packed)


@pytest.mark.parametrize(
    ("place", "content"),
    [
        (5, b"\x80"),  # code -128
        (16 * 32, struct.pack("<e", math.nan)),
        (16 * 32 + 2, struct.pack("<e", math.inf)),
        (16 * 32 + 30, struct.pack("<e", -1.0)),
    ],
)
def test_verify_finds_values_no_exporter_writes(
    tmp_path: Path, model: Path, place: int, content: bytes
) -> None:
    path = tmp_path / "model.bin"
    tensor = next(tensor for tensor in ModelFile(model).tensors if tensor.quantized)
    path.write_bytes(with_values(model, tensor, place, content))
    assert unsound(path) == [tensor.name]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "model.bin"
    write_model(path, encodings=ENCODINGS["mixed"])
    return path


@pytest.mark.parametrize(
    ("name", "place", "content"),
    [
        ("qk", 3, b"\x80"),  # -128 in a codebook
        ("qk", 20, b"\1"),  # behind a codebook
        ("qk", 32 + 16 * 16, struct.pack("<e", math.nan)),
        ("qk", 32 + 16 * 16 + 30, struct.pack("<e", -math.inf)),
        ("v", 16 * 24, struct.pack("<e", math.inf)),
        ("v", 16 * 24 + 30, struct.pack("<e", -1.0)),
    ],
)
def test_verify_finds_what_no_encoding_of_fewer_bits_holds(
    tmp_path: Path, mixed: Path, name: str, place: int, content: bytes
) -> None:
    path = tmp_path / "model.bin"
    tensor = next(t for t in ModelFile(mixed).tensors if t.name.endswith(f"0.self_attn.{name}_proj.weight"))
    path.write_bytes(with_values(mixed, tensor, place, content))
    assert unsound(path) == [tensor.name]


def test_verify_finds_the_code_that_int6_has_no_use_for(tmp_path: Path, mixed: Path) -> None:
    path, file = tmp_path / "model.bin", ModelFile(mixed)
    tensor = next(t for t in file.tensors if t.encoding is format.Encoding.INT6)
    data = bytearray(file.data(tensor))
    data[0] &= 0xF0  # the code of row 0, column 0: no low bits, and no high ones
    data[16 * 16] &= 0xFC
    path.write_bytes(with_values(mixed, tensor, 0, bytes(data)))
    assert unsound(path) == [tensor.name]


def encodings_place(file: ModelFile) -> tuple[int, int]:
    fields = file.fields()
    start = format.align(fields["template_offset"] + fields["template_size"])
    return start, len(format.matrices(file.config))


def with_encodings(model: Path, numbers: bytes) -> bytes:
    """The file with other numbers in its section `encodings`, and CRCs that fit."""
    file = ModelFile(model)
    start, size = encodings_place(file)
    assert len(numbers) == size
    data = model.read_bytes()
    return with_fitting_crcs(data[:start] + numbers + data[start + size :], file.fields())


def test_every_number_of_an_encoding_is_checked(tmp_path: Path, mixed: Path) -> None:
    """With or without CRCs that fit: an unknown number by its name, a known one by the sizes that follow."""
    path, file, data = tmp_path / "model.bin", ModelFile(mixed), mixed.read_bytes()
    start, size = encodings_place(file)
    for place, name in enumerate(format.matrices(file.config)):
        for number in range(256):
            if number == data[start + place]:
                continue
            numbers = bytearray(data[start : start + size])
            numbers[place] = number
            path.write_bytes(with_encodings(mixed, bytes(numbers)))
            message = refusal(path)
            if number > 2:
                assert f"encodings: {name} has the number {number}, known are 0..2" in message
            if number < 4:
                damaged = bytearray(data)
                damaged[start + place] = number
                path.write_bytes(damaged)
                refusal(path)


def test_a_file_of_int8_alone_under_the_newer_version_is_refused(tmp_path: Path) -> None:
    path, writer = (
        tmp_path / "model.bin",
        ModelWriter(tmp_path / "model.bin", CONFIG, METADATA, TOKENIZER, ""),
    )
    writer._version = format.VERSION_WITH_ENCODINGS
    writer._sections["encodings"] = bytes(len(format.matrices(CONFIG)))
    writer._fields = writer._layout()
    with writer:
        for tensor in writer.tensors:
            writer.write(random_bytes(tensor, CONFIG.group_size))
            writer.end_tensor()
    assert refusal(path) == f"{path}: format version 2, but all of it is INT8"


def test_neighbours_of_one_encoding_are_one_matrix(mixed: Path) -> None:
    file = ModelFile(mixed)
    names = [tensor.name.split(".")[-2] for tensor in file.tensors if tensor.role is format.Role.QKV]
    assert names == ["qk_proj", "v_proj"] * CONFIG.n_layers
    stored = [tensor for tensor in file.tensors if tensor.role is format.Role.QKV]
    parts = [[part.name.split(".")[-2] for part in tensor.parts] for tensor in stored]
    assert parts == [["q_proj", "k_proj"], ["v_proj"]] * CONFIG.n_layers


def test_a_gate_and_its_up_have_one_encoding() -> None:
    encodings = {"model.layers.1.mlp.gate_proj.weight": format.Encoding.INT4}
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj.weight is int4, .* is int8: "):
        format.tensors(CONFIG, encodings)


def test_a_file_of_int8_alone_has_no_trace_of_encodings(tmp_path: Path) -> None:
    write_model(tmp_path / "old.bin")
    every = dict.fromkeys(format.matrices(CONFIG), format.Encoding.INT8)
    write_model(tmp_path / "new.bin", encodings=every)
    assert (tmp_path / "old.bin").read_bytes() == (tmp_path / "new.bin").read_bytes()
    assert ModelFile(tmp_path / "new.bin").fields()["version"] == 1


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_vector_that_is_not_finite_is_refused_by_name(tmp_path: Path, model: Path, value: float) -> None:
    """Norms, biases, rope frequencies, routers: with INT8 activations such a number would become text."""
    path, vectors = tmp_path / "model.bin", [t for t in ModelFile(model).tensors if not t.quantized]
    assert format.ROPE_TENSOR in {t.name for t in vectors}
    for i, tensor in enumerate(vectors):
        at = (0, 3, tensor.size // 4 - 1)[i % 3]
        path.write_bytes(with_values(model, tensor, 4 * at, struct.pack("<f", value)))
        assert refusal(path) == f"{path}: {tensor.name}: value {at} is not a finite number"


# ----------------------------------------------------------------------------
# The writer


def leftovers(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.name.endswith(".tmp"))


def test_exception_while_writing_leaves_the_target_untouched(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), ModelWriter(path, CONFIG, METADATA, TOKENIZER, TEMPLATE) as writer:
        writer.write(b"half a tensor")
        assert len(leftovers(tmp_path)) == 1
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_unfinished_file_is_never_loadable(tmp_path: Path) -> None:
    """Interrupted anywhere, even just before the header: the magic is written last."""
    path = tmp_path / "model.bin"
    with pytest.raises(KeyboardInterrupt), ModelWriter(path, CONFIG, METADATA, TOKENIZER, TEMPLATE) as writer:
        for tensor in writer.tensors:
            writer.write(random_bytes(tensor, CONFIG.group_size))
            writer.end_tensor()
        writer._file.flush()
        assert "not a model.bin" in refusal(tmp_path / leftovers(tmp_path)[0])
        raise KeyboardInterrupt
    assert not path.exists()


def test_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents, fsync, header, fsync, rename, fsync of the directory: no power cut leaves half a file."""
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            steps.append("fsync directory")
        else:
            has_header = (tmp_path / leftovers(tmp_path)[0]).read_bytes().startswith(format.MAGIC)
            steps.append("fsync with header" if has_header else "fsync without header")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        assert ModelFile(source).metadata == METADATA
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_model(tmp_path / "model.bin")
    assert steps == ["fsync without header", "fsync with header", "rename", "fsync directory"]


@pytest.mark.parametrize("change", [-1, 1])
def test_tensor_of_the_wrong_size_is_an_error(tmp_path: Path, change: int) -> None:
    with (
        pytest.raises(ValueError, match=r"rope\.inverse_frequencies: wrote up to \d+, expected 80"),
        ModelWriter(tmp_path / "model.bin", CONFIG, METADATA, TOKENIZER, TEMPLATE) as writer,
    ):
        writer.write(bytes(writer.tensors[0].size + change))
        writer.end_tensor()
    assert list(tmp_path.iterdir()) == []


def test_missing_tensor_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="wrote 0 of 20 tensors"),
        ModelWriter(tmp_path / "model.bin", CONFIG, METADATA, TOKENIZER, TEMPLATE),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 48}, "group_size is 48"),
        ({"group_size": 64}, "dim = 96 is not a multiple of group_size = 64"),
        ({"hidden_dim": 161}, "hidden_dim = 161 is not a multiple of group_size = 32"),
        ({"head_dim": 42}, r"n_heads \* head_dim = 504 is not a multiple of group_size = 32"),
        ({"n_kv_heads": 5}, "n_heads = 12 is not a multiple of n_kv_heads = 5"),
        ({"n_kv_heads": 0}, r"n_kv_heads = 0 is outside 1\.\.1024"),
        ({"n_layers": 1025}, r"n_layers = 1025 is outside 1\.\.1024"),
        ({"n_heads": 32, "n_kv_heads": 1, "head_dim": 39}, "head_dim = 39 is odd"),
        ({"n_tokens": 91}, "n_tokens = 91 exceeds vocab_size = 90"),
        ({"n_experts_per_token": 2}, "n_experts_per_token is 2, but n_experts = 0"),
        ({"mlp_only_layers": (1,)}, r"mlp_only_layers is \(1,\), but n_experts = 0"),
        (EXPERTS | {"n_experts_per_token": 7}, "n_experts_per_token = 7 exceeds n_experts = 6"),
        (EXPERTS | {"decoder_sparse_step": 0}, "decoder_sparse_step = 0, but n_experts = 6"),
        (EXPERTS | {"expert_hidden_dim": 40}, "expert_hidden_dim = 40 is not a multiple of group_size = 32"),
        (EXPERTS | {"mlp_only_layers": (2,)}, r"mlp_only_layers is \[2\], not layers below 2"),
        (EXPERTS | {"mlp_only_layers": (1, 0)}, r"mlp_only_layers is \[1, 0\], not layers below 2"),
        (
            EXPERTS | {"n_layers": 1024, "n_experts": 1024},
            "n_layers = 1024 of n_experts = 1024 are more than",
        ),
        ({"rms_eps": 0.0}, "rms_eps = 0.0 is outside"),
        ({"rope_theta": math.nan}, "rope_theta = nan is outside"),
    ],
)
def test_writer_refuses_what_no_reader_accepts(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = format.Config(**vars(CONFIG) | changes)
    with pytest.raises(ValueError, match=message):
        ModelWriter(tmp_path / "model.bin", config, METADATA, TOKENIZER, TEMPLATE)
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_sections_no_reader_accepts(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with pytest.raises(ValueError, match="template_size = 1048577 is outside"):
        ModelWriter(path, CONFIG, METADATA, TOKENIZER, "x" * (format.MAX_TEMPLATE + 1))
    with pytest.raises(ValueError, match="tokenizer_size = 0 is outside"):
        ModelWriter(path, CONFIG, METADATA, b"", TEMPLATE)
    with pytest.raises(ValueError, match="metadata_size = .* is outside"):
        ModelWriter(path, CONFIG, METADATA | {"name": "x" * format.MAX_JSON}, TOKENIZER, TEMPLATE)
    with pytest.raises(ValueError, match="tokenizer has a zero byte"):
        ModelWriter(path, CONFIG, METADATA, TOKENIZER + b"\0", TEMPLATE)
    with pytest.raises(ValueError, match="surrogates"):
        ModelWriter(path, CONFIG, METADATA, TOKENIZER, "\ud800")


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """Files of others, and the temporary of a writer at work, are left alone."""
    path = tmp_path / "model[1].bin"
    dead = tmp_path / f".{path.name}.0123abcd.tmp"
    others = [
        tmp_path / name for name in (".model1.bin.0123abcd.tmp", f".{path.name}.tmp", f"{path.name}.bak")
    ]
    for file in (dead, *others):
        file.write_bytes(b"x")
    with pytest.raises(KeyboardInterrupt), ModelWriter(path, CONFIG, METADATA, TOKENIZER, TEMPLATE) as writer:
        alive = writer._temporary
        assert not dead.exists()
        write_model(path)
        assert alive.exists()
        raise KeyboardInterrupt
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])
    assert unsound(path) == []


def test_many_writers_of_one_target_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with ThreadPoolExecutor(4) as writers:
        list(writers.map(write_model, [path] * 20))
    assert unsound(path) == []
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_a_mapped_file_changes_nothing_for_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_model(path)
    file = ModelFile(path)
    write_model(path, format.Config(**vars(CONFIG) | {"n_layers": 1}))
    assert all(sound for _, sound in file.verify())
    assert len(file.tensors) > len(ModelFile(path).tensors)
