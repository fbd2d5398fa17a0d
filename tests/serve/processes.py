"""`-m serve` as a process of its own, and programs of others to try it with."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass
class Served:
    """A server that answers. url: http://127.0.0.1:PORT. log: its file of JSON lines."""

    url: str
    log: Path

    def records(self) -> list[dict[str, Any]]:
        """What its log says of requests."""
        found = []
        for line in self.log.read_text().splitlines():
            if line.startswith("{"):
                found.append(json.loads(line))
        return [one for one in found if "status" in one]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def serving(models: Mapping[str, Path], *options: str) -> Iterator[Served]:
    """Within, `-m serve` answers with the models, by alias; options: of its command line."""
    port = free_port()
    named = [word for alias, path in models.items() for word in ("--model-alias", f"{alias}={path}")]
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "-m",
        "serve",
        "--port",
        str(port),
        "--log-json",
        *named,
        *options,
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT)
        try:
            url = f"http://127.0.0.1:{port}"
            end = time.monotonic() + 60
            while not answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(log.read_text())
                time.sleep(0.1)
            yield Served(url, log)
        finally:
            process.terminate()
            process.wait()


def answers(url: str) -> bool:
    """Whether a GET is answered well."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def install_npm(root: Path, node: str, packages: list[str]) -> Path:
    """The folder of the programs that npm has installed into `root`, with a Node of their own."""
    modules = root / "node_modules"
    if not all((modules / (name.rpartition("@")[0] or name)).exists() for name in packages):
        root.mkdir(parents=True, exist_ok=True)
        quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
        if not (modules / "node" / "bin" / "node").exists():
            subprocess.run(["npm", "init", "-y"], cwd=root, check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["npm", "install", *quiet, node], cwd=root, check=True)
        # npm from 11.16 on runs a package's install script only when told to; an older one has no such
        # command
        subprocess.run(
            ["npm", "install-scripts", "approve", "node"], cwd=root, capture_output=True, check=False
        )
        subprocess.run(["npm", "rebuild", "node"], cwd=root, check=True, stdout=subprocess.DEVNULL)
        env = {**os.environ, "PATH": f"{modules / 'node' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(["npm", "install", *quiet, *packages], cwd=root, check=True, env=env)
    return modules / ".bin"
