from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from small_models import export_small_model

from qwen3c import Model, engine
from qwen3c.training.rollouts import Completion, rollout

PROMPTS = [[5, 6, 7], [9], list(range(20, 50))]
END = frozenset({3})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> engine.Engine:
    return engine.Engine(str(export_small_model(tmp_path_factory.mktemp("model"), std=0.05)))


def run(
    model: engine.Engine,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    n: int = 4,
    tokens: int = 12,
    temperature: float = 1.0,
    seed: Sequence[int] = (1, 2),
) -> list[list[Completion]]:
    return rollout(model, prompts, n, tokens, END, temperature, seed)


def test_a_completion_is_a_function_of_weights_prompt_and_seed(model: engine.Engine) -> None:
    first, again = run(model), run(model)
    assert first == again != run(model, seed=(1, 3))
    assert len({tuple(c.tokens) for c in first[0]}) == 4  # the group is diverse


def test_logprobs_are_those_of_the_distribution_that_was_sampled(model: engine.Engine) -> None:
    temperature = 0.7
    for prompt, group in zip(PROMPTS, run(model, temperature=temperature), strict=True):
        for completion in group:
            session = model.session()
            logits = session.forward(prompt + completion.tokens, logits="all").astype(np.float64)
            logits = logits[len(prompt) - 1 : -1, : model.config.n_tokens] / temperature
            logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            expected = logprobs[np.arange(len(completion.tokens)), completion.tokens]
            assert np.allclose(completion.logprobs, expected, rtol=0, atol=1e-5)


def test_temperature_zero_takes_the_largest_logit(model: engine.Engine) -> None:
    for prompt, group in zip(PROMPTS, run(model, n=2, temperature=0.0), strict=True):
        session = model.session()
        ids, tokens = prompt, []
        for _ in range(12):
            tokens.append(int(session.forward(ids)[: model.config.n_tokens].argmax()))
            ids = tokens[-1:]
            if tokens[-1] in END:
                break
        assert [c.tokens for c in group] == [tokens, tokens]


def test_completions_end_at_an_end_token_or_the_limit(model: engine.Engine) -> None:
    for group in run(model, n=8, tokens=200):
        for completion in group:
            assert completion.ended == (completion.tokens[-1] in END)
            assert not END & set(completion.tokens[:-1])
            assert completion.ended or len(completion.tokens) == 200


def test_a_completion_past_the_context_is_refused(model: engine.Engine) -> None:
    with pytest.raises(ValueError, match="context"):
        run(model, tokens=model.config.context)


def test_a_completion_is_what_generate_samples_with_its_seed(tmp_path: Path) -> None:
    model = Model(str(export_small_model(tmp_path, std=0.05)))
    ends = model.metadata["eos_token_ids"]
    groups = rollout(model, PROMPTS, 4, 12, ends, 0.8, (1, 2))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            reply = model.generate(prompt, 12, temperature=0.8, top_p=1.0, top_k=0, seed=completion.seed)
            assert [event.token for event in reply] == completion.tokens
