from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nano import NANO, ROOT, environment, train, write_chat, write_tasks, write_text

from qwen3c.training.checkpoint import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_text(directory / "text")
    write_chat(directory / "chat.jsonl")
    write_tasks(directory / "tasks.jsonl")
    assert (
        train("pretrain", directory / "text", "-o", directory / "base", *NANO, "--steps", 1, "--quiet") == 0
    )
    shutil.copytree(directory / "base", directory / "foreign", ignore=shutil.ignore_patterns("checkpoints"))
    (directory / "broken").mkdir()
    (directory / "broken" / "config.json").write_text("{")
    (directory / "broken" / "tokenizer.json").write_text("{")
    (directory / "bad.jsonl").write_text('{"messages": 1}\n')
    (directory / "long.jsonl").write_text(json.dumps({"prompt": "1 + 1 " * 100}) + "\n")
    (directory / "binary").write_bytes(bytes(range(32)) * 10)
    (directory / "accents.txt").write_text("caf\u00e9 " * 100)
    return directory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrain {d}/nowhere -o {o}", "nowhere: no such file or folder"),
        ("pretrain {d}/binary -o {o}", "is not text"),
        ("pretrain {d}/text -o {o} --context 100000", "too few for a window of 100000"),
        ("pretrain {d}/text -o {o} --dim 33", "dim = 33 is not a multiple of 32"),
        (
            "pretrain {d}/text -o {o} --n-heads 3 --n-kv-heads 2",
            "n_heads = 3 is not a multiple of n_kv_heads = 2",
        ),
        ("pretrain {d}/text -o {o} --n-layers 0", "n_layers is 0"),
        ("pretrain {d}/text -o {o} --vocab-size 10", "vocabulary of 10 tokens"),
        ("pretrain {d}/text -o {o} --warmup 5000", "--warmup 5000 is not from 0 to --steps"),
        ("pretrain {d}/text -o {o} --tokenizer {d}/text", "has no tokenizer.json"),
        ("pretrain {d}/text -o {o} --model {d}/text", "has no config.json"),
        ("pretrain {d}/text -o {o} --model {d}/broken", "broken/config.json: is not valid JSON"),
        ("pretrain {d}/text -o {d}/binary", "binary"),
        ("pretrain {d}/text -o {d}/text/out", "lies in the data"),
        ("pretrain {d}/accents.txt -o {o} --tokenizer char", "accents.txt: the tokenizer has no token for"),
        ("pretrain {d}/text -o {o} --model {d}/base --context 65", "--context 65 exceeds the model's 64"),
        ("sft {d}/chat.jsonl --model {d}/base -o {d}/foreign", "foreign: holds a model (Qwen3ForCausalLM)"),
        ("sft {d}/chat.jsonl --model {d}/base -o {d}/foreign --resume", "foreign: holds a model"),
        (
            "grpo {d}/tasks.jsonl --model {d}/base -o {o} --reward nano:digits --max-tokens 64",
            "--max-tokens 64 leaves no room for a prompt: the context is 64",
        ),
        ("pretrain {d}/text -o {o} --shard", "--shard needs several processes"),
        ("sft {d}/bad.jsonl --model {d}/base -o {o}", "bad.jsonl: line 1: messages is not a list"),
        ("sft {d}/nowhere.jsonl --model {d}/base -o {o}", "nowhere.jsonl"),
        (
            "sft {d}/chat.jsonl --model {d}/base -o {o} --context 4096",
            "--context 4096 exceeds the model's 64",
        ),
        (
            "grpo {d}/long.jsonl --model {d}/base -o {o} --reward nano:digits --max-tokens 8",
            "line 1: the prompt is",
        ),
        (
            "grpo {d}/bad.jsonl --model {d}/base -o {o} --reward nano:digits --max-tokens 8",
            "line 1: messages is not",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    arguments: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*arguments.format(d=data, o=tmp_path / "out").split(), "--quiet") == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("train.py: error: ") and len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.safetensors"))


GRPO = "grpo {d}/tasks.jsonl --model {d}/base --reward nano:digits"


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ("pretrain {d}/text --steps 0", "--steps"),
        ("pretrain {d}/text --batch -1", "--batch"),
        ("pretrain {d}/text --learning-rate nan", "--learning-rate"),
        ("pretrain {d}/text --validation-fraction 1", "--validation-fraction"),
        ("pretrain {d}/text --clip 0", "--clip"),
        ("pretrain {d}/text --weight-decay -1", "--weight-decay"),
        ("pretrain {d}/text --min-learning-rate 1.5", "--min-learning-rate"),
        ("pretrain {d}/text --seed -1", "--seed"),
        ("pretrain {d}/text --resume --force", "--resume goes on with a run, --force begins anew"),
        ("pretrain {d}/text --model {d}/base --preset nano", "--preset belongs to a new model"),
        ("pretrain {d}/text --model {d}/base --tokenizer bpe", "--tokenizer belongs to a new model"),
        (
            "pretrain {d}/text --model {d}/base --preset micro --dim 64",
            "--preset, --dim belong to a new model",
        ),
        ("pretrain {d}/text --tokenizer char --vocab-size 300", "--vocab-size is for --tokenizer bpe"),
        (GRPO + " --completions 1", "argument --completions: 1 is not at least 2"),
        (GRPO + " --kl -0.1", "argument --kl: -0.1 is not a number from 0 up"),
        (GRPO + " --kl nan", "argument --kl"),
        (GRPO + " --loss ppo", "argument --loss: invalid choice"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_in_one_line(
    arguments: str, flag: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        train(*arguments.format(d=data).split(), "-o", tmp_path)
    err = capsys.readouterr().err
    assert status.value.code == 2 and flag in err
    assert err.startswith("train.py: error: ") and len(err.splitlines()) == 1


def test_a_folder_is_begun_anew_only_by_force(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(data / "foreign", out)
    (out / "chat_template.jinja").write_text("of the other model")
    weights = (out / "model.safetensors").read_bytes()
    arguments = ["pretrain", data / "text", "-o", out, *NANO, "--tokenizer", "bpe", "--steps", 1, "--quiet"]
    assert train(*arguments) == 2 and (out / "model.safetensors").read_bytes() == weights
    assert train(*arguments, "--seed", 2, "--force") == 0
    assert (out / "model.safetensors").read_bytes() != weights
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-0000001"]
    assert train(*arguments, "--seed", 3) == 2
    assert train(*arguments, "--seed", 3, "--force") == 0
    assert len(read_metrics(out / "metrics.jsonl")) == 3  # two evaluations and a step


def test_the_last_learning_rate_may_be_zero_and_the_context_one(data: Path, tmp_path: Path) -> None:
    nano = [*NANO, "--context", 1, "--min-learning-rate", 0, "--steps", 2, "--quiet"]
    assert train("pretrain", data / "text", "-o", tmp_path / "out", *nano) == 0
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["samples"] == []  # there is no room for one


@pytest.mark.parametrize("stage", ["pretrain {d}/text", "sft {d}/chat.jsonl --model {d}/base"])
def test_an_estimate_is_printed_and_nothing_is_written(
    stage: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*stage.format(d=data).split(), "-o", tmp_path / "out", "--estimate") == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("parameters", "optimizer", "activations", "KV cache", "FLOPs a token")
    )
    assert not (tmp_path / "out").exists()


def test_help_and_a_missing_library_need_no_torch(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "accelerate"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    path = {**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", "--help"], env=path, capture_output=True, text=True
    )
    assert run.returncode == 0 and "pretrain | sft | grpo" in run.stdout
    code = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'accelerate' "
        "else f(n, *a)\n"
    )
    code += "from qwen3c.cli.train import main; raise SystemExit(main(['pretrain', 'x', '-o', 'y']))"
    run = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert run.returncode == 2
    assert "training needs the extra `train`" in run.stderr and "accelerate missing" in run.stderr
    assert len(run.stderr.splitlines()) == 1
