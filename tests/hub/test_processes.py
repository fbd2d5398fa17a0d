"""A name in processes of their own: killed anywhere, several at once, without a network, from shell to token.

python -m pytest tests/hub/test_processes.py
python -m pytest -m slow tests/hub/test_processes.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Fault, Hub

from qwen3c import Model

ROOT = Path(__file__).parents[2]
MODEL, GGUF = "owner/Small", "owner/Small-GGUF:Small-Q8_0.gguf"

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


def start(script: str, *arguments: object, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(script: str, *arguments: object, env: dict[str, str]) -> tuple[int, str, str]:
    process = start(script, *arguments, env=env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def run_py(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "run.py", *arguments], cwd=ROOT, env=os.environ | env | {"QWEN3C_THREADS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


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
    killed_at(hub, tmp_path, 6, MODEL, converted)


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


def test_a_name_answers_in_one_command_and_then_without_a_network(hub: Hub, tmp_path: Path) -> None:
    env = hub.environment(tmp_path)
    options = ["-i", "hello", "-n", "4", "-s", "1", "-t", "0"]
    first = run_py(MODEL, *options, env=env)
    assert first.returncode == 0 and first.stdout, first.stderr
    assert "fetching owner/Small: 0.5 MiB\n" in first.stderr and "Small int8" in first.stderr
    asked = len(hub.asked)
    second = run_py(MODEL, *options, env=env)
    assert (second.returncode, second.stdout, len(hub.asked)) == (0, first.stdout, asked)
    assert "fetching" not in second.stderr
    gguf = run_py(GGUF, *options, env=env)
    assert gguf.returncode == 0 and gguf.stdout, gguf.stderr
    assert {path.rpartition(".")[2] for path in hub.paths()} == {"json", "md", "safetensors", "gguf"}


NO_SOCKETS = """
import sys
def hook(event, args):
    if event.startswith("socket."):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(hook)
from qwen3c.cli import run
status = run.main(sys.argv[1:])
never = {"huggingface_hub", "httpx2", "filelock", "qwen3c.hub.download", "qwen3c.convert"}
print(sorted(never & {*sys.modules}))
sys.exit(status)
"""


def test_a_second_start_opens_no_socket_and_loads_no_client(hub: Hub, tmp_path: Path) -> None:
    env = hub.environment(tmp_path)
    assert run("from qwen3c import Model\nModel.from_hub('owner/Small', 1)", env=env)[0] == 0
    for options in (
        ["-i", "a", "-n", "1"],
        ["-m", "info"],
        ["-m", "generate", "--raw", "-i", "a", "-n", "1"],
    ):
        status, out, err = run(NO_SOCKETS, MODEL, *options, env=env | {"QWEN3C_THREADS": "1"})
        assert (status, out.splitlines()[-1]) == (0, "[]"), err
    status, out, err = run(NO_SOCKETS, "-m", "models", env=env)
    assert (status, out.splitlines()[-1]) == (0, "[]") and "owner/Small  8 bits" in out, err


def test_every_mode_takes_a_name(hub: Hub, tmp_path: Path) -> None:
    env = hub.environment(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("import os\n" * 20)
    page = str(tmp_path / "page.html")
    for arguments in (
        [MODEL, "-m", "info"], [MODEL, "-m", "bench"], [MODEL, "-m", "perplexity", str(text)],
        [MODEL, "-m", "trace", "-i", "a", "--html", page, "-n", "1"], [MODEL, "-i", "a", "-n", "1"],
        [MODEL, "-m", "serve", "--print-config"], [MODEL, "-m", "generate", "-i", "a", "-n", "1"],
        [f"hf.co/{MODEL}@main", "-m", "info"], [MODEL, "-m", "info", "--bits", "4"],
    ):  # fmt: skip
        done = run_py(*arguments, env=env)
        assert done.returncode == 0 and (done.stdout or "--html" in arguments), (arguments, done.stderr)
    assert len(hub.paths()) == len(set(hub.paths()))
    done = run_py("-i", "a", "-n", "1", env=env | {"QWEN3C_MODEL": MODEL})
    assert done.returncode == 0 and "Small int8" in done.stderr


def test_export_takes_a_name_and_downloads_once(hub: Hub, tmp_path: Path, converted: bytes) -> None:
    env = os.environ | hub.environment(tmp_path)
    target = tmp_path / "model.bin"
    for options in ([], ["--quiet"], ["--bits", "4", "--name", "Other"], ["--estimate"]):
        done = subprocess.run(
            [sys.executable, "export.py", MODEL, str(target), *options], cwd=ROOT, env=env,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if not options:
            assert target.read_bytes() == converted
    assert len(hub.paths()) == len(set(hub.paths())) and not list((tmp_path / "cache").rglob("*.bin"))
    assert Model(target, threads=1).metadata["name"] == "Other"


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


def test_without_the_client_one_line_says_what_to_install(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    script = (
        "import importlib.util, sys\nreal = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'huggingface_hub' else real(name, *a)\n"
        "from qwen3c.cli.run import main\nsys.exit(main(sys.argv[1:]))"
    )
    status, out, err = run(script, MODEL, "-m", "info", env=hub.environment(tmp_path))
    assert (status, out) == (2, "")
    assert err == (
        "run.py: error: a model by its name needs huggingface_hub: "
        "`pip install '.[hub]'` in the folder of qwen3c installs it\n"
    )


# what other programs do: the client downloads files into its own cache
DOWNLOAD = """
import sys
from huggingface_hub import hf_hub_download
for path in sys.argv[2:]:
    hf_hub_download(sys.argv[1], path)
"""


def test_offline_takes_what_other_programs_have_downloaded(
    hub: Hub, tmp_path: Path, converted: bytes
) -> None:
    env = hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}
    nothing = run_py(MODEL, "-m", "info", env=env)
    assert nothing.returncode == 2 and nothing.stderr == (
        "run.py: error: owner/Small: is not in the cache, and HF_HUB_OFFLINE is set: "
        "unset it once to fetch the model\n"
    )
    online = hub.environment(tmp_path)
    for name, repository in hub.repositories.items():
        status, _, err = run(DOWNLOAD, name, *repository.files, env=online)
        assert status == 0, err
    asked = len(hub.asked)
    for name in (MODEL, GGUF):
        done = run_py(name, "-m", "info", env=env)
        assert done.returncode == 0, done.stderr
    assert len(hub.asked) == asked
    (model,) = (tmp_path / "cache" / "owner--Small").rglob("*.bin")
    assert model.read_bytes() == converted


def test_what_other_programs_have_downloaded_is_not_fetched_again(
    hub: Hub, tmp_path: Path, converted: bytes
) -> None:
    env = hub.environment(tmp_path)
    weights = [path for path in hub.repositories["owner/Small"].files if path.endswith(".safetensors")]
    status, _, err = run(DOWNLOAD, "owner/Small", *weights, env=env)
    assert status == 0, err
    hub.asked.clear()
    assert run_py(MODEL, "-m", "info", env=env).returncode == 0
    assert not [path for path in hub.paths() if path.endswith(".safetensors")]
    (model,) = (tmp_path / "cache").rglob("*.bin")
    assert model.read_bytes() == converted
