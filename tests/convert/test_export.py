"""export.py: the right bytes, the same bytes every time, and all of them or none.

python -m pytest tests/convert/test_export.py
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantization_oracle
from commands import PACKAGES, run_script
from numpy.typing import NDArray
from small_models import encode_tensor, small_weights, write_safetensors, write_small_model

from qwen3c import engine, format
from qwen3c.cli.export import main
from qwen3c.convert import export as exporter, quantise
from qwen3c.convert.export import export
from qwen3c.convert.source import SourceError
from qwen3c.format import ModelFile

ROOT = Path(__file__).parents[2]
OLD = format.MAGIC + b"old"  # what stood in the target: a model.bin, so that an export may replace it


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_small_model(tmp_path / "source")


def leftovers(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if entry.name.endswith(".tmp")]


def expected_bytes(tensor: format.Tensor, weights: dict[str, NDArray[np.float32]], group_size: int) -> bytes:
    """What docs/FORMAT.md says is stored for a tensor."""
    stacked = np.concatenate([weights[part.name] for part in tensor.parts])
    if not tensor.quantized:
        return stacked.astype("<f4").tobytes()
    return oracle_bytes(stacked, group_size, tensor.encoding.value)


def oracle_bytes(weights: NDArray[np.float32], group_size: int, encoding: str) -> bytes:
    if encoding == "int8":
        return quantization_oracle.tiles(*quantization_oracle.quantize(weights, group_size))
    found = quantization_oracle.quantize_fitted(weights, group_size, encoding)
    return quantization_oracle.tiles(*found, encoding)


# ----------------------------------------------------------------------------
# The right bytes

SHAPES: list[dict[str, Any]] = [
    {},
    {"tied": False, "dtype": "F16", "shards": 3, "dialect": 5},
    {"dtype": "F32", "dim": 128, "n_heads": 8, "n_kv_heads": 1, "head_dim": 64, "n_layers": 3},
    # k and v of 24 rows: tiles that hold rows of two tensors; 500 rows of vocabulary: a tile that is not full
    {"dim": 96, "n_heads": 8, "n_kv_heads": 2, "head_dim": 12, "vocab_size": 500, "group_size": 32},
    {
        "dim": 256,
        "hidden_dim": 512,
        "n_heads": 2,
        "n_kv_heads": 2,
        "head_dim": 128,
        "group_size": 256,
        "n_layers": 1,
    },
    {"dim": 128, "hidden_dim": 384, "n_heads": 4, "head_dim": 32, "group_size": 128, "tied": False},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slice_weights", [1, 5000, 1 << 20])
def test_every_byte_is_the_one_the_format_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], slice_weights: int
) -> None:
    """The bytes do not depend on the size of the slices: one tile row, a few, or all."""
    monkeypatch.setattr(quantise, "SLICE_WEIGHTS", slice_weights)
    shape = dict(shape)
    group_size = shape.pop("group_size", 64)
    source, target = write_small_model(tmp_path / "source", **shape), tmp_path / "model.bin"
    export(source, target, group_size=group_size)
    weights, file = small_weights(**shape), ModelFile(target)
    for tensor in file.tensors:
        if tensor.parts:
            assert bytes(file.data(tensor)) == expected_bytes(tensor, weights, group_size), tensor.name
        else:
            frequencies = np.frombuffer(file.data(tensor), "<f4")
            exact = 1e6 ** (-2 * np.arange(len(frequencies)) / file.config.head_dim)
            assert (frequencies == exact.astype(np.float32)).all()
    assert all(sound for _, sound in file.verify())
    assert file.tokenizer == (source / "tokenizer.json").read_bytes()


def test_dtypes_that_hold_the_same_numbers_give_the_same_tensors(tmp_path: Path) -> None:
    checksums = []
    for dtype in ("BF16", "F16", "F32"):
        export(write_small_model(tmp_path / dtype, dtype=dtype), tmp_path / "model.bin")
        checksums.append(ModelFile(tmp_path / "model.bin").checksums)
    assert checksums[0] == checksums[1] == checksums[2]


def test_dtypes_may_differ_within_one_stored_matrix(tmp_path: Path, source: Path) -> None:
    export(source, tmp_path / "plain.bin")
    kinds = {"q_proj": "F32", "k_proj": "F16", "up_proj": "F32", "norm": "F32"}
    stored = {}
    for name, tensor in small_weights().items():
        dtype = next((dtype for part, dtype in kinds.items() if part in name), "BF16")
        stored[name] = encode_tensor(tensor, dtype)
    write_safetensors(source / "model.safetensors", stored)
    export(source, tmp_path / "mixed.bin")
    plain, mixed = ModelFile(tmp_path / "plain.bin"), ModelFile(tmp_path / "mixed.bin")
    assert mixed.checksums == plain.checksums
    assert mixed.metadata["source"]["dtypes"] == ["BF16", "F16", "F32"]


def quantize(
    weights: NDArray[np.float32],
    group_size: int,
    encoding: format.Encoding = format.Encoding.INT8,
    importance: NDArray[np.float32] | None = None,
) -> tuple[bytes, tuple[float, float, float, int]]:
    """(stored bytes, error figures) that quantize_tiles gives for float32 weights (rows, columns)."""
    rows, columns = weights.shape
    out = np.empty(format.matrix_size(rows, columns, group_size, encoding), np.uint8)
    parts = [(weights.view(np.uint8).ravel(), "F32")]
    figures = engine.quantize_tiles(parts, columns, group_size, out, encoding.value, importance)
    return out.tobytes(), figures


def awkward_weights() -> NDArray[np.float32]:
    """Groups of every magnitude: zeros, subnormal, halfway between codes, the largest that can be stored."""
    random = np.random.default_rng(0)
    weights = random.standard_normal((160, 256)).astype(np.float32)
    weights *= np.float32(10.0) ** random.integers(-42, 6, (160, 1)).astype(np.float32)
    weights[3] = 0
    weights[4, 5] = -0.0
    weights[5] = np.float32(1e-45)
    weights[6] = random.integers(-254, 255, 256) / np.float32(2)  # ties, at scale 1
    weights[7, 0] = 127
    weights[8] = weights[8] * 0 + np.float32(127 * 65504)
    weights[9, ::7] = -127 * 65504
    weights[10] = random.integers(-2, 3, 256) * np.float32(2.0**-24)
    return weights


@pytest.mark.parametrize("group_size", format.GROUP_SIZES)
@pytest.mark.parametrize("isa", engine.runnable_isas())
def test_quantisation_is_bit_for_bit_the_documented_rule(isa: str, group_size: int) -> None:
    before = engine.isa()
    engine.set_isa(isa)
    try:
        weights = awkward_weights()
        codes, scales = quantization_oracle.quantize(weights, group_size)
        stored, (worst, squared_error, squared_weight, bad) = quantize(weights, group_size)
        assert stored == quantization_oracle.tiles(codes, scales)
        error = weights.astype(np.float64) - quantization_oracle.dequantize(codes, scales)
        assert bad == -1
        assert worst == pytest.approx(np.abs(error).max(), rel=1e-6)
        assert squared_error == pytest.approx(np.square(error).sum(), rel=1e-5)
        assert squared_weight == pytest.approx(np.square(weights.astype(np.float64)).sum(), rel=1e-5)
    finally:
        engine.set_isa(before)


@pytest.mark.parametrize("group_size", [32, 256])
@pytest.mark.parametrize("encoding", [format.Encoding.INT4, format.Encoding.INT6])
@pytest.mark.parametrize("isa", engine.runnable_isas())
def test_fitted_scales_are_bit_for_bit_the_documented_rule(
    isa: str, encoding: format.Encoding, group_size: int
) -> None:
    before = engine.isa()
    engine.set_isa(isa)
    try:
        weights = np.clip(awkward_weights(), -31 * 65504, 31 * 65504)
        importance = np.abs(np.random.default_rng(2).standard_normal(256)).astype(np.float32)
        importance[::9] = 0
        for given in (None, importance):
            codes, scales = quantization_oracle.quantize_fitted(weights, group_size, encoding.value, given)
            stored, (worst, squared_error, _, bad) = quantize(weights, group_size, encoding, given)
            assert stored == quantization_oracle.tiles(codes, scales, encoding.value)
            error = weights.astype(np.float64) - quantization_oracle.dequantize(codes, scales)
            assert bad == -1
            assert worst == pytest.approx(np.abs(error).max(), rel=1e-5)
            assert squared_error == pytest.approx(np.square(error).sum(), rel=1e-5)
    finally:
        engine.set_isa(before)


@pytest.mark.parametrize(
    ("importance", "fault"),
    [
        (np.ones(31, np.float32), r"shape \(31,\), expected \(32,\)"),
        (np.full(32, -1, np.float32), "negative or not finite"),
        (np.full(32, np.nan, np.float32), "negative or not finite"),
    ],
)
def test_an_importance_that_is_none_is_refused(importance: NDArray[np.float32], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        quantize(np.ones((16, 32), np.float32), 32, format.Encoding.INT4, importance)


def test_no_weight_is_further_than_half_a_step_from_its_code() -> None:
    random = np.random.default_rng(1)
    weights = random.standard_normal((4096, 256)).astype(np.float32) * np.float32(0.02)
    weights *= np.exp(random.normal(0, 2, (4096, 1))).astype(np.float32)
    stored, _ = quantize(weights, 32)
    codes, scales = quantization_oracle.untile(stored, 4096, 256, 32)
    assert codes.min() >= -127
    error = np.abs(weights.astype(np.float64) - codes.astype(np.float64) * np.repeat(scales, 32, axis=1))
    assert (error <= np.repeat(scales.astype(np.float64), 32, axis=1) / 2 * (1 + 2**-20)).all()


# ----------------------------------------------------------------------------
# The same bytes every time


def test_bytes_depend_on_the_contents_and_the_group_size_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "SLICE_WEIGHTS", 2000)
    seen = set()
    for i, (shards, threads) in enumerate([(1, 1), (1, 2), (2, 3), (5, 1), (5, 8), (1, 1)]):
        source = write_small_model(tmp_path / f"another name {i}", shards=shards, tied=False)
        os.utime(source / "config.json", (i, i))
        export(source, tmp_path / f"{i}.bin", threads=threads)
        seen.add((tmp_path / f"{i}.bin").read_bytes())
    assert len(seen) == 1


def test_name_is_what_the_flag_says(tmp_path: Path, source: Path) -> None:
    report = export(source, tmp_path / "model.bin", name="Käthe")
    assert report.name == ModelFile(tmp_path / "model.bin").metadata["name"] == "Käthe"


# ----------------------------------------------------------------------------
# What is reported


def test_report_has_the_error_of_every_kind_of_matrix(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "source", n_layers=3, tied=False)
    report = export(source, tmp_path / "model.bin")
    weights, kinds = small_weights(n_layers=3, tied=False), report.errors
    assert {kind: error.tensors for kind, error in kinds.items()} == {
        "model.embed_tokens": 1,
        "self_attn.qkv_proj": 3,
        "self_attn.o_proj": 3,
        "mlp.gate_up_proj": 3,
        "mlp.down_proj": 3,
        "lm_head": 1,
    }
    stacked = np.concatenate([weights[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(3)])
    error = stacked - quantization_oracle.dequantize(*quantization_oracle.quantize(stacked, 64))
    assert kinds["mlp.down_proj"].worst == pytest.approx(np.abs(error).max())
    relative = math.sqrt(np.square(error).mean() / np.square(stacked).mean())
    assert kinds["mlp.down_proj"].relative == pytest.approx(relative, rel=1e-5)
    assert 0.001 < relative < 0.01
    assert report.file_size == (tmp_path / "model.bin").stat().st_size
    assert report.source_size == sum(2 * w.size for w in weights.values())
    text = "\n".join(report.lines())
    assert re.search(r"mlp\.down_proj +3 +\S+ +\d\.\d+%", text)
    assert "MB/s" in text
    assert "peak memory" in text


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Four times the layers, 25 MB more of source: the same memory to a megabyte."""
    shape = {"dim": 512, "hidden_dim": 2048, "n_heads": 8, "head_dim": 64, "dtype": "F32"}
    peaks = []
    for n_layers in (1, 3):
        source = write_small_model(tmp_path / "source", **shape, n_layers=n_layers)
        tracemalloc.start()
        report = export(source, tmp_path / "model.bin", threads=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert report.source_size > 45e6
    assert abs(peaks[1] - peaks[0]) < 1e6
    assert peaks[1] < 40e6


# ----------------------------------------------------------------------------
# Weights that cannot be stored

PLACES = [
    ("model.embed_tokens.weight", (511, 63)),
    ("model.layers.0.self_attn.q_proj.weight", (0, 0)),
    ("model.layers.0.self_attn.k_proj.weight", (63, 1)),
    ("model.layers.1.self_attn.v_proj.weight", (17, 40)),
    ("model.layers.1.mlp.up_proj.weight", (100, 3)),
    ("model.layers.1.input_layernorm.weight", (5,)),
    ("model.layers.1.self_attn.k_norm.weight", (31,)),
    ("model.norm.weight", (0,)),
]


@pytest.mark.parametrize(("name", "place"), PLACES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("slice_weights", [1, 1 << 20])
def test_weight_that_is_no_number_is_refused_by_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    name: str,
    place: tuple[int, ...],
    value: float,
    slice_weights: int,
) -> None:
    monkeypatch.setattr(quantise, "SLICE_WEIGHTS", slice_weights)
    weights = small_weights()
    weights[name][place] = value
    write_safetensors(source / "model.safetensors", {n: encode_tensor(w, "BF16") for n, w in weights.items()})
    target = tmp_path / "model.bin"
    target.write_bytes(OLD)
    where = ", ".join(map(str, place))
    with pytest.raises(SourceError, match=re.escape(f"{name}[{where}] is {value}; only finite weights")):
        export(source, target)
    assert target.read_bytes() == OLD
    assert leftovers(tmp_path) == []


def test_weight_too_large_for_a_scale_is_refused(tmp_path: Path, source: Path) -> None:
    weights = small_weights(dtype="F32")
    largest = np.float32(quantise.MAX_WEIGHT[format.Encoding.INT8])
    name = "model.layers.0.mlp.down_proj.weight"
    for value, is_fine in ((largest, True), (np.nextafter(largest, np.float32(np.inf)), False)):
        weights[name][1, 2] = value
        write_safetensors(
            source / "model.safetensors", {n: encode_tensor(w, "F32") for n, w in weights.items()}
        )
        if is_fine:
            export(source, tmp_path / "model.bin")
        else:
            with pytest.raises(
                SourceError, match=r"down_proj\.weight\[1, 2\] is 8\.31901e\+06; .* up to 8319008"
            ):
                export(source, tmp_path / "model.bin")


# ----------------------------------------------------------------------------
# The target


def test_target_that_cannot_be_written_is_refused(tmp_path: Path, source: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(source / "config.json")
    os.link(source / "tokenizer.json", tmp_path / "hard link")
    cases = {
        tmp_path: "is a directory",
        tmp_path / "no" / "model.bin": "there is no directory",
        tmp_path / "fifo": "not a regular file",
        Path("/dev/null"): "not a regular file",
        source / "model.safetensors": "is a file of the model that is read",
        source / ".." / "source" / "config.json": "is a file of the model that is read",
        tmp_path / "link": "is a file of the model that is read",
        tmp_path / "hard link": "is a file of the model that is read",
    }
    before = {path: path.read_bytes() for path in source.iterdir()}
    for target, reason in cases.items():
        with pytest.raises(SourceError, match=reason):
            export(source, target)
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert leftovers(tmp_path) == []


def test_target_in_a_read_only_directory_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write there all the same
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "closed")
    with pytest.raises(SourceError, match="is not writable"):
        export(source, tmp_path / "closed" / "model.bin")


@pytest.mark.parametrize("content", [b"years of work", b"\0", format.MAGIC[:-1], b"GGUF"])
def test_a_file_that_is_no_model_is_replaced_only_by_force(
    tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str], content: bytes
) -> None:
    target = tmp_path / "precious.md"
    target.write_bytes(content)
    for refused in (lambda: export(source, target), lambda: exporter.estimate(source, target)):
        with pytest.raises(
            SourceError, match=r"precious\.md: exists and is not a model\.bin; --force replaces it"
        ):
            refused()
    assert main([str(source), str(target)]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert target.read_bytes() == content
    export(source, target, force=True)
    assert ModelFile(target).config.dim == 64
    target.write_bytes(content)
    assert main([str(source), str(target), "--force", "--quiet"]) == 0
    assert ModelFile(target).config.dim == 64


@pytest.mark.parametrize("content", [None, b"", OLD])
def test_nothing_an_empty_file_and_a_model_are_replaced(
    tmp_path: Path, source: Path, content: bytes | None
) -> None:
    target = tmp_path / "model.bin"
    if content is not None:
        target.write_bytes(content)
    export(source, target)
    assert ModelFile(target).config.dim == 64


def test_force_replaces_no_file_of_the_source(source: Path) -> None:
    with pytest.raises(SourceError, match="is a file of the model that is read"):
        export(source, source / "config.json", force=True)


def test_options_are_given_by_name(tmp_path: Path, source: Path) -> None:
    with pytest.raises(TypeError, match="positional"):
        export(source, tmp_path / "model.bin", 64)  # type: ignore[arg-type, call-arg]


def test_link_stays_a_link(tmp_path: Path, source: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, real = tmp_path / "model.bin", tmp_path / "elsewhere" / "real.bin"
    link.symlink_to(real)
    export(source, link)
    assert link.is_symlink()
    assert ModelFile(real).metadata == ModelFile(link).metadata


def test_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(source, tmp_path / "model.bin")
    needed = (tmp_path / "model.bin").stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SourceError, match=f"needs {needed:,} bytes, {needed - 1:,} are free"):
        export(source, tmp_path / "other.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "source"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_failure_of_any_call_leaves_the_old_file(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    call: str,
) -> None:
    """The n-th write, fsync or rename says the disk is full, for every n until the export gets through."""
    monkeypatch.setattr(quantise, "SLICE_WEIGHTS", 4000)
    export(source, tmp_path / "whole.bin")
    target, failures = tmp_path / "model.bin", 0
    while True:
        target.write_bytes(OLD)
        with monkeypatch.context() as patch:
            fail_at_nth(patch, call, failures)
            status = main([str(source), str(target), "--quiet"])
        if status == 0:
            break
        failures += 1
        assert status == 2
        assert capfd.readouterr().err == f"export.py: error: {target}: No space left on device\n"
        assert leftovers(tmp_path) == []
        renamed = call == "fsync" and failures == 3  # the rename is done, only its fsync failed
        assert target.read_bytes() == ((tmp_path / "whole.bin").read_bytes() if renamed else OLD)
    assert failures >= {"write": 50, "fsync": 3, "replace": 1}[call]


def fail_at_nth(patch: pytest.MonkeyPatch, call: str, n: int) -> None:
    owner: Any = format.ModelWriter if call == "write" else os
    real, count = getattr(owner, call), 0

    def failing(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == n + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    patch.setattr(owner, call, failing)


# ----------------------------------------------------------------------------
# Killed

KILL_AT = """
import json, os, pathlib, signal, sys
import numpy, safetensors, tokenizers  # here, so that no child has to
from qwen3c import engine, format
from qwen3c.convert import export, quantise

source, target, points = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
quantise.SLICE_WEIGHTS = 4000
calls = 0
last = None

def counted(function):
    def call(*arguments, **options):
        event()
        result = function(*arguments, **options)
        event()
        return result
    return call

def event():
    global calls
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)
    calls += 1

class File:
    def __init__(self, file):
        self.file = file
    def __getattr__(self, name):
        value = getattr(self.file, name)
        return counted(value) if name in ("write", "seek", "flush", "close") else value

def open_counted(path, mode):
    event()
    file = open(path, mode)
    event()
    return File(file) if mode == "xb" else file

format.open = open_counted
for name in ("fsync", "replace", "close"):
    setattr(os, name, counted(getattr(os, name)))

def run(point):
    global calls, last
    calls, last = 0, point
    export.export(source, target)
    return calls

if points is None:
    print(run(None))
for point in points or []:
    old = target.read_bytes() if target.exists() else None
    child = os.fork()
    if child == 0:
        run(point)
        os._exit(0)
    print(json.dumps([point, os.WTERMSIG(os.waitpid(child, 0)[1])]), flush=True)
    for name in os.listdir(target.parent):
        if name.endswith(".tmp"):
            os.rename(target.parent / name, target.parent / f"leftover {point}")
    if target.exists():
        os.rename(target, target.parent / f"target {point}")
    if old is not None:
        target.write_bytes(old)
"""


@pytest.mark.parametrize("old", [OLD, None])
def test_kill_at_any_point_leaves_the_old_file_or_the_whole_new_one(
    tmp_path: Path, source: Path, old: bytes | None
) -> None:
    """SIGKILL before and after calls that touch files: the first 4, the last 15, some 30 in between."""
    export(source, tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    directory = tmp_path / "target"
    directory.mkdir()
    target = directory / "model.bin"
    n_calls = int(run_script(KILL_AT, source, target, "null").stdout)
    assert target.read_bytes() == whole
    target.unlink()
    if old is not None:
        target.write_bytes(old)
    middle = range(8, n_calls - 30, max(n_calls // 40, 1))
    points = sorted({*range(8), *middle, *range(n_calls - 30, n_calls)})
    assert len(points) >= 50
    result = run_script(KILL_AT, source, target, json.dumps(points))
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert reports == [[point, signal.SIGKILL] for point in points], result.stderr

    outcomes = []
    for point in points:
        found = directory / f"target {point}"
        outcomes.append(found.read_bytes() if found.exists() else None)
        assert outcomes[-1] in (old, whole), f"point {point}"
        leftover = directory / f"leftover {point}"
        if leftover.exists() and leftover.read_bytes() != whole:
            with pytest.raises(format.ModelFileError):
                ModelFile(leftover)
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome == whole), "new first, old later?"
    assert outcomes[0] == old
    assert outcomes[-1] == whole


def test_leftovers_of_a_killed_export_are_removed_by_the_next(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "model.bin"
    with start_slow_export(source, target) as process:
        process.kill()
    assert len(leftovers(tmp_path)) == 1
    export(source, target)
    assert leftovers(tmp_path) == []


SLOW_EXPORT = """
import sys, time
from qwen3c.cli.export import main
from qwen3c.convert import quantise
convert = quantise.convert

def convert_slowly(*arguments):
    time.sleep(0.1)
    return convert(*arguments)

quantise.convert = convert_slowly
sys.exit(main(sys.argv[1:]))
"""


def start_slow_export(source: Path, target: Path) -> subprocess.Popen[str]:
    """An export that takes seconds, returned once it is writing."""
    command = [sys.executable, "-c", SLOW_EXPORT, str(source), str(target), "--threads", "1"]
    process = subprocess.Popen(
        command, cwd=PACKAGES, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not leftovers(target.parent) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("signal_number", "status", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "its terminal was closed"),
    ],
)
def test_signal_ends_the_export_and_leaves_nothing(
    tmp_path: Path, source: Path, signal_number: int, status: int, word: str
) -> None:
    target = tmp_path / "model.bin"
    target.write_bytes(OLD)
    with start_slow_export(source, target) as process:
        process.send_signal(signal_number)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "")
    assert error == f"export.py: error: {target}: {word}, nothing was written\n"
    assert target.read_bytes() == OLD
    assert leftovers(tmp_path) == []


INTERRUPTED_EXPORTS = """
import random, signal, sys, time
from qwen3c.convert.export import export

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
export(*sys.argv[1:], threads=2)  # imports what it needs
start = time.perf_counter()
export(*sys.argv[1:], threads=2)
seconds = time.perf_counter() - start
interrupted = 0
for i in range(150):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.Random(i).uniform(1e-5, seconds))
        export(*sys.argv[1:], threads=2)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
print(interrupted)
"""


def test_an_interrupt_at_any_moment_ends_the_export(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "model.bin"
    command = [sys.executable, "-c", INTERRUPTED_EXPORTS, str(source), str(target)]
    run = subprocess.run(command, cwd=PACKAGES, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert int(run.stdout) > 30
    ModelFile(target)
    assert (
        len(leftovers(tmp_path)) <= 1
    )  # a temporary of a writer killed before it locked the file is removed by the next export


QUANTIZING_TO_THE_END = """
from _thread import start_new_thread
from time import sleep
from qwen3c import engine

def quantize_for_ever():
    out = bytearray(16 * 64 + 32)
    while True:
        engine.quantize_tiles([(bytes(2 * 16 * 64), "BF16")], 64, 64, out)

for _ in range(4):
    start_new_thread(quantize_for_ever, ())
sleep(0.1)
"""


def test_a_worker_that_is_at_it_when_the_interpreter_ends_does_no_harm() -> None:
    for _ in range(4):
        command = [sys.executable, "-c", QUANTIZING_TO_THE_END]
        run = subprocess.run(command, cwd=PACKAGES, capture_output=True, text=True, timeout=60)
        assert (run.returncode, run.stderr) == (0, "")


# ----------------------------------------------------------------------------
# Limits of the system


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_where_threads_cannot_start_the_export_does_with_those_there_are(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    """Threads cannot be started, as under `ulimit -u` or without memory for a stack."""
    export(source, tmp_path / "expected.bin")
    real, started = quantise.start_new_thread, 0  # type: ignore[attr-defined]

    def start_some(*arguments: Any) -> int:
        nonlocal started
        if started == allowed:
            raise RuntimeError("can't start new thread")
        started += 1
        return real(*arguments)

    monkeypatch.setattr(quantise, "start_new_thread", start_some)
    monkeypatch.setattr(quantise, "SLICE_WEIGHTS", 4000)
    export(source, tmp_path / "model.bin", threads=4)
    assert started == allowed
    assert (tmp_path / "model.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()


@pytest.mark.parametrize("threads", [True, False])
def test_out_of_memory_is_one_line(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    threads: bool,
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError("Unable to allocate 4.00 MiB")

    if not threads:
        monkeypatch.setattr(quantise, "_start_threads", lambda n, target: 0)
    monkeypatch.setattr(quantise, "_quantize", no_memory)
    target = tmp_path / "model.bin"
    assert main([str(source), str(target)]) == 2
    assert (
        capfd.readouterr().err == f"export.py: error: {target}: out of memory: Unable to allocate 4.00 MiB\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("limit", range(5, 9))
def test_too_few_open_files_are_one_line(tmp_path: Path, limit: int) -> None:
    """The limit of open files is reached somewhere between the first shard and the temporary file."""
    source = write_small_model(tmp_path / "source", shards=3)
    script = f"""
        import resource, sys
        import numpy, tokenizers, safetensors, qwen3c.engine, qwen3c.convert.lora
        from qwen3c.cli.export import main
        resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
        sys.exit(main(sys.argv[1:]))
    """
    result = run_script(textwrap.dedent(script), source, tmp_path / "model.bin", "--quiet")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert f"Too many open files: the limit is {limit} (ulimit -n)" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_library_that_cannot_be_loaded_is_one_short_line(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """NumPy's ImportError is a page of advice; its cause has the reason."""

    def fail(*_: object, **__: object) -> None:
        try:
            raise ImportError("libopenblas.so: failed to map segment from shared object")
        except ImportError as error:
            raise ImportError("IMPORTANT: PLEASE READ THIS\n" * 20) from error

    monkeypatch.setattr("qwen3c.convert.export.export", fail)
    assert main([str(source), str(tmp_path / "model.bin")]) == 2
    expected = "export.py: error: libopenblas.so: failed to map segment from shared object\n"
    assert capfd.readouterr().err == expected
