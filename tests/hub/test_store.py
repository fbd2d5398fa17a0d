"""What is kept of the Hub: found by name, revision and bits; listed; pruned.

python -m pytest tests/hub/test_store.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest
from hub_server import Hub

from qwen3c import Model
from qwen3c.cli import run
from qwen3c.cli.serve import _with_files
from qwen3c.hub import obtain, store
from qwen3c.serve import config
from qwen3c.system.names import Name, parse

MODEL, GGUF = Name("owner/Small"), Name("owner/Small-GGUF", "main", "Small-Q8_0.gguf")


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = run.main([*arguments])
    return status, *capsys.readouterr()


def test_a_model_is_found_by_revision_and_bits(hub: Hub, cache: Path) -> None:
    first = obtain.model(MODEL)
    four = obtain.model(MODEL, "4")
    assert first != four and four.stat().st_size < first.stat().st_size
    assert store.find(MODEL) == first and store.find(MODEL, "4") == four and store.find(MODEL, "6") is None
    commit = hub.repositories["owner/Small"].commit
    assert store.find(Name("owner/Small", commit)) == first and store.find(Name("owner/Small", "v1")) is None
    files = dict(hub.repositories["owner/Small"].files)
    hub.add("owner/Small", files | {"README.md": b"---\nlicense: mit\n---\n"})
    assert obtain.model(MODEL) == first, "what main meant when it was first asked for"
    tagged = obtain.model(Name("owner/Small", "v1"))
    assert tagged.parent != first.parent
    assert Model.from_hub("owner/Small@v1", 1).file.metadata["source"]["licence"] == "mit"
    assert len(hub.paths()) == 2 * len(set(hub.paths())), "once for each commit"


def test_bits_that_are_none_are_refused_before_anything_is_asked(hub: Hub, cache: Path) -> None:
    with pytest.raises(ValueError, match="--bits is '3', not one of 4, 4.5"):
        Model.from_hub("owner/Small", bits="3")
    assert not hub.asked


def test_a_file_of_that_name_wins(
    hub: Hub, cache: Path, sources: Path, converted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "Small").write_bytes(converted)
    assert Model.from_hub("owner/Small", 1).path == "owner/Small"
    assert not hub.asked and not cache.exists()
    (tmp_path / "owner" / "Small").unlink()
    with pytest.raises(ValueError, match="owner/Small: No such file"):
        Model.from_hub("owner/Small")
    assert Model.from_hub("hf.co/owner/Small", 1).config.n_layers == 4


def test_a_server_takes_names_in_flags_and_in_its_configuration(
    hub: Hub, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "serve.toml"
    file.write_text(
        f'draft = "owner/Small"\n[models]\na = "{GGUF}"\nb = {{ path = "b.bin", draft = "x/y" }}\n'
    )
    made = config.settings(str(file), {"models": {"c": "owner/Small"}}, {"models": "--model-alias"})
    paths = {alias: (model.path, model.draft) for alias, model in made.models.items()}
    assert made.draft == "owner/Small"
    assert paths == {
        "a": (str(GGUF), None), "b": (str(tmp_path / "b.bin"), "x/y"), "c": ("owner/Small", None)
    }  # fmt: skip
    assert not hub.asked
    models = {alias: model for alias, model in made.models.items() if alias != "b"}
    ready = _with_files(dataclasses.replace(made, models=models), None)
    assert ready.models["a"].path == str(store.find(GGUF)) and ready.draft == str(store.find(MODEL))
    assert ready.models["c"].path == ready.draft


def test_from_python_progress_is_told_and_a_pickle_opens_the_file_again(hub: Hub, cache: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with Model.from_hub("owner/Small", 1, progress=lambda *step: told.append(step)) as model:
        assert model.metadata["name"] == "Small" and model.threads == 1
        with pickle.loads(pickle.dumps(model)) as again:
            assert again.path == model.path
    doing = list(dict.fromkeys(step[0].split()[0] for step in told))
    assert doing == ["asking", "fetching", "checking", "converting"]
    for what in ("fetching owner/Small", "converting owner/Small to 8 bits"):
        steps = [step[1:] for step in told if step[0] == what]
        assert steps == sorted(steps) and steps[0][0] == 0 and steps[-1][0] == steps[-1][1] > 0


def test_what_is_kept_is_listed_with_what_it_needs(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(capsys, "-m", "models") == (0, "", f"{cache}: no models\n")
    for name in (MODEL, GGUF):
        obtain.model(name)
    obtain.model(MODEL, "4")
    status, out, err = command(capsys, "-m", "models")
    commit = hub.repositories["owner/Small"].commit[:8]
    assert status == 0 and "are not needed, --prune frees them" in err
    assert [line.split()[0] for line in out.splitlines() if not line.startswith(" ")] == [
        "owner/Small", "owner/Small", str(GGUF),
    ]  # fmt: skip
    assert f"owner/Small  4 bits  {commit}\n    file 0.2 MiB, memory 4" in out
    assert " MiB at context 256 of 256\n    downloaded 0.5 MiB\n" in out
    status, out, _ = command(capsys, "-m", "models", "--json")
    kept = json.loads(out)
    assert kept["folder"] == str(cache) and len(kept["models"]) == 3
    for model in kept["models"]:
        assert model["file_bytes"] == os.stat(model["path"]).st_size < model["resident_bytes"]
        assert model["context"] == model["default_context"] == 256 and model["revisions"] == ["main"]
        typed = parse(model["name"])
        assert typed and store.find(typed, model["bits"]) == Path(model["path"])
    assert len(json.loads(command(capsys, "-m", "models", "owner/Small-GGUF", "--json")[1])["models"]) == 1


def test_what_was_begun_is_listed(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = obtain.model(MODEL)
    part = model.parent / "source" / "model-00001-of-00002.safetensors"
    part.rename(f"{part}.part")
    model.unlink()
    status, out, _ = command(capsys, "-m", "models")
    assert status == 0 and "not converted yet" in out and "begun 0.3 MiB: the next start goes on" in out
    store.find(MODEL)
    status, _, err = command(capsys, "--prune", "--yes")
    assert (status, err) == (
        0,
        f"{cache}: everything in it is needed; -m models --prune NAME deletes a model\n",
    )


def test_a_damaged_model_is_named_and_the_rest_is_listed(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    obtain.model(MODEL).write_bytes(b"QWEN3C")
    obtain.model(GGUF)
    status, out, _ = command(capsys, "-m", "models")
    assert status == 0 and "damaged, --prune with its name deletes it: " in out and str(GGUF) in out


def test_prune_frees_what_no_start_needs(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, asked = obtain.model(MODEL), len(hub.asked)
    status, out, err = command(capsys, "-m", "models", "--prune", "--yes")
    assert (
        (status, out) == (0, "")
        and "what was downloaded, 0.5 MiB\n" in err
        and "0.5 MiB are free again" in err
    )
    assert {path for path in cache.rglob("*") if path.is_file() and ".lock" not in str(path)} == {
        model, cache / "owner--Small" / "refs" / "main",
    }  # fmt: skip
    assert obtain.model(MODEL) == model and len(hub.asked) == asked
    obtain.model(MODEL, "4")
    assert len(hub.asked) > asked, "other bits take the source again"
    status, _, err = command(capsys, "owner/Small", "--prune", "--yes")
    assert status == 0 and "all of it" in err and not list(cache.glob("owner--*"))


def test_nothing_is_deleted_without_consent(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain.model(MODEL)
    before = sorted(cache.rglob("*"))
    status, _, err = command(capsys, "-m", "models", "--prune")
    assert status == 2 and "--prune asks before it deletes, and nobody is at a terminal: --yes" in err
    assert sorted(cache.rglob("*")) == before


def test_what_another_process_is_fetching_is_left_alone(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    obtain.model(MODEL)
    with store.locked(store.Place(MODEL).folder):
        status, _, err = command(capsys, "-m", "models", "owner/Small", "--prune", "--yes")
    assert status == 0 and "another process is fetching it; nothing of it was deleted" in err
    assert store.find(MODEL)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["owner/Other", "-m", "models"], "owner/Other: is not in "),
        (["model.bin", "-m", "models"], "model.bin: is not the name of a model on the Hub"),
        (["owner/b:Q8", "-m", "info"], "owner/b:Q8: after the colon stands a GGUF file of owner/b"),
        (["model.bin", "-m", "info", "--bits", "4"], "--bits is for "),
    ],
)
def test_a_wrong_name_is_one_line(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    status, out, err = command(capsys, *arguments)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert not hub.asked


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QWEN3C_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.root() == tmp_path / "qwen3c"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert store.root() == Path("/home/somebody/.cache/qwen3c")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN3C_CACHE", "here")
    assert store.root() == tmp_path / "here"
