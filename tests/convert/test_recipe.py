"""Recipes: every rule does what it says, and a fault in one is an error of one line that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantization_oracle import CODEBOOK
from small_gguf import small_gguf, write_gguf
from small_models import MIXED_RECIPE, export_small_model, small_weights, write_small_model

from qwen3c import format
from qwen3c.cli.export import main
from qwen3c.convert import recipe
from qwen3c.convert.export import estimate, export
from qwen3c.engine import Engine
from qwen3c.format import Encoding, ModelFile

CONFIG = format.Config(
    dim=64, hidden_dim=64, n_layers=28, n_heads=2, n_kv_heads=2, head_dim=32, vocab_size=100, n_tokens=100,
    context=64, group_size=32, tied_embedding=True, rms_eps=1e-6, rope_theta=1e6,
)  # fmt: skip
TEXT = """
encoding = "int4"
group_size = 64
[[matrices]]
names = ["*.v_proj.weight", "output"]
encoding = "int6"
[[matrices]]
names = ["*.down_proj.weight"]
layers = [0, -1]
encoding = "int8"
"""


def layers_of(encodings: format.Encodings, end: str, encoding: Encoding) -> list[int]:
    return [int(n.split(".")[2]) for n, e in encodings.items() if n.endswith(end) and e is encoding]


def test_a_file_says_which_matrix_has_which_encoding(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    read = recipe.read(str(path))
    encodings = read.encodings(CONFIG)
    assert read.group_size == 64
    assert list(encodings) == format.matrices(CONFIG)
    assert layers_of(encodings, "v_proj.weight", Encoding.INT6) == list(range(28))
    assert layers_of(encodings, "down_proj.weight", Encoding.INT8) == [0, 27]
    assert encodings["model.embed_tokens.weight"] is Encoding.INT6  # tied: it is the output
    untied = format.Config(**vars(CONFIG) | {"tied_embedding": False})
    encodings = read.encodings(untied)
    assert encodings["model.embed_tokens.weight"] is Encoding.INT4
    assert encodings["lm_head.weight"] is Encoding.INT6


def test_more_names_the_layers_that_k_mixes_give_more_bits() -> None:
    rules = [{"names": ["*.down_proj.weight"], "layers": "more", "encoding": "int6"}]
    encodings = recipe.parse({"encoding": "int4", "matrices": rules}, "here").encodings(CONFIG)
    # llama.cpp: i < n / 8, i >= 7 n / 8, (i - n / 8) % 3 == 2, with n = 28
    expected = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert layers_of(encodings, "down_proj.weight", Encoding.INT6) == expected


def test_a_later_rule_wins() -> None:
    rules = [{"names": ["*"], "encoding": "int6"}, {"names": ["*q_proj*"], "encoding": "int8"}]
    encodings = recipe.parse({"encoding": "int4", "matrices": rules}, "here").encodings(CONFIG)
    assert set(encodings.values()) == {Encoding.INT6, Encoding.INT8}
    assert layers_of(encodings, "q_proj.weight", Encoding.INT8) == list(range(28))


@pytest.mark.parametrize("bits", recipe.BITS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_number_of_bits_has_a_recipe_that_fits_every_model(bits: str, tied: bool) -> None:
    experts = {"n_experts": 4, "n_experts_per_token": 2, "expert_hidden_dim": 32, "decoder_sparse_step": 2}
    for changed in ({}, experts):
        config = format.Config(**vars(CONFIG) | {"tied_embedding": tied} | changed)
        encodings = recipe.of_bits(bits).encodings(config)
        assert set(encodings) == set(format.matrices(config))


FAULTS: dict[str, tuple[str, str]] = {
    "no TOML": ("encoding = int4", "not TOML: "),
    "not text": ("\udcff", "not TOML: "),
    "no encoding": ("", "encoding is None, not one of int8, int4, int6"),
    "an unknown encoding": ("encoding = 'int5'", "encoding is 'int5', not one of int8, int4, int6"),
    "floats": ("encoding = 'float32'", "encoding is 'float32', not one of"),
    "an encoding that is a number": ("encoding = 4", "encoding is 4, not one of"),
    "an unknown key": ("encoding = 'int4'\nbits = 4", "unknown key 'bits'; known are encoding, group_size, "),
    "a group size": ("encoding = 'int4'\ngroup_size = 48", "group_size is 48, not one of 32, 64, 128, 256"),
    "one rule": ("encoding = 'int4'\n[matrices]\nnames = []", "matrices is {'names': []}, not tables"),
    "rules of text": ("encoding = 'int4'\nmatrices = ['*']", "matrices is ['*'], not tables [[matrices]]"),
    "no names": ("encoding = 'int4'\n[[matrices]]\nencoding = 'int6'", "matrices 1: names is None, not"),
    "one name": ("encoding = 'int4'\n[[matrices]]\nnames = '*'\nencoding = 'int6'", "1: names is '*'"),
    "layers of text": (
        "encoding = 'int4'\n[[matrices]]\nnames = ['*']\nlayers = 'all'\nencoding = 'int6'",
        "matrices 1: layers is 'all', not a list of numbers or 'more'",
    ),
    "a rule without encoding": ("encoding = 'int4'\n[[matrices]]\nnames = ['*']", "1: encoding is None"),
    "a key of a rule": (
        "encoding = 'int4'\n[[matrices]]\nname = '*'\nencoding = 'int6'",
        "matrices 1: unknown key 'name'; known are encoding, layers, names",
    ),
    "a rule about nothing": (
        "encoding = 'int4'\n[[matrices]]\nnames = ['*.w_proj.weight']\nencoding = 'int6'",
        "matrices 1: no matrix is '*.w_proj.weight'",
    ),
    "a layer that is not there": (
        "encoding = 'int4'\n[[matrices]]\nnames = ['*']\nlayers = [2]\nencoding = 'int6'",
        "matrices 1: no matrix is '*'",
    ),
    "a gate without its up": (
        "encoding = 'int4'\n[[matrices]]\nnames = ['*gate_proj*']\nencoding = 'int6'",
        "model.layers.0.mlp.gate_proj.weight is int6, model.layers.0.mlp.up_proj.weight is int4: they are",
    ),
    "too long": ("#" * 70_000, "a recipe has at most 65536 bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    text, expected = FAULTS[fault]
    source, path = write_small_model(tmp_path / "source"), tmp_path / "recipe.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert main([str(source), str(tmp_path / "model.bin"), "--recipe", str(path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert str(path) in line and expected in line
    assert not (tmp_path / "model.bin").exists()


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_small_model(tmp_path / "source")
    for path in (tmp_path / "none.toml", tmp_path):
        assert main([str(source), str(tmp_path / "model.bin"), "--recipe", str(path)]) == 2
        assert str(path) in capsys.readouterr().err.splitlines()[-1]


def test_bits_and_a_recipe_are_one_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "model.bin"), "--bits", "4", "--recipe", "x.toml"])
    assert "--bits and --recipe both say how many bits" in capsys.readouterr().err


def test_bits_that_no_recipe_has_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_small_model(tmp_path / "source")
    assert main([str(source), str(tmp_path / "model.bin"), "--quiet", "--bits", "7"]) == 2
    assert capsys.readouterr().err.endswith("error: --bits is '7', not one of 4, 4.5, 5, 6, 8\n")


@pytest.mark.parametrize("bits", ["8", None])
def test_eight_bits_are_the_file_of_today(tmp_path: Path, bits: str | None) -> None:
    source = write_small_model(tmp_path / "source")
    export(source, tmp_path / "expected.bin")
    options = ["--bits", bits] if bits else []
    assert main([str(source), str(tmp_path / "model.bin"), "--quiet", *options]) == 0
    assert (tmp_path / "model.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()


def test_a_file_of_fewer_bits_says_how_it_was_made_and_what_it_takes(tmp_path: Path) -> None:
    source, path = write_small_model(tmp_path / "source"), tmp_path / "model.bin"
    assert main([str(source), str(path), "--quiet", "--bits", "4"]) == 0
    file = ModelFile(path)
    assert all(sound for _, sound in file.verify())
    assert file.metadata["recipe"] == recipe.BITS["4"]
    assert file.config.group_size == 32
    made = recipe.of_bits("4")
    assert estimate(source, recipe=made).file_size == path.stat().st_size
    assert file.encodings == made.encodings(file.config)


def test_q8_0_is_taken_over_where_it_stays_int8_and_rounded_again_elsewhere(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", *small_gguf("Q8_0"))
    export(source, tmp_path / "int8.bin")
    export(source, tmp_path / "mixed.bin", recipe=recipe.parse(MIXED_RECIPE, "recipe"))
    whole, mixed = Engine(tmp_path / "int8.bin"), Engine(tmp_path / "mixed.bin")
    for tensor in mixed.file.tensors:
        for part in tensor.parts:
            expected, found = whole.weight(part.name), mixed.weight(part.name)
            if tensor.encoding in (Encoding.INT8, Encoding.FLOAT32):
                assert np.array_equal(found, expected), part.name
            else:
                off = np.square(found - expected).sum() / np.square(expected).sum()
                assert 0 < off < (0.01 if tensor.encoding is Encoding.INT4 else 1e-3), part.name


@pytest.mark.parametrize(("encoding", "most"), [("int4", 0.0065), ("int6", 6e-4), ("int8", 6e-5)])
def test_rounding_loses_what_the_number_of_bits_promises(tmp_path: Path, encoding: str, most: float) -> None:
    """Squared error of normal weights to their square; absmax / 7 with codes -7..7 would lose 0.0125."""
    model = Engine(export_small_model(tmp_path, 32, {"encoding": encoding}))
    for name, source in small_weights().items():
        if source.ndim == 2:
            off = np.square(model.weight(name) - source).sum() / np.square(source).sum()
            assert most / 3 < off < most, f"{name}: {off}"


def test_every_tile_row_has_its_codebook(tmp_path: Path) -> None:
    file = ModelFile(export_small_model(tmp_path, 32, {"encoding": "int4"}))
    for tensor in file.tensors:
        if tensor.quantized:
            assert (file.tile_rows(tensor)["codebook"] == CODEBOOK).all()


def test_a_recipe_does_not_hold_what_toml_does_not(tmp_path: Path) -> None:
    """The table of every built-in recipe is one that a file could hold."""
    table: dict[str, Any]
    for bits, table in recipe.BITS.items():
        lines = [f"encoding = {table['encoding']!r}"]
        for rule in table.get("matrices", []):
            lines += ["[[matrices]]", *(f"{key} = {value!r}" for key, value in rule.items())]
        path = tmp_path / f"{bits}.toml"
        path.write_text("\n".join(lines))
        assert recipe.read(str(path)).table == table
