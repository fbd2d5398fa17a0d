"""A hub on loopback, and the real client of it in the process of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub
from small_gguf import small_gguf, write_gguf
from small_models import write_small_model

from qwen3c.convert.export import export

MODEL, GGUF = "owner/Small", "owner/Small-GGUF:Small-Q8_0.gguf"


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as its makers would upload it, with files that nobody should fetch; and a GGUF file of it."""
    folder = tmp_path_factory.mktemp("sources")
    model = write_small_model(folder / "model", shards=2, n_layers=4)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Small\n")
    (model / "modeling_small.py").write_text("raise SystemExit('code of a model was run')\n")
    (model / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "Small-Q8_0.gguf", *small_gguf("Q8_0"))
    return folder


@pytest.fixture(scope="session")
def converted(sources: Path) -> bytes:
    """What export.py makes of the model."""
    target = sources / "model.bin"
    export(sources / "model", target, name="Small")
    return target.read_bytes()


@pytest.fixture
def hub(sources: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add("owner/Small", sources / "model")
        hub.add("owner/Small-GGUF", sources / "gguf")
        yield hub


@pytest.fixture
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, empty; the client here asks the hub, and waits for nobody."""
    from huggingface_hub import constants

    from qwen3c.hub import download

    for name, value in hub.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.01, 0.01))
    return tmp_path / "cache"
