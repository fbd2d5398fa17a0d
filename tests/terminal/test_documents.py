"""Every command of *.md and docs/*.md, typed in a shell in a folder that has the files it names.

COMMANDS says how each is run: as it stands, with flags that make it small, or why it cannot run here. A
command new in the documents fails the first test until it is added there.

python -m pytest tests/terminal/test_documents.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hub_server import Hub
from safetensors.numpy import save_file
from screen import ROOT, SHELL, Terminal
from small_gguf import small_gguf, write_gguf
from small_models import export_small_model, small_weights, write_small_model

# TERMINAL.md is a table of commands, not a text that tells anyone to type them
DOCUMENTS = [p for p in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]) if p.name != "TERMINAL.md"]
PROGRAMS = (
    r"(?:python3?|pip|make|accelerate|hf|git|qwen3c[a-z-]*|echo|cd|curl|docker|sudo|source|\.?[\w/.]+\.py)"
)
COMMAND = re.compile(rf"(?:[A-Z_0-9]+=\S+ )*{PROGRAMS} \S.*")
SETTINGS = re.compile(r"(?:[A-Z_0-9]+=\S+ )*")
IMPORTS = {
    "train.py": "torch",
    "fidelity.py": "torch",
    "relatives.py": "torch",
    "lowbits.py": "torch",
    "agreement.py": "llama_cpp",
}


@dataclass(frozen=True)
class Typed:
    """A command that runs, `more` typed behind it. shows: text on the screen. keys: typed at each "> "."""

    more: str = ""
    shows: str = ""
    keys: tuple[str, ...] = ()
    leaves: str = ""  # a file that it makes


@dataclass(frozen=True)
class NotHere:
    """A command that cannot run in a test; it is only parsed, by `make -n`, --help or the shell."""

    reason: str


SMALL_STEPS = "--steps 2 --batch 2 --micro-batch 2 --context 64 --evaluate-every 2"
SETS_UP = NotHere("sets up an environment with packages from the network")
WHOLE_SUITE = NotHere("is this suite")
PEERS = NotHere("needs other engines and the 0.6B shape")
LONG = NotHere("takes minutes to hours")
IN_SERVING = NotHere("needs a server; tests/serve/test_documents.py has one")
PROVIDER, HERE = "https://api.example.com/v1", "http://127.0.0.1:8080"
PROCESSES = NotHere("two processes with a GPU each; tests/training/test_stages.py launches two on the CPU")
CHAT = ("hello", "/exit")

COMMANDS: dict[str, Typed | NotHere] = {
    "make run": SETS_UP,
    "make test": WHOLE_SUITE,
    "make serve": SETS_UP,
    "pip install '.[serve]'": SETS_UP,
    "make oracles": SETS_UP,
    "make oracles test": SETS_UP,
    "make lint": NotHere("checks all of the sources: CI runs it"),
    "make sanitize": LONG,
    "make serial": LONG,
    "make slow": LONG,
    "make test-arm": NotHere("needs a cross-compiler and qemu"),
    "make model": LONG,
    "make bench": LONG,
    "make conformance": NotHere("fetches clients and suites of others"),
    "make bench AGAINST=llama.cpp,openvino,ctranslate2": PEERS,
    "QWEN3C_TOKENIZER=path/to/Qwen3-0.6B make test": WHOLE_SUITE,
    "pip install .": SETS_UP,
    "pip install '.[bench]'": SETS_UP,
    "pip install torch==2.13.0 && pip install -e '.[train]'": SETS_UP,
    "pip install '.[hub]'": SETS_UP,
    "python run.py Qwen/Qwen3-0.6B": Typed("-n 8", keys=CHAT),
    "python run.py Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf": Typed("-n 8", keys=CHAT),
    'python run.py Qwen/Qwen3-0.6B --bits 4 -i "Hello"': Typed("-n 8", shows="int4"),
    "python run.py -m models": Typed(shows="status=0"),
    "python run.py -m models --prune --yes": Typed(shows="everything in it is needed"),
    "hf auth login": NotHere("asks for a token of the Hub"),
    "python run.py Qwen/Qwen3-0.6B -m models --prune --yes": NotHere(
        "needs a model in the cache; tests/hub has"
    ),
    "python export.py Qwen/Qwen3-0.6B model.bin": Typed(leaves="model.bin"),
    "python export.py Qwen3-0.6B model.bin": Typed(leaves="model.bin"),
    "python export.py path/to/Qwen3-0.6B model.bin --estimate": Typed(shows="fits here"),
    "python export.py path/to/Qwen3-0.6B model.bin --bits 4": Typed(leaves="model.bin"),
    "python export.py path/to/Qwen3-0.6B model.bin --bits 4 --calibrate text.txt": Typed(leaves="model.bin"),
    "python benchmarks/lowbits.py path/to/model --text heldout.txt --windows 24 --only-recipes --calibrate text.txt": Typed(
        "--window 64 --windows 1", shows="--calibrate"
    ),
    "python export.py path/to/Qwen3-0.6B model.bin --lora ADAPTER": Typed(leaves="model.bin"),
    "python export.py Qwen3-0.6B-Q8_0.gguf model.bin": Typed(leaves="model.bin"),
    "python export.py final model.bin": Typed(leaves="model.bin"),
    "python export.py": NotHere("a script's name, not a command"),
    "python run.py model.bin": Typed("-n 8", keys=CHAT),
    "python -m qwen3c": Typed("-n 8", keys=CHAT),
    'python run.py model.bin -i "Why is the sky blue?"': Typed("-n 8", shows="tok/s"),
    'echo "Why is the sky blue?" | python run.py model.bin': Typed("-n 8", shows="tok/s"),
    'python run.py model.bin -i "Why is the sky blue?" --json': Typed("-n 8", shows='"finish_reason"'),
    'python run.py model.bin --raw -i "def fibonacci(n):"': Typed("-n 8", shows="tok/s"),
    'python run.py model.bin -m trace -i "import" --html t.html': Typed(shows="t.html", leaves="t.html"),
    "python run.py model.bin -m info --verify": Typed(shows="checksums"),
    "python run.py model.bin -m perplexity text.txt": Typed(shows="perplexity"),
    "python run.py model.bin -m bench": Typed(shows="tg64"),
    "python run.py model.bin -m batch requests.jsonl -o answers.jsonl": Typed(leaves="answers.jsonl"),
    "python run.py model.bin -m serve": Typed("--print-config", shows="port = 8080"),
    f"python run.py model.bin -m serve --upstream {PROVIDER} --upstream-model their-model": Typed(
        "--print-config", shows=PROVIDER
    ),
    "qwen3c -m mcp --url http://127.0.0.1:8080": NotHere("needs a server; tests/cli/test_mcp.py has one"),
    "curl -s http://127.0.0.1:8080/v1/chat/completions -H 'content-type: application/json' \\": IN_SERVING,
    f"docker run -d --network=host -e PORT=3000 -e OPENAI_API_BASE_URL={HERE}/v1 -e OPENAI_API_KEY=none \\": IN_SERVING,
    "python run.py --help": Typed(shows="usage"),
    "run.py model.bin -m info --verify": NotHere("without the python before it; README has the whole"),
    "run.py --help": NotHere("in a table, without the python before it; README has the whole"),
    "python train.py pretrain texts/ -o base --preset mini": Typed(
        f"--preset nano --vocab-size 300 {SMALL_STEPS}", leaves="base/model.safetensors"
    ),
    "python train.py sft chat.jsonl --model base -o tuned": Typed(
        SMALL_STEPS, leaves="tuned/model.safetensors"
    ),
    "python train.py grpo tasks.jsonl --model tuned -o final --reward rewards:exact": Typed(
        "--steps 1 --batch 1 --completions 2 --max-tokens 4", leaves="final/model.safetensors"
    ),
    "accelerate launch --multi_gpu --num_processes 2 train.py pretrain texts/ -o base": PROCESSES,
    "accelerate launch --multi_gpu --num_processes 2 train.py pretrain texts/ -o base --shard": PROCESSES,
    "python benchmarks/bench.py --help": Typed(shows="--against"),
    "python benchmarks/tables.py": NotHere("writes docs/SPEED.md; tests/test_tables.py holds the page to it"),
    "python benchmarks/bench.py --against llama.cpp,openvino,ctranslate2 --pairs 5 --batches 4,16": PEERS,
    "python benchmarks/fidelity.py path/to/model --text heldout.txt": Typed(
        "--window 64 --windows 1", shows="perplexity"
    ),
    "python benchmarks/fidelity.py path/to/Qwen3-0.6B --windows 4 --window 128 --llama-cpp": PEERS,
    "python benchmarks/fidelity.py build/llama --text heldout.txt --windows 8 --group-size 64 --rope llama3": NotHere(
        "needs a Llama trained for hours; the line above it runs"
    ),
    "python benchmarks/lowbits.py path/to/model --text heldout.txt": Typed(
        "--window 64 --windows 1", shows="--bits 8"
    ),
    "python benchmarks/lowbits.py path/to/model --text heldout.txt --windows 32 --ggml path/to/libggml-base.so": PEERS,
    "python benchmarks/relatives.py model.bin heldout.txt build/relatives": NotHere("needs a trained Qwen3"),
    "python train.py pretrain texts/ --model build/relatives/llama -o build/llama --context 256 --steps 80 --learning-rate 1e-3": LONG,
    "python benchmarks/gguf_model.py build/llama llama.gguf": Typed(leaves="llama.gguf"),
    "python benchmarks/agreement.py llama.gguf --text heldout.txt --windows 8": PEERS,
    "python benchmarks/rollouts.py build/sft": LONG,
    "python benchmarks/speculation.py": Typed("--pairs 1 --tokens 200", shows="tokens a pass"),
    "python benchmarks/speculation.py model.bin --small small.bin": NotHere("needs a second trained model"),
    'python recipe/corpus.py build/box --parameters "3 million"': LONG,
    "python recipe/evaluate.py --base build/base --sft build/sft --grpo build/grpo --data build/box": LONG,
}


def commands(text: str) -> list[str]:
    """The commands of a document: lines of indented and fenced blocks (but Python's), and `commands` in the
    text.
    """
    text = re.sub(r"^```python$.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^(?: {4}|\t)(.*)$", text, re.MULTILINE)
    for language, block in re.findall(r"^```(\w*)$(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        # `text` is what a terminal showed: only what stands behind its prompt was typed
        lines += [line for line in block.splitlines() if language != "text" or line.startswith("$ ")]
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    found = []
    for line in lines:
        command = re.sub(r"(^|\s+)#.*", "", line.removeprefix("$ ")).strip()
        if COMMAND.fullmatch(command):
            found.append(command)
    return found


FOUND = list(
    dict.fromkeys(c for document in DOCUMENTS for c in commands(document.read_text(encoding="utf-8")))
)


def test_commands_are_found_in_every_kind_of_block() -> None:
    text = (
        "a\n\n    make run   # sets up\n\n```sh\n$ pip install .\n```\n\n```text\n$ make bench\nmake it "
        "so\n```\n\n```python\nmake = 3\n```\n`A=1 make test`, `x y`\n"
    )
    assert commands(text) == ["make run", "pip install .", "make bench", "A=1 make test"]
    assert len(FOUND) > 30


def test_every_command_of_the_documents_is_listed_here_and_nothing_else() -> None:
    assert not [command for command in FOUND if command not in COMMANDS], (
        "new in the documents: add to COMMANDS"
    )
    assert not [command for command in COMMANDS if command not in FOUND], "gone from the documents"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents name, under the names they give it, small."""
    shelf = tmp_path_factory.mktemp("shelf")
    export_small_model(shelf)
    source = shelf / "source"
    for name in ("Qwen3-0.6B", "path/to/Qwen3-0.6B", "path/to/model", "final", "build/llama"):
        shutil.copytree(source, shelf / name)
    for name in ("base", "tuned"):
        write_small_model(shelf / name, thinking="none")
    write_gguf(shelf / "Qwen3-0.6B-Q8_0.gguf", *small_gguf(dtype="Q8_0"))
    text = "def add(a, b):\n    return a + b\n\n\n" * 60
    for name in ("text.txt", "heldout.txt"):
        (shelf / name).write_text(text)
    (shelf / "texts").mkdir()
    for i in range(4):
        (shelf / "texts" / f"{i}.txt").write_text(text)
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello to you"}]
    (shelf / "chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 20)
    body = {"prompt": "def f", "max_tokens": 4}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (shelf / "requests.jsonl").write_text(json.dumps(request) + "\n")
    (shelf / "tasks.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n' * 10)
    (shelf / "rewards.py").write_text(
        "def exact(prompt, completion, task):\n    return float(len(completion) % 2)\n"
    )
    write_small_adapter(shelf / "ADAPTER")
    for name in ("run.py", "export.py", "train.py", "benchmarks", "recipe"):
        (shelf / name).symlink_to(ROOT / name)
    return shelf


def write_small_adapter(directory: Path) -> None:
    """A LoRA of rank 1 for the queries of the small model."""
    shapes = {name: weights.shape for name, weights in small_weights().items() if "q_proj" in name}
    ones = {}
    for name, (rows, columns) in shapes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        ones[f"{module}.lora_A.weight"] = np.ones((1, columns), np.float32)
        ones[f"{module}.lora_B.weight"] = np.ones((rows, 1), np.float32)
    directory.mkdir()
    save_file(ones, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def hub(shelf: Path) -> Iterator[Hub]:
    """The Hugging Face Hub, with the models of the documents."""
    with Hub() as hub:
        hub.add("Qwen/Qwen3-0.6B", shelf / "Qwen3-0.6B")
        gguf = "Qwen3-0.6B-Q8_0.gguf"
        hub.add("Qwen/Qwen3-0.6B-GGUF", {gguf: (shelf / gguf).read_bytes()})
        yield hub


@pytest.fixture
def desk(shelf: Path, tmp_path: Path) -> Path:
    shutil.copytree(shelf, tmp_path / "desk", symlinks=True)
    return tmp_path / "desk"


@pytest.mark.parametrize("command", [command for command, how in COMMANDS.items() if isinstance(how, Typed)])
def test_a_command_of_the_documents_works_as_it_stands(command: str, desk: Path, hub: Hub) -> None:
    if missing := missing_import(command):
        pytest.skip(f"needs {missing}")
    how = COMMANDS[command]
    assert isinstance(how, Typed)
    if how.leaves:
        made = desk / how.leaves
        for old in (made, made.parent if made.parent != desk else made):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),  # as if qwen3c were installed
        "XDG_STATE_HOME": str(desk / "state"),
        "PS1": "$ ",
        "OMP_NUM_THREADS": "1",  # two on a busy machine wait for each other
        **hub.environment(desk),
    }
    with Terminal(SHELL, cwd=desk, env=env) as shell:
        shell.wait_for("$")
        shell.type(f"{command} {how.more}; echo status=$?\r")
        for key in how.keys:
            shell.wait_until(lambda: shell.current_line == ">", "a prompt")
            shell.type(key + "\r")
            shell.wait_for(f"> {key}")
        shell.wait_until(lambda: any(re.fullmatch(r"status=\d+", line) for line in shell.lines), "the end")
        assert "status=0" in shell.lines and "Traceback" not in shell.text, shell.text
        assert how.shows in "".join(shell.lines), shell.text
        # every line that was drawn again is gone, and none was too long for the window
        assert not [line for line in shell.erased if len(line) > 79]
    assert not how.leaves or (desk / how.leaves).exists()


@pytest.mark.parametrize(
    "command", [command for command, how in COMMANDS.items() if isinstance(how, NotHere)]
)
def test_a_command_that_cannot_run_here_says_why_and_is_understood(command: str, desk: Path) -> None:
    how = COMMANDS[command]
    assert isinstance(how, NotHere) and len(how.reason) > 8
    bare = SETTINGS.sub("", command, count=1)
    if bare.startswith("make "):
        parsed, folder = ["make", "-n", *bare.split()[1:]], ROOT
    elif bare.startswith("python ") and not missing_import(command):
        # --help comes last: what stands before it has been read by then
        parsed, folder = ["bash", "-c", f"{sys.executable} {bare.removeprefix('python ')} --help"], desk
    else:
        parsed, folder = ["bash", "-n", "-c", command], desk
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(parsed, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def missing_import(command: str) -> str:
    """A library that a command needs to start and that is not installed here, or ""."""
    needed = [library for script, library in IMPORTS.items() if script in command]
    return next((library for library in needed if importlib.util.find_spec(library) is None), "")
