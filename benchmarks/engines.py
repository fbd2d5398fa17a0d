"""The engines of the benchmark: the peers, and each engine in a process of its own (worker.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen3c import engine
from qwen3c.inspect.bench import Test

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Peer:
    needs: tuple[str, ...]  # modules
    extra: str  # of pyproject.toml, which installs them
    form: str  # what its model is called: the end of a file or folder
    converter: tuple[
        str, ...
    ] = ()  # modules for our own program that writes its model; none: the peer has its own


PEERS = {
    "llama.cpp": Peer(("llama_cpp",), "bench", "q8_0.gguf", converter=("gguf",)),
    "openvino": Peer(("openvino_genai", "optimum.intel"), "openvino", "openvino"),
    "ctranslate2": Peer(("ctranslate2", "transformers", "torch"), "ctranslate2", "ctranslate2"),
}


# ----------------------------------------------------------------------------
# An engine in a process of its own


@dataclass(frozen=True)
class Setting:
    """The settings that all engines of one race share."""

    threads: int
    kv: str
    context: int
    batch: int
    huge_pages: bool  # of ours


class Contender:
    """An engine in a child process; ValueError where it cannot do what it is asked."""

    def __init__(self, name: str, python: str, path: Path, setting: Setting) -> None:
        self.name, self.path = name, path
        command = [python, str(WORKER), "serve", name, str(path), json.dumps(asdict(setting))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        self.settings: str = self._receive()

    def seconds(self, test: Test, seed: int) -> float:
        return self._ask("seconds", **asdict(test), seed=seed)

    def greedy(self, ids: list[int], n: int) -> list[int]:
        return self._ask("greedy", ids=ids, n=n)

    def memory(self) -> tuple[int, int]:
        """(resident bytes, KV cache bytes of ours)"""
        resident, kv = self._ask("memory")
        return resident, kv

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, what: str, **arguments: Any) -> Any:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended; see above")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{self.name}: {answer['error']}")
        return answer["answer"]


def environment() -> dict[str, str]:
    """The environment of a child: it imports this qwen3c, whatever its directory."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "QWEN3C_ISA": engine.isa()}


def require_peers(names: Sequence[str], pythons: dict[str, str]) -> None:
    """ValueError, one line, if a peer is unknown or not installed."""
    for name in names:
        if name not in PEERS:
            raise ValueError(f"there is no peer {name!r}; known: {', '.join(PEERS)}")
        peer, python = PEERS[name], pythons.get(name, sys.executable)
        for module in peer.needs + peer.converter:
            where = sys.executable if module in peer.converter else python
            if not has_module(where, module):
                how = f"pip install '.[{peer.extra}]' does it"
                raise ValueError(f"peer {name} is not installed for {where} (no module {module}); {how}")


def has_module(python: str, name: str) -> bool:
    program = "import importlib, sys; importlib.import_module(sys.argv[1])"
    return subprocess.run([python, "-c", program, name], stderr=subprocess.DEVNULL).returncode == 0


def convert(name: str, pythons: dict[str, str], source: Path, work: Path) -> Path:
    """The peer's form of the model, made by the peer's own tools unless --work has it."""
    target = work / f"{source.resolve().name}-{PEERS[name].form}"
    if not target.exists():
        print(f"converting {source.name} for {name}", file=sys.stderr, flush=True)
        python = sys.executable if PEERS[name].converter else pythons.get(name, sys.executable)
        command = [python, str(WORKER), "convert", name, str(source), str(target)]
        done = subprocess.run(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise ValueError(f"{name} cannot convert {source}: {last_line(done.stderr)}")
    return target


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word why"])[-1]
