"""A LoRA adapter is merged as peft merges it, or refused in one line naming what cannot be.

python -m pytest tests/convert/test_lora.py
"""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_gguf import small_gguf, write_gguf
from small_models import encode_tensor, small_weights, write_json, write_safetensors, write_small_model

from qwen3c import Model
from qwen3c.cli.export import main
from qwen3c.convert.directory import Directory
from qwen3c.convert.export import export
from qwen3c.convert.huggingface import Checkpoint
from qwen3c.convert.lora import merge
from qwen3c.convert.source import SourceError, to_float32
from qwen3c.format import ModelFile

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
Arrays = dict[str, NDArray[np.float32]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_small_model(tmp_path / "source", dtype="F32")


def write_adapter(
    directory: Path, targets: list[str] = ATTENTION, r: int = 4, dtype: str = "F32", **keys: Any
) -> Path:
    """An adapter of every target of the small model, with coarse numbers, so that its merge is exact."""
    random, tensors = np.random.default_rng(7), {}
    for name, weights in small_weights(**keys.pop("shape", {})).items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in targets:
            for half, dims in (("A", (r, weights.shape[1])), ("B", (weights.shape[0], r))):
                values = random.integers(-8, 9, dims).astype(np.float32) / np.float32(64)
                tensors[f"base_model.model.{module}.lora_{half}.weight"] = encode_tensor(values, dtype)
    directory.mkdir()
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": targets, "bias": "none"}
    write_json(directory / "adapter_config.json", config | keys)
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    return directory


def merged(source: Path, adapter: Path) -> Arrays:
    """Every weight the exporter would see, by name."""
    with Directory(source) as files, Directory(adapter) as adapter_files:
        checkpoint = Checkpoint(files)
        merge(checkpoint, adapter_files)
        weights = {}
        for name, tensor in checkpoint.tensors.items():
            data = memoryview(bytearray(tensor.size))
            tensor.read(0, data)
            weights[name] = to_float32(data, tensor.dtype).reshape(tensor.shape)
        return weights


# ----------------------------------------------------------------------------
# The formula


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_merge_is_the_formula_exactly(tmp_path: Path, source: Path, dtype: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", LINEAR, dtype=dtype)
    found, base = merged(source, adapter), small_weights()
    with Directory(adapter) as files:
        from qwen3c.convert.directory import open_safetensors

        halves = {}
        for name, tensor in open_safetensors(files, "adapter_model.safetensors").items():
            data = memoryview(bytearray(tensor.size))
            tensor.read(0, data)
            halves[name] = to_float32(data, dtype).reshape(tensor.shape)
    for name, weights in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if name.split(".")[-2] in LINEAR:
            weights = weights + 2 * (halves[prefix + "B.weight"] @ halves[prefix + "A.weight"])
            assert not (weights == base[name]).all()
        assert (found[name] == weights).all(), name


@pytest.mark.parametrize("slice_weights", [1, 3000, 1 << 20])
def test_export_merges_whatever_the_size_of_the_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, slice_weights: int
) -> None:
    """The file is the one that a directory of merged weights gives."""
    adapter = write_adapter(tmp_path / "adapter", [*LINEAR])
    tensors = {name: encode_tensor(w, "F32") for name, w in merged(source, adapter).items()}
    other = shutil.copytree(source, tmp_path / "merged")
    write_safetensors(other / "model.safetensors", tensors)
    monkeypatch.setattr("qwen3c.convert.quantise.SLICE_WEIGHTS", slice_weights)
    export(source, tmp_path / "adapted.bin", lora=adapter)
    export(other, tmp_path / "merged.bin")
    adapted, expected = ModelFile(tmp_path / "adapted.bin"), ModelFile(tmp_path / "merged.bin")
    assert adapted.checksums == expected.checksums
    assert adapted.metadata["source"]["lora"]["lora_alpha"] == 8
    assert "lora" not in expected.metadata["source"]


def test_gguf_may_be_the_base(tmp_path: Path, source: Path) -> None:
    """Merged matrices of a Q8_0 file are quantised anew; the others keep their codes."""
    adapter = write_adapter(tmp_path / "adapter")
    for dtype in ("F32", "Q8_0"):
        write_gguf(tmp_path / f"{dtype}.gguf", *small_gguf(dtype))
        export(tmp_path / f"{dtype}.gguf", tmp_path / f"{dtype}.bin", group_size=32, lora=adapter)
    export(source, tmp_path / "expected.bin", group_size=32, lora=adapter)
    export(tmp_path / "Q8_0.gguf", tmp_path / "plain.bin")
    assert ModelFile(tmp_path / "F32.bin").checksums == ModelFile(tmp_path / "expected.bin").checksums
    adapted, plain, right = (Model(tmp_path / f"{name}.bin") for name in ("Q8_0", "plain", "expected"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert (adapted.weight(name) == plain.weight(name)).all()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.abs(adapted.weight(name) - right.weight(name)).max() < 0.02 < np.abs(plain.weight(name)).max()


def test_memory_does_not_grow_with_the_rank_or_the_model(tmp_path: Path) -> None:
    """No matrix, and neither half of an adapter, is ever held whole."""
    shape = {"dim": 512, "hidden_dim": 4096, "n_layers": 1, "dtype": "F32"}
    source = write_small_model(tmp_path / "source", **shape)
    adapter = write_adapter(tmp_path / "adapter", ["gate_proj", "up_proj"], r=128, shape=shape)
    tracemalloc.start()
    with Directory(source) as files, Directory(adapter) as adapter_files:
        checkpoint = Checkpoint(files)
        before = tracemalloc.get_traced_memory()[0]
        merge(checkpoint, adapter_files)
        tensor = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
        tracemalloc.reset_peak()
        tensor.read(4 * 512 * 1024, memoryview(bytearray(4 * 512 * 64)))
        peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 3e6 < tensor.size / 2


# ----------------------------------------------------------------------------
# peft


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ATTENTION},
        {"target_modules": LINEAR, "r": 3, "lora_alpha": 7, "use_rslora": True},
        {"target_modules": "all-linear", "fan_in_fan_out": True},
        {"target_modules": r".*\.1\..*(q_proj|down_proj)"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": LINEAR, "exclude_modules": ["model.layers.0.mlp.up_proj"]},
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, r"^model.layers.0.*down_proj": 5},
            "alpha_pattern": {
                "k_proj": 3,
                r"layers.1.self_attn.q_proj": 11.5,
                r"layers\.\d+\.mlp\.up_proj": 1,
            },
        },
        {"target_modules": ["lm_head", "v_proj"]},
    ],
)
def test_merge_is_that_of_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    source = write_small_model(tmp_path / "source", dtype="F32", tied=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, **options}, init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = {name: w.detach().numpy().copy() for name, w in model.merge_and_unload().state_dict().items()}
    keys = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    write_json(tmp_path / "adapter" / "adapter_config.json", keys | {"init_lora_weights": True})
    found, plain = merged(source, tmp_path / "adapter"), small_weights(tied=False)
    assert found.keys() == expected.keys()
    changed = {name for name in plain if not (plain[name] == expected[name]).all()}
    assert changed == {name for name in plain if not (plain[name] == found[name]).all()} != set()
    for name, weights in expected.items():
        np.testing.assert_allclose(found[name], weights, rtol=1e-6, atol=1e-6 * np.abs(weights).max())


def test_exact_merge_of_peft_gives_the_same_file(tmp_path: Path, source: Path) -> None:
    """With exactly representable products and sums, merging at export equals merging before it."""
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    adapter = write_adapter(tmp_path / "adapter", LINEAR, task_type="CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    tensors = {
        name: encode_tensor(w.detach().numpy(), "F32")
        for name, w in model.state_dict().items()
        if name != "lm_head.weight"
    }
    other = shutil.copytree(source, tmp_path / "merged")
    write_safetensors(other / "model.safetensors", tensors)
    export(source, tmp_path / "adapted.bin", lora=adapter)
    export(other, tmp_path / "merged.bin")
    assert ModelFile(tmp_path / "adapted.bin").checksums == ModelFile(tmp_path / "merged.bin").checksums


# ----------------------------------------------------------------------------
# Experts

MOE = {"architecture": "qwen3_moe", "tied": False}


@pytest.mark.parametrize("fused", [False, True])
def test_adapter_of_experts_is_merged_as_peft_merges_it(tmp_path: Path, fused: bool) -> None:
    """An adapter of experts that are modules fits a base with fused or separate experts."""
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    source = write_small_model(tmp_path / "source", dtype="F32", fused_experts=fused, **MOE)
    adapter = write_adapter(tmp_path / "adapter", LINEAR, task_type="CAUSAL_LM", shape=MOE)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    changed = compare_with_peft(merged(source, adapter), model)
    assert changed == {name for name in small_weights(**MOE) if name.split(".")[-2] in LINEAR}


FUSED_TARGETS: list[tuple[dict[str, Any], list[str]]] = [
    ({"target_parameters": ["mlp.experts.down_proj"]}, ["down_proj"]),
    ({"target_parameters": ["experts.gate_up_proj"], "use_rslora": True, "r": 3}, ["gate_proj", "up_proj"]),
    (
        {"target_parameters": ["down_proj", "gate_up_proj"], "target_modules": ["q_proj"]},
        ["gate_proj", "up_proj", "down_proj", "q_proj"],
    ),
    ({"target_parameters": ["gate.weight", "v_proj.weight", "gate_up_proj"],
      "alpha_pattern": {"gate.weight": 3}},
     ["gate", "v_proj", "gate_proj", "up_proj"]),
    ({"target_parameters": ["model.layers.1.mlp.experts.down_proj"]}, ["down_proj"]),
    ({"target_modules": "all-linear"}, [*LINEAR, "gate"]),  # peft adapts parameters, ranks by pattern
]  # fmt: skip


@pytest.mark.parametrize(("options", "targets"), FUSED_TARGETS)
def test_adapter_of_fused_experts_is_merged_as_peft_merges_it(
    tmp_path: Path, options: dict[str, Any], targets: list[str]
) -> None:
    """An adapter of experts that are one parameter per layer."""
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    source = write_small_model(tmp_path / "source", dtype="F32", **MOE)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **options}, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    for name, weights in model.named_parameters():
        if "lora_" in name:
            weights.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    set_keys(init_lora_weights=True)(tmp_path / "adapter")
    changed = compare_with_peft(merged(source, tmp_path / "adapter"), model.merge_and_unload())
    layers = ("model.layers.1.",) if "model.layers.1" in str(options) else ("model.layers.", "lm_head")
    names = {name for name in small_weights(**MOE) if name.startswith(layers)}
    assert changed == {name for name in names if name.split(".")[-2] in targets}


def compare_with_peft(found: Arrays, model: Any) -> set[str]:
    """Compare every weight with the merged `model`; returns the names of changed weights."""
    expected = {name: w.detach().numpy() for name, w in model.state_dict().items()}
    plain = small_weights(**MOE)
    assert found.keys() == plain.keys()
    for name, weights in found.items():
        before, experts, after = name.partition(".experts.")
        right = expected.get(name)
        if experts:
            expert, kind, _ = after.split(".")
            if kind == "down_proj":
                right = expected[f"{before}{experts}down_proj"][int(expert)]
            else:
                halves = np.split(expected[f"{before}{experts}gate_up_proj"][int(expert)], 2)
                right = halves[kind == "up_proj"]
        assert right is not None
        np.testing.assert_allclose(weights, right, rtol=1e-6, atol=1e-6 * np.abs(right).max(), err_msg=name)
    return {name for name, weights in plain.items() if not (weights == found[name]).all()}


def test_names_of_dense_modules_pass_fused_experts_by(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "source", dtype="F32", **MOE)
    adapter = write_adapter(tmp_path / "adapter", shape=MOE)
    set_keys(target_modules=LINEAR)(adapter)
    found, plain = merged(source, adapter), small_weights(**MOE)
    changed = {name for name in plain if not (found[name] == plain[name]).all()}
    assert changed == {name for name in plain if name.split(".")[-2] in ATTENTION}


def test_adapter_with_some_of_the_experts_is_refused(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "source", dtype="F32", **MOE)
    adapter = write_adapter(tmp_path / "adapter", LINEAR, shape=MOE)
    expert = "model.layers.1.mlp.experts.3.up_proj"
    set_tensors(lambda t: [t.pop(f"base_model.model.{expert}.lora_{half}.weight") for half in "AB"])(adapter)
    with pytest.raises(SourceError, match=f"has no tensors for {expert}, which target_modules names"):
        merged(source, adapter)


def write_fused_adapter(directory: Path, **keys: Any) -> Path:
    """An adapter of rank 4 for down_proj of all experts of layers 0 and 1."""
    tensors = {
        f"base_model.model.model.layers.{layer}.mlp.experts.lora_{half}.weight": encode_tensor(
            np.zeros((24, 64), np.float32) if half == "A" else np.zeros((64, 24), np.float32), "F32"
        )
        for layer in range(2)
        for half in "AB"
    }
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": None}
    write_json(directory / "adapter_config.json", config | {"target_parameters": ["down_proj"]} | keys)
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    return directory


@pytest.mark.parametrize(
    ("keys", "shape", "reason"),
    [
        ({"target_parameters": "down_proj"}, MOE,
         "target_parameters is 'down_proj', expected a list of names"),
        ({"target_parameters": None}, MOE, "target_modules is None, expected a list of names"),
        ({"target_parameters": ["gate_up_proj"]}, MOE,
         "lora_B.weight has shape [64, 24], expected [128, 24]"),
        ({"target_parameters": ["down_proj", "gate_up_proj"]}, MOE,
         "no tensors for model.layers.0.mlp.experts.gate_up_proj"),
        ({}, MOE | {"n_layers": 3},
         "no tensors for model.layers.2.mlp.experts.down_proj, which target_parameters names"),
        ({}, MOE | {"n_experts": 8},
         "lora_A.weight has shape [24, 64], expected [32, 64]: made for another base"),
        ({}, {}, "'model.layers.0.mlp.experts' is not a linear layer of the base model"),
    ],
)  # fmt: skip
def test_adapter_of_other_fused_experts_is_refused(
    tmp_path: Path, keys: dict[str, Any], shape: dict[str, Any], reason: str
) -> None:
    source = write_small_model(tmp_path / "source", **shape)
    merged(write_small_model(tmp_path / "right", **MOE), write_fused_adapter(tmp_path / "plain"))
    with pytest.raises(SourceError) as caught:
        merged(source, write_fused_adapter(tmp_path / "adapter", **keys))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------
# Refused


def set_keys(**keys: Any) -> Callable[[Path], object]:
    path = "adapter_config.json"
    return lambda d: write_json(d / path, json.loads((d / path).read_text()) | keys)


def drop_key(key: str) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        keys = json.loads((directory / "adapter_config.json").read_text())
        del keys[key]
        write_json(directory / "adapter_config.json", keys)

    return damage


def set_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the tensors of the file: name -> (dtype, shape, bytes)."""

    def damage(directory: Path) -> None:
        path, tensors = directory / "adapter_model.safetensors", {}
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                first, last = (8 + size + offset for offset in entry["data_offsets"])
                tensors[name] = (entry["dtype"], tuple(entry["shape"]), data[first:last])
        change(tensors)
        write_safetensors(path, tensors)

    return damage


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
F32_4x64 = ("F32", (4, 64), bytes(1024))

FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: No such file"),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"),
                "adapter_config.json: is not valid JSON"),
    "other method": (set_keys(peft_type="IA3"), "peft_type is 'IA3', supported: 'LORA'"),
    "no method": (drop_key("peft_type"), "required key 'peft_type' is missing"),
    "no rank": (drop_key("r"), "required key 'r' is missing"),
    "rank of zero": (set_keys(r=0), "r is 0, at least 1 is needed"),
    "rank is text": (set_keys(r="4"), "r is '4', expected an integer"),
    "no alpha": (drop_key("lora_alpha"), "required key 'lora_alpha' is missing"),
    "no targets": (drop_key("target_modules"), "required key 'target_modules' is missing"),
    "targets are numbers": (set_keys(target_modules=[1]), "target_modules is [1], expected a list of names"),
    "layers are text": (set_keys(layers_to_transform="1"), "layers_to_transform is '1', expected a list"),
    "DoRA": (set_keys(use_dora=True), "use_dora is True, which is not supported"),
    "modules to save": (set_keys(modules_to_save=["lm_head"]), "modules_to_save is"),
    "bias": (set_keys(bias="all"), "bias is 'all', supported: 'none'"),
    "bias of the adapter": (set_keys(lora_bias=True), "lora_bias is True, which is not supported"),
    "parameters": (set_keys(target_parameters=["norm.weight"], target_modules=None),
                   "does not name model.layers.0.self_attn"),
    "replicated layers": (set_keys(layer_replication=[[0, 2]]), "layer_replication is"),
    "key of the future": (set_keys(use_sorcery={"on": True}), "use_sorcery is"),
    "PiSSA": (set_keys(init_lora_weights="pissa_niter_4"),
              "'pissa_niter_4', which changes the base weights too"),
    "rslora is text": (set_keys(use_rslora="yes"), "use_rslora is 'yes', expected true or false"),
    "endless pattern": (set_keys(alpha_pattern={"(.*)*x": 2}), "pattern '(.*)*x' is not supported"),
    "broken pattern": (set_keys(alpha_pattern={"**": 2}), "pattern '**'"),
    "patterns are a list": (set_keys(alpha_pattern=[1]), "alpha_pattern is [1], expected an object"),
    "alpha is text": (set_keys(alpha_pattern={"q_proj": "x"}), "is 'x', expected a finite number"),
    "other rank": (set_keys(r=8), "lora_A.weight has shape [4, 64], expected [8, 64]: made for another base"),
    "no tensors": (lambda d: (d / "adapter_model.safetensors").unlink(), "safetensors: no such file"),
    "pickle": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        "no such file (adapter_model.bin is never opened: only safetensors are read)",
    ),
    "empty": (set_tensors(dict.clear), "has no tensors"),
    "short": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x10" + bytes(20)),
        "header of 16 bytes in a file of 21",
    ),
    "half": (set_tensors(lambda t: t.pop(Q_PROJ + "B.weight")), "q_proj' has no tensor lora_B.weight"),
    "layer": (
        set_tensors(lambda t: (t.pop(Q_PROJ + "A.weight"), t.pop(Q_PROJ + "B.weight"))),
        "has no tensors for model.layers.0.self_attn.q_proj, which target_modules names",
    ),
    "target not named": (set_keys(target_modules=["q_proj", "k_proj", "v_proj"]),
                         "does not name model.layers.0.self_attn.o_proj"),
    "layer not named": (set_keys(layers_to_transform=[0]), "does not name model.layers.1."),
    "magnitude": (
        set_tensors(lambda t: t.update({Q_PROJ + "magnitude_vector": F32_4x64})),
        "q_proj.lora_magnitude_vector': DoRA is not supported",
    ),
    "base layer": (
        set_tensors(lambda t: t.update({"base_model.model.lm_head.base_layer.weight": F32_4x64})),
        "unexpected tensor 'base_model.model.lm_head.base_layer.weight' of the base: save the adapter with",
    ),
    "foreign tensor": (set_tensors(lambda t: t.update(x=F32_4x64)), "unexpected tensor 'x'"),
    "embedding": (
        set_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": F32_4x64})),
        "unexpected tensor 'base_model.model.model.embed_tokens.lora_embedding_A'",
    ),
    "norm": (
        set_tensors(
            lambda t: t.update({f"base_model.model.model.norm.lora_{x}.weight": F32_4x64 for x in "AB"})
        ),
        "does not name model.norm",
    ),
    "no module": (
        set_tensors(lambda t: t.update({f"base_model.model.visual.lora_{x}.weight": F32_4x64 for x in "AB"})),
        "'visual' is not a linear layer of the base model",
    ),
    "tied head": (
        set_tensors(
            lambda t: t.update({f"base_model.model.lm_head.lora_{x}.weight": F32_4x64 for x in "AB"})
        ),
        "adapts lm_head, which in this base is the embedding as well",
    ),
    "vector": (
        set_tensors(lambda t: t.update({Q_PROJ + "A.weight": ("F32", (256,), bytes(1024))})),
        "q_proj.lora_A.weight' has shape [256], expected a matrix",
    ),
    "integers": (
        set_tensors(lambda t: t.update({Q_PROJ + "A.weight": ("I32", (4, 64), bytes(1024))})),
        "q_proj.lora_A.weight is I32",
    ),
    "not finite": (
        set_tensors(lambda t: t.update({Q_PROJ + "A.weight": ("F32", (4, 64), b"\xff" * 1024)})),
        "self_attn.q_proj.weight + LoRA[0, 0] is nan; only finite weights",
    ),
    "too large": (set_keys(lora_alpha=1e300), "+ LoRA[0, 0] is "),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_in_one_line(tmp_path: Path, source: Path, fault: str) -> None:
    damage, reason = FAULTS[fault]
    adapter = write_adapter(tmp_path / "adapter")
    damage(adapter)
    with pytest.raises(SourceError) as caught:
        export(source, tmp_path / "model.bin", lora=adapter)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "model.bin").exists()


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"n_layers": 3}, "has no tensors for model.layers.2.self_attn.q_proj"),
        ({"n_layers": 1}, "'model.layers.1.self_attn.q_proj' is not a linear layer of the base model"),
        ({"dim": 128}, "lora_A.weight has shape [4, 64], expected [4, 128]: made for another base model?"),
        ({"n_heads": 8}, "lora_B.weight has shape [128, 4], expected [256, 4]: made for another base model?"),
    ],
)
def test_other_base_is_noticed(tmp_path: Path, shape: dict[str, Any], reason: str) -> None:
    source = write_small_model(tmp_path / "other", **shape)
    with pytest.raises(SourceError) as caught:
        export(source, tmp_path / "model.bin", lora=write_adapter(tmp_path / "adapter"))
    assert reason in str(caught.value)


def test_scale_is_that_of_plain_or_rank_stabilised_lora(tmp_path: Path, source: Path) -> None:
    plain = merged(source, write_adapter(tmp_path / "plain"))
    stable = merged(source, write_adapter(tmp_path / "stable", use_rslora=True))
    name = "model.layers.1.self_attn.v_proj.weight"
    base = small_weights()[name]
    np.testing.assert_allclose(stable[name] - base, (plain[name] - base) * math.sqrt(4), rtol=1e-5, atol=1e-6)


def test_script_takes_an_adapter_and_refuses_in_one_line(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, target = write_adapter(tmp_path / "adapter"), tmp_path / "model.bin"
    assert main([str(source), str(target), "--lora", str(adapter), "--quiet"]) == 0
    assert ModelFile(target).metadata["source"]["lora"]["r"] == 4
    assert main([str(source), str(target), "--lora", str(tmp_path / "none"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.endswith(
        "none: no such directory; expected one with adapter_config.json and *.safetensors\n"
    )
    assert main([str(source), str(adapter / "adapter_model.safetensors"), "--lora", str(adapter)]) == 2
    assert "is a file of the model that is read" in capsys.readouterr().err
