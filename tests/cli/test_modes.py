"""The modes that look into a model: info, perplexity and trace say what the library says.

python -m pytest tests/cli/test_modes.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, TINY, in_process
from small_models import export_small_model

from qwen3c import Model
from qwen3c.format import ModelFile
from qwen3c.inspect import trace
from qwen3c.inspect.info import describe

pytestmark = pytest.mark.usefixtures("default_model")

# ----------------------------------------------------------------------------
# info and perplexity


def test_info_says_what_is_asked_first_then_every_tensor_and_the_header_on_80_columns(
    small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ModelFile(small)
    told = in_process(capsys, small, "-m", "info").out
    lines = told.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["name", "file", "size", "parameters", "context"]
    assert lines[1].endswith(f" {small}") and all(len(line) < 80 for line in [lines[0], *lines[2:]])
    sections = [line.split("  ")[0] for line in lines if line and not line.startswith(" ")]
    assert [s for s in sections if not s.startswith("available")] == [
        "metadata", "tensors", "header", "source", "config of the source",
    ]  # fmt: skip
    for name, value in file.fields().items():
        assert re.search(rf"^  {name} +{re.escape(str(value))}$", told, re.MULTILINE)
    for name, value in file.metadata["source"]["config"].items():
        shown = rf"{name}\.\w+ " if isinstance(value, dict) else rf"{name} "
        assert re.search(rf"^  {shown}", told, re.MULTILINE), name
    for tensor in file.tensors:
        layer = re.match(r"model\.layers\.(\d+)\.", tensor.name)
        if layer and int(layer[1]) > 0:
            continue
        name = tensor.name.removeprefix(layer[0]) if layer else tensor.name
        line = next(line for line in lines if line.split()[:1] == [name])
        assert line.endswith(f" {tensor.size:,}") and " x ".join(map(str, tensor.shape)) in line
    assert "  model.layers.1: likewise" in lines
    assert json.loads(in_process(capsys, small, "-m", "info", "--json").out) == json.loads(
        json.dumps(describe(file))
    )
    memory = describe(file)["memory"][-1]
    assert memory["context"] == 256
    assert (memory["kv_f16_bytes"], memory["kv_f32_bytes"]) == (256 * 2 * 2 * 64 * 2, 256 * 2 * 2 * 64 * 4)
    assert memory["resident_f32_bytes"] - memory["resident_f16_bytes"] == 256 * 2 * 2 * 64 * 2


def test_info_folds_the_experts_of_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(export_small_model(tmp_path, architecture="qwen3_moe"))
    told = in_process(capsys, path, "-m", "info").out
    tensors = ModelFile(path).tensors
    for kind, shape in (("gate_up", "6 x 128 x 64"), ("down", "6 x 64 x 64")):
        for layer in range(2):
            size = sum(t.size for t in tensors if re.search(rf"layers\.{layer}\..*\d\.{kind}_proj", t.name))
            name = rf"mlp\.experts\.\*\.{kind}_proj\.weight"
            assert re.search(rf"^ +{name} +int8 g64 +{shape} +{size:,}$", told, re.MULTILINE)
    assert told.count(".experts.") == 2 and "model.layers.1: likewise" in told


def test_verify_names_every_damaged_tensor(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ModelFile(small)
    sound = in_process(capsys, small, "--verify")
    assert sound.status == 0 and f"all {len(file.tensors)} tensors match" in sound.err
    data = bytearray(Path(small).read_bytes())
    hit = [file.tensors[i] for i in (0, 3, len(file.tensors) - 1)]
    for tensor in hit:
        data[file.tensors_offset + tensor.offset + tensor.size // 2] ^= 1
    (tmp_path / "bad.bin").write_bytes(data)
    done = in_process(capsys, str(tmp_path / "bad.bin"), "-m", "info", "--verify")
    assert done.status == 2
    damaged = [re.search(r"tensor (\S+) is damaged", line) for line in done.err.splitlines()]
    assert [match and match[1] for match in damaged] == [tensor.name for tensor in hit]
    told = json.loads(in_process(capsys, str(tmp_path / "bad.bin"), "--verify", "--json").out)
    assert told["damaged"] == [t.name for t in hit]


def test_perplexity_is_that_of_the_logits(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "qwen3c" / "cli" / "options.py").read_text()[:3000]
    (tmp_path / "text").write_text(text)
    done = in_process(capsys, "-m", "perplexity", str(tmp_path / "text"), "-c", "300", "--json")
    ids, nats, n = model.tokenizer.encode(text), 0.0, 0
    for start in range(0, len(ids), 300):
        part = ids[start : start + 300]
        x = model.session().forward(part, logits="all")[:, : model.config.n_tokens].astype(np.float64)
        p = np.exp(x - x.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        nats -= np.log(p[np.arange(len(part) - 1), part[1:]]).sum()
        n += len(part) - 1
    told = json.loads(done.out)
    assert told["tokens"] == n and told["window"] == 300
    assert told["perplexity"] == pytest.approx(math.exp(nats / n), rel=1e-5)
    told_people = in_process(capsys, TINY, str(tmp_path / "text"), "-m", "perplexity", "-c", "300").out
    assert (
        told_people.startswith(f"perplexity {told['perplexity']:.4f} (") and f"over {n} tokens" in told_people
    )


# ----------------------------------------------------------------------------
# trace


def test_trace_says_at_each_level_what_the_library_says(
    small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(small, threads=1)
    text = trace.continue_text(model, model.tokenizer.encode("hi there"), 2, temperature=0)
    options = [small, "-m", "trace", "-i", "hi there", "-n", "2", "-t", "0"]
    for level in trace.LEVELS:
        told = in_process(capsys, *options, "--level", level)
        shown = list(trace.lines(model, text, level))
        assert (
            told.status == 0 and told.out.splitlines()[:-1] == shown[:-1]
        )  # the last line may be the free memory
        found = json.loads(in_process(capsys, *options, "--level", level, "--json").out)
        found.pop("memory", None)
        expected = json.loads(json.dumps(trace.describe(model, text, level)))
        expected.pop("memory", None)
        assert found | {"seed": 0} == expected | {"seed": 0}
    assert in_process(capsys, *options).out == in_process(capsys, *options, "--level", "input_flow").out


def test_trace_takes_a_message_where_asked_for(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(small, threads=1)
    prompt = model.chat_prompt([{"role": "user", "content": "hi"}], False)
    told = json.loads(in_process(capsys, small, "-m", "trace", "-i", "hi", "-r", "0", "--json").out)
    assert [token["token"] for token in told["tokens"]] == prompt and told["prompt_tokens"] == len(prompt)


def test_trace_writes_a_page(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "trace.html"
    done = in_process(capsys, small, "-m", "trace", "-i", "hi", "-n", "2", "-s", "7", "--html", str(page))
    assert (done.status, done.out) == (0, "")
    assert "temperature" in done.err and re.search(rf"{page}: \d tokens, seed 7, 0.0 MB; open it", done.err)
    assert page.read_text().startswith("<!doctype html>")
    for arguments, reason in [
        (["-m", "trace", "-i", "hi", "--html", small], "is not a trace; nothing but a trace is written over"),
        (["-m", "trace", "-i", "hi", "--html", str(tmp_path / "no" / "x.html")], "there is no directory"),
        (["-m", "trace", "-i", "", "--html", str(page)], "prompt is empty"),
        (["-m", "trace", "-i", "hi " * 300], "the context holds 256"),
        (["-m", "generate", "-i", "hi", "--html", "x"], "--html belongs to -m trace, not to -m generate"),
        (["-m", "trace", "-i", "hi", "--level", "all"], "invalid choice"),
    ]:
        done = in_process(capsys, small, *arguments)
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1) and reason in done.err, done.err
    assert Model(small, threads=1).config.context == 256
