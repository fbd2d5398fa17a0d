"""The benchmark's arithmetic, its checks and its report; no speed is asserted.

python -m pytest tests/inspect/test_bench.py
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_models import TINY_QWEN3, export_small_model, write_small_model

from qwen3c import Model, engine, reference
from qwen3c.cli import run
from qwen3c.convert.export import export
from qwen3c.format import Config, ModelFile, matrix_size
from qwen3c.inspect import bench
from qwen3c.inspect.bench import Series, Test, Work

ROOT = Path(__file__).parents[2]
Test.__test__ = False  # type: ignore[attr-defined]  # pytest: not a class of tests
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"tied": True},
    "qwen2": {"architecture": "qwen2", "dim": 128, "n_heads": 4, "head_dim": 32, "tied": False},
    "llama": {"architecture": "llama", "tied": False},
    "qwen3_moe": {"architecture": "qwen3_moe", "tied": True},
}
DENSE = Config(
    dim=64, hidden_dim=192, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, vocab_size=512, n_tokens=400,
    context=1024, group_size=64, tied_embedding=True, rms_eps=1e-6, rope_theta=1e6,
)  # fmt: skip
# of one row of DENSE, by hand: qkv, o, gate and up, down; then the head
BODY = 2 * (64 * (128 + 64 + 64) + 128 * 64 + 64 * 384 + 192 * 64)
HEAD = 512 * 64


def load(name: str) -> ModuleType:
    """A file of benchmarks/ as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / f"benchmarks/{name}.py")
        assert spec and spec.loader
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load("bench")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(export_small_model(tmp_path_factory.mktemp("small")))


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/bench.py"), *args],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


# ----------------------------------------------------------------------------
# What a test asks of the machine


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_decoded_token_reads_every_weight_it_uses_once(name: str, tmp_path: Path) -> None:
    file = ModelFile(export_small_model(tmp_path, **ARCHITECTURES[name]))
    config, expected = file.config, 0.0
    for tensor in file.tensors:
        if ".experts." in tensor.name:
            expected += tensor.size * config.n_experts_per_token / config.n_experts
        elif tensor.name == "model.embed_tokens.weight" and not config.tied_embedding:
            expected += tensor.size / config.vocab_size
        else:
            expected += tensor.size
    assert sum(bench.weight_bytes(config, 1)) == pytest.approx(expected)
    if name == "qwen3":
        assert expected == sum(tensor.size for tensor in file.tensors)


def test_many_rows_read_nearly_all_experts_and_one_row_its_own() -> None:
    config = replace(
        DENSE, architecture=2, n_experts=8, n_experts_per_token=2, expert_hidden_dim=64, decoder_sparse_step=1
    )
    experts = 2 * 8 * (matrix_size(128, 64, 64) + matrix_size(64, 64, 64))
    one, many = bench.weight_bytes(config, 1)[0], bench.weight_bytes(config, 200)[0]
    assert many - one == pytest.approx(experts * (1 - 2 / 8))
    # two rows choose 1 - (3/4)^2 = 7/16 of the experts
    assert bench.weight_bytes(config, 2)[0] - one == pytest.approx(experts * (7 / 16 - 2 / 8))


def test_multiply_adds_are_those_of_the_matrices() -> None:
    assert bench.multiply_adds(DENSE) == (BODY, HEAD)
    config = replace(
        DENSE, architecture=2, n_experts=8, n_experts_per_token=2, expert_hidden_dim=64, decoder_sparse_step=1
    )
    router_and_two_experts = 2 * (8 * 64 + 2 * (64 * 128 + 64 * 64))
    assert bench.multiply_adds(config) == (2 * (64 * 256 + 128 * 64) + router_and_two_experts, HEAD)


def test_a_prompt_reads_weights_once_a_pass_and_its_head_once() -> None:
    body, head = bench.weight_bytes(DENSE, 256)
    work = bench.work(DENSE, "f16", Test("pp", 300))
    kv = DENSE.kv_bytes_per_token("f16")
    assert work.bytes == 2 * body + head + (256 + 300) * kv
    attention = 2 * 2 * 128 * (300 * 301 // 2)  # q k and p v, of 2 layers and 128 columns
    assert work.multiply_adds == 300 * BODY + HEAD + attention


def test_decoding_reads_the_cache_of_every_session_from_its_depth_on() -> None:
    body, head = bench.weight_bytes(DENSE, 3)
    work = bench.work(DENSE, "f32", Test("tg", 2, depth=100, batch=3))
    kv = DENSE.kv_bytes_per_token("f32")
    assert work.bytes == 2 * (body + head) + 3 * (101 + 102) * kv
    assert work.multiply_adds == 3 * (2 * (BODY + HEAD) + 2 * 2 * 128 * (101 + 102))


def test_the_later_of_two_limits_counts() -> None:
    work = Work(bytes=100, multiply_adds=1000)
    assert work.seconds(bandwidth=10, peak=1e9) == 10
    assert work.seconds(bandwidth=1e9, peak=10) == 100


# ----------------------------------------------------------------------------
# The report


def test_the_columns_are_medians_and_shares_are_taken_run_by_run() -> None:
    series = Series("qwen3c", Test("tg", 10, batch=2), work=Work(2e9, 4e9))
    series.seconds, series.bandwidth, series.peak = [1.0, 2.0, 4.0], [2e9, 4e9, 1e9], [1e12] * 3
    assert series.rates == [20, 10, 5]
    assert series.shares == [1.0, 0.25, 0.5]
    sigma = math.sqrt(((20 - 35 / 3) ** 2 + (10 - 35 / 3) ** 2 + (5 - 35 / 3) ** 2) / 2)
    assert series.cells() == ["tg10 x2", f"10.00 ± {sigma:.2f}", "1.00", "2.00", "50%"]
    told = series.as_json()
    assert told["tokens_per_second"] == 10 and told["share_of_limit"] == 0.5 and told["seconds"] == [1, 2, 4]
    assert json.loads(json.dumps(told)) == told


def test_a_peer_has_a_rate_and_no_share_of_our_limit() -> None:
    series = Series("llama.cpp", Test("pp", 10, depth=3), [1.0], [1e9], [1e9])
    assert series.cells() == ["pp10 @ d3", "10.00 ± 0.00", "", "", ""]
    assert "share_of_limit" not in series.as_json()


def test_markdown_lines_up() -> None:
    lines = list(bench.markdown(("test", "t/s"), [["pp512", "7.5"], ["tg", "1234.5"]]))
    assert lines == [
        "| test  |    t/s |",
        "|-------|-------:|",
        "| pp512 |    7.5 |",
        "| tg    | 1234.5 |",
    ]


@pytest.mark.parametrize(
    ("bandwidth", "peak", "quiet"),
    [
        ([30e9, 30.5e9, 29.8e9], [300e9, 301e9, 300e9], True),
        ([30e9, 20e9, 29e9], [300e9, 301e9, 300e9], False),
        ([30e9, 30.5e9, 29.8e9], [300e9, 150e9, 300e9], False),
        ([30e9], [300e9], True),
    ],
)
def test_a_machine_whose_limits_vary_proves_nothing(
    bandwidth: list[float], peak: list[float], quiet: bool
) -> None:
    said = bench.verdict(bandwidth, peak)
    assert ("quiet enough" in said) == quiet and ("TOO NOISY" in said) != quiet


def test_ratios_are_taken_pair_by_pair(program: ModuleType) -> None:
    ours = Series("qwen3c", Test("tg", 1), [1.0, 10.0, 1.0])
    theirs = Series("llama.cpp", Test("tg", 1), [2.0, 20.0, 3.0])
    assert program.ratio(ours, theirs) == "2.00 (2.00 to 3.00)"
    assert program.ratio(ours, ours) == "" and program.ratio(None, theirs) == ""


# ----------------------------------------------------------------------------
# The race


def test_engines_take_turns_and_the_first_round_is_not_counted(program: ModuleType) -> None:
    order: list[str] = []

    class Fake:
        def __init__(self, name: str, able: bool = True) -> None:
            self.name, self.able = name, able

        def seconds(self, test: Test, seed: int) -> float:
            order.append(f"{self.name}{seed}")
            if not self.able:
                raise ValueError("cannot")
            return 1000.0 if seed == 0 else float(seed)

    machine = SimpleNamespace(bandwidth=[], peak=[])
    machine.measure = lambda: (machine.bandwidth.append(1.0), machine.peak.append(2.0))
    missing: list[str] = []
    found = program.take_turns(
        2, [Fake("a"), Fake("b"), Fake("c", able=False)], machine, Test("tg", 1), missing
    )
    assert order == ["a0", "b0", "c0", "b1", "a1", "a2", "b2"]
    assert [(series.engine, series.seconds) for series in found] == [("a", [1, 2]), ("b", [1, 2])]
    assert all(series.bandwidth == [1, 1] and series.peak == [2, 2] for series in found)
    assert missing == ["tg1: cannot"]


def test_a_depth_is_paid_for_once_and_every_run_starts_from_it(small: str) -> None:
    from qwen3c import Model

    model = Model(small, threads=1)
    player = bench.Player(model)
    for test in (Test("tg", 3, depth=20), Test("pp", 5, depth=20), Test("tg", 2, batch=3), Test("loop", 4)):
        assert player.seconds(test, 1) > 0
        sessions = player._sessions
        assert player.seconds(test, 2) > 0
        assert player._sessions is sessions
        if test.kind != "loop":
            assert [session.position for session in sessions] == [test.depth + test.n] * test.batch
    with pytest.raises(ValueError, match="257 positions, the model has 256"):
        player.seconds(Test("tg", 1, depth=256), 0)


def test_a_mixed_pass_reads_one_prompt_and_decodes_a_token_of_the_others(small: str) -> None:
    from qwen3c import Model

    player = bench.Player(Model(small, threads=1))
    for _ in range(2):
        assert player.seconds(Test("mix", 5, depth=20, batch=2), 1) > 0
        assert [session.position for session in player._sessions] == [21, 21, 25]


def test_a_neighbour_ends_with_the_benchmark_even_with_a_killed_one() -> None:
    def lives(process: int) -> bool:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        return True

    with load("bench").neighbour() as process:
        assert lives(process)
    assert not lives(process)
    killed = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import bench, os, signal\n"
        "with bench.neighbour() as process:\n"
        "    print(process, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", killed], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    for _ in range(600):
        if not lives(int(done.stdout)):
            return
        time.sleep(0.05)
    raise AssertionError("the neighbour goes on without the benchmark")


# ----------------------------------------------------------------------------
# Right before fast


def test_the_engine_passes_both_checks(small: str) -> None:
    assert "bit for bit" in bench.check_bits(Model(small, 1))
    assert "NumPy reference" in bench.check_reference(small, 1)


def test_kernels_that_differ_in_one_bit_are_not_timed() -> None:
    class Session:
        def forward(self, ids: Sequence[int], logits: str = "last") -> NDArray[np.float32]:
            value = np.float32(1) if engine.isa() == "scalar" else np.nextafter(np.float32(1), np.float32(2))
            return np.full((len(ids), 4) if logits == "all" else 4, value, np.float32)

    model: Any = SimpleNamespace(
        config=SimpleNamespace(n_tokens=4),
        metadata={"eos_token_ids": []},
        generate=lambda *prompt, **options: [],
        session=Session,
    )
    before = engine.isa()
    if before == "scalar":
        pytest.skip("needs a CPU that runs more than the scalar kernels")
    with pytest.raises(RuntimeError, match="different logits"):
        bench.check_bits(model)
    assert engine.isa() == before


def test_other_tokens_than_the_reference_has_are_not_timed(
    small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *arguments: -right(*arguments))
    with pytest.raises(RuntimeError, match="the NumPy reference has token"):
        bench.check_reference(small, 1)


def test_a_model_too_large_for_the_reference_is_said_to_be(
    small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "available", lambda: 1000)
    assert "not compared" in bench.check_reference(small, 1)


# ----------------------------------------------------------------------------
# The machine's limits


def test_the_machine_has_limits_on_every_instruction_set() -> None:
    before = engine.isa()
    try:
        for isa in engine.runnable_isas():
            engine.set_isa(isa)
            assert engine.int8_peak(1, 0.001) > 0
    finally:
        engine.set_isa(before)
    data = np.ones(1 << 20, np.int8)
    assert engine.read_bandwidth(data, 2) > 0
    assert engine.read_bandwidth(data[:64]) > 0
    with pytest.raises(ValueError, match="63 bytes are too few"):
        engine.read_bandwidth(data[:63])


# ----------------------------------------------------------------------------
# The commands


def test_run_py_prints_a_table_of_80_columns_and_explains_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "QUICK_RUNS", (2, 2))
    monkeypatch.setattr(bench, "cpu_name", lambda: "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz" * 2)
    assert run.main([str(TINY_QWEN3), "-m", "bench", "-j", "1"]) == 0
    out = capsys.readouterr().out
    lines, words = out.splitlines(), " ".join(out.split())
    assert max(map(len, lines)) < 80
    file = ModelFile(TINY_QWEN3)
    model = f"{file.metadata['name']} int8 g64, 4.2 MiB, {file.config.n_parameters / 1e6:.2f} M parameters"
    assert lines[0] == model and ", 1 thread, " in words
    assert "bit for bit" in words and "int8 peak" in words
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert rows[0] == list(bench.COLUMNS)
    assert [row[0] for row in rows[2:]] == ["pp512", "tg64", "loop64"]
    for row in rows[2:]:
        rate = float(row[1].split(" ± ")[0])
        assert rate > 0 and float(row[2]) > 0 and float(row[3]) > 0 and row[4].endswith("%")
    for name in ("pp512", "tg64", "loop64", *bench.COLUMNS[1:]):
        assert any(line.startswith(f"{name:<11} ") and len(line) > 40 for line in lines), name


def test_what_was_measured_is_kept_when_the_next_test_fails(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turns = program.take_turns

    def fails_at_decode(pairs: int, contenders: Any, machine: Any, test: Test, missing: list[str]) -> Any:
        if test.kind == "tg":
            raise RuntimeError("the machine went away")
        return take_turns(pairs, contenders, machine, test, missing)

    monkeypatch.setattr(program, "take_turns", fails_at_decode)
    source, target = write_small_model(tmp_path / "source", context=512), tmp_path / "out.json"
    arguments = [str(source), "--tests", "pp,tg", "--pairs", "1", "--prompts", "9", "--json", str(target)]
    assert program.main([*arguments, "--work", str(tmp_path / "work")]) == 2
    results = json.loads(target.read_text())["races"][0]["results"]
    assert [result["test"] for result in results] == ["pp9"] and results[0]["multiply_adds"] > 0


def test_the_benchmark_measures_everything_and_writes_it_down(tmp_path: Path) -> None:
    source, target = write_small_model(tmp_path / "source", context=512), tmp_path / "out.json"
    done = command(
        str(source), "--pairs", "2", "--prompts", "40", "--decode", "3", "--depths", "50", "--batches", "2",
        "--threads", "1,2", "--kv", "f16,f32", "--json", str(target), "--work", str(tmp_path / "work"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(target.read_text())
    assert [(race["threads"], race["kv"]) for race in told["races"]] == [
        (1, "f16"),
        (2, "f16"),
        (1, "f32"),
        (2, "f32"),
    ]
    for race in told["races"]:
        names = [result["test"] for result in race["results"]]
        assert names == ["pp40", "tg3", "loop3", "tg3 x2", "tg3 @ d50", "pp40 @ d50"]
        assert all(len(result["seconds"]) == 2 and result["share_of_limit"] > 0 for result in race["results"])
        figures = {figure["what"]: figure["values"] for figure in race["figures"]}
        assert {
            "resident",
            "first token, text to text",
            "a pass of 254 rows of a prompt and 2 that decode",
        } <= figures.keys()
        assert all(value > 0 for what in ("pp40", "tg3") for value in figures[f"{what} beside a neighbour"])
        assert race["verdict"] and len(race["checks"]) == 2
    assert {figure["what"].split(",")[0] for figure in told["figures"]} == {"export", "sampler"}
    assert done.stdout.count("| qwen3c ") == 4 * (6 + 7) + 3
    pytest.importorskip("matplotlib")
    written = load("pictures").draw(told, tmp_path / "pictures")
    assert [path.name for path in written] == ["roofline.png", "depth.png", "batch.png", "threads.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_a_peer_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = load("bench")
    assert program.main(["--against", "nonesuch"]) == 2
    assert capsys.readouterr().err == (
        "bench.py: error: there is no peer 'nonesuch'; known: llama.cpp, openvino, ctranslate2\n"
    )
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    for peer, (module, extra) in {
        "llama.cpp": ("llama_cpp", "bench"),
        "openvino": ("openvino_genai", "openvino"),
        "ctranslate2": ("ctranslate2", "ctranslate2"),
    }.items():
        assert program.main(["--against", peer, "--python", f"{peer}={python}"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"no module {module}" in said and f"'.[{extra}]'" in said
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()


def test_more_positions_than_the_model_has_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_small_model(tmp_path / "source")
    args = [str(source), "--tests", "depth", "--depths", "250", "--decode", "7", "--prompts", "1"]
    assert load("bench").main([*args, "--work", str(tmp_path / "work")]) == 2
    assert "257 positions are needed, the model has 256" in capsys.readouterr().err.splitlines()[-1]


def test_random_models_of_every_family_can_be_exported(tmp_path: Path) -> None:
    random_model = load("random_model")
    for name, config in random_model.SIZES.items():
        tiny = replace(
            config, dim=64, hidden_dim=64, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=300, n_tokens=300,
            head_dim=32, n_experts=min(config.n_experts, 4),
            n_experts_per_token=min(config.n_experts_per_token, 2),
            expert_hidden_dim=min(config.expert_hidden_dim, 64),
        )  # fmt: skip
        random_model.write_random_model(tmp_path / name, tiny)
        export(tmp_path / name, tmp_path / "model.bin")
        assert ModelFile(tmp_path / "model.bin").config == tiny
