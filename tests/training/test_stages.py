"""The three stages end to end, on models that train in a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from nano import NANO, ROOT, environment, losses, train, write_chat, write_tasks, write_text

import qwen3c
from qwen3c.convert.export import export

QUICK = ["--quiet", "--threads", 1, "--evaluate-every", 4, "--checkpoint-every", 2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_text(directory / "text")
    write_chat(directory / "chat.jsonl")
    write_tasks(directory / "tasks.jsonl")
    return directory


@pytest.fixture(scope="module")
def base(data: Path) -> Path:
    """A pretrained model: enough to know digits, plus and equals."""
    status = train("pretrain", data / "text", "-o", data / "base", *NANO, "--quiet", "--steps", 60,
                   "--learning-rate", 1e-2, "--evaluate-every", 30, "--checkpoint-every", 30)  # fmt: skip
    assert status == 0
    return data / "base"


def stage_arguments(stage: str, data: Path, base: Path, out: Path, steps: int = 6) -> list[object]:
    common = ["-o", out, "--steps", steps, *QUICK]
    if stage == "pretrain":
        return ["pretrain", data / "text", *NANO[:-2], *common]
    if stage == "sft":
        return ["sft", data / "chat.jsonl", "--model", base, "--batch", 2, *common]
    reward = ["--reward", "nano:digits", "--batch", 4, "--completions", 4, "--max-tokens", 8]
    return ["grpo", data / "tasks.jsonl", "--model", base, *reward, *common]


STAGES = ["pretrain", "sft", "grpo"]


def test_the_loss_falls_from_that_of_a_uniform_guess(base: Path) -> None:
    records = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    validation = [r["validation_loss"] for r in records if "validation_loss" in r]
    assert validation[0] == pytest.approx(np.log(320), rel=0.05)
    assert validation[-1] < 2.5
    assert all(r["samples"] for r in records if "validation_loss" in r)


def test_a_run_leaves_a_model_metrics_and_a_picture(base: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "curves.png"} <= set(
        os.listdir(base)
    )
    assert (base / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not [name for name in os.listdir(base) if name.startswith(".")]


def test_every_stage_ends_in_a_model_that_the_engine_runs(data: Path, base: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "sft"
    assert train("sft", data / "chat.jsonl", "--model", base, "-o", tuned, "--steps", 40, "--batch", 4,
                 "--learning-rate", 1e-2, *QUICK) == 0  # fmt: skip
    reinforced = tmp_path / "grpo"
    assert train("grpo", data / "tasks.jsonl", "--model", tuned, "-o", reinforced, "--steps", 8, "--batch", 4,
                 "--reward", "nano:digits", "--max-tokens", 8, "--learning-rate", 1e-3,
                 *QUICK) == 0  # fmt: skip
    export(reinforced, tmp_path / "model.bin", group_size=32)
    model = qwen3c.Model(str(tmp_path / "model.bin"))
    generation = model.generate(
        model.chat_prompt([{"role": "user", "content": "3 + 4?"}]), temperature=0, max_tokens=20
    )
    for _ in generation:
        pass
    assert generation.reply.finish_reason == "stop" and generation.reply.text.strip().isdigit()


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_reinforcement_raises_the_reward(loss: str, data: Path, base: Path, tmp_path: Path) -> None:
    assert train("grpo", data / "tasks.jsonl", "--model", base, "-o", tmp_path / "out", "--steps", 30,
                 "--batch", 4,
                 "--reward", "nano:digits", "--max-tokens", 6, "--learning-rate", 5e-3, "--kl", 0,
                 "--loss", loss, "--quiet", "--threads", 1, "--evaluate-every", 10) == 0  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    rewards = [r["validation_reward"] for r in records if "validation_reward" in r]
    assert rewards[-1] > rewards[0] + 0.2
    steps = [r for r in records if "loss" in r]
    assert all(
        r["tokens"] == round(r["completion_tokens"] * 4 * 8) for r in steps
    )  # whatever the mean is over


def test_the_character_tokenizer_trains_exports_and_generates(data: Path, tmp_path: Path) -> None:
    arguments = [a for a in NANO if a not in ("--vocab-size", "320")]
    assert train("pretrain", data / "text", "-o", tmp_path / "out", *arguments, "--tokenizer", "char",
                 "--steps", 150,
                 "--learning-rate", 1e-2, *QUICK) == 0  # fmt: skip
    export(tmp_path / "out", tmp_path / "model.bin", group_size=32)
    model = qwen3c.Model(str(tmp_path / "model.bin"))
    prompt = model.tokenizer.encode("3 + 4 =")
    events = list(model.generate(prompt, temperature=0, max_tokens=4))
    assert "".join(event.text for event in events).strip()[:1].isdigit()
    assert not any(event.thinking for event in events)  # its vocabulary has no tag to think in


def test_trained_weights_give_the_engine_the_logits_of_transformers(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    export(base, tmp_path / "model.bin", group_size=32)
    model = qwen3c.Model(str(tmp_path / "model.bin"), activations="float32", kv="f32")
    oracle = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            weight.copy_(torch.from_numpy(model.weight(name)))
        ids = model.tokenizer.encode("3 + 4 = 7\n1 + 1 = 2\n")
        expected = oracle(torch.tensor([ids])).logits[0].numpy()
    ours = model.session().forward(ids, logits="all")
    assert ((ours - expected) ** 2).sum() / (expected**2).sum() <= 1e-8


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_has_the_same_losses_to_the_bit(
    stage: str, data: Path, base: Path, tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(*stage_arguments(stage, data, base, whole)) == 0
    child = os.fork()
    if child == 0:  # killed after step 4, whose checkpoint it has
        from qwen3c.training import trainer

        record = trainer.Trainer._record
        trainer.Trainer._record = lambda self, r: (  # type: ignore[assignment, method-assign]
            os.kill(os.getpid(), 9) if r["step"] == 5 else record(self, r)
        )
        os._exit(train(*stage_arguments(stage, data, base, halves)))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(losses(halves)) == 4
    assert train(*stage_arguments(stage, data, base, halves), "--resume") == 0
    assert losses(halves) == losses(whole)
    assert (halves / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_finished_or_foreign_run_is_not_overwritten(
    data: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (base / "model.safetensors").read_bytes()
    assert train(*stage_arguments("pretrain", data, base, base)) == 2
    assert "holds a run already; --resume" in capsys.readouterr().err
    assert train(*stage_arguments("pretrain", data, base, base), "--resume") == 2
    assert "was made with --" in capsys.readouterr().err
    assert (base / "model.safetensors").read_bytes() == weights


KILL = """
import os, random, signal, sys, time
from pathlib import Path
import torch, transformers, accelerate, matplotlib.figure
import qwen3c.training.pretrain, qwen3c.cli.train as cli
from qwen3c.training.checkpoint import checkpoints
torch.set_num_threads(1)
out, arguments = Path(sys.argv[1]), sys.argv[1:]
seconds, last, newest = random.Random(1), None, None
for i in range(20):
    child = os.fork()
    if child == 0:
        os._exit(cli.main(["pretrain", *arguments[1:], "-o", str(out), "--resume"]))
    deadline = time.monotonic() + 60
    while newest == last and time.monotonic() < deadline:  # let it get one checkpoint further
        time.sleep(0.01)
        newest = ([None] + checkpoints(out))[-1]
    last = newest
    time.sleep(seconds.random() * 0.4)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = checkpoints(out)
    assert found, f"kill {i}: no checkpoint"
    newest = last = found[-1]
    torch.load(last / "trainer.pt", weights_only=True)
    transformers.AutoModelForCausalLM.from_pretrained(last)
    print(i, last.name, flush=True)
"""


def test_killed_at_twenty_points_a_run_keeps_its_last_checkpoint(data: Path, tmp_path: Path) -> None:
    arguments = [
        data / "text",
        *NANO,
        "--steps",
        100000,
        "--evaluate-every",
        7,
        "--checkpoint-every",
        1,
        "--quiet",
    ]
    run = subprocess.run(
        [sys.executable, "-c", KILL, *map(str, [tmp_path / "out", *arguments])],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    names = [line.split()[1] for line in run.stdout.splitlines()]
    assert len(names) == 20 and names == sorted(names) and names[0] != names[-1]


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["copies", "sharded"])
def test_two_processes_reach_the_losses_of_one(
    shard: list[str], data: Path, base: Path, tmp_path: Path
) -> None:
    arguments = ["pretrain", data / "text", *NANO, "--steps", 6, "--batch", 4, "--micro-batch", 1, *QUICK]
    assert train(*arguments, "-o", tmp_path / "one") == 0
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1,
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]  # fmt: skip
    command = [sys.executable, *launch, ROOT / "train.py", *arguments, "-o", tmp_path / "two", *shard]
    run = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    export(tmp_path / "two", tmp_path / "model.bin", group_size=32)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(
    number: signal.Signals, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        ROOT / "train.py",
        "pretrain",
        data / "text",
        "-o",
        out,
        *NANO,
        "--steps",
        100000,
        "--quiet",
    ]
    run = subprocess.Popen(list(map(str, command)), env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not ((out / "metrics.jsonl").exists() and losses(out)) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    step = len(losses(out))
    assert f"stopped after step {step}; --resume goes on" in err and len(err.splitlines()) == 1
    assert (out / "checkpoints" / f"step-{step:07d}" / "trainer.pt").exists()


def test_a_diverging_loss_ends_the_run_and_names_the_intact_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from qwen3c.training.pretrain import Pretraining
    from qwen3c.training.trainer import Batch

    loss, calls = Pretraining.loss, []

    def diverge(self: Pretraining, batch: Batch) -> tuple[torch.Tensor, int]:
        calls.append(1)
        total, n = loss(self, batch)
        return (total * float("inf") if self.step == 4 and self.model.training else total), n

    monkeypatch.setattr(Pretraining, "loss", diverge)
    out = tmp_path / "out"
    assert train("pretrain", data / "text", "-o", out, *NANO, "--steps", 20, *QUICK) == 2
    err = capsys.readouterr().err
    assert "step 5: the loss is" in err and "diverged" in err and "step-0000004 is intact" in err
    assert len(err.splitlines()) == 1 and len(losses(out)) == 4


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("nano:raises", "the reward function failed on .*KeyError"),
        ("nano:not_a_number", "the reward function returned nan"),
        ("nano:nothing", "--reward nano:nothing: AttributeError"),
        ("no_such_module:f", "--reward no_such_module:f: ModuleNotFoundError"),
        ("nano", "expected module:function"),
        ("nano:ROOT", "is not a function"),
    ],
)
def test_a_bad_reward_ends_in_one_line(
    reward: str, message: str, data: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = stage_arguments("grpo", data, base, tmp_path / "out")
    arguments[arguments.index("nano:digits")] = reward
    assert train(*arguments) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    import re

    assert re.search(message, err)
