"""Texts as vectors and documents by score, against transformers doing what the model cards show.

python -m pytest tests/drivers/test_retrieval.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from small_models import DEFAULTS, config_json, tokenizer_json, write_small_model

from qwen3c import Model
from qwen3c.convert.export import export
from qwen3c.drivers.retrieval import instruct

TEXTS = ["import os", "The sun is a star.", "x", instruct("what is a star?"), "day and night " * 40]
DOCUMENTS = ["Beijing is the capital of China.", "Gravity attracts two bodies.", "", "no <|im_end|> yes"]
QUERY = "What is the capital of China?"


def vocabulary() -> dict[str, Any]:
    """The tokenizer of the small models, with "yes" and "no" as words in place of its rarest ones."""
    tokenizer = json.loads(tokenizer_json())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    pairs = [pair for pair in (["y", "e"], ["ye", "s"], ["n", "o"]) if "".join(pair) not in vocab]
    for pair in pairs:
        vocab["".join(pair)] = vocab.pop("".join(merges.pop()))
    tokenizer["model"]["merges"] = [*pairs, *merges]
    return tokenizer


def write_source(directory: Path, **shape: Any) -> Path:
    source = write_small_model(directory, **shape)
    (source / "tokenizer.json").write_text(json.dumps(vocabulary()))
    return source


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("retrieval")
    export(write_source(directory / "source", context=1024, dtype="F32"), directory / "model.bin")
    return directory / "model.bin"


@pytest.fixture(scope="module")
def exact(path: Path) -> Model:
    return Model(str(path), kv="f32", activations="float32")


def oracle(model: Model) -> Any:
    """Qwen3ForCausalLM with the dequantised weights of the model."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.Qwen3Config(**config_json(context=1024, dialect=5))
    config._attn_implementation = "eager"
    hf = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.copy_(torch.from_numpy(model.weight(name)))
    return hf


def nmse(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.sum((found - expected) ** 2.0) / np.sum(expected**2.0))


def test_embeddings_are_those_of_the_model_card(path: Path, exact: Model) -> None:
    hf = oracle(exact)
    import tokenizers
    import torch

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(vocabulary()))
    end = tokenizer.token_to_id("<|endoftext|>")
    expected = []
    for text in TEXTS:
        ids = [*tokenizer.encode(text).ids, end]
        with torch.no_grad():
            last = hf.model(torch.tensor([ids])).last_hidden_state[0, -1]
        expected.append(torch.nn.functional.normalize(last, p=2, dim=0).numpy())
    found = exact.embed(TEXTS)
    assert found.shape == (len(TEXTS), DEFAULTS["dim"]) and found.dtype == np.float32
    assert nmse(found, np.array(expected)) <= 1e-8
    quantised = Model(str(path)).embed(TEXTS)
    assert np.all(np.sum(quantised * found, axis=1) > 0.99)


def test_scores_are_those_of_the_model_card(exact: Model) -> None:
    hf = oracle(exact)
    import tokenizers
    import torch

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(vocabulary()))
    documents = DOCUMENTS[:3]  # the last spells a control token, which transformers would take for one
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for given in (None, "Find capitals"):
        task = given or "Given a web search query, retrieve relevant passages that answer the query"
        expected = []
        for document in documents:
            body = f"<Instruct>: {task}\n<Query>: {QUERY}\n<Document>: {document}"
            ids = [id for part in (prefix, body, suffix) for id in tokenizer.encode(part).ids]
            with torch.no_grad():
                logits = hf(torch.tensor([ids])).logits[0, -1].double()
            pair = logits[[tokenizer.token_to_id("no"), tokenizer.token_to_id("yes")]]
            expected.append(torch.log_softmax(pair, dim=0)[1].exp().item())
        found = exact.rerank(QUERY, documents, given)
        assert found.shape == (len(documents),) and found.dtype == np.float32
        assert np.allclose(found, expected, rtol=0, atol=1e-5)
        assert len(set(found.tolist())) == len(documents)


def test_company_changes_no_bit(path: Path) -> None:
    model = Model(str(path))
    many = TEXTS * 6  # more than one batch, and more than one pass of each
    together = model.embed(many)
    scores = model.rerank(QUERY, DOCUMENTS)
    for i in range(len(TEXTS)):
        assert np.array_equal(together[i :: len(TEXTS)], np.repeat(model.embed(TEXTS[i : i + 1]), 6, axis=0))
    for i in range(len(DOCUMENTS)):
        assert np.array_equal(scores[i : i + 1], model.rerank(QUERY, DOCUMENTS[i : i + 1]))
    assert model.embed([]).shape == (0, model.config.dim) and model.rerank(QUERY, []).shape == (0,)


def test_the_hidden_state_is_what_the_logits_are_made_of(exact: Model) -> None:
    ids = exact.tokenizer.encode(TEXTS[4])
    hidden = exact.session().forward(ids, "hidden")
    assert np.array_equal(hidden, exact.trace(ids, "model.norm")["model.norm"][-1])
    head = exact.weight("model.embed_tokens.weight")  # tied
    assert nmse(head @ hidden, exact.session().forward(ids)) < 1e-10


def test_what_cannot_be_embedded_is_an_error(path: Path) -> None:
    model = Model(str(path))
    n = len(model.tokenizer.encode("a b" * 1200)) + 1
    with pytest.raises(
        ValueError, match=rf"text 1 of 2 takes {n} tokens .* the context of the model is 1024"
    ):
        model.embed(["a", "a b" * 1200])
    with pytest.raises(ValueError, match=r"text 1 of 3 is empty"):
        model.embed(["a", "", "b"])
    with pytest.raises(ValueError, match=r"texts is one text, not a list"):
        model.embed("abc")
    with pytest.raises(
        ValueError, match=r"document 0 of 1 takes \d+ tokens .* the context of the model is 1024"
    ):
        model.rerank("q", ["a b" * 1200])
    with pytest.raises(ValueError, match=r"documents is one text, not a list"):
        model.rerank("q", "abc")


def test_a_vocabulary_without_the_words_is_named(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "source", context=1024)
    export(source, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"'(yes|no)' is \d tokens in the vocabulary"):
        Model(str(tmp_path / "model.bin")).rerank("q", ["a"])
    tokenizer = vocabulary()
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("endoftext", "other").replace("im_start", "start")
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    export(source, tmp_path / "other.bin")
    other = Model(str(tmp_path / "other.bin"))
    with pytest.raises(ValueError, match=r"no token <\|endoftext\|>"):
        other.embed(["a"])
    with pytest.raises(ValueError, match=r"no token <\|im_start\|>"):
        other.rerank("q", ["a"])


@pytest.mark.parametrize("closes", [False, True], ids=["plain", "with a post-processor"])
def test_the_end_token_is_there_once(tmp_path: Path, exact: Model, closes: bool) -> None:
    source = write_source(tmp_path / "source", context=1024, dtype="F32")
    if closes:
        from tokenizers import Tokenizer, processors

        tokenizer = Tokenizer.from_str(json.dumps(vocabulary()))
        end = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[end]
        )
        (source / "tokenizer.json").write_text(tokenizer.to_str())
    export(source, tmp_path / "model.bin")
    model = Model(str(tmp_path / "model.bin"), kv="f32", activations="float32")
    assert (model.tokenizer.opening, len(model.tokenizer.closing)) == ([], closes)
    assert np.array_equal(model.embed(TEXTS), exact.embed(TEXTS))


@pytest.mark.parametrize("architecture", ["Qwen3Model", "Qwen3ForCausalLM"])
def test_a_model_saved_without_its_head_is_the_same_model(
    tmp_path: Path, exact: Model, architecture: str
) -> None:
    source = write_source(tmp_path / "source", context=1024, dtype="F32")
    tensors = load_file(source / "model.safetensors")
    save_file({name.removeprefix("model."): w for name, w in tensors.items()}, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": [architecture], "tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    export(source, tmp_path / "model.bin")
    model = Model(str(tmp_path / "model.bin"), kv="f32", activations="float32")
    assert np.array_equal(model.embed(TEXTS), exact.embed(TEXTS))


def test_weights_that_overflow_give_no_vectors_and_no_scores(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", context=1024, dtype="F32")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38
    save_file(tensors, source / "model.safetensors")
    export(source, tmp_path / "model.bin")
    model = Model(str(tmp_path / "model.bin"))
    with pytest.raises(ValueError, match=r"model\.bin: the model's hidden state is not finite"):
        model.embed(TEXTS)
    with pytest.raises(ValueError, match=r"model\.bin: the model's logits are not finite"):
        model.rerank(QUERY, DOCUMENTS)
