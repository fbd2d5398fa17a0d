"""A process that fetches a model is killed, interrupted, or not alone: the next one finishes, and only once.

python -m pytest tests/hub/test_killed.py
python -m pytest -m slow tests/hub/test_killed.py
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hub_processes import GGUF, MODEL, run, run_py, start
from hub_server import Fault, Hub

# fetches the model that argv names, and kills itself, as `kill -9` does, at the event of a number: each use
# of a file of the cache, and each piece that arrives or is converted. The number 0 counts the events.
KILLED = """
import os, signal, sys
number, name, cache = int(sys.argv[1]), sys.argv[2], os.environ["QWEN3C_CACHE"]
events = 0
def happened(*_):
    global events
    events += 1
    if events == number:
        os.kill(os.getpid(), signal.SIGKILL)
def hook(event, args):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.listdir", "os.truncate"):
        if isinstance(args[0], (str, bytes)) and os.fsdecode(args[0]).startswith(cache):
            happened()
from qwen3c import Model
from qwen3c.hub import download, obtain
sys.addaudithook(hook)
model = Model.from_hub(name, 1, progress=happened)
print(events)
"""


def killed_at(hub: Hub, folder: Path, points: int, name: str, converted: bytes | None) -> None:
    """Kill a process at so many points, from its first event on; each time the next one finishes."""
    status, out, err = run(KILLED, 0, name, env=hub.environment(folder / "count"))
    assert status == 0, err
    events = int(out)
    assert events > points // 2
    for point in range(points):
        number = 1 + point * (events * 9 // 10) // (points - 1)  # how many pieces arrive varies a little
        env = hub.environment(folder / str(point))
        status, _, err = run(KILLED, number, name, env=env)
        assert status == -signal.SIGKILL, (number, events, err)
        status, _, err = run(KILLED, 0, name, env=env)
        assert (status, err) == (0, ""), number
        cache = folder / str(point) / "cache"
        assert not [path for path in cache.rglob("*") if path.suffix in (".part", ".tmp")], number
        (model,) = cache.rglob("*bits-8.bin")
        assert converted is None or model.read_bytes() == converted


def test_a_process_killed_anywhere_is_finished_by_the_next(
    hub: Hub, tmp_path: Path, converted: bytes
) -> None:
    killed_at(hub, tmp_path, 4, MODEL, converted)


@pytest.mark.slow
def test_a_process_killed_at_each_of_many_points_is_finished_by_the_next(
    hub: Hub, tmp_path: Path, converted: bytes
) -> None:
    killed_at(hub, tmp_path / "a", 50, MODEL, converted)
    killed_at(hub, tmp_path / "b", 20, GGUF, None)


def test_two_processes_at_once_fetch_and_convert_once(hub: Hub, tmp_path: Path, converted: bytes) -> None:
    script = (
        "import sys\nfrom qwen3c import Model\nfrom qwen3c.convert import export\nreal = export.export\n"
        "def noted(*a, **k):\n    print('converts')\n    return real(*a, **k)\nexport.export = noted\n"
        "Model.from_hub(sys.argv[1], 1)\n"
    )
    hub.faults = [Fault("^cdn:", "slow", 0.03)]
    env = hub.environment(tmp_path)
    processes = [start(script, MODEL, env=env) for _ in range(3)]
    ended = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ended
    assert "".join(out for out, _ in ended) == "converts\n"
    assert len(hub.paths()) == len(set(hub.paths()))


def test_ctrl_c_keeps_what_has_arrived(hub: Hub, tmp_path: Path, converted: bytes) -> None:
    env = hub.environment(tmp_path)
    hub.faults = [Fault("^cdn:", "slow", 0.05)]
    script = "import sys\nfrom qwen3c.cli.run import main\nsys.exit(main(sys.argv[1:]))"
    process = start(script, MODEL, "-m", "info", env=env)
    hub.watch = lambda sent: process.send_signal(signal.SIGINT) if 100_000 < sent < 120_000 else None
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines() == [
        "fetching owner/Small: 0.5 MiB",
        "owner/Small: what has arrived is kept, the same command goes on",
    ]
    assert list((tmp_path / "cache").rglob("*.part"))
    hub.faults, hub.watch = [], None
    done = run_py(MODEL, "-m", "info", env=env)
    assert done.returncode == 0 and "are here" in done.stderr
    (model,) = (tmp_path / "cache").rglob("*.bin")
    assert model.read_bytes() == converted


def test_a_full_disk_in_the_middle_of_either_step_is_one_line(
    hub: Hub, tmp_path: Path, converted: bytes
) -> None:
    """As full as a disk is for a process that may write no longer files (RLIMIT_FSIZE)."""
    script = (
        "import resource, sys\nfrom qwen3c.cli.run import main\nsize = int(sys.argv.pop(1))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\nsys.exit(main(sys.argv[1:]))"
    )
    env = hub.environment(tmp_path)
    for file in ("safetensors.part", "bits-8.bin"):
        status, out, err = run(script, 200_000, MODEL, "-m", "info", env=env)
        assert (status, out) == (2, "") and err.splitlines()[-1].startswith("run.py: error: "), err
        assert file in err.splitlines()[-1] and "File too large" in err.splitlines()[-1], err
        assert run_py(MODEL, "-m", "info", env=env).returncode == 0
        for model in (tmp_path / "cache").rglob("*.bin"):
            model.unlink()
    status, _, err = run(script, 10_000_000, MODEL, "-m", "info", env=env)
    assert status == 0
    (model,) = (tmp_path / "cache").rglob("*.bin")
    assert model.read_bytes() == converted
