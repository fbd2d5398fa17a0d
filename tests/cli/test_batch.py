"""-m batch: each answer once, in the order of the requests, whatever ends the run in between.

python -m pytest tests/cli/test_batch.py; with `-m slow` 2,000 requests, killed at 20 points
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import RUN, Result, command, in_process
from small_batches import mixed, write
from small_models import export_small_model

from qwen3c import Model
from qwen3c.system.files import MODEL_IN_THE_BOX, lock

BOX = str(MODEL_IN_THE_BOX)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN3C_MODEL", raising=False)
    monkeypatch.setenv("QWEN3C_THREADS", "1")


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 of them."""
    return write(tmp_path_factory.mktemp("requests") / "requests.jsonl", mixed(200))


@pytest.fixture(scope="module")
def answers(requests: Path) -> bytes:
    """What an unbroken run makes of them."""
    output = requests.with_name("answers.jsonl")
    assert batch(requests, output).status == 0
    return output.read_bytes()


def batch(requests: Path | str, output: Path | str, *more: str, **options: Any) -> Result:
    """The command in a process of its own."""
    return command(BOX, "-m", "batch", str(requests), "-o", str(output), "-j", "1", *more, **options)


def part_of(output: Path) -> Path:
    return Path(f"{output}.part")


def killed(requests: Path, output: Path, lines: int, number: int = signal.SIGKILL) -> tuple[int, str]:
    """Send a signal to a run when so many lines are written, if it has not ended: (status, stderr)."""
    words = [*RUN, BOX, "-m", "batch", str(requests), "-o", str(output), "-j", "1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as run:
        while run.poll() is None and _lines(part_of(output)) < lines:
            time.sleep(0.002)
        run.send_signal(number)
        _, said = run.communicate(timeout=60)
    return run.returncode, said.decode()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# ----------------------------------------------------------------------------
# Runs that end well


def test_every_request_has_its_answer_in_the_order_of_the_requests(answers: bytes, requests: Path) -> None:
    found = [json.loads(line) for line in answers.splitlines()]
    assert [one["custom_id"] for one in found] == [one["custom_id"] for one in mixed(200)]
    assert {one["response"]["status_code"] for one in found} == {200, 400}
    assert not part_of(requests.with_name("answers.jsonl")).exists()


def test_stdin_and_stdout_do_as_well(answers: bytes, requests: Path) -> None:
    done = command("-m", "batch", "-", "-o", "-", input=requests.read_bytes())
    assert done.status == 0 and done.out.encode() == answers
    assert "200 answers | 25 refused" in done.err


def test_a_batch_that_is_done_is_not_done_again(
    answers: bytes, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_bytes(answers)
    done = in_process(capsys, "-m", "batch", str(requests), "-o", str(output))
    assert done.status == 0 and "all 200 answers are there already" in done.err
    assert output.read_bytes() == answers and list(tmp_path.iterdir()) == [output]


# ----------------------------------------------------------------------------
# Runs that do not


@pytest.mark.parametrize("points", [(1, 40, 199)])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(
    answers: bytes, requests: Path, tmp_path: Path, points: tuple[int, ...]
) -> None:
    output = tmp_path / "answers.jsonl"
    for lines in points:
        killed(requests, output, lines)
        assert not output.exists() or output.read_bytes() == answers, "there is all of it or nothing"
    assert batch(requests, output).status == 0
    assert output.read_bytes() == answers and list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_two_thousand_requests_killed_at_twenty_points(tmp_path: Path) -> None:
    requests = write(tmp_path / "requests.jsonl", mixed(2000))
    assert batch(requests, tmp_path / "unbroken.jsonl", timeout=600).status == 0
    unbroken = (tmp_path / "unbroken.jsonl").read_bytes()
    output = tmp_path / "answers.jsonl"
    for lines in sorted(random.Random(1).sample(range(1, 2000), 20)):
        killed(requests, output, lines)
        assert not output.exists() or output.read_bytes() == unbroken
    assert batch(requests, output, timeout=600).status == 0
    assert output.read_bytes() == unbroken


@pytest.fixture(scope="module")
def begun(requests: Path, answers: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a killed run leaves: what it is about, and 20 answers."""
    output = tmp_path_factory.mktemp("begun") / "answers.jsonl"
    killed(requests, output, 2)
    head = part_of(output).read_bytes().splitlines(keepends=True)[0]
    some = random.Random(1).sample(answers.splitlines(keepends=True), 20)
    return b"".join([head, *some])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: text[:-40],
        lambda text: text + b"\0" * 512,
        lambda text: text + b'{"custom_id": "request-1", "response"',
        lambda text: text + b'{"of": "something else"}\n',
        lambda text: text + text.splitlines(keepends=True)[-1],
        lambda text: text.splitlines()[0],
        lambda text: b"",
    ],
)
def test_a_damaged_end_is_cut_off(
    damage: Callable[[bytes], bytes], begun: bytes, answers: bytes, requests: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "answers.jsonl"
    part_of(output).write_bytes(damage(begun))
    assert in_process(capsys, BOX, "-m", "batch", str(requests), "-o", str(output)).status == 0
    assert output.read_bytes() == answers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_soon_and_says_how_to_go_on(
    number: int, answers: bytes, requests: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    status, said = killed(requests, output, 20, number)
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signal.Signals(number)]
    last = said.splitlines()[-1]
    assert status == 128 + number and "Traceback" not in said
    kept = re.fullmatch(rf"run.py: {word}; (\d+) of 200 answers are in .*\.part, with which .* goes on", last)
    assert kept and 19 <= int(kept[1]) == _lines(part_of(output)) - 1 < 200
    done = batch(requests, output)
    assert f"{kept[1]} of 200 answers are there" in done.err and output.read_bytes() == answers


def test_an_interrupted_run_writes_to_stdout_what_is_complete(answers: bytes, requests: Path) -> None:
    words = [*RUN, BOX, "-m", "batch", str(requests), "-o", "-", "-j", "1", "--concurrency", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stderr and b"context" in run.stderr.readline()
        time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        out, said = run.communicate(timeout=60)
    assert run.returncode in (0, 130) and b"Traceback" not in said
    whole, lines = answers.splitlines(), out.splitlines()
    assert lines == [line for line in whole if line in set(lines)]


def test_an_engine_that_fails_ends_it_and_loses_nothing(
    answers: bytes, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output, forward, passes = tmp_path / "answers.jsonl", Model.forward, iter(range(10**6))

    def fail(self: Model, *args: Any) -> Any:
        if next(passes) == 30:
            raise MemoryError
        return forward(self, *args)

    monkeypatch.setattr(Model, "forward", fail)
    words = (BOX, "-m", "batch", str(requests), "-o", str(output), "--concurrency", "4")
    failed = in_process(capsys, *words)
    assert failed.status == 2 and not output.exists() and "Traceback" not in failed.err
    assert re.search(r"error: line \d+: out of memory; \d+ of 200 answers are in ", failed.err)
    assert in_process(capsys, *words).status == 0 and output.read_bytes() == answers


# ----------------------------------------------------------------------------
# What is refused


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a run that must not begin."""
    done = in_process(capsys, *map(str, words))
    assert done.status == 2 and not done.out
    (line,) = done.err.splitlines()
    return line.partition("error: ")[2]


def test_requests_that_cannot_be_read_are_one_line_with_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, one = tmp_path / "answers.jsonl", mixed(1)[0]
    for lines, said in (
        ([one, "{"], "line 2: it is not JSON"),
        ([one, "", one], "line 3: custom_id 'request-0' is that of line 1"),
        ([{"method": "POST"}], "line 1: custom_id is missing"),
        ([], "there is no request in it"),
    ):
        requests = write(tmp_path / "requests.jsonl", lines)
        assert said in refused(capsys, "-m", "batch", requests, "-o", output)
        assert list(tmp_path.iterdir()) == [requests]
    assert "No such file" in refused(capsys, "-m", "batch", tmp_path / "none", "-o", output)


def test_what_is_in_the_way_is_left_alone(
    requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    words = ("-m", "batch", requests, "-o", output)
    output.write_text("mine\n")
    assert "not of these requests" in refused(capsys, *words)
    assert output.read_text() == "mine\n"
    output.unlink()
    part_of(output).write_text("mine\n")
    assert "was not left by a run like this one" in refused(capsys, *words)
    assert part_of(output).read_text() == "mine\n"
    assert "it is there and no file" in refused(capsys, "-m", "batch", requests, "-o", tmp_path)
    assert "No such file" in refused(capsys, "-m", "batch", requests, "-o", tmp_path / "none" / "a.jsonl")
    assert "not of these requests" in refused(capsys, "-m", "batch", requests, "-o", requests)


def test_a_run_goes_on_with_nothing_else(
    begun: bytes, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, other = tmp_path / "answers.jsonl", write(tmp_path / "other.jsonl", mixed(201))
    part_of(output).write_bytes(begun)
    small = export_small_model(tmp_path)
    for said, words in {
        "other requests": (BOX, other),
        "another model": (small, requests),
        "another --kv": (BOX, requests, "--kv", "int8"),
        "a context of 512, now it is 256": (BOX, requests, "-c", "256"),
    }.items():
        model, asked, *more = words
        done = in_process(capsys, str(model), "-m", "batch", str(asked), "-o", str(output), *map(str, more))
        assert done.status == 2 and said in done.err.splitlines()[-1]
        assert part_of(output).read_bytes() == begun


def test_two_runs_do_not_write_one_file(
    begun: bytes, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    with open(part_of(output), "wb") as file:
        file.write(begun)
        file.flush()
        lock(file, wait=True)
        assert "another run is writing it" in refused(capsys, "-m", "batch", requests, "-o", output)


def test_options_that_cannot_be_are_one_line(requests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs both" in refused(capsys, "-m", "batch", requests)
    assert "needs both" in refused(capsys, "-m", "batch", "-o", "answers.jsonl")
    assert "belongs to -m batch" in refused(capsys, "-m", "bench", "-o", "answers.jsonl")
    assert "belongs to" in refused(capsys, "-m", "batch", requests, "-o", "-", "-t", "0")
    done = in_process(capsys, "-m", "batch", str(requests), "-o", "-", "--max-memory", "much")
    assert done.status == 2 and "--max-memory = 'much': expected bytes" in done.err


def test_what_is_not_installed_is_said(
    requests: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "starlette" else find(name))
    line = refused(capsys, "-m", "batch", requests, "-o", "-")
    assert line.startswith("-m batch needs starlette") and "pip install '.[serve]'" in line
