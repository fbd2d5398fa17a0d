"""Model.trace, held against transformers layer by layer, and what qwen3c/trace.py says of it.

Each traced activation is compared with what a hook on the module of the same name sees in transformers' float32
model of the same dequantised weights, so a layer that computes something else is named.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_models import export_small_model, small_weights

from qwen3c import Model, engine, trace

# A rearranged float32 sum gives up to 4e-12 on these shapes (measured)
NMSE_BOUND = 1e-10

Arrays = dict[str, NDArray[np.float32]]


def random_shape(seed: int) -> dict[str, Any]:
    """Another small Qwen3 for every seed."""
    random = np.random.default_rng(seed)
    n_kv_heads = int(random.integers(1, 4))
    return {
        "dim": 32 * int(random.integers(2, 6)),
        "hidden_dim": 32 * int(random.integers(2, 8)),
        "n_layers": int(random.integers(2, 5)),
        "n_heads": n_kv_heads * int(random.integers(1, 5)),
        "n_kv_heads": n_kv_heads,
        "head_dim": 32 * int(random.integers(1, 4)),
        "tied": bool(random.integers(2)),
        "vocab_size": int(random.integers(400, 600)),
        "rope_theta": float(random.choice([1e4, 1e6, 5e6])),
        "context": 1024,
        "group_size": 32,
        "seed": seed,
    }


def random_ids(model: engine.Model, n: int) -> NDArray[np.int64]:
    return np.random.default_rng(n).integers(0, model.config.vocab_size, n)


def exact_model(path: Path, **options: Any) -> engine.Model:
    return engine.Model(str(path), kv="f32", activations="float32", **options)


# ----------------------------------------------------------------------------
# Against transformers


def hooked_activations(hf: Any, ids: NDArray[np.int64]) -> Arrays:
    """What every module of `hf` returns for `ids`, under its name; inputs of two of them; attention weights."""
    import torch

    seen: Arrays = {}

    def keep(name: str, value: Any) -> None:
        seen[name] = value.detach()[0].numpy()

    def on_output(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if name.endswith("self_attn"):
                keep(f"{name}.attn_weights", output[1])
            else:
                keep(name, output[0] if isinstance(output, tuple) else output)

        return hook

    for name, module in hf.named_modules():
        if name.startswith(("model.", "lm_head")) and "rotary" not in name and name != "model.layers":
            module.register_forward_hook(on_output(name))
        if name.endswith((".o_proj", ".down_proj")):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: keep(f"{name}.input", inputs[0])
            )
    with torch.no_grad():
        hf(torch.from_numpy(ids)[None], output_attentions=True)
    return seen


def oracle(model: engine.Model, source: Path) -> Any:
    pytest.importorskip("torch", reason="needs torch; `make oracles` installs it")
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers; `make oracles` installs it"
    )
    import test_oracle

    return test_oracle.oracle(model, transformers.AutoConfig.from_pretrained(source))


def nmse(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Squared error over squared size, in float64."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    difference = found.astype(np.float64) - expected
    return float(np.square(difference).sum() / np.square(expected.astype(np.float64)).sum())


@pytest.mark.parametrize(("seed", "length"), [(1, 40), (2, 300), (3, 520), (4, 77), (5, 17), (6, 260)])
def test_every_traced_activation_is_what_transformers_computes(seed: int, length: int, tmp_path: Path):
    path = export_small_model(tmp_path, **random_shape(seed))
    model = exact_model(path)
    ids = random_ids(model, length)
    expected = hooked_activations(oracle(model, tmp_path / "source"), ids)
    found = model.trace(ids)
    for name, array in found.items():
        assert nmse(array, expected[name]) <= NMSE_BOUND, name
    # what the engine does not keep: blocks that only pass on what is inside them, and SiLU, fused with the product
    left = {name for name in expected.keys() - found.keys() if not name.endswith((".mlp", ".act_fn"))}
    assert not left


def test_a_layer_that_computes_something_else_is_named(tmp_path: Path):
    path = export_small_model(tmp_path, n_layers=3)
    model = exact_model(path)
    ids = random_ids(model, 50)
    hf = oracle(model, tmp_path / "source")
    hf.model.layers[1].self_attn.k_norm.weight.data *= 1.001
    expected = hooked_activations(hf, ids)
    wrong = [name for name, array in model.trace(ids).items() if nmse(array, expected[name]) > NMSE_BOUND]
    assert wrong[0] == "model.layers.1.self_attn.k_norm"


# ----------------------------------------------------------------------------
# Invariants


def equal(a: Arrays, b: Arrays) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_a_trace_has_the_bits_of_the_forward_pass(activations: engine.Activations, tmp_path: Path):
    model = engine.Model(str(export_small_model(tmp_path, context=512)), activations=activations)
    ids = random_ids(model, 300)
    logits = model.session().forward(ids, logits="all")
    trace = model.trace(ids)
    assert np.array_equal(trace["lm_head"], logits)
    assert np.array_equal(model.session().forward(ids, logits="all"), logits)
    # a token sees nothing of those after it
    shorter = model.trace(ids[:100])
    assert all(
        np.array_equal(trace[name][:100], array) for name, array in shorter.items() if "attn" not in name
    )
    name = "model.layers.1.self_attn.attn_weights"
    assert np.array_equal(trace[name][:, :100, :100], shorter[name])


def test_threads_and_instruction_sets_trace_the_same_bits(tmp_path: Path):
    path = str(export_small_model(tmp_path, context=512, dim=256, hidden_dim=512, n_heads=6))
    ids = random_ids(engine.Model(path), 300)
    expected = engine.Model(path, threads=1).trace(ids)
    usual = engine.isa()
    try:
        for isa in engine.runnable_isas():
            engine.set_isa(isa)
            assert equal(engine.Model(path, threads=2).trace(ids), expected), isa
    finally:
        engine.set_isa(usual)


def test_attention_weights_are_probabilities_of_what_a_token_sees(tmp_path: Path):
    model = engine.Model(str(export_small_model(tmp_path, context=1024)))
    for name, weights in model.trace(random_ids(model, 600), "*.attn_weights").items():
        assert weights.shape == (4, 600, 600), name
        assert np.all(weights >= 0)
        assert np.allclose(weights.sum(-1), 1, atol=1e-5)
        assert not np.triu(weights, 1).any()


def test_the_logit_lens_after_the_last_layer_is_the_logits(tmp_path: Path):
    model = engine.Model(str(export_small_model(tmp_path, context=512)))
    trace = model.trace(random_ids(model, 300))
    assert np.array_equal(model.logit_lens(trace["model.layers.1"]), trace["lm_head"])
    assert not np.array_equal(model.logit_lens(trace["model.layers.0"]), trace["lm_head"])


def test_names_choose_what_is_kept(tmp_path: Path):
    model = engine.Model(str(export_small_model(tmp_path)))
    whole = model.trace([1, 2, 3])
    for names in (
        "model.layers.0.*",
        "*.k_proj",
        "lm_head",
        "*.down_proj.input",
        ["model.norm", "model.layers.1"],
    ):
        some = model.trace([1, 2, 3], names)
        assert some
        assert all(np.array_equal(array, whole[name]) for name, array in some.items())
    assert list(model.trace([1, 2], "*.k_proj")) == [
        f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1)
    ]


def test_what_cannot_be_traced_is_refused_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = engine.Model(str(export_small_model(tmp_path)))
    with pytest.raises(ValueError, match="no activation of this model is called 'layers.0'"):
        model.trace([1], "layers.0")
    with pytest.raises(ValueError, match="257 more ids from position 0 pass the context of 256"):
        model.trace([1] * 257)
    with pytest.raises(ValueError, match=r"token id 512 is outside 0\.\.511"):
        model.trace([512])
    with pytest.raises(ValueError, match=r"x must have shape \(n, 64\), n >= 1, got \(1, 65\)"):
        model.logit_lens(np.zeros((1, 65)))
    monkeypatch.setattr(engine, "available", lambda: 1000)
    with pytest.raises(ValueError, match=r"the trace of 4 tokens takes [\d,]+ bytes, 1,000 are available"):
        model.trace([1, 2, 3, 4])
    model.session().forward([1, 2, 3])


# ----------------------------------------------------------------------------
# What is said of it


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(str(export_small_model(tmp_path_factory.mktemp("small"), n_layers=3)))


def text_of(model: Model, prompt: str = "def f(x):", n: int = 3) -> trace.Text:
    return trace.continue_text(model, model.tokenizer.encode(prompt), n, temperature=0)


def test_the_flow_names_every_module_once_with_its_shapes(small: Model):
    text = text_of(small)
    n, shown = len(text.ids), list(trace.lines(small, text, "input_flow"))
    for name, array in small.trace(text.ids).items():
        if name.startswith(("model.layers.1", "model.layers.2")):
            continue
        module = name.removeprefix("model.layers.0").removeprefix(".") or "x"
        line = next(line for line in shown if line.split()[:1] == [module])
        assert re.search(rf"-> \({', '.join(map(str, array.shape))}\) ", line), name
    assert "model.layers.1 to model.layers.2: likewise" in shown
    assert any(re.search(rf"^model.embed_tokens +\({n}\) +-> \({n}, 64\)", line) for line in shown)
    assert any(re.search(rf"^  self_attn.o_proj +\({n}, 128\) +-> \({n}, 64\)", line) for line in shown)


def test_every_token_after_the_prompt_has_its_probability_and_the_alternatives(small: Model):
    text = text_of(small)
    assert len(text.ids) == text.n_prompt + 3
    expected = trace.alternatives(small, text, small.trace(text.ids)["lm_head"])
    events = list(small.generate(text.ids[: text.n_prompt], 3, temperature=0, logprobs=trace.ALTERNATIVES))
    for place, event in zip(expected[text.n_prompt - 1 :], events, strict=True):
        assert place.tokens == [id for id, _ in event.top_logprobs]
        assert np.allclose(place.probabilities, np.exp([p for _, p in event.top_logprobs]), rtol=1e-4)
        assert place.chance == pytest.approx(np.exp(event.logprob), rel=1e-4)
    shown = list(trace.lines(small, text, "compact"))
    chances = [float(re.search(r"([\d.]+)%   else ", line)[1]) for line in shown if "   else " in line]
    assert chances == [pytest.approx(100 * place.chance, abs=0.06) for place in expected[text.n_prompt - 1 :]]


def test_the_ranges_are_those_of_the_arrays(small: Model):
    text = text_of(small)
    told = trace.describe(small, text, "verbose")
    arrays, exact = small.trace(text.ids), trace.exact_trace(small, text.ids)
    assert [entry["name"] for entry in told["activations"]] == list(arrays)
    for entry in told["activations"]:
        array = arrays[entry["name"]].astype(np.float64)
        assert entry["shape"] == array.shape and entry["bytes"] == 4 * array.size
        figures = [entry["minimum"], entry["maximum"], entry["mean"], entry["std"], entry["rms"]]
        wanted = [array.min(), array.max(), array.mean(), array.std(), np.sqrt(np.mean(array**2))]
        assert np.allclose(figures, wanted, rtol=1e-4, atol=1e-6), entry["name"]
        off = array - exact[entry["name"]]
        assert entry["error"] == pytest.approx(np.sqrt(np.sum(off**2) / np.sum(array**2)), rel=0.05)
    errors = {entry["name"]: entry["error"] for entry in told["activations"]}
    assert errors["model.embed_tokens"] == 0 and 1e-4 < errors["lm_head"] < 0.1
    json.dumps(told)


def test_the_weights_have_their_statistics_and_rounding_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shape = {"dim": 128, "vocab_size": 501, "tied": False}
    model = engine.Model(str(export_small_model(tmp_path, **shape)))
    monkeypatch.setattr(trace, "SLICE_WEIGHTS", 5000)
    source = small_weights(**shape)
    tensors = {tensor.name: tensor for tensor in model.file.tensors}
    told = list(trace.weights(model.file))
    assert {weight.name for weight in told} == {name for name, tensor in tensors.items() if tensor.parts}
    for weight in told:
        parts = [part.name for part in tensors[weight.name].parts]
        stored = np.concatenate([model.weight(name) for name in parts]).astype(np.float64)
        s = weight.statistics
        assert np.allclose([s.minimum, s.maximum, s.mean, s.std], [stored.min(), stored.max(), stored.mean(), stored.std()],
                           rtol=1e-3, atol=1e-6)  # fmt: skip
        lost = np.sqrt(
            np.sum((stored - np.concatenate([source[name] for name in parts])) ** 2) / np.sum(stored**2)
        )
        assert weight.error == pytest.approx(lost, rel=0.1), weight.name


def test_what_cannot_be_seen_is_written_out(small: Model):
    assert [trace.token_text(small, id) for id in small.tokenizer.encode("漢")] == ["\\xe6", "\\xbc", "\\xa2"]
    assert trace.visible(" a\tb\n") == "·a⇥b↵"
    assert trace.visible("\x1b[31m\u202e\x00é漢") == "\\u{1b}[31m\\u{202e}\\u{0}é漢"
