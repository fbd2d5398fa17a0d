"""Blocks of a GGUF file give the weights that ggml reads from them; where they are rounded, it is said.

python -m pytest tests/convert/test_gguf_blocks.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_gguf import Tensors, gguf_name, of_blocks, pair_rows, random_blocks, small_gguf, write_gguf
from small_models import small_weights

from qwen3c import Model, engine, format
from qwen3c.cli.export import main
from qwen3c.convert import gguf_blocks as blocks, quantise, recipe
from qwen3c.convert.export import Report, export
from qwen3c.convert.gguf import GGUF
from qwen3c.convert.huggingface import Checkpoint
from qwen3c.convert.source import BLOCKS, SourceError, to_float32
from qwen3c.format import Encoding, ModelFile

WIDE: dict[str, Any] = {
    "dim": 256,
    "hidden_dim": 256,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 64,
    "n_layers": 1,
}
MOE: dict[str, Any] = {"architecture": "qwen3_moe", "n_experts": 5, "expert_hidden_dim": 64, "dim": 128}
LLAMA: dict[str, Any] = {"architecture": "llama", "n_heads": 4, "n_kv_heads": 2, "head_dim": 24, "dim": 96}
# k and v of 24 rows: tile rows that hold rows of two tensors; 500 rows of vocabulary: one that is not full
UNEVEN: dict[str, Any] = {"dim": 96, "n_heads": 8, "n_kv_heads": 2, "head_dim": 12, "vocab_size": 500}
EXACT = {"Q4_0": Encoding.INT4, "MXFP4": Encoding.INT4, "Q5_0": Encoding.INT6, "Q8_0": Encoding.INT8}


def raw(data: NDArray[Any]) -> memoryview:
    return data.view("u1").data.cast("B")


def made(tmp_path: Path, kinds: Any, bits: str | None = None, **shape: Any) -> tuple[Model, Tensors, Report]:
    """The model of random blocks, what the file held, and the report."""
    keys, tensors = of_blocks(kinds, **shape)
    path, target = write_gguf(tmp_path / "model.gguf", keys, tensors), tmp_path / "model.bin"
    report = export(path, target, force=True, recipe=recipe.of_bits(bits) if bits else None)
    assert all(sound for _, sound in ModelFile(target).verify())
    return Model(target, activations="float32", kv="f32"), tensors, report


def expected_weights(tensors: Tensors, **shape: Any) -> dict[str, NDArray[np.float32]]:
    """The matrices of the file by their Hugging Face names, rows in transformers' order."""
    result = {}
    for name, weights in small_weights(**shape).items():
        before, experts, after = name.partition(".mlp.experts.")
        expert, _, kind = after.partition(".")
        stored = f"{before}{experts}{kind.removesuffix('.weight')}" if experts else name
        dtype, dims, data = tensors[gguf_name(stored)]
        if len(dims) > 1:
            found = to_float32(memoryview(data), dtype).reshape(dims)
            found = found[int(expert)] if experts else found
            if shape.get("architecture") == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                halves = found.reshape(-1, shape["head_dim"] // 2, 2, found.shape[1])
                found = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(found.shape)
            result[name] = found.reshape(weights.shape)
    return result


def lost(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(found - expected).sum() / np.square(expected).sum()))


# ----------------------------------------------------------------------------
# Decoded as ggml does


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_weights_are_those_of_the_package_to_the_bit(kind: str) -> None:
    """Whatever the bytes are: scales that are NaN, infinite or negative too."""
    package = pytest.importorskip("gguf")
    layout, ggml = blocks.KINDS[kind], package.GGMLQuantizationType[kind]
    assert package.GGML_QUANT_SIZES[ggml] == (layout.weights, layout.size)
    data = np.random.default_rng(0).integers(0, 256, (20_000, layout.size), np.uint8)
    with np.errstate(all="ignore"):
        expected = package.quants.dequantize(data, ggml).ravel()
    found = blocks.dequantize(raw(data), kind)
    same = found.view("u4") == expected.view("u4")
    assert (same | np.isnan(found) & np.isnan(expected)).all()


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_a_block_is_as_large_as_its_fields(kind: str) -> None:
    layout = blocks.KINDS[kind]
    assert np.dtype([*layout.fields]).itemsize == layout.size == BLOCKS[kind][1]


def test_blocks_packed_by_hand() -> None:
    """Nibble j is weight j in its low half, weight j + 16 in its high half; bit j of Q5_0 is weight j's."""
    half = np.float16(0.5).tobytes()
    nibbles = bytes(j | (15 - j) << 4 for j in range(16))
    order = np.array([*range(16), *range(15, -1, -1)])
    found = blocks.dequantize(memoryview(half + nibbles), "Q4_0")
    assert (found == (order - 8) * 0.5).all()
    found = blocks.dequantize(memoryview(half + b"\1\0\0\x80" + nibbles), "Q5_0")
    fifth = np.zeros(32)
    fifth[[0, 31]] = 16
    assert (found == (order + fifth - 16) * 0.5).all()
    found = blocks.dequantize(memoryview(b"\x80" + nibbles), "MXFP4")
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # E2M1
    assert (found == 2.0 * np.array([*numbers, *-numbers])[order]).all()
    # Q6_K: the scale 0.5, of the groups 1, 2, ... 16; code 33 everywhere: low nibble 1, upper bits 2
    q6_k = b"\x11" * 128 + b"\xaa" * 64 + bytes(range(1, 17)) + half
    assert (blocks.dequantize(memoryview(q6_k), "Q6_K") == np.repeat(np.arange(1, 17), 16) * 0.5).all()


# ----------------------------------------------------------------------------
# Code for code


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("shape", [{}, UNEVEN, MOE, LLAMA])
def test_codes_that_an_encoding_holds_are_taken_over(
    tmp_path: Path, shape: dict[str, Any], kind: str
) -> None:
    model, tensors, report = made(tmp_path, kind, **shape)
    file = ModelFile(tmp_path / "model.bin")
    assert {t.encoding for t in file.tensors if t.quantized} == {EXACT[kind]}
    assert file.config.group_size == 32
    for name, weights in expected_weights(tensors, **shape).items():
        assert np.array_equal(model.weight(name), weights), name
    assert all(error.worst == 0 for error in report.errors.values())


@pytest.mark.parametrize(
    ("kind", "bits"), [("Q4_0", "6"), ("Q4_0", "8"), ("Q5_0", "8"), ("IQ4_NL", "8"), ("MXFP4", "6")]
)
def test_more_bits_hold_them_too(tmp_path: Path, kind: str, bits: str) -> None:
    model, tensors, _ = made(tmp_path, kind, bits, **UNEVEN)
    for name, weights in expected_weights(tensors, **UNEVEN).items():
        assert np.array_equal(model.weight(name), weights), name


@pytest.mark.parametrize("shape", [{}, UNEVEN, LLAMA])
def test_logits_of_q4_0_do_not_depend_on_the_encoding(tmp_path: Path, shape: dict[str, Any]) -> None:
    """With float activations a product is a function of the weights alone: the same, to the bit."""
    ids, logits = list(range(5, 90)), []
    for bits in (None, "6", "8"):
        model, _, _ = made(tmp_path, "Q4_0", bits, **shape)
        logits.append(model.session().forward(ids, logits="all"))
    assert np.isfinite(logits[0]).all() and np.ptp(logits[0]) > 0
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])


def test_logits_of_q4_0_are_those_of_transformers_on_dequantised_weights(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    shape: dict[str, Any] = {"n_heads": 2, "n_kv_heads": 1, "head_dim": 128, "tied": False}
    model, _, _ = made(tmp_path, "Q4_0", **shape)
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    ids = list(range(5, 100))
    with torch.no_grad():
        expected = hf(torch.tensor([ids])).logits[0].numpy().astype(np.float64)
    error = model.session().forward(ids, logits="all") - expected
    assert (error**2).sum() <= 1e-10 * (expected**2).sum()


def test_a_tile_row_of_two_codebooks_is_rounded_and_all_others_are_not(tmp_path: Path) -> None:
    """Rows 96..119 of qkv_proj are k's: the tile rows 96..111 and 112..127 are of k alone, and of k and v."""
    kinds = {
        "attn_q": "Q4_0",
        "attn_k": "MXFP4",
        "attn_v": "Q4_0",
        "attn_output": "Q4_0",
        "ffn": "Q4_0",
        "token": "Q4_0",
    }
    model, tensors, report = made(tmp_path, kinds, **UNEVEN | {"n_layers": 1})
    for name, weights in expected_weights(tensors, **UNEVEN | {"n_layers": 1}).items():
        same = (model.weight(name) == weights).all(axis=1)
        rounded = {"k_proj": [*range(16, 24)], "v_proj": [*range(8)]}.get(name.split(".")[-2], [])
        assert np.flatnonzero(~same).tolist() == rounded, name
        assert lost(model.weight(name), weights) < 0.15
    (line,) = [line for line in report.loss_lines() if line.startswith("MXFP4 and Q4_0")]
    assert "as they are, of the others" in line


def with_exponent(tensors: Tensors, row: int, exponent: int) -> NDArray[np.float32]:
    """Give the first block of a row of layer 0's ffn_up this exponent; returns the weights."""
    kind, dims, data = tensors["blk.0.ffn_up.weight"]
    found = blocks.KINDS[kind].blocks(memoryview(data)).copy().reshape(dims[0], -1)
    found["exponent"][row, 0] = exponent
    found["exponent"][40, 1], found["nibbles"][40, 1] = 0, 0x80  # zeros, of whatever scale
    tensors["blk.0.ffn_up.weight"] = (kind, dims, found.tobytes())
    return to_float32(raw(found.ravel()), kind).reshape(dims)


def test_a_scale_of_mxfp4_below_those_of_fp16_becomes_the_nearest(tmp_path: Path) -> None:
    keys, tensors = of_blocks("MXFP4")
    weights = with_exponent(tensors, 20, 102)  # 2^-26
    report = export(write_gguf(tmp_path / "model.gguf", keys, tensors), tmp_path / "model.bin")
    found = Model(tmp_path / "model.bin").weight("model.layers.0.mlp.up_proj.weight")
    assert np.flatnonzero(~(found == weights).all(axis=1)).tolist() == [20]
    assert np.abs(found - weights).max() <= 12 * 2.0**-26
    loss = report.losses["MXFP4", Encoding.INT4]
    assert loss.weights - loss.taken_over == weights.shape[1] and 0 < loss.worst <= 12 * 2.0**-26


def test_a_scale_of_mxfp4_above_those_of_fp16_is_rounded_with_its_tile_row(tmp_path: Path) -> None:
    keys, tensors = of_blocks("MXFP4")
    weights = with_exponent(tensors, 20, 144)  # 2^16
    report = export(write_gguf(tmp_path / "model.gguf", keys, tensors), tmp_path / "model.bin")
    found = Model(tmp_path / "model.bin").weight("model.layers.0.mlp.up_proj.weight")
    assert np.flatnonzero(~(found == weights).all(axis=1)).tolist() == [*range(16, 32)]
    assert lost(found[16:32], weights[16:32]) < 0.15
    loss = report.losses["MXFP4", Encoding.INT4]
    assert loss.weights - loss.taken_over == 16 * weights.shape[1]


# ----------------------------------------------------------------------------
# Rounded


@pytest.mark.parametrize(
    ("kind", "encoding", "most"),
    [
        ("Q4_1", Encoding.INT6, 0.025),
        ("Q5_1", Encoding.INT6, 0.025),
        ("Q2_K", Encoding.INT4, 0.09),
        ("Q3_K", Encoding.INT4, 0.09),
        ("Q4_K", Encoding.INT6, 0.025),
        ("Q5_K", Encoding.INT6, 0.025),
        ("Q6_K", Encoding.INT8, 0.007),
        ("IQ4_NL", Encoding.INT4, 0.017),
        ("IQ4_XS", Encoding.INT4, 0.017),
    ],
)
def test_others_lose_little_and_the_report_says_how_much(
    tmp_path: Path, kind: str, encoding: Encoding, most: float
) -> None:
    model, tensors, report = made(tmp_path, kind, **WIDE)
    weights = expected_weights(tensors, **WIDE)
    found = np.concatenate([model.weight(name).ravel() for name in weights])
    off = lost(found, np.concatenate([w.ravel() for w in weights.values()]))
    assert 0 < off < most
    assert [*report.losses] == [(kind, encoding)]
    (loss,) = report.losses.values()
    assert loss.tensors == len(weights) and loss.relative == pytest.approx(off, rel=1e-3)
    (line,) = report.loss_lines()
    assert line.split() == [
        kind,
        "->",
        encoding.value.upper(),
        str(len(weights)),
        f"{loss.relative:.2%}",
        "lost",
    ]
    worst = max(np.abs(model.weight(name) - w).max() for name, w in weights.items())
    assert loss.worst == pytest.approx(worst, rel=1e-5)


def test_codes_of_iq4_lose_less_in_their_own_codebook_than_by_a_search(tmp_path: Path) -> None:
    model, tensors, _ = made(tmp_path, "IQ4_XS", **WIDE)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = expected_weights(tensors, **WIDE)[name]
    dims = (weights.shape[0], weights.shape[1])
    out = np.zeros(format.matrix_size(*dims, 32, Encoding.INT4), np.uint8)
    _, error, square, _ = engine.quantize_tiles([(raw(weights.ravel()), "F32")], 256, 32, out.data, "int4")
    assert lost(model.weight(name), weights) < 0.9 * (error / square) ** 0.5


def test_what_is_taken_over_is_called_so(tmp_path: Path) -> None:
    _, _, report = made(tmp_path, {"token": "Q6_K", "blk": "Q4_0"}, **WIDE)
    exact, rounded = report.loss_lines()
    assert exact.split() == ["Q4_0", "->", "INT4", "7", "as", "they", "are"]
    assert rounded.startswith("Q6_K -> INT8") and rounded.endswith("% lost")
    assert ModelFile(tmp_path / "model.bin").config.group_size == 32


def test_a_file_without_blocks_has_no_such_lines(tmp_path: Path) -> None:
    report = export(write_gguf(tmp_path / "model.gguf", *small_gguf("F16")), tmp_path / "model.bin")
    assert [*report.loss_lines()] == []


# ----------------------------------------------------------------------------
# Which encoding


def encodings(tmp_path: Path, kinds: dict[str, str], **shape: Any) -> Checkpoint:
    with GGUF(write_gguf(tmp_path / "model.gguf", *of_blocks(kinds, **shape))) as files:
        return Checkpoint(files)


def test_a_mix_has_the_encoding_of_each_and_says_so_in_the_metadata(tmp_path: Path) -> None:
    """As llama.cpp makes a Q4_K_M: more bits for v and down of some layers and for the output."""
    shape = WIDE | {"n_layers": 3}
    kinds = {"token": "Q6_K", "blk.1.attn_v": "Q6_K", "blk.1.ffn_down": "Q6_K", "blk": "Q4_K"}
    found = encodings(tmp_path, kinds, **shape)
    for name, encoding in found.encodings.items():
        more = name in {
            "model.embed_tokens.weight",
            *(f"model.layers.1.{n}.weight" for n in ("self_attn.v_proj", "mlp.down_proj")),
        }
        assert encoding is (Encoding.INT8 if more else Encoding.INT6), name
    again = recipe.parse(found.metadata["recipe"], "metadata")
    assert again.encodings(found.config) == found.encodings
    assert found.metadata["source"]["dtypes"] == ["F32", "Q4_K", "Q6_K"]


def test_gate_and_up_get_what_holds_both(tmp_path: Path) -> None:
    found = encodings(tmp_path, {"ffn_up": "Q6_K", "blk": "Q4_0", "token": "Q4_0"}, **WIDE)
    layer = "model.layers.0.mlp."
    assert [found.encodings[f"{layer}{x}_proj.weight"] for x in ("gate", "up", "down")] == [
        Encoding.INT8, Encoding.INT8, Encoding.INT4,
    ]  # fmt: skip


def test_experts_are_told_in_one_rule(tmp_path: Path) -> None:
    found = encodings(tmp_path, {"ffn_down_exps": "Q5_0", "blk": "Q4_0", "token": "Q4_0"}, **MOE)
    assert found.metadata["recipe"]["matrices"] == [
        {"names": ["*.mlp.experts.*.down_proj.weight"], "layers": [0, 1], "encoding": "int6"}
    ]
    assert recipe.parse(found.metadata["recipe"], "").encodings(found.config) == found.encodings


def test_what_is_not_of_blocks_stays_int8(tmp_path: Path) -> None:
    found = encodings(tmp_path, {"blk": "Q4_0"})  # the embedding is F16
    assert found.encodings["model.embed_tokens.weight"] is Encoding.INT8
    assert encodings(tmp_path, {"blk": "Q8_0", "token": "Q8_0"}).encodings == {}


@pytest.mark.parametrize(
    ("bits", "expected"),
    [("4", {Encoding.INT4, Encoding.INT6}), ("6", {Encoding.INT6}), ("8", {Encoding.INT8})],
)
def test_bits_win_over_what_the_file_asks_for(tmp_path: Path, bits: str, expected: set[Encoding]) -> None:
    path = write_gguf(tmp_path / "model.gguf", *of_blocks("Q5_0"))
    assert main([str(path), str(tmp_path / "model.bin"), "--quiet", "--bits", bits]) == 0
    file = ModelFile(tmp_path / "model.bin")
    assert {tensor.encoding for tensor in file.tensors if tensor.quantized} == expected
    assert file.config.group_size == 32


def test_another_group_size_rounds_what_32_would_hold(tmp_path: Path) -> None:
    keys, tensors = of_blocks("Q4_0")
    path = write_gguf(tmp_path / "model.gguf", keys, tensors)
    report = export(path, tmp_path / "model.bin", group_size=64)
    assert ModelFile(tmp_path / "model.bin").config.group_size == 64
    assert 0.03 < report.losses["Q4_0", Encoding.INT4].relative < 0.3


# ----------------------------------------------------------------------------
# One file whatever the way; damage


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "IQ4_NL", "Q4_1", "MXFP4"])
def test_bytes_do_not_depend_on_slices_pieces_or_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = write_gguf(tmp_path / "model.gguf", *of_blocks(kind, **UNEVEN))
    export(path, tmp_path / "expected.bin", threads=1)
    monkeypatch.setattr(quantise, "SLICE_WEIGHTS", 1)
    monkeypatch.setattr(blocks, "PIECE_WEIGHTS", 64)
    monkeypatch.setattr("qwen3c.convert.taking_over.PIECE_WEIGHTS", 1)
    export(path, tmp_path / "model.bin", threads=3)
    assert (tmp_path / "model.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "IQ4_NL", "Q4_1"])
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_that_is_no_number_is_refused_by_place(tmp_path: Path, kind: str, scale: float) -> None:
    keys, tensors = of_blocks(kind)
    _, dims, data = tensors["blk.0.ffn_up.weight"]
    found = blocks.KINDS[kind].blocks(memoryview(data)).copy()
    found["scale"][3] = scale  # 64 columns: the second block of row 1
    tensors["blk.0.ffn_up.weight"] = (kind, dims, found.tobytes())
    with pytest.raises(
        SourceError, match=r"blk\.0\.ffn_up\.weight\[1, (3[2-9]|[45]\d|6[0-3])\] is -?(nan|inf); only finite"
    ):
        export(write_gguf(tmp_path / "model.gguf", keys, tensors), tmp_path / "model.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_mxfp4_of_a_weight_beyond_all_scales_is_refused_by_place(tmp_path: Path) -> None:
    keys, tensors = of_blocks("MXFP4")
    _, dims, data = tensors["token_embd.weight"]
    found = blocks.KINDS["MXFP4"].blocks(memoryview(data)).copy()
    found["exponent"][0], found["nibbles"][0] = 255, 0x77
    tensors["token_embd.weight"] = ("MXFP4", dims, found.tobytes())
    with pytest.raises(
        SourceError, match=r"token_embd\.weight\[0, 0\] is inf; only finite weights up to 2030624"
    ):
        export(write_gguf(tmp_path / "model.gguf", keys, tensors), tmp_path / "model.bin")


@pytest.mark.parametrize(("damage", "expected"), [
    ("cut", "its header describes"),
    ("kind", "is IQ3_S, supported: BF16, F16, F32, Q4_0"),
    ("rows", "is Q4_K, but its rows have 64 weights"),
    ("size", "is at byte"),
])  # fmt: skip
def test_damage_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, expected: str
) -> None:
    keys, tensors = of_blocks("Q4_0")
    kind, dims, data = tensors["blk.0.ffn_up.weight"]
    changed = {"kind": ("IQ3_S", dims, data), "rows": ("Q4_K", dims, data), "size": (kind, dims, data[:-36])}
    tensors["blk.0.ffn_up.weight"] = changed.get(damage, (kind, dims, data))
    path = write_gguf(tmp_path / "model.gguf", keys, tensors)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    assert main([str(path), str(tmp_path / "model.bin"), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line and str(path) in line
    assert damage != "kind" or "take a Q4_K_M, Q8_0 or BF16 file of the model" in line
    assert not (tmp_path / "model.bin").exists()


def test_rows_of_a_llama_are_those_of_the_pairs(tmp_path: Path) -> None:
    """The permutation is of rows, so blocks stay whole."""
    keys, tensors = of_blocks("Q4_0", **LLAMA)
    model, _, _ = made(tmp_path, "Q4_0", **LLAMA)
    kind, dims, data = tensors["blk.0.attn_q.weight"]
    found = pair_rows(model.weight("model.layers.0.self_attn.q_proj.weight"), 24)
    assert np.array_equal(found, to_float32(memoryview(data), kind).reshape(dims))
    assert keys["general.architecture"] == "llama"
    assert random_blocks("Q4_0", (2, 32))[2] != random_blocks("Q4_0", (2, 32), 1)[2]
