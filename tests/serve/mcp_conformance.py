"""MCP's own conformance suite and inspector, against our server and our host; `make conformance` runs it.

python tests/serve/mcp_conformance.py FOLDER     FOLDER: where npm installs the suite, unless it is there

Every scenario of both protocol eras runs. What fails must be on the lists below, and what is on them must
fail.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SUITE = "@modelcontextprotocol/conformance@0.2.0-alpha.12"
INSPECTOR = "@modelcontextprotocol/inspector@2.12.0"
NODE = "node@22"  # both need it
FIXTURES = [sys.executable, str(Path(__file__).with_name("mcp_fixtures.py"))]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
# We serve tools. The scenarios of what else the protocol has cannot pass, nor can those of tools that log or
# ask.
NO_RESOURCES = ["resources-list", "resources-read-text", "resources-read-binary", "resources-templates-read"]
NO_PROMPTS = [
    "prompts-list",
    "prompts-get-simple",
    "prompts-get-with-args",
    "prompts-get-embedded-resource",
    "prompts-get-with-image",
]
SERVER = {
    "2026-07-28": [
        *NO_RESOURCES,
        *NO_PROMPTS,
        "completion-complete",
        "caching:sep-2549-prompts-list-caching-hints",
        "caching:sep-2549-resources-list-caching-hints",
        "caching:sep-2549-resources-templates-list-caching-hints",
        # not testable: they want tools that ask the client back, or that log
        "server-stateless:sep-2575-server-rejects-undeclared-capability",
        "server-stateless:sep-2575-missing-capability-http-400",
        "server-stateless:sep-2575-http-server-no-independent-requests-on-stream",
        "server-stateless:sep-2575-server-no-log-without-loglevel",
        "input-required-result-basic-elicitation",
        "input-required-result-basic-sampling",
        "input-required-result-basic-list-roots",
        "input-required-result-request-state",
        "input-required-result-multiple-input-requests",
        "input-required-result-multi-round",
        "input-required-result-non-tool-request",
        "input-required-result-result-type",
        "input-required-result-tampered-state",
        "input-required-result-capability-check",
        # they pass, with a warning that there was nothing to look at
        "input-required-result-missing-input-response",
        "input-required-result-ignore-extra-params",
        "sep-2164-resource-not-found",
    ],
    "2025-11-25": [
        *NO_RESOURCES,
        *NO_PROMPTS,
        "resources-subscribe",
        "resources-unsubscribe",
        "completion-complete",
        "logging-set-level",
        "tools-call-with-logging",
        "tools-call-sampling",
        "tools-call-elicitation",
        "elicitation-sep1034-defaults",
        "elicitation-sep1330-enums",
    ],
}
# what our own tools must pass without a fixture among them
OURS = ["tools-list", "dns-rebinding-protection", "http-header-validation", "server-sse-multiple-streams"]
CLIENT = [
    "initialize",
    "tools_call",
    "sse-retry",
    "request-metadata",
    "http-standard-headers",
    "http-custom-headers",
    "http-invalid-tool-headers",
    "json-schema-ref-no-deref",
    "json-schema-2020-12-preservation",
]


def main(folder: str) -> int:
    root = Path(folder).resolve()
    env = install(root)
    binary = root / "node_modules" / ".bin"
    conformance = str(binary / "conformance")
    faults = []
    with tempfile.TemporaryDirectory() as results:
        run = Runner(env, results)
        with serving("server") as url:
            for revision, expected in SERVER.items():
                known = Path(results, "expected.yml")
                known.write_text("server:\n" + "".join(f"  - {name}\n" for name in expected))
                arguments = ["--requirements", revision, "--expected-failures", str(known)]
                faults += run(f"server {revision}", [conformance, "server", "--url", url, *arguments])
        with serving("ours") as url:
            for scenario in OURS:
                faults += run(
                    f"ours {scenario}", [conformance, "server", "--url", url, "--scenario", scenario]
                )
            inspector = [str(binary / "mcp-inspector"), "--cli", url, "--transport", "http"]
            faults += run("inspector tools/list", [*inspector, "--method", "tools/list"], "count_tokens")
            call = ["--method", "tools/call", "--tool-name", "count_tokens", "--tool-arg", "text=hello"]
            faults += run("inspector tools/call", [*inspector, *call], "tokens")
        for scenario in CLIENT:
            command = f"{' '.join(FIXTURES)} client"
            faults += run(
                f"host {scenario}", [conformance, "client", "--command", command, "--scenario", scenario]
            )
    print(f"{len(faults)} unexpected{': ' * bool(faults)}{', '.join(faults)}")
    return 1 if faults else 0


def install(root: Path) -> dict[str, str]:
    """The environment in which the suite runs; npm installs what is missing."""
    node = root / "node_modules" / "node" / "bin"
    if not (root / "node_modules" / ".bin" / "mcp-inspector").exists() or not (node / "node").exists():
        root.mkdir(parents=True, exist_ok=True)
        quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(["npm", "init", "-y"], cwd=root, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["npm", "install", *quiet, NODE, SUITE, INSPECTOR], cwd=root, check=True)
        # npm from 11.16 on runs a package's install script only when told to; an older one has no such
        # command
        subprocess.run(
            ["npm", "install-scripts", "approve", "node"], cwd=root, capture_output=True, check=False
        )
        subprocess.run(["npm", "rebuild", "node"], cwd=root, check=True, stdout=subprocess.DEVNULL)
    return {**ENVIRONMENT, "PATH": f"{node}{os.pathsep}{os.environ['PATH']}"}


class Runner:
    """Runs one command after the other and says in one line how each went."""

    def __init__(self, env: dict[str, str], folder: str) -> None:
        self._env = env
        self._folder = folder

    def __call__(self, name: str, command: list[str], wanted: str = "") -> list[str]:
        """[] if the command succeeds and prints `wanted`, else its name; then its output was shown."""
        done = subprocess.run(
            command, cwd=self._folder, env=self._env, capture_output=True, text=True, timeout=600, check=False
        )
        output = done.stdout + done.stderr
        counts = re.findall(r"(?:Total|Passed): ?.*", output)
        sound = done.returncode == 0 and wanted in output
        print(f"{'ok  ' if sound else 'FAIL'} {name}  {counts[-1] if counts else ''}", flush=True)
        if not sound:
            print(output)
        return [] if sound else [name]


@contextlib.contextmanager
def serving(what: str) -> Iterator[str]:
    """Within, mcp_fixtures.py serves; the URL of its /mcp."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*FIXTURES, what, str(port)], stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
