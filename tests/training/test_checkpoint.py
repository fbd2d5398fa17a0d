from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3c.system.files import replacing
from qwen3c.training import TrainingError
from qwen3c.training.checkpoint import (
    Metrics,
    begin,
    check_free,
    check_inputs,
    checkpoints,
    fingerprint,
    prune,
    publish,
    read_metrics,
    tidy,
    write_directory,
)


def fill_with(text: str) -> Callable[[Path], None]:
    def fill(directory: Path) -> None:
        (directory / "model.safetensors").write_text(text)
        (directory / "config.json").write_text(text)

    return fill


def test_checkpoints_are_listed_oldest_first(tmp_path: Path) -> None:
    for step in (1000000, 2, 30):
        write_directory(tmp_path / "checkpoints" / f"step-{step:07d}", fill_with("x"))
    assert [p.name for p in checkpoints(tmp_path)] == ["step-0000002", "step-0000030", "step-1000000"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-0000001"
    write_directory(path, fill_with("old"))

    def fail(directory: Path) -> None:
        (directory / "config.json").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_directory(path, fail)
    assert (path / "config.json").read_text() == "old"
    assert os.listdir(path.parent) == ["step-0000001"]


def test_a_writer_that_is_killed_leaves_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-0000001"

    def kill(directory: Path) -> None:
        (directory / "config.json").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        write_directory(path, kill)
    os.waitpid(child, 0)
    assert checkpoints(tmp_path) == []
    write_directory(path, fill_with("whole"))
    prune(tmp_path, keep=1)
    assert os.listdir(path.parent) == ["step-0000001"]


def test_publishing_copies_the_model_and_not_the_state_of_the_optimiser(tmp_path: Path) -> None:
    write_directory(tmp_path / "c", fill_with("new"))
    (tmp_path / "c" / "trainer.pt").write_text("state")
    (tmp_path / "model.safetensors").write_text("old")
    publish(tmp_path / "c", tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "new"
    assert not (tmp_path / "trainer.pt").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in range(5):
        write_directory(tmp_path / "checkpoints" / f"step-{step:07d}", fill_with("x"))
    prune(tmp_path, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-0000003", "step-0000004"]


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, 0)
    for step in range(1, 6):
        first.add({"step": step, "time": time.time()})
    again = Metrics(path, 3)
    again.add({"step": 4})
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]


def test_a_last_line_cut_short_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"st')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"st\n' + json.dumps({"step": 1}) + "\n")
    with pytest.raises(TrainingError, match="line 1 is not JSON"):
        read_metrics(path)


def test_a_folder_with_a_model_or_a_run_is_not_free(tmp_path: Path) -> None:
    check_free(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text("")  # of a run killed before its first checkpoint
    (tmp_path / "notes.txt").write_text("mine")
    check_free(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(
        TrainingError, match=r"holds a model \(LlamaForCausalLM\).*\(config.json, model.safetensors\)"
    ):
        check_free(tmp_path)
    write_directory(tmp_path / "checkpoints" / "step-0000001", fill_with("x"))
    with pytest.raises(TrainingError, match="holds a run already; --resume"):
        check_free(tmp_path)
    with pytest.raises(TrainingError, match="is a file"):
        check_free(tmp_path / "notes.txt")


def test_a_new_run_removes_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    write_directory(tmp_path / "checkpoints" / "step-0000007", fill_with("x"))
    (tmp_path / "checkpoints" / ".step-0000008.12.tmp").mkdir()
    for name in ("metrics.jsonl", "curves.png", "notes.txt", "model.safetensors"):
        (tmp_path / name).write_text("old")
    begin(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "model.safetensors", "notes.txt"]
    assert os.listdir(tmp_path / "checkpoints") == []


def test_temporaries_of_a_killed_run_go_and_those_of_others_stay(tmp_path: Path) -> None:
    for name in (".curves.png.12.tmp", ".metrics.jsonl.3.tmp", ".model.safetensors.4.tmp", ".mine.12.tmp"):
        (tmp_path / name).write_text("")
    tidy(tmp_path)
    assert os.listdir(tmp_path) == [".mine.12.tmp"]


def test_publishing_removes_the_files_of_another_model(tmp_path: Path) -> None:
    write_directory(tmp_path / "c", fill_with("new"))
    out = tmp_path / "out"
    out.mkdir()
    for name in ("chat_template.jinja", "model-00001-of-00002.safetensors", "config.json", "notes.txt"):
        (out / name).write_text("old")
    publish(tmp_path / "c", out)
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "notes.txt"]


def test_a_resumed_run_names_the_first_difference(tmp_path: Path) -> None:
    one, two = fingerprint([b"a", b"b"]), fingerprint([b"ab"])
    assert one != two
    saved: dict[str, Any] = {"stage": "pretrain", "--context": 64, "training data": one}
    check_inputs(tmp_path, saved, dict(saved))
    for given, message in (
        ({**saved, "--context": 128}, "was made with --context 64, not 128"),
        ({**saved, "training data": two}, "was made with another training data"),
        ({**saved, "--model": one}, "was made with --model not given, not of other contents"),
    ):
        with pytest.raises(TrainingError, match=message):
            check_inputs(tmp_path, saved, given)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
        metrics.add({"step": 1})
