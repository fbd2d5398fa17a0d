"""A run is resumed with its own inputs or not at all; a stop at any point leaves whole checkpoints."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from nano import NANO, ROOT, environment, losses, train, write_chat, write_jsonl, write_tasks, write_text

from qwen3c.training.checkpoint import read_metrics
from qwen3c.training.trainer import Settings

QUICK = ["--quiet", "--threads", 1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of every stage, of two steps."""
    d = tmp_path_factory.mktemp("runs")
    write_text(d / "text")
    write_text(d / "other", n_documents=5)
    write_chat(d / "chat.jsonl")
    write_chat(d / "chat2.jsonl", 30)
    write_tasks(d / "tasks.jsonl")
    write_jsonl(d / "tasks2.jsonl", [{"prompt": f"{i}", "answer": ""} for i in range(20)])
    for stage in ("pretrain", "sft", "grpo"):
        assert train(*arguments(d, stage)) == 0
    shutil.copytree(d / "pretrain", d / "base2")
    return d


def arguments(d: Path, stage: str, out: Path | None = None) -> list[object]:
    common = ["-o", out or d / stage, "--steps", 2, *QUICK]
    return {
        "pretrain": ["pretrain", d / "text", *NANO, *common],
        "sft": ["sft", d / "chat.jsonl", "--model", d / "pretrain", "--batch", 2, *common],
        "grpo": ["grpo", d / "tasks.jsonl", "--model", d / "pretrain", "--reward", "nano:digits", "--batch",
                 2,
                 "--completions", 2, "--max-tokens", 8, *common],
    }[stage]  # fmt: skip


CHANGES = [
    ("pretrain", "{d}/text", "{d}/other", "another training data"),
    ("pretrain", "--dim 32", "--dim 64", "--dim 32, not 64"),
    ("pretrain", "--context 64", "--context 32", "--context 64, not 32"),
    ("pretrain", "--vocab-size 320", "--vocab-size 300", "--vocab-size 320, not 300"),
    ("pretrain", "--vocab-size 320", "--tokenizer {d}/pretrain", "--tokenizer bpe, not of other contents"),
    ("pretrain", "+", "--seed 2", "--seed 1, not 2"),
    ("pretrain", "+", "--validation {d}/other", "another training data"),
    ("pretrain", "--steps 2", "--steps 1", "is past --steps 1"),
    ("sft", "{d}/chat.jsonl", "{d}/chat2.jsonl", "another training data"),
    ("sft", "+", "--context 32", "--context 64, not 32"),
    ("sft", "+", "--learning-rate 0.1", "--learning-rate 0.0003, not 0.1"),
    ("sft", "--model {d}/pretrain", "--model {d}/grpo", "another --model"),
    ("grpo", "{d}/tasks.jsonl", "{d}/tasks2.jsonl", "another training data"),
    ("grpo", "nano:digits", "nano:raises", "--reward nano:digits, not nano:raises"),
    ("grpo", "--completions 2", "--completions 4", "--completions 2, not 4"),
    ("grpo", "+", "--kl 0.5", "--kl 0.02, not 0.5"),
    ("grpo", "+", "--loss grpo", "--loss dapo, not grpo"),
    ("grpo", "--model {d}/pretrain", "--model {d}/sft", "another --model"),
]


@pytest.mark.parametrize(("stage", "old", "new", "message"), CHANGES)
def test_another_run_is_not_resumed_and_the_difference_is_named(
    stage: str, old: str, new: str, message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, old, new = " ".join(map(str, arguments(runs, stage))), old.format(d=runs), new.format(d=runs)
    assert old == "+" or old in given
    given = f"{given} {new}" if old == "+" else given.replace(old, new)
    before = (runs / stage / "metrics.jsonl").read_bytes()
    assert train(*given.split(), "--resume") == 2
    err = capsys.readouterr().err
    assert message in err and "checkpoints/step-0000002: " in err and len(err.splitlines()) == 1
    assert (runs / stage / "metrics.jsonl").read_bytes() == before


def test_a_folder_of_another_stage_is_not_resumed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(a) for a in arguments(runs, "sft")]
    given[given.index("-o") + 1] = str(runs / "base2")
    assert train(*given, "--resume") == 2
    assert "was made with" in capsys.readouterr().err


def test_an_edited_reward_is_another_one(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(a) for a in arguments(runs, "grpo", tmp_path / "out")]
    given[given.index("nano:digits")] = "edited_reward:f"
    status: list[int] = []
    for body in ("0.0", "1.0"):
        (tmp_path / "edited_reward.py").write_text(f"def f(prompt, completion, task):\n    return {body}\n")
        sys.modules.pop("edited_reward", None)
        import importlib
        import linecache

        importlib.invalidate_caches()
        linecache.clearcache()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        status.append(train(*given, *(["--resume"] if status else [])))
    assert status == [0, 2]
    assert "was made with another reward function" in capsys.readouterr().err


def test_steps_and_what_decides_no_loss_may_change(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(runs / "pretrain", out)
    given = [a for a in arguments(runs, "pretrain", out) if a != "--quiet"]
    given[given.index("--steps") + 1] = 4
    assert train(*given, "--resume", "--evaluate-every", 1, "--keep", 1, "--micro-batch", 4) == 0
    err = capsys.readouterr().err
    assert "going on from step 2; --steps was 2 and is 4: the learning rate follows the new schedule" in err
    assert len(losses(out)) == 4
    rates = [r["learning_rate"] for r in read_metrics(out / "metrics.jsonl") if "learning_rate" in r]
    expected = Settings(out, 4, 8, 4, learning_rate=2e-3, warmup=1)
    assert rates[2:] == pytest.approx([expected.learning_rate_at(step) for step in (2, 3)])
    assert train(*given, "--resume") == 0
    assert "all 4 steps are done already" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_leaves_no_trace_in_the_next(
    runs: Path, tmp_path: Path
) -> None:
    given = arguments(runs, "pretrain", tmp_path / "out")
    child = os.fork()
    if child == 0:
        from qwen3c.training import curves

        def killed(records: object, path: Path) -> None:
            path.write_text("half a picture")
            os.kill(os.getpid(), signal.SIGKILL)

        curves.draw = killed
        os._exit(train(*given))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [name for name in os.listdir(tmp_path / "out") if name.startswith(".curves")]
    assert train(*given, "--resume") == 0
    evaluated = [
        r["step"] for r in read_metrics(tmp_path / "out" / "metrics.jsonl") if "validation_loss" in r
    ]
    assert evaluated == [0, 2]
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


@pytest.mark.parametrize("what", ["curves.png", "model.safetensors", "trainer.pt"])
def test_a_disk_without_room_is_named_and_the_last_checkpoint_stays(
    what: str, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(runs / "pretrain", out)
    files = [out / "curves.png", *(out / "checkpoints" / "step-0000002").iterdir()]
    sizes = {path.name: path.stat().st_size for path in files}
    child = os.fork()
    if child == 0:  # a limit on the size of files stands for a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[what] * 9 // 10, resource.RLIM_INFINITY))
        given = " ".join(map(str, arguments(runs, "pretrain", out))).replace("--steps 2", "--steps 3")
        os._exit(train(*given.split(), "--resume"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    err = capfd.readouterr().err
    where = out / "curves.png" if what == "curves.png" else out / "checkpoints" / "step-0000003"
    assert err.startswith(f"train.py: error: {where}: cannot be written: ") and "File too large" in err
    assert len(err.splitlines()) == 1 and "unexpected pos" not in err
    assert os.listdir(out / "checkpoints") == ["step-0000002"]


def test_no_float64_meets_the_device(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have no float64. Here tensors count as on such a device until cpu() is called."""
    import torch

    cpu, double, to, back = torch.Tensor.cpu, torch.Tensor.double, torch.Tensor.to, set()

    def brought_back(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = cpu(self, *args, **kwargs)
        back.add(id(result))
        return result

    def doubled(self: torch.Tensor) -> torch.Tensor:
        assert id(self) in back, "float64 on the device"
        return double(self)

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.dtype != torch.float64, "float64 to the device"
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cpu", brought_back)
    monkeypatch.setattr(torch.Tensor, "double", doubled)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    assert train(*arguments(runs, "pretrain", tmp_path / "out")) == 0


def test_samples_are_several_and_of_text_go_on_past_its_end(runs: Path) -> None:
    for stage, n in (("pretrain", 4), ("sft", 2), ("grpo", 2)):
        last = [r for r in read_metrics(runs / stage / "metrics.jsonl") if "samples" in r][-1]["samples"]
        assert len(last) >= n and len(set(last)) > 1, stage
    from qwen3c.training.vocabulary import load

    tokenizer = load(runs / "pretrain")
    record = read_metrics(runs / "pretrain" / "metrics.jsonl")[0]
    # an untrained model ends a text once in 160 tokens: of 4 samples some do, and all have the whole length
    lengths = [len(tokenizer.encode(text)) for text in record["samples"]]
    assert min(lengths) > 32 and any(
        "<|endoftext|>" in text or "<|im_end|>" in text for text in record["samples"]
    )


def test_under_nohup_a_closed_terminal_does_not_end_a_run(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = [str(a) for a in arguments(runs, "pretrain", out)]
    given[given.index("--steps") + 1] = "100000"
    command = ["nohup", sys.executable, str(ROOT / "train.py"), *given]
    run = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 100
    while not ((out / "metrics.jsonl").exists() and losses(out)) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGHUP)
    n = len(losses(out))
    while len(losses(out)) < n + 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run.poll() is None and len(losses(out)) >= n + 20
    run.send_signal(signal.SIGTERM)
    told, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "Traceback" not in told
    step = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (out / "checkpoints" / f"step-{step:07d}").exists()
