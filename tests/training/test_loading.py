"""Models that can be tuned: those that the exporter takes, with every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nano import train, write_chat
from safetensors.torch import load_file, save_file
from small_models import write_small_model

from qwen3c.training import TrainingError
from qwen3c.training.loading import load_model, model_fingerprint


@pytest.mark.parametrize(
    "shape", [{}, {"tied": False}, {"architecture": "qwen2", "head_dim": 16}, {"architecture": "qwen3_moe"}]
)
def test_every_family_of_the_exporter_loads(tmp_path: Path, shape: dict[str, Any]) -> None:
    model, tokenizer = load_model(write_small_model(tmp_path / "model", dtype="F32", **shape))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert (model.get_input_embeddings().weight == stored["model.embed_tokens.weight"]).all()  # type: ignore[union-attr]
    assert tokenizer.encode("a")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_model_with_a_tensor_missing_is_refused_by_its_name(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_small_model(tmp_path / "model", tied=False, dtype="F32")
    tensors = load_file(model / "model.safetensors")
    del tensors[name]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    chat = write_chat(tmp_path / "chat.jsonl")
    assert train("sft", chat, "--model", model, "-o", tmp_path / "out", "--quiet") == 2
    err = capsys.readouterr().err
    assert f"tensor {name}" in err and "is missing" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["sft", "pretrain", "grpo"])
def test_a_model_that_the_exporter_refuses_is_refused_at_the_start(
    tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = write_small_model(tmp_path / "model")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=512)).save_pretrained(model)
    chat = write_chat(tmp_path / "chat.jsonl")
    options = ["--reward", "nano:digits"] if stage == "grpo" else []
    assert train(stage, chat, "--model", model, "-o", tmp_path / "out", *options, "--quiet") == 2
    err = capsys.readouterr().err
    assert "architectures is ['GPT2LMHeadModel'], supported: Qwen3ForCausalLM" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_name_of_the_hub_is_answered_with_the_command_that_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match="`hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B` gets one"):
        load_model(Path("Qwen/Qwen3-0.6B"))


def test_a_model_is_known_by_the_contents_of_its_files(tmp_path: Path) -> None:
    one, same, other = (
        model_fingerprint(write_small_model(tmp_path / name, seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == same != other
    (tmp_path / "a" / "README.md").write_text("not of the model")
    assert model_fingerprint(tmp_path / "a") == one
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "rope_theta": 1}))
    assert model_fingerprint(tmp_path / "a") != one
