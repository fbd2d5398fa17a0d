"""A name from the shell to a token, in every mode, without a network and without the client of the Hub.

python -m pytest tests/hub/test_processes.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_processes import GGUF, MODEL, ROOT, run, run_py
from hub_server import Hub

from qwen3c import Model


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
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    body = {"model": "x", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    request = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    requests.write_text(json.dumps(request) + "\n")
    done = run_py(MODEL, "-m", "batch", str(requests), "-o", str(answers), "--draft", MODEL, env=env)
    assert done.returncode == 0 and '"custom_id":"1"' in answers.read_text().replace(": ", ":"), done.stderr
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
