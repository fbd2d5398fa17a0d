"""qwen3c beside llama.cpp Q8_0, and beside what the machine can do: one run, paired and interleaved.

    python benchmarks/compare.py path/to/Qwen3-0.6B
    python benchmarks/compare.py                        # random weights in that shape

Both engines get the same weights, tokens, threads, f16 KV cache and context; llama.cpp its flash attention.
Each lives in its own process and they take turns, first one leading, then the other, so that what else
happens on the machine happens to both: believe the ratios, which are taken pair by pair. Between the
pairs the same number of threads reads memory as fast as it goes: no engine decodes faster than that.

    prefill       512 tokens into an empty cache
    decode        64 tokens one by one, from position 8
    resident      VmRSS after that, tokenizer loaded, mapped weights included
    first token   from the start of the process to its first byte of output, the file being cached

The peer needs llama-cpp-python and gguf (`pip install '.[bench]'`); --alone does without it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3c import engine
from qwen3c.export import export
from qwen3c.format import ModelFile

OURS, PEER = "qwen3c", "llama.cpp Q8_0"
PROBE_BYTES = 512 << 20  # of anonymous memory read to find the machine's limit
PROMPT = "The first word of"

RUN_OURS = "from qwen3c.run import main; raise SystemExit(main())"
RUN_PEER = """
import sys
from llama_cpp import Llama
path, threads, context, prompt = sys.argv[1:]
model = Llama(path, n_ctx=int(context), n_threads=int(threads), flash_attn=True, verbose=False)
print(model.create_completion(prompt, max_tokens=1, temperature=0)["choices"][0]["text"])
"""


# ----------------------------------------------------------------------------
# An engine in a process of its own


class Contender:
    """An engine in a child process, and what was measured of it: tokens per second, seconds to the first."""

    def __init__(self, name: str, path: Path, threads: int, context: int) -> None:
        self.name, self.path = name, path
        self.measured: dict[str, list[float]] = {"prefill": [], "decode": [], "first token": []}
        worker = Path(__file__).with_name("worker.py")
        command = [sys.executable, str(worker), name.split()[0], str(path), str(threads), str(context)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._receive()

    def measure(self, what: str, n: int, seed: int) -> None:
        self.measured[what].append(n / self._ask(f"{what} {n} {seed}"))

    def memory(self) -> tuple[int, int]:
        """(resident bytes, KV cache bytes of ours)"""
        resident, kv = self._ask("memory")
        return resident, kv

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, request: str) -> Any:
        assert self._process.stdin
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> Any:
        assert self._process.stdout
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"compare.py: error: the process of {self.name} ended; see above")
        return json.loads(answer)


# ----------------------------------------------------------------------------
# The machine's limit


class Bandwidth:
    """GB/s at which `threads` threads read anonymous memory, and a mapped file in the page cache."""

    def __init__(self, path: Path, threads: int) -> None:
        self.threads = threads
        self.memory = np.ones(PROBE_BYTES, np.int8)
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.file = np.frombuffer(self._map, np.int8)
        self.of_memory: list[float] = []
        self.of_file: list[float] = []
        self._read(self.file)  # the first touch maps the pages

    def measure(self) -> None:
        self.of_memory.append(self._read(self.memory))
        self.of_file.append(self._read(self.file))

    def _read(self, data: NDArray[np.int8]) -> float:
        # the largest of int8 is one load and one instruction per vector, and NumPy lets go of the GIL
        readers = [
            threading.Thread(target=np.max, args=(part,)) for part in np.array_split(data, self.threads)
        ]
        start = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return data.nbytes / (time.perf_counter() - start) / 1e9


# ----------------------------------------------------------------------------
# The run


@dataclass
class Files:
    ours: Path
    peer: Path | None


def prepare(args: argparse.Namespace, work: Path) -> Files:
    """The model in both formats; a random source and the peer's file are not made again if --work has them."""
    source = args.source
    if source is None:
        from random_model import SIZES, write_random_model

        source = work / f"random-{args.size}"
        if not (source / "model.safetensors").exists():
            note(f"writing random weights of {args.size}")
            write_random_model(source, SIZES[args.size])
    name = source.resolve().name
    files = Files(work / f"{name}-{args.group_size}.bin", None if args.alone else work / f"{name}-q8_0.gguf")
    note(f"exporting {name}")
    export(source, files.ours, group_size=args.group_size)
    if files.peer and not files.peer.exists():
        from gguf_model import write_gguf

        note(f"writing {files.peer.name}")
        write_gguf(source, files.peer)
    return files


def race(args: argparse.Namespace, contenders: list[Contender], bandwidth: Bandwidth) -> None:
    """Measure everything `args.pairs` times, the engines in alternating order; one round before is not counted."""
    for i in range(-1, args.pairs):
        for what, n in (("prefill", args.prompt), ("decode", args.decode)):
            for contender in contenders if i % 2 else contenders[::-1]:
                contender.measure(what, n, seed=i + 1)
        bandwidth.measure()
        note(f"pair {i + 1} of {args.pairs}" if i >= 0 else "warm")
    for contender in contenders:
        for what in ("prefill", "decode"):
            del contender.measured[what][0]
    del bandwidth.of_memory[0], bandwidth.of_file[0]


def race_to_first_token(args: argparse.Namespace, contenders: list[Contender]) -> None:
    """Seconds from starting a process to the first byte it prints."""
    threads, context = str(args.threads), str(context_of(args))
    commands = {
        OURS: [
            RUN_OURS,
            None,
            "-m",
            "generate",
            "-i",
            PROMPT,
            "-n",
            "1",
            "-j",
            threads,
            "-c",
            context,
            "--json",
        ],
        PEER: [RUN_PEER, None, threads, context, PROMPT],
    }
    for i in range(args.pairs):
        for contender in contenders if i % 2 else contenders[::-1]:
            command = [str(word or contender.path) for word in commands[contender.name]]
            start = time.perf_counter()
            with subprocess.Popen(
                [sys.executable, "-c", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as process:
                assert process.stdout and process.stderr
                if not process.stdout.read(1):
                    raise SystemExit(f"compare.py: error: {contender.name}: {process.stderr.read().decode()}")
                contender.measured["first token"].append(time.perf_counter() - start)
                process.communicate()


def context_of(args: argparse.Namespace) -> int:
    return -(-max(args.prompt, 8 + args.decode) // 256) * 256


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------
# The report


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and in brackets the smallest and the largest."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def report(args: argparse.Namespace, contenders: list[Contender], bandwidth: Bandwidth) -> None:
    model = ModelFile(contenders[0].path)
    print(f"{cpu_name()}, {args.threads} threads, {engine.isa()}; load at the end {os.getloadavg()[0]:.1f}")
    print(f"{model.metadata['name']}, group {model.config.group_size}; median of {args.pairs} (range)\n")
    names = [contender.name for contender in contenders]
    print("| | " + " | ".join(names) + (" | ratio, pair by pair |" if len(names) > 1 else " |"))
    print("|---" * (len(names) + 1 + (len(names) > 1)) + "|")
    rows = {"prefill": (f"prefill {args.prompt}, tok/s", 1), "decode": ("decode, tok/s", 2)}
    for what, (label, digits) in (rows | {"first token": ("first token, s", 2)}).items():
        cells = [label, *(spread(contender.measured[what], digits) for contender in contenders)]
        if len(contenders) > 1:
            pairs = zip(*(contender.measured[what] for contender in contenders), strict=True)
            cells.append(spread([ours / theirs for ours, theirs in pairs], 2))
        print("| " + " | ".join(cells) + " |")
    memory = [contender.memory() for contender in contenders]
    print("| resident, MB | " + " | ".join(f"{rss / 1e6:.0f}" for rss, _ in memory) + " |" * len(names))
    sizes = [contender.path.stat().st_size for contender in contenders]
    print("| file, MB | " + " | ".join(f"{size / 1e6:.0f}" for size in sizes) + " |" * len(names))

    rest = memory[0][0] - sizes[0] - memory[0][1]
    print(f"\nresident beyond file and KV cache ({memory[0][1] / 1e6:.0f} MB): {rest / 1e6:.0f} MB")
    print(f"memory read by {args.threads} threads, GB/s: {spread(bandwidth.of_memory, 1)}")
    print(f"cached file read by {args.threads} threads, GB/s: {spread(bandwidth.of_file, 1)}")
    swept = sum(t.size for t in model.tensors) / 1e9
    if not model.config.tied_embedding:  # one row of it
        swept -= next(t.size for t in model.tensors if t.name == "model.embed_tokens.weight") / 1e9
    decode = [rate * swept for rate in contenders[0].measured["decode"]]
    print(f"weights read by our decode, GB/s: {spread(decode, 1)}")
    shares = [ours / limit for ours, limit in zip(decode, bandwidth.of_memory, strict=True)]
    print(f"as a share of the memory read beside it: {spread(shares, 2)}")


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else "unknown CPU"


def run(args: argparse.Namespace, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    files = prepare(args, work)
    limit = ModelFile(files.ours).config.context
    if context_of(args) > limit:
        raise ValueError(f"{context_of(args)} positions are needed, the model has {limit}")
    contenders = [Contender(OURS, files.ours, args.threads, context_of(args))]
    if files.peer:
        contenders.append(Contender(PEER, files.peer, args.threads, context_of(args)))
    bandwidth = Bandwidth(files.ours, args.threads)
    race(args, contenders, bandwidth)
    race_to_first_token(args, contenders)
    report(args, contenders, bandwidth)
    for contender in contenders:
        contender.close()


def main() -> int:
    args = parse()
    if not args.alone:  # says what is missing before anything is made
        import gguf_model  # noqa: F401
        import llamacpp  # noqa: F401
    try:
        with tempfile.TemporaryDirectory() as temporary:
            run(args, args.work or Path(temporary))
    except (OSError, ValueError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="MODEL_DIR", type=Path, nargs="?", help="Hugging Face directory (default: random)")
    add("--size", default="0.6B", choices=("0.6B", "1.7B", "4B", "8B"), help="of the random model")
    add("--threads", type=int, default=engine.default_threads(), help="default: what this machine can feed")
    add("--pairs", type=int, default=7, help="measurements of each kind (default: 7)")
    add("--prompt", metavar="N", type=int, default=512, help="tokens of the prefill (default: 512)")
    add("--decode", metavar="N", type=int, default=64, help="tokens decoded (default: 64)")
    add("--group-size", type=int, default=64, help="of our file (default: 64)")
    add("--work", metavar="DIR", type=Path, help="keep the converted models here (default: a temporary one)")
    add("--alone", action="store_true", help="no llama.cpp")
    args = parser.parse_args()
    for name in ("threads", "pairs", "prompt", "decode"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, at least 1 is needed")
    return args


if __name__ == "__main__":
    sys.exit(main())
