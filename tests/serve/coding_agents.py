"""Codex, Claude Code and opencode against a server of ours, each twice: it answers,
and the second turn is cached.

python tests/serve/coding_agents.py FOLDER [MODEL]      FOLDER: where npm installs them, unless they are there

They see an environment that holds nothing of this machine's, and a server that is all of the network they
need.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from processes import Served, install_npm, serving
from talker import write_talker

PACKAGES = ["@openai/codex", "@anthropic-ai/claude-code", "opencode-ai"]
NODE = "node@22"
CACHED = 0.9  # of the second turn's prompt
ASKED = "say hello"


def commands(url: str) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Agent -> (command, variables of its environment)."""
    provider = {
        "name": '"q"', "base_url": f'"{url}/v1"', "wire_api": '"responses"', "env_key": '"Q_KEY"',
    }  # fmt: skip
    settings = [f"model_providers.q.{key}={value}" for key, value in provider.items()]
    codex = [word for one in ['model_provider="q"', 'model="talker"', *settings] for word in ("-c", one)]
    opencode = {
        "provider": {
            "q": {
                "npm": "@ai-sdk/openai-compatible",
                "options": {"baseURL": f"{url}/v1", "apiKey": "x"},
                "models": {"talker": {"limit": {"context": 40960, "output": 4096}}},
            }
        },
        "model": "q/talker",
    }
    claude = {
        "ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": "x", "ANTHROPIC_MODEL": "talker",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }  # fmt: skip
    return {
        "codex": (["codex", "exec", "--skip-git-repo-check", *codex, ASKED], {"Q_KEY": "x"}),
        "claude": (["claude", "-p", ASKED], claude),
        "opencode": (["opencode", "run", ASKED], {"OPENCODE_CONFIG_CONTENT": json.dumps(opencode)}),
    }


@contextmanager
def home() -> Iterator[tuple[dict[str, str], Path]]:
    """(an environment without anything of this machine's but its PATH, the empty folder in it to work in)."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        work.mkdir()
        yield {"HOME": folder, "PATH": os.environ["PATH"], "TERM": "dumb"}, work


def turn(
    server: Served, command: list[str], env: dict[str, str], work: Path
) -> tuple[str, list[dict[str, int]]]:
    """(what the agent prints, the log's records of the requests it made)."""
    before = len(server.records())
    done = subprocess.run(
        command,
        cwd=work,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    asked = [one for one in server.records()[before:] if one["method"] == "POST"]
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
    return done.stdout.strip() if done.returncode == 0 else "", asked


def main(folder: str, model: str | None = None) -> int:
    binary = install_npm(Path(folder).resolve(), NODE, PACKAGES)
    os.environ["PATH"] = (
        f"{binary}{os.pathsep}{binary.parent / 'node' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    )
    faults = []
    with tempfile.TemporaryDirectory() as made:
        path = Path(model) if model else write_talker(Path(made, "talker.bin"))
        with serving({"talker": path}) as server:
            for name, (command, variables) in commands(server.url).items():
                with home() as (env, work):
                    turns = [turn(server, command, {**env, **variables}, work) for _ in range(2)]
                (first, _), (second, asked) = turns
                statuses = [one["status"] for one in asked]
                most = max(asked, key=lambda one: one.get("prompt_tokens", 0), default={})
                share = most.get("cached_tokens", 0) / max(most.get("prompt_tokens", 0), 1)
                sound = bool(first and second) and share > CACHED and set(statuses) == {200}
                faults += [] if sound else [name]
                print(
                    f"{'ok  ' if sound else 'FAIL'} {name}  {len(first)} and {len(second)} characters, "
                    f"{most.get('prompt_tokens')} tokens, {100 * share:.1f} % cached", flush=True,
                )  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
