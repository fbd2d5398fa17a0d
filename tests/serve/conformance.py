"""Suites and clients that nobody here wrote, against a server of ours; `make conformance` runs them all.

python tests/serve/conformance.py FOLDER [SUITE...]

FOLDER: what npm and pip fetch is kept there, so that a second run needs no network. Of each suite it says how
many cases pass. Those that cannot are listed below with the reason; every other one that fails is a fault.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import venv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE.parent / "drivers")]

import clients  # noqa: E402
import coding_agents  # noqa: E402
from processes import install_npm, serving  # noqa: E402
from talker import write_talker  # noqa: E402
from test_retrieval import write_source  # noqa: E402

from qwen3c.convert.export import export  # noqa: E402

# the versions that the exceptions were written for
OPENAI, ANTHROPIC, LLAMA, SCHEMATHESIS = (
    "openai==3.57.0",
    "anthropic==2.14.0",
    "llama_cpp_python==0.3.36",
    "schemathesis==4.32.5",
)
NPM = [*coding_agents.PACKAGES, "openai@7", "zod"]
SUITES_NEED = [
    OPENAI, ANTHROPIC, "pytest", "pytest-asyncio", "respx", "aiohttp", "httpx_aiohttp", "http-snapshot",
    "rich", "inline-snapshot", "filelock", "requests", "wget",
]  # fmt: skip

# case -> why it does not pass; a pattern of FILE::NAME
STORED = "nothing is stored, so that nothing can be looked up, changed or deleted"
Exceptions = Mapping[str, str]
OPENAI_EXCEPTIONS: Exceptions = {
    r"test_(completions|responses)::\w*(retrieve|update|list|delete|cancel|compact)": STORED,
    r"test_models::\w*delete": STORED,
    r"test_models::\w*retrieve": "asks for a model of OpenAI's, which is not there",
    r"chat\.test_completions::\w*all_params": "functions, function_call and web_search_options are refused",
    r"test_completions::\w*all_params": "suffix and best_of = 0 are refused",
    r"test_responses::\w*all_params": "what needs a store, a background or truncation is refused",
    r"test_responses::\w*create_overload": "asks for a response to nothing",
    r"test_embeddings::\w*create\[(strict|aiohttp)": "asks for base64, then insists on a list",
}
ANTHROPIC_EXCEPTIONS: Exceptions = {
    r"test_messages::\w*all_params": "a schema of a strict tool that is none, and MCP servers, are refused",
    r"test_models::\w*retrieve": "asks for a model of Anthropic's, which is not there",
}
THEIRS = "the text, or the count of tokens, of a model of theirs"
LLAMA_EXCEPTIONS: Exceptions = {
    r"basic::test_server_multiple_addresses": "a server has one address",
    r"basic::test_server_props": "no path is told",
    r"basic::test_server_slots": "there is no /slots",
    r"basic::test_load_split_model": "there is no /completion, llama-server's own API",
    r"basic::test_no_ui": "the page is always there",
    r"basic::test_server_model_aliases": "an alias is a model of its own",
    r"chat_completion::test_chat_completion(_stream)?\[": THEIRS,
    r"chat_completion::test_chat_completion_(cached_tokens|with_openai_library)": THEIRS,
    r"chat_completion::test_(chat_template|apply_chat|verbose)": "no other template, no prompt shown",
    r"chat_completion::test_completion_with_json_schema\[True": "a model that talks at random says spaces",
    r"chat_completion::test_completion_with_grammar": "GBNF is refused, and names Lark",
    r"chat_completion::test_invalid_chat_completion_req\[messages7": "the assistant may speak twice",
    r"chat_completion::test_(chat_completion_with_timings|logprobs_stream)": "first comes an empty text",
    r"chat_completion::test_context_size_exceeded": "type and code of the error are OpenAI's",
    r"chat_completion::test_return_progress": "a pass takes what time allows, whatever the size of a batch",
    r"chat_completion::test_chat_completions_token_count": "there is no /chat/completions/input_tokens",
    r"anthropic::test_anthropic_(tool_result_with_image|vision)": "pictures are refused with 400, not 500",
    r"anthropic::test_anthropic_empty_messages": "no message is refused, as Anthropic does",
    r"anthropic::test_anthropic_thinking_with_reasoning_model": THEIRS,
    r"responses::test_responses_with_openai_library": THEIRS,
    r"responses::test_responses_stream_with_openai_library": THEIRS,
    r"responses::test_responses_stream_with_llama_telemetry": "progress and timings are not in responses",
    r"embedding::test_embedding_(mixed_input|content_text)": "prompts are all texts or all ids",
    r"embedding::test_embedding_pooling_none": "how a model pools is the model's",
    r"embedding::test_embedding_error_prompt_too_long": "the error has another text",
    r"(embedding|rerank)::test_\w+_usage": THEIRS,
    r"tokenize::test_tokenize_with_bos": "the vocabulary has no opening token",
}
# not those of its templates, metrics, router, slots, LoRA, pictures, own tools and own API
LLAMA_FILES = [
    "test_basic", "test_chat_completion", "test_compat_anthropic", "test_compat_oai_responses",
    "test_embedding", "test_rerank", "test_tokenize",
]  # fmt: skip


@dataclass
class Place:
    """Where everything is: a folder."""

    root: Path

    def pip(self, name: str, *packages: str) -> Path:
        """The programs of a virtual environment that has the packages."""
        folder = self.root / name
        known = folder / "installed.txt"
        if not known.exists() or known.read_text() != "\n".join(packages):
            venv.create(folder, with_pip=True)
            run([folder / "bin" / "pip", "install", "-q", "--disable-pip-version-check", *packages])
            known.write_text("\n".join(packages))
        return folder / "bin"

    def source(self, package: str, *members: str) -> Path:
        """The folder of a package's sources, or of some of them."""
        folder = self.root / "sources"
        name = package.replace("==", "-")
        if not (folder / name).exists():
            folder.mkdir(exist_ok=True)
            only = [
                "--no-deps",
                "--no-binary",
                package.partition("==")[0],
                "-q",
                "--disable-pip-version-check",
            ]
            run([self.pip("suites", *SUITES_NEED) / "pip", "download", *only, "-d", folder, package])
            with tarfile.open(folder / f"{name}.tar.gz") as archive:
                wanted = [one for one in archive if not members or one.name.startswith(members)]
                archive.extractall(folder, wanted, filter="data")
        return folder / name

    @property
    def talker(self) -> Path:
        path = self.root / "talker.bin"
        return path if path.exists() else write_talker(path)

    @property
    def ranker(self) -> Path:
        path = self.root / "ranker.bin"
        if not path.exists():
            export(write_source(self.root / "ranker", context=1024), path)
        return path


@dataclass
class Result:
    """What a suite came to. excused: reason -> cases. faults: cases that should have passed."""

    ran: int
    passed: int
    excused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def run(command: Sequence[str | Path], **options: object) -> None:
    subprocess.run([str(word) for word in command], check=True, **options)  # type: ignore[call-overload]


def lines(command: Sequence[str | Path]) -> Result:
    """A program that says `ok NAME` or `FAIL NAME` of each case."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    passed = re.findall(r"^ok +(.*)", done.stdout, re.M)
    faults = re.findall(r"^FAIL +(.*)", done.stdout, re.M)
    if done.returncode and not faults:
        faults = [f"exit status {done.returncode}"]
    if faults:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
    return Result(len(passed) + len(faults), len(passed), faults=faults)


def tests(
    place: Place, folder: Path, files: Sequence[str], env: Mapping[str, str], exceptions: Exceptions
) -> Result:
    """Files of somebody's tests for pytest."""
    report = place.root / "report.xml"
    report.unlink(missing_ok=True)
    options = [
        "-o",
        "addopts=",
        "-o",
        "asyncio_mode=auto",
        "-q",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    command = [place.pip("suites", *SUITES_NEED) / "python", "-m", "pytest", *options, *files]
    subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        check=False,
    )
    result = Result(0, 0)
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        result.ran += 1
        if case.find("failure") is None and case.find("error") is None:
            result.passed += 1
            continue
        file = re.sub(r"(\.Test\w+)$", "", case.get("classname", ""))
        name = f"{file}::{case.get('name')}"
        reason = next((why for pattern, why in exceptions.items() if re.search(pattern, name)), None)
        if reason is None:
            result.faults.append(name)
        else:
            result.excused[reason] += 1
    return result


# ----------------------------------------------------------------------------
# The suites


def agents(place: Place) -> Result:
    install_npm(place.root / "npm", coding_agents.NODE, NPM)
    return lines([sys.executable, HERE / "coding_agents.py", place.root / "npm", place.talker])


def node(place: Place) -> Result:
    binary = install_npm(place.root / "npm", coding_agents.NODE, NPM)
    program = binary.parent / "node" / "bin" / "node"
    with serving({"talker": place.talker}) as server:
        return lines([program, HERE / "openai_node.mjs", server.url, place.root / "npm"])


def libraries(place: Place) -> Result:
    programs = place.pip("libraries", *clients.PACKAGES)
    with serving({"talker": place.talker}) as server:
        return lines([programs / "python", HERE / "clients.py", server.url])


def openai_python(place: Place) -> Result:
    folder = place.source(OPENAI)
    names = ["chat/test_completions", "test_completions", "test_embeddings", "test_models", "test_responses"]
    files = [f"tests/api_resources/{name}.py" for name in names]
    with serving({"talker": place.talker}) as server:
        return tests(place, folder, files, {"TEST_API_BASE_URL": f"{server.url}/v1"}, OPENAI_EXCEPTIONS)


def anthropic_python(place: Place) -> Result:
    folder = place.source(ANTHROPIC)
    files = [
        f"tests/api_resources/{name}.py" for name in ("test_messages", "test_models", "beta/test_messages")
    ]
    with serving({"talker": place.talker}) as server:
        return tests(place, folder, files, {"TEST_API_BASE_URL": server.url}, ANTHROPIC_EXCEPTIONS)


def llama_server(place: Place) -> Result:
    inside = "vendor/llama.cpp/tools/server/tests"
    folder = place.source(LLAMA, f"{LLAMA.replace('==', '-')}/{inside}") / inside
    shim = place.root / "llama-server"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "llama_server_shim.py"}" "$@"\n')
    shim.chmod(0o755)
    env = {
        "LLAMA_SERVER_BIN_PATH": str(shim),
        "QWEN3C_SHIM_TALKER": str(place.talker),
        "QWEN3C_SHIM_RANKER": str(place.ranker),
    }
    return tests(place, folder, [f"unit/{name}.py" for name in LLAMA_FILES], env, LLAMA_EXCEPTIONS)


def schemathesis(place: Place) -> Result:
    """Every endpoint of /openapi.json with whatever its schema lets come: no answer may be a 5xx."""
    programs = place.pip("schemathesis", SCHEMATHESIS)
    with serving({"talker": place.talker}) as server:
        command = [
            "schemathesis",
            "run",
            f"{server.url}/openapi.json",
            "-c",
            "not_a_server_error",
            "-n",
            "300",
        ]
        done = subprocess.run(
            [str(programs / command[0]), *command[1:]],
            cwd=place.root,
            capture_output=True,
            text=True,
            check=False,
        )
        records = server.records()
    failed = [f"{one['method']} {one['path']} {one['status']}" for one in records if one["status"] >= 500]
    print(done.stdout[-2000:], file=sys.stderr)
    return Result(len(records), len(records) - len(failed), faults=sorted(set(failed)))


def mcp(place: Place) -> Result:
    return lines([sys.executable, HERE / "mcp_conformance.py", place.root / "mcp"])


SUITES: dict[str, Callable[[Place], Result]] = {
    "coding agents": agents,
    "openai-node": node,
    "libraries": libraries,
    "openai-python": openai_python,
    "anthropic-sdk-python": anthropic_python,
    "llama-server": llama_server,
    "mcp": mcp,
    "schemathesis": schemathesis,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    args = parser.parse_args()
    place = Place(args.folder.resolve())
    place.root.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in args.suites or SUITES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = SUITES[name](place)
    print(f"{'suite':22} {'ran':>6} {'passed':>6} {'excused':>7} {'faults':>6}")
    for name, result in results.items():
        excused = sum(result.excused.values())
        print(f"{name:22} {result.ran:6} {result.passed:6} {excused:7} {len(result.faults):6}")
    for name, result in results.items():
        for reason, n in result.excused.items():
            print(f"{name}: {n} excused: {reason}")
        for fault in result.faults:
            print(f"{name}: FAIL {fault}")
    return 1 if any(result.faults for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
