"""The command export.py: what it says, what it refuses, what it estimates.

python -m pytest tests/cli/test_export.py
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from commands import run_script
from small_gguf import small_gguf, write_gguf
from small_models import write_json, write_small_model
from test_huggingface import FAULTS

from qwen3c import format, memory
from qwen3c.cli.export import main
from qwen3c.convert import export as exporter
from qwen3c.convert.export import export
from qwen3c.convert.source import StoredTensor
from qwen3c.format import ModelFile
from qwen3c.inspect.info import lines

ROOT = Path(__file__).parents[2]
OLD = format.MAGIC + b"old"  # what stood in the target: a model.bin, so that an export may replace it


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_small_model(tmp_path / "source")


def leftovers(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if entry.name.endswith(".tmp")]


@pytest.mark.parametrize("missing", ["tokenizer_config.json", "chat_template"])
def test_a_model_without_a_chat_template_says_what_it_cannot_do(
    tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str], missing: str
) -> None:
    if missing == "chat_template":
        write_json(source / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    else:
        (source / missing).unlink()
    report = export(source, tmp_path / "model.bin")
    assert len(report.warnings) == 1
    assert main([str(source), str(tmp_path / "model.bin")]) == 0
    last = capfd.readouterr().err.splitlines()[-1]
    where = "tokenizer_config.json, chat_template.jinja"
    assert (
        last == f"warning: {source} has no chat template ({where}): the model completes text, but cannot chat"
    )


def test_a_model_with_a_chat_template_is_not_warned_about(tmp_path: Path, source: Path) -> None:
    assert export(source, tmp_path / "model.bin").warnings == []


def test_a_gguf_file_without_a_chat_template_says_so_too(tmp_path: Path) -> None:
    keys, tensors = small_gguf()
    del keys["tokenizer.chat_template"]
    path = write_gguf(tmp_path / "model.gguf", keys, tensors)
    assert (
        "model.gguf has no chat template (tokenizer.chat_template)"
        in export(path, tmp_path / "m.bin").warnings[0]
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_source_is_one_line_and_status_2(
    tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    damage, expected = FAULTS[fault]
    damage(source)
    target = tmp_path / "model.bin"
    target.write_bytes(OLD)
    assert main([str(source), str(target)]) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith(f"export.py: error: {source}")
    assert error.count("\n") == 1
    assert expected in error
    assert target.read_bytes() == OLD
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["SRC", "OUT", "--group-size", "100"], "--group-size is 100, not one of 32, 64, 128, 256"),
        (["SRC", "OUT", "--group-size", "128"], "dim = 64 is not a multiple of group_size = 128"),
        (["SRC", "OUT", "--name", "\ud800"], "name has a lone surrogate at position 0"),
        (["nowhere", "OUT"], "nowhere: no such directory"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    places = {"SRC": str(source), "OUT": str(tmp_path / "model.bin")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["OUT", "SRC"], "the order is SRC OUT.bin"),
        (["SRC", "OUT", "--threads", "0"], "--threads is 0, at least 1"),
        (["SRC", "OUT", "--group-size", "x"], "invalid int value: 'x'"),
        (["SRC"], "OUT.bin is missing"),
        (["SRC", ""], "OUT.bin is missing"),
        (["", "OUT"], "SRC is an empty text"),
        (["SRC", "OUT", "--groop"], "unrecognized arguments: --groop"),
    ],
)
def test_wrong_usage_is_explained(
    tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    places = {"SRC": str(source), "OUT": str(tmp_path / "model.bin")}
    with pytest.raises(SystemExit) as caught:
        main([places.get(argument, argument) for argument in arguments])
    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("export.py: error: ") and error.count("\n") == 1 and reason in error


def test_script_converts_and_says_how_it_went(tmp_path: Path, source: Path) -> None:
    for quiet in ([], ["--quiet"]):
        command = [
            sys.executable,
            str(ROOT / "export.py"),
            "source",
            "model.bin",
            "--group-size",
            "32",
            *quiet,
        ]
        result = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert (result.returncode, result.stdout) == (0, "")
        assert ("MB/s" in result.stderr) == (not quiet)
        assert "\x1b" not in result.stderr
        assert ModelFile(tmp_path / "model.bin").config.group_size == 32


def test_help_waits_for_no_library() -> None:
    script = """
        import sys
        from qwen3c.cli.export import main
        try:
            main(["--help"])
        finally:
            print("loaded:", *{"numpy", "tokenizers", "safetensors"} & sys.modules.keys())
    """
    output = run_script(textwrap.dedent(script)).stdout
    assert "SRC OUT.bin" in output
    assert output.endswith("loaded:\n")


def test_file_size_limit_is_one_line(tmp_path: Path, source: Path) -> None:
    """A real failing write, from the system: the file may not grow beyond 100 kB."""
    script = """
        import resource, sys
        from qwen3c.cli.export import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sys.exit(main(sys.argv[1:]))
    """
    result = run_script(textwrap.dedent(script), source, tmp_path / "model.bin", "--quiet")
    assert result.returncode == 2
    assert result.stderr == f"export.py: error: {tmp_path / 'model.bin'}: File too large\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("shape", [{}, {"tied": False, "shards": 2}, {"dim": 128, "dtype": "F32"}], ids=str)
def test_an_estimate_is_what_the_export_then_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shape: dict[str, Any]
) -> None:
    source = write_small_model(tmp_path / "source", **shape)
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(StoredTensor, "read", lambda *_: pytest.fail("a weight was read"))
        estimate = exporter.estimate(source, tmp_path / "model.bin")
        assert main([str(source), "--estimate"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    report = export(source, tmp_path / "model.bin")
    assert estimate.file_size == report.file_size == (tmp_path / "model.bin").stat().st_size
    assert estimate.source_size == report.source_size
    out = capsys.readouterr().out
    assert f"({estimate.file_size:,} bytes), INT8 in groups of 64" in out
    # the estimated memory is what `info` says of the exported file
    rows = [line for line in out.splitlines() if line.endswith(("yes", "no", "only"))]
    assert rows and set(rows) <= set(lines(ModelFile(tmp_path / "model.bin")))


def test_an_estimate_says_what_does_not_fit(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    monkeypatch.setattr(memory, "available", lambda mapped=0: 1000)
    assert main([str(source), "--estimate"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"disk: 0\.0 MiB free in .*: does not fit", out)
    assert re.search(r"256 .* MiB  no\n", out) and "would be read from disk again and again" in out


def test_an_estimate_refuses_what_an_export_refuses(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_json(source / "config.json", {"model_type": "gpt2"})
    errors = []
    for arguments in (["--estimate"], [str(source.parent / "model.bin")]):
        assert main([str(source), *arguments]) == 2
        errors.append(capfd.readouterr().err)
    assert errors[0] == errors[1] and "config.json" in errors[0]


def test_model_in_the_box_is_sound() -> None:
    file = ModelFile(ROOT / "qwen3c" / "data" / "model.bin")
    assert file.metadata["name"] == "qwen3c-box"
    assert file.metadata["thinking"] == "none"
    assert file.metadata["generation"]["temperature"] == 0.3
    assert file.file_size <= 16 << 20
    assert all(sound for _, sound in file.verify())


def test_config_with_text_no_file_can_hold_is_one_line(
    tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", values | {"_note": "\ud800"})
    assert main([str(source), str(tmp_path / "model.bin")]) == 2
    assert "surrogates not allowed" in capfd.readouterr().err
