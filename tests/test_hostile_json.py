"""Whatever a key of a source's JSON files holds, the export ends in a model or in one short line about it.

python -m pytest tests/test_hostile_json.py
QWEN3C_CASES=100000 python -m pytest tests/test_hostile_json.py  # every case there is
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_models import config_json, write_json, write_small_model
from test_lora import write_adapter

from qwen3c.cli.export import main

N_CASES = int(os.environ.get("QWEN3C_CASES", 400))
LONGEST = 300  # characters of a message
REMOVED = object()


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**64, 10**30, 10**400, -(10**4000), 0.0, -0.5, 1e-300, 1e300,
    float("inf"),
    float("nan"), "", "x", "x" * 100_000, "\x1b[2J\x07\r\n", "\ud800", "\0", "\u202e☃", [], [None], [[]],
    ["x"] * 1000,
    [10**400], {}, {"": None}, {"name": "default"}, [{"name": "default"}],
    [{"name": "default", "template": 3}],
    {"content": 5}, {"\ud800": 1}, {"x" * 5000: "y" * 5000}, nested(90), nested(500), REMOVED,
]  # fmt: skip

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0}
YARN |= {"beta_slow": 1.0, "truncate": True, "attention_factor": None, "mscale": 1.0, "mscale_all_dim": 0.5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MOE = {"architecture": "qwen3_moe", "n_layers": 1, "n_experts": 2}
CONFIGS: list[dict[str, Any]] = [
    {"n_layers": 1},
    {"n_layers": 1, "rope": YARN},
    {"n_layers": 1, "rope": LLAMA3, "dialect": 5},
    MOE,
]
MORE_KEYS = {
    "config.json": ["_name_or_path", "quantization_config", "partial_rotary_factor", "layer_types",
                    "mlp_bias",
                    "rope_parameters", "num_local_experts", "shared_expert_intermediate_size", "note"],
    "generation_config.json": ["min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"],
    "tokenizer_config.json": ["add_bos_token", "pad_token", "unk_token", "note"],
    "model.safetensors.index.json": ["weight_map", "metadata", "note"],
    "adapter_config.json": ["use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules",
                            "layers_to_transform",
                            "target_parameters", "init_lora_weights", "use_dora", "note"],
}  # fmt: skip


def places(name: str, values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The keys of a file, of objects in it too."""
    yield from ((key,) for key in {**values, **dict.fromkeys(MORE_KEYS[name])})
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((key, inner) for inner in value)


def sources(directory: Path) -> Iterator[tuple[Path, list[str]]]:
    """Sound sources, each with the arguments that export it."""
    for i, shape in enumerate(CONFIGS):
        source = write_small_model(directory / f"source{i}", **shape, shards=2 if i == 0 else 1)
        yield source, [f"source{i}", "out.bin", "--quiet"]
    shape = {"n_layers": 1}
    adapter = write_adapter(directory / "adapter", ["q_proj"], shape=shape)
    yield adapter, ["source0", "out.bin", "--quiet", "--lora", "adapter"]


def cases(directory: Path) -> list[tuple[Path, tuple[str, ...], Any, list[str]]]:
    found = []
    for source, arguments in sources(directory):
        for name in MORE_KEYS:
            if (source / name).exists():
                values = json.loads((source / name).read_text())
                for place in places(name, values):
                    found += [(source / name, place, value, arguments) for value in VALUES]
    random.Random(0).shuffle(found)
    return found


def with_value(values: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    if value is REMOVED:
        inner.pop(place[-1], None)
    else:
        inner[place[-1]] = value
    return changed


def test_any_value_of_any_key_ends_in_a_model_or_in_one_short_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = exported = 0
    for path, place, value, arguments in cases(tmp_path)[:N_CASES]:
        sound = path.read_text()
        write_json(path, with_value(json.loads(sound), place, value))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            status = main(arguments)
        path.write_text(sound)
        out, error = capfd.readouterr()
        case = f"{path.name}: {'.'.join(place)[:80]} = {repr(value)[:80]}: {error[:1000]!r}"
        assert out == "" and status in (0, 2), case
        assert error.count("\n") == (status == 2) and len(error) <= LONGEST, case
        assert all(c.isprintable() for c in error.rstrip("\n")), case
        refused += status == 2
        exported += status == 0
    assert min(refused, exported) > (refused + exported) // 10
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("config.json", "note", "\ud800", "config.json: note is not Unicode: surrogates not allowed"),
        ("config.json", "note", {"a": ["\ud800"]}, "config.json: note.a.0 is not Unicode"),
        ("config.json", "note", {"\udfff": 1}, "is not Unicode: surrogates not allowed"),
        ("config.json", "note", nested(500), "is nested deeper than 100"),
        ("config.json", "hidden_size", 10**400, "hidden_size is 100000000"),
        ("config.json", "_name_or_path", "\ud800", "config.json: _name_or_path is not Unicode"),
        ("tokenizer_config.json", "chat_template", [{"name": "default"}],
         "chat_template is not text, nor a list"),
        ("tokenizer_config.json", "chat_template", [{"name": "default", "template": 1}],
         "chat_template is not"),
        ("generation_config.json", "temperature", 10**400, "temperature is 100000000"),
    ],
    ids=range(9),
)  # fmt: skip
def test_the_line_names_the_file_and_the_key(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, place: str, value: Any, said: str
) -> None:
    source = write_small_model(tmp_path / "source")
    write_json(source / name, json.loads((source / name).read_text()) | {place: value})
    assert main([str(source), str(tmp_path / "model.bin")]) == 2
    error = capfd.readouterr().err
    assert said in error and error.startswith(f"export.py: error: {source / name}: ")
    assert len(error) <= LONGEST + len(str(source))


def test_a_number_too_large_for_a_float_is_refused_by_key(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_small_model(tmp_path / "source")
    write_json(source / "config.json", config_json() | {"note": {"x": 7}})
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"x": 7', '"x": 1e999'))
    assert main([str(source), str(tmp_path / "model.bin")]) == 2
    assert "config.json: note.x is not a finite number" in capfd.readouterr().err


def test_names_with_escape_sequences_reach_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_small_model(tmp_path / "source")
    write_json(source / "config.json", config_json() | {"_name_or_path": "a/\x1b[2Jmodel"})
    assert main([str(source), str(tmp_path / "model.bin")]) == 0
    error = capfd.readouterr().err
    assert "\x1b" not in error and "\\u001b[2Jmodel" in error


def test_a_sound_copy_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources that the cases change are sound; otherwise all could be refused for another reason."""
    monkeypatch.chdir(tmp_path)
    for _, arguments in sources(tmp_path):
        assert main(arguments) == 0
    shutil.rmtree(tmp_path / "source0")
    assert main(["source0", "out.bin"]) == 2
