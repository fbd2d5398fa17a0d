"""The two losses of GRPO against formulas written out one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qwen3c.training import TrainingError
from qwen3c.training.grpo import GRPO, LOSSES, Policy, advantages_of, load_reward, token_losses
from qwen3c.training.trainer import Batch

Floats = NDArray[np.float64]
LENGTHS = [3, 7, 1, 5]  # of the completions of one group


def batch_of(lengths: list[int], advantages: Floats, seed: int = 1) -> tuple[Batch, torch.Tensor]:
    """Random log-probabilities far enough apart that some ratios are clipped; padding holds numbers too."""
    random = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths) + 2)
    mask = np.zeros(shape, bool)
    for row, length in enumerate(lengths):
        mask[row, 1 : 1 + length] = True
    values = {name: random.normal(-2, 0.4, shape) for name in ("old", "reference", "new")}
    batch = {name: torch.tensor(values[name]) for name in ("old", "reference")}
    batch |= {
        "mask": torch.tensor(mask),
        "advantages": torch.tensor(np.where(mask, advantages[:, None], 0.0)),
    }
    return batch, torch.tensor(values["new"])


def expected_loss(batch: Batch, new: torch.Tensor, advantages: Floats, policy: Policy) -> float:
    """DeepSeekMath, equation 3, with its estimate of the divergence (equation 4)."""
    of_completions, of_tokens = [], []
    for i, advantage in enumerate(advantages):
        terms = []
        for t in range(batch["mask"].shape[1]):
            if not batch["mask"][i, t]:
                continue
            ratio = math.exp(float(new[i, t]) - float(batch["old"][i, t]))
            clipped = max(1 - policy.clip_ratio, min(1 + policy.clip_ratio, ratio))
            other = math.exp(float(batch["reference"][i, t]) - float(new[i, t]))
            divergence = other - math.log(other) - 1
            terms.append(-(min(ratio * advantage, clipped * advantage) - policy.kl * divergence))
        of_completions.append(sum(terms) / len(terms))
        of_tokens += terms
    if policy.loss == "grpo":
        return sum(of_completions) / len(of_completions)
    return sum(of_tokens) / len(of_tokens)


class Stage(GRPO):
    """A GRPO stage without model and data, for its loss."""

    def __init__(self, policy: Policy, logprobs: torch.Tensor) -> None:
        self.policy, self.model, self._kl, self.logprobs = policy, None, 0.0, logprobs

    def _logprobs(self, model: object, tokens: object) -> torch.Tensor:
        return self.logprobs


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_that_of_the_paper_or_of_dapo(loss: str) -> None:
    policy = Policy(loss=loss, kl=0.3, clip_ratio=0.1)
    advantages = np.array([1.5, -0.5, 0.3, -1.3])
    batch, new = batch_of(LENGTHS, advantages)
    total, count = Stage(policy, new).loss({**batch, "tokens": None})  # type: ignore[dict-item]
    assert float(total) / count == pytest.approx(expected_loss(batch, new, advantages, policy), rel=1e-12)
    ratio = torch.exp(new - batch["old"])[batch["mask"]]
    assert ((ratio - 1).abs() > 0.1).any() and (
        (ratio - 1).abs() < 0.1
    ).any()  # both sides of the clip are tried


def test_the_losses_differ_where_lengths_do() -> None:
    advantages = np.array([1.0, -1.0, 1.0, -1.0])
    means = {}
    for loss in LOSSES:
        batch, new = batch_of(LENGTHS, advantages)
        total, count = Stage(Policy(loss=loss), new).loss({**batch, "tokens": None})  # type: ignore[dict-item]
        means[loss] = float(total) / count
    assert abs(means["dapo"] - means["grpo"]) > 0.01
    assert LOSSES[0] == Policy().loss == "dapo"


def test_micro_batches_add_up_to_the_mean_over_completions() -> None:
    advantages = np.array([1.5, -0.5, 0.3, -1.3])
    batch, new = batch_of(LENGTHS, advantages)
    policy = Policy(loss="grpo")
    halves = [({name: value[i : i + 2] for name, value in batch.items()}, new[i : i + 2]) for i in (0, 2)]
    parts = [Stage(policy, logprobs).loss({**half, "tokens": None}) for half, logprobs in halves]  # type: ignore[dict-item]
    mean = sum(float(total) for total, _ in parts) / sum(count for _, count in parts)
    assert mean == pytest.approx(expected_loss(batch, new, advantages, policy), rel=1e-12)


def test_advantages_are_standard_scores_within_the_group() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [2.0, 4.0, 4.0, 6.0]])
    for loss, divisor in (("dapo", 4), ("grpo", 3)):
        for row, found in zip(rewards, advantages_of(rewards, loss), strict=True):
            mean = sum(row) / 4
            deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / divisor)
            assert found == pytest.approx([(x - mean) / (deviation + 1e-4) for x in row])


def test_the_divergence_is_never_negative() -> None:
    batch, new = batch_of(LENGTHS, np.ones(4))
    _, divergence = token_losses(new, batch, Policy())
    assert (divergence >= 0).all() and divergence.max() > 0.1


def test_a_reward_that_is_not_there_says_where_it_was_looked_for() -> None:
    with pytest.raises(TrainingError, match=r"nothing_here\.py in this folder would be found, with exact\("):
        load_reward("nothing_here:exact")
