"""Calibration: inputs are the engine's, feedback is GPTQ, interrupted runs go on, bad texts are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_gguf import of_blocks, small_gguf, write_gguf
from small_models import MIXED_RECIPE, write_small_model

from qwen3c import engine, format
from qwen3c.cli.export import main
from qwen3c.convert import calibrate, calibration_text
from qwen3c.convert.calibration_state import CalibrationState, folder
from qwen3c.convert.calibration_text import BUILT_IN, CalibrationOptions, CalibrationText
from qwen3c.convert.directory import Directory
from qwen3c.convert.export import export
from qwen3c.convert.feedback import Inputs, factor, put_codes, round_with_feedback
from qwen3c.convert.huggingface import Checkpoint
from qwen3c.convert.recipe import parse
from qwen3c.convert.source import SourceError
from qwen3c.engine import Engine
from qwen3c.format import Encoding, ModelFile
from qwen3c.text.tokenizer import Tokenizer

Array = NDArray[np.float32]
INT4 = parse({"encoding": "int4", "group_size": 32}, "recipe")
TEXT = "The quick brown fox jumps over the lazy dog; 12 + 30 = 42.\n" * 5
N_ROWS, N_COLUMNS = 40, 128
SHAPES: list[dict[str, Any]] = [
    {},
    {"architecture": "qwen2", "head_dim": 16, "n_layers": 1},
    {"architecture": "qwen3_moe", "n_layers": 2, "mlp_only_layers": [0]},
    {"tied": False, "n_layers": 1},
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def correlated(n: int, seed: int = 0) -> Array:
    """Rows (n, N_COLUMNS) whose columns depend on each other and differ in size."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((N_COLUMNS // 4, N_COLUMNS)) * np.exp(random.standard_normal(N_COLUMNS))
    rows = random.standard_normal((n, N_COLUMNS // 4)) @ mix + 0.1 * random.standard_normal((n, N_COLUMNS))
    return rows.astype(np.float32)


def quantized(weights: Array, encoding: Encoding) -> NDArray[Any]:
    """The tile rows of weights, without data."""
    out = np.empty(format.matrix_size(len(weights), weights.shape[1], 32, encoding), np.uint8)
    engine.quantize_tiles([(weights.view("u1").ravel(), "F32")], weights.shape[1], 32, out, encoding.value)
    return out.view(format.tile_row_type(weights.shape[1], 32, encoding))


def stored(tile_rows: NDArray[Any], rows: int) -> Array:
    codes, scales = format.codes_and_scales(tile_rows)
    return (np.repeat(scales, 32, axis=1) * codes)[:rows]


# ----------------------------------------------------------------------------
# Feedback


@pytest.mark.parametrize("encoding", [Encoding.INT4, Encoding.INT6])
def test_codes_come_back_as_they_were_put(encoding: Encoding) -> None:
    weights = np.random.default_rng(0).standard_normal((48, N_COLUMNS), np.float32)
    tile_rows = quantized(weights, encoding)
    codes, _ = format.codes_and_scales(tile_rows)
    codebook = tile_rows["codebook"][0].tolist() if encoding is Encoding.INT4 else [*range(-32, 32)]
    places = np.vectorize(codebook.index)(codes).astype(np.uint8)
    before = tile_rows.tobytes()
    tile_rows["tiles"]["nibbles"] = 0
    put_codes(tile_rows, encoding, places)
    assert tile_rows.tobytes() == before


def test_a_factor_gives_the_hessian_back() -> None:
    inputs = Inputs(N_COLUMNS, whole=True)
    x = correlated(500)
    inputs.add(x[:200])
    inputs.add(x[200:])
    assert inputs.rows == 500
    assert inputs.hessian is not None
    hessian = inputs.hessian.copy()
    found = factor(inputs)
    assert sorted(found.order) == [*range(N_COLUMNS)]
    assert np.array_equal(found.upper, np.triu(found.upper)) and (found.upper.diagonal() == 1).all()
    # A^-1 H A^-T is diagonal, but for the damping
    damped = hessian[np.ix_(found.order, found.order)].astype(np.float64)
    inverse = np.linalg.inv(found.upper.astype(np.float64))
    rest = inverse @ (damped + np.eye(N_COLUMNS) * float(inputs.damping)) @ inverse.T
    off = rest - np.diag(rest.diagonal())
    assert np.abs(off).max() < 1e-3 * rest.diagonal().max()


@pytest.mark.parametrize("encoding", [Encoding.INT4, Encoding.INT6])
def test_feedback_is_gptq(encoding: Encoding) -> None:
    """As in the paper: column by column, by the Cholesky factor of the inverse of H, in float64."""
    weights = np.random.default_rng(1).standard_normal((N_ROWS, N_COLUMNS), np.float32)
    inputs = Inputs(N_COLUMNS, whole=True)
    inputs.add(correlated(500))
    assert inputs.hessian is not None
    hessian = inputs.hessian.astype(np.float64)
    found = factor(inputs)
    tile_rows = quantized(weights, encoding)
    worst, squares = round_with_feedback(weights, tile_rows, encoding, found)
    kept = stored(tile_rows, N_ROWS)
    assert np.isclose(worst, np.abs(weights - kept).max()) and np.isclose(
        squares, ((weights - kept) ** 2).sum()
    )

    order = found.order
    damped = hessian[np.ix_(order, order)]
    damped += np.eye(N_COLUMNS) * float(inputs.damping)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    _, scales = format.codes_and_scales(tile_rows)
    values = tile_rows["codebook"][0].astype(float) if encoding is Encoding.INT4 else np.arange(-31.0, 32)
    left, expected = weights.astype(np.float64)[:, order], np.empty_like(weights)
    for k, column in enumerate(order):
        scale = scales[:N_ROWS, column // 32].astype(np.float64)
        near = np.abs(left[:, k : k + 1] / scale[:, None] - values).argmin(axis=1)
        expected[:, column] = values[near] * scale
        error = (left[:, k] - expected[:, column]) / upper[k, k]
        left[:, k:] -= np.outer(error, upper[k, k:])
    assert (kept == expected).mean() > 0.999  # a tie or a last bit, and all that follows from it


def test_feedback_loses_less_of_the_outputs_and_keeps_the_scales() -> None:
    weights = np.random.default_rng(2).standard_normal((N_ROWS, N_COLUMNS), np.float32)
    inputs = Inputs(N_COLUMNS, whole=True)
    inputs.add(correlated(2000))
    plain, fed = quantized(weights, Encoding.INT4), quantized(weights, Encoding.INT4)
    round_with_feedback(weights, fed, Encoding.INT4, factor(inputs))
    assert (plain["tiles"]["scales"] == fed["tiles"]["scales"]).all()
    lost = [np.square(correlated(2000) @ (weights - stored(t, N_ROWS)).T).sum() for t in (plain, fed)]
    assert lost[1] < 0.5 * lost[0]


def test_the_fewer_rows_there_were_the_less_is_fed_back() -> None:
    sizes = []
    for n in (1, 10, 100, 10_000):
        inputs = Inputs(N_COLUMNS, whole=True)
        inputs.add(correlated(n))
        sizes.append(float(np.square(np.triu(factor(inputs).upper, 1)).sum()))
    assert sizes == sorted(sizes) and sizes[0] < 0.05 * sizes[-1], sizes


def test_inputs_that_are_all_zero_change_nothing() -> None:
    weights = np.random.default_rng(3).standard_normal((N_ROWS, N_COLUMNS), np.float32)
    inputs = Inputs(N_COLUMNS, whole=True)
    inputs.add(np.zeros((300, N_COLUMNS), np.float32))
    tile_rows = quantized(weights, Encoding.INT4)
    before = tile_rows.tobytes()
    round_with_feedback(weights, tile_rows, Encoding.INT4, factor(inputs))
    assert tile_rows.tobytes() == before


# ----------------------------------------------------------------------------
# Blocks


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)) or "qwen3")
def test_the_inputs_of_every_block_are_those_of_the_engine(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
) -> None:
    """What a calibration computes between blocks is what the finished file computes."""
    source = write_small_model(tmp_path / "source", **shape)
    behind: list[Array] = []
    save = CalibrationState.save

    def noted(state: CalibrationState, tensors: Any, x: Array) -> None:
        behind.append(x.copy())
        save(state, tensors, x)

    monkeypatch.setattr(CalibrationState, "save", noted)
    monkeypatch.setattr(calibration_text, "WINDOW", 64)
    path = tmp_path / "model.bin"
    recipe = parse(MIXED_RECIPE | {"group_size": 32}, "recipe")
    export(source, path, recipe=recipe, calibrate=CalibrationOptions(text))
    model = Engine(path, threads=1, kv="f32", activations="float32")
    ids = tokens(source, text)[:64]
    for layer in range(model.config.n_layers):
        name = f"model.layers.{layer}"
        expected = model.trace(ids, name)[name]
        off = np.abs(behind[layer][0] - expected).max()
        assert off < 2e-4 * np.abs(expected).max(), name
    assert all(sound for _, sound in ModelFile(path).verify())
    assert ModelFile(path).metadata["source"]["calibration"]["method"] == "feedback"


def tokens(source: Path, text: Path) -> list[int]:
    return Tokenizer((source / "tokenizer.json").read_bytes()).encode(text.read_text())


def test_every_matrix_of_few_bits_changes_and_int8_stays_as_it_is(tmp_path: Path, text: Path) -> None:
    source = write_small_model(tmp_path / "source", tied=False)
    recipe = parse(MIXED_RECIPE | {"group_size": 32}, "recipe")
    made = {}
    for name, options in (
        ("plain", None),
        ("weighed", CalibrationOptions(text, feedback=False)),
        ("fed", CalibrationOptions(text)),
    ):
        export(source, tmp_path / name, recipe=recipe, calibrate=options)
        made[name] = ModelFile(tmp_path / name)
    for plain, weighed, fed in zip(*(file.tensors for file in made.values()), strict=True):
        data = [bytes(file.data(t)) for file, t in zip(made.values(), (plain, weighed, fed), strict=True)]
        by_data = plain.encoding in calibrate.BY_DATA and plain.role is not format.Role.EMBEDDING
        assert (data[0] != data[1]) == (data[0] != data[2]) == by_data, plain.name
        assert (data[1] != data[2]) == by_data, plain.name


def test_an_expert_that_saw_nothing_is_quantised_without_data(tmp_path: Path, text: Path) -> None:
    source = write_small_model(tmp_path / "source", architecture="qwen3_moe", n_layers=1)
    text.write_text("ab")
    export(source, tmp_path / "plain.bin", recipe=INT4)
    export(source, tmp_path / "model.bin", recipe=INT4, calibrate=CalibrationOptions(text))
    plain, made = ModelFile(tmp_path / "plain.bin"), ModelFile(tmp_path / "model.bin")
    experts = [t for t in made.tensors if ".experts." in t.name]
    same = [bytes(plain.data(t)) == bytes(made.data(t)) for t in experts]
    assert len(same) == 12 and sum(same) >= 12 - 2 * 2 * 2  # two tokens with two experts each


def test_the_mix_that_comes_along_suits_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.loads(line) for line in BUILT_IN.read_text(encoding="utf-8").splitlines()]
    assert 20_000 < BUILT_IN.stat().st_size < 60_000
    assert sum("messages" in line for line in lines) >= 8 and sum("text" in line for line in lines) >= 12
    monkeypatch.setattr(calibration_text, "MAX_TOKENS", 1 << 20)
    for template in ("hybrid", "none"):
        source = write_small_model(tmp_path / template, n_layers=1, thinking=template, dialect=5)
        if template == "none":
            (source / "chat_template.jinja").unlink()
        with Directory(source) as files:
            read = CalibrationText(Checkpoint(files))
            end = Tokenizer(files.tokenizer()[1]).control_id("<|im_end|>")
        assert read.name == "the built-in mix" and read.windows.shape[1] == 256
        assert read.windows.size > 7000 and (read.windows == end).any() == (template == "hybrid")


# ----------------------------------------------------------------------------
# Interrupted


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_that_was_ended_goes_on_and_comes_to_the_same_bytes(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    source = write_small_model(tmp_path / "source", n_layers=3, tied=tied)
    whole, target = tmp_path / "whole.bin", tmp_path / "model.bin"
    export(source, whole, recipe=INT4, calibrate=CalibrationOptions(text))
    block = calibrate.Calibration._block
    done: list[int] = []

    def ended_in(stop: int) -> Any:
        def once(calibration: calibrate.Calibration, layer: int, x: Array) -> Any:
            if layer == stop:
                raise KeyboardInterrupt
            done.append(layer)
            return block(calibration, layer, x)

        return once

    for stop in (1, 2):
        monkeypatch.setattr(calibrate.Calibration, "_block", ended_in(stop))
        with pytest.raises(KeyboardInterrupt):
            export(source, target, recipe=INT4, calibrate=CalibrationOptions(text))
        assert not target.exists() and folder(target).is_dir()
    monkeypatch.setattr(calibrate.Calibration, "_block", ended_in(-1))
    progress: list[tuple[float, float]] = []
    options = CalibrationOptions(text, progress=lambda *figures: progress.append(figures))
    export(source, target, recipe=INT4, calibrate=options)
    assert done == [0, 1, 2]
    assert progress[0][0] > 0.5 * progress[0][1] and np.isclose(*progress[-1])
    assert target.read_bytes() == whole.read_bytes() and not folder(target).exists()


def interrupted(source: Path, target: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the state of a calibration behind."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(calibrate.Calibration, "_mixture", stop)
        patch.setattr(calibrate.Calibration, "ready", stop)
        export(source, target, recipe=INT4, threads=1, calibrate=CalibrationOptions(text))


def test_a_state_of_something_else_is_refused_and_kept(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_small_model(tmp_path / "source"), tmp_path / "model.bin"
    interrupted(source, target, text, monkeypatch)
    for options, group_size in (
        (CalibrationOptions(text, feedback=False), None),
        (CalibrationOptions(), None),
        (CalibrationOptions(text), 64),
    ):
        with pytest.raises(SourceError, match="of another source, text or options; remove it to start over"):
            export(source, target, recipe=INT4, group_size=group_size, calibrate=options)
    (folder(target) / "plan.json").unlink()
    with pytest.raises(SourceError, match="is in the way"):
        export(source, target, recipe=INT4, calibrate=CalibrationOptions(text))
    assert folder(target).exists() and not target.exists()


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_damaged_state_is_one_line(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    source, target = write_small_model(tmp_path / "source"), tmp_path / "model.bin"
    interrupted(source, target, text, monkeypatch)
    block = folder(target) / "block-001.npz"
    block.write_bytes(block.read_bytes()[:size])
    with pytest.raises(SourceError, match=r"block-001.npz: is damaged; remove .*model.bin.calibration"):
        export(source, target, recipe=INT4, calibrate=CalibrationOptions(text))
    assert not target.exists()


# ----------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.txt", b"", "holds no text: 0 tokens, at least 2 are needed"),
        ("a.txt", b"x", "holds no text: 1 tokens"),
        ("a.txt", b"a\xff\xfe", "byte 1 is not UTF-8"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "hello"}\n\n{"text": "hel', "line 3: is not JSON"),
        ("a.jsonl", b'{"text": "hello"}\n[1]\n', "line 2: is a JSON list, expected an object"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: has neither messages nor a text"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "pope", "content": "x"}]}\n',
            "line 1: messages[0].role is 'pope'",
        ),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: byte 10 is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: holds half of a surrogate pair"),
        ("missing.txt", None, "No such file or directory"),
        ("missing.jsonl", None, "No such file or directory"),
    ],
)
@pytest.mark.parametrize("option", ["--calibrate", "--importance"])
def test_a_bad_text_is_one_line_and_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
    content: bytes | None,
    fault: str,
) -> None:
    source, path = write_small_model(tmp_path / "source", n_layers=1), tmp_path / name
    if content is not None:
        path.write_bytes(content)
    target = tmp_path / "model.bin"
    assert main([str(source), str(target), "--bits", "4", option, str(path), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and fault in error
    assert not target.exists() and not folder(target).exists()


def test_conversations_are_rendered_by_the_template(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "hello <|im_end|>"}, {"role": "assistant", "content": "hi"}]
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"text": "abc"}) + "\n")
    with Directory(write_small_model(tmp_path / "source")) as files:
        read = CalibrationText(Checkpoint(files), path)
        tokenizer = Tokenizer(files.tokenizer()[1])
    text = tokenizer.decode(read.windows.ravel().tolist())
    end = tokenizer.control_id("<|im_end|>")
    assert text.startswith("<|im_start|>user\nhello <|im_end|><|im_end|>\n") and "abc" in text
    assert (read.windows == end).sum() == 2  # the one in a message is text


def test_a_model_of_int8_is_not_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_small_model(tmp_path / "source", n_layers=1)
    for more in ([], ["--bits", "8"]):
        assert main([str(source), str(tmp_path / "model.bin"), "--calibrate", *more]) == 2
        assert (
            "--calibrate: all matrices become INT8, or have few bits already; give --bits 4"
            in capsys.readouterr().err
        )


def test_codes_that_the_source_has_already_are_not_chosen_again(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "model.gguf", *of_blocks("Q4_0"))
    assert main([str(tmp_path / "model.gguf"), str(tmp_path / "model.bin"), "--calibrate", str(text)]) == 2
    assert "--calibrate: all matrices become INT8, or have few bits already" in capsys.readouterr().err
    write_gguf(tmp_path / "model.gguf", *small_gguf(dtype="Q8_0"))
    export(tmp_path / "model.gguf", tmp_path / "plain.bin", recipe=INT4)
    export(tmp_path / "model.gguf", tmp_path / "model.bin", recipe=INT4, calibrate=CalibrationOptions(text))
    assert (tmp_path / "plain.bin").read_bytes() != (tmp_path / "model.bin").read_bytes()
