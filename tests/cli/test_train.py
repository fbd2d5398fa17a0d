import json
import subprocess
import sys

import pytest
from nano import NANO, ROOT, environment, train, write_chat, write_tasks, write_text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_text(directory / "text")
    write_chat(directory / "chat.jsonl")
    write_tasks(directory / "tasks.jsonl")
    assert (
        train("pretrain", directory / "text", "-o", directory / "base", *NANO, "--steps", 1, "--quiet") == 0
    )
    (directory / "broken").mkdir()
    (directory / "broken" / "config.json").write_text("{")
    (directory / "broken" / "tokenizer.json").write_text("{")
    (directory / "bad.jsonl").write_text('{"messages": 1}\n')
    (directory / "long.jsonl").write_text(json.dumps({"prompt": "1 + 1 " * 100}) + "\n")
    (directory / "binary").write_bytes(bytes(range(32)) * 10)
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
def test_what_cannot_be_trained_is_refused_in_one_line(arguments, message, data, tmp_path, capsys):
    assert train(*arguments.format(d=data, o=tmp_path / "out").split(), "--quiet") == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("train.py: error: ") and len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "flag", ["--steps 0", "--batch -1", "--learning-rate nan", "--validation-fraction 1", "--clip 0"]
)
def test_numbers_out_of_range_are_refused_by_the_parser(flag, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        train("pretrain", data / "text", "-o", tmp_path, *flag.split())
    assert status.value.code == 2 and flag.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pretrain {d}/text", "sft {d}/chat.jsonl --model {d}/base"])
def test_an_estimate_is_printed_and_nothing_is_written(stage, data, tmp_path, capsys):
    assert train(*stage.format(d=data).split(), "-o", tmp_path / "out", "--estimate") == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("parameters", "optimizer", "activations", "KV cache", "FLOPs a token")
    )
    assert not (tmp_path / "out").exists()


def test_help_and_a_missing_library_need_no_torch(tmp_path):
    for name in ("torch", "transformers", "accelerate"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    path = {**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", "--help"], env=path, capture_output=True, text=True
    )
    assert run.returncode == 0 and "pretrain | sft | grpo" in run.stdout
    code = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'accelerate' else f(n, *a)\n"
    code += "from qwen3c.cli.train import main; raise SystemExit(main(['pretrain', 'x', '-o', 'y']))"
    run = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert run.returncode == 2
    assert "training needs the extra `train`" in run.stderr and "accelerate missing" in run.stderr
    assert len(run.stderr.splitlines()) == 1
