"""Any metadata is refused in one line, or does no harm to anything that reads it.

python -m pytest tests/test_metadata.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from small_models import export_small_model
from test_format import with_section

from qwen3c import Model
from qwen3c.cli import run
from qwen3c.format import ModelFile, ModelFileError, ModelWriter
from qwen3c.inspect import info

N_MUTANTS = 150
ROOM = 1 << 16  # bytes
VALUES: list[Any] = [
    None, True, 0, -1, 3, 10**400, -(10**30), 2**64, 0.5, 1e308, float("nan"), float("inf"),
    "", "a", "x" * 3000, "\ud800", "a\udfffb", "\x1b[31m", "\n", "\U0001f642",
    [], {}, [1], ["a"], [None], [[]], [-1], [10**400], {"a": 1}, {"\ud800": 1}, {"": None},
    {"temperature": "x"},
    {"temperature": 1e308}, {"top_k": 0.5}, {"logit_bias": 3}, {"seed": 1}, {"bos_token": 1}, {"config": []},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with room for other metadata."""
    source = ModelFile(
        export_small_model(tmp_path_factory.mktemp("metadata"), dim=64, hidden_dim=64, n_layers=1)
    )
    path = tmp_path_factory.mktemp("roomy") / "model.bin"
    metadata = source.metadata | {"room": "x" * ROOM}
    with ModelWriter(path, source.config, metadata, source.tokenizer, source.template) as writer:
        for tensor in source.tensors:
            writer.write(source.data(tensor))
            writer.end_tensor()
    return path


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def mutant(metadata: dict[str, Any], seed: int) -> bytes:
    """The metadata with one value at any depth replaced, or one key added; some are nested deeply."""
    r = random.Random(seed)
    value: Any = json.loads(json.dumps(metadata))
    del value["room"]
    place = r.choice([p for p in places(value) if p] + [(key,) for key in metadata] * 3 + [("new",)])
    at = value
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = "here"
    depth = r.choice([0, 0, 0, 0, 0, 1, 20, 60, 900, 5000])
    inner = json.dumps(r.choice(VALUES))
    deep = "[" * depth + inner + "]" * depth if r.random() < 0.5 else '{"a":' * depth + inner + "}" * depth
    return json.dumps(value).replace('"here"', deep, 1).encode()


def test_every_mutant_is_refused_in_one_line_or_used_by_all(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, data = ModelFile(model), model.read_bytes()
    path, used = tmp_path / "model.bin", 0
    generate = ["-m", "generate", "-j", "1", "-i", "a", "-n", "1"]
    for seed in range(N_MUTANTS):
        content = mutant(file.metadata, seed)
        path.write_bytes(
            with_section(data, file.fields(), "metadata", content.ljust(file.fields()["metadata_size"]))
        )
        try:
            loaded = ModelFile(path)
            assert list(info.lines(loaded)) and json.dumps(info.describe(loaded), allow_nan=False).encode()
            Model(str(path), threads=1).chat_prompt([{"role": "user", "content": "a"}])
            accepted = True
        except ModelFileError as error:
            accepted = False
            assert "\n" not in str(error) and len(str(error)) < len(str(path)) + 300, (seed, error)
            str(error).encode()
        for words in (["-m", "info"], ["-m", "info", "--json"], generate):
            capsys.readouterr()
            status = run.main([str(path), *words])
            err = capsys.readouterr().err
            assert status in (0, 2) and "Traceback" not in err, (seed, words, err)
            assert status == 2 or accepted or words is not generate, (seed, words)
            assert status == 0 or len(err.splitlines()) == 1, (seed, words, err)
        used += accepted
    assert N_MUTANTS / 10 < used < N_MUTANTS * 0.9
