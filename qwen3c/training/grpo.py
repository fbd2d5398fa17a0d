"""Group Relative Policy Optimisation (https://arxiv.org/abs/2402.03300, section 4.1).

For each prompt G completions are sampled; a completion's advantage is its reward, normalised within the
group. The two losses (LOSSES) differ in what the mean is taken over, and in the standard deviation:

    dapo  the mean over all tokens of the step (DAPO, https://arxiv.org/abs/2503.14476, section 3.3), so a
          long completion weighs more than a short one; the population's standard deviation (divisor G)
    grpo  the mean over completions of the mean over their tokens (the paper's equation 3); the sample's
          standard deviation (divisor G - 1), as in most implementations, since the paper does not say

Completions come from the INT8 engine, so the policy that sampled differs a little from the policy that
learns. The clipped ratio of their probabilities corrects for that, and for the updates made since.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import TrainingError
from .checkpoint import fingerprint
from .conversations import ConversationEncoder, read_jsonl
from .rollouts import Completion, rollout
from .trainer import Batch, Settings, Start, Trainer
from .vocabulary import end_of_text

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from .. import engine

LOSSES = ("dapo", "grpo")
SAMPLES = 4  # texts that show the model's progress
ROLLOUTS = ".rollouts"  # the folder of the model.bin with a step's weights

Reward = Callable[[str, str, dict[str, Any]], float]
"""(prompt, completion, task) -> reward. task: the task's line and "ended": whether the completion ended
itself.
"""


@dataclass(frozen=True)
class Task:
    tokens: list[int]  # token ids of the prompt
    text: str
    values: dict[str, Any]  # the object in the task's line


@dataclass(frozen=True)
class Policy:
    """How completions are sampled and learned from."""

    completions: int = 8  # per prompt, G
    max_tokens: int = 64
    temperature: float = 1.0
    updates: int = 1  # optimiser steps per batch of completions
    clip_ratio: float = 0.2
    kl: float = 0.02  # weight of the divergence from the reference model
    loss: str = "dapo"  # of LOSSES

    def check(self) -> None:
        """TrainingError for settings that could learn nothing, or would learn the opposite."""
        if self.completions < 2:
            raise TrainingError(
                f"--completions {self.completions}: a reward is compared within its group, which takes at "
                "least 2"
            )
        if self.kl < 0:
            raise TrainingError(f"--kl {self.kl:g} would push away from the reference; at least 0 is needed")


def load_reward(name: str) -> Reward:
    """Import the function named `module:function`; the current directory is searched first."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise TrainingError(f"--reward {name}: expected module:function")
    sys.path.insert(0, os.getcwd())
    try:
        reward: Reward = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        hint = ""
        if error.name == module:
            hint = (
                f"; {module}.py in this folder would be found, with {function}(prompt, completion, task) in "
                "it"
            )
        raise TrainingError(f"--reward {name}: ModuleNotFoundError: {error}{hint}") from None
    except Exception as error:  # whatever the module raises while it loads
        raise TrainingError(
            f"--reward {name}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from None
    if not callable(reward):
        raise TrainingError(f"--reward {name}: is not a function")
    return reward


def reward_fingerprint(reward: Reward) -> str:
    """The fingerprint of the function's source, if that can be read."""
    try:
        source = inspect.getsource(reward)
    except (OSError, TypeError):
        source = ""
    return fingerprint([source.encode()])


def tasks_fingerprint(tasks: Sequence[Task]) -> str:
    return fingerprint(json.dumps([t.tokens, t.values], sort_keys=True).encode() for t in tasks)


def read_tasks(path: Path, tokenizer: PreTrainedTokenizerFast, room: int) -> list[Task]:
    """Lines of {"messages": [...], ...} or {"prompt": "text", ...}, of at most `room` tokens each."""
    tasks, encoder = [], None
    for number, value in read_jsonl(path):
        where = f"{path}: line {number}"
        if isinstance(value.get("prompt"), str):
            ids = list(tokenizer.backend_tokenizer.encode(value["prompt"], add_special_tokens=False).ids)
        else:
            encoder = encoder or ConversationEncoder(tokenizer)
            ids = encoder.prompt(value, where)
        if not 1 <= len(ids) <= room:
            raise TrainingError(
                f"{where}: the prompt is {len(ids)} tokens, from 1 to {room} leave room for a completion"
            )
        tasks.append(Task(ids, str(tokenizer.decode(ids)), value))
    return tasks


def advantages_of(rewards: NDArray[np.float64], loss: str) -> NDArray[np.float64]:
    """Rewards (groups, completions) -> how far each is from the mean of its group, in standard deviations."""
    deviation = rewards.std(1, ddof=1 if loss == "grpo" else 0, keepdims=True)
    return (rewards - rewards.mean(1, keepdims=True)) / (deviation + 1e-4)


def token_losses(logprobs: torch.Tensor, batch: Batch, policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, divergence from the reference model) of every token, masked ones included."""
    import torch

    ratio = torch.exp(logprobs - batch["old"])
    clipped = ratio.clamp(1 - policy.clip_ratio, 1 + policy.clip_ratio)
    gain = torch.minimum(ratio * batch["advantages"], clipped * batch["advantages"])
    # an unbiased estimate of the divergence that is never negative (Schulman, "Approximating KL")
    log_ratio = batch["reference"] - logprobs
    kl = torch.exp(log_ratio) - log_ratio - 1
    return policy.kl * kl - gain, kl


class GRPO(Trainer):
    best_is_highest = True

    def __init__(
        self,
        settings: Settings,
        start: Start,
        reference: PreTrainedModel,
        policy: Policy,
        train: list[Task],
        validation: list[Task],
        reward: Reward,
    ) -> None:
        super().__init__(settings, start)
        self.reference = reference.to(self.accelerator.device).eval().requires_grad_(False)
        self.policy, self.train, self.validation, self.reward = policy, train, validation, reward
        ends = self.plain_model.generation_config.eos_token_id
        self.end_tokens = frozenset(
            [ends] if isinstance(ends, int) else ends or [end_of_text(self.tokenizer)]
        )
        self.n_tokens = len(self.tokenizer)
        self._kl = 0.0

    def describe(self) -> str:
        p = self.policy
        return (
            f"{len(self.train):,} tasks, {len(self.validation):,} held out; each step {self.settings.batch} "
            "prompts with "
            f"{p.completions} completions of at most {p.max_tokens} tokens"
        )

    def run(self) -> None:
        try:
            super().run()
        finally:
            if self.is_main:
                shutil.rmtree(self.settings.out / ROLLOUTS, ignore_errors=True)

    # ------------------------------------------------------------------------
    # Completions and what they are worth

    def updates(self, step: int) -> Iterator[Sequence[Batch]]:
        import torch

        tasks = self._tasks(step)
        begin = time.perf_counter()
        with self._engine() as model:
            groups = self._complete(model, tasks, self.policy.completions, self.policy.temperature, step)
        seconds = time.perf_counter() - begin
        rewards = np.array([self._rewards(task, group) for task, group in zip(tasks, groups, strict=True)])
        advantages = advantages_of(rewards, self.policy.loss)
        n_sampled = sum(len(c.tokens) for group in groups for c in group)
        self.step_record = {
            "tokens": int(self._sum(torch.tensor(n_sampled * self.policy.updates))),
            "reward": self._mean(float(rewards.mean())),
            "completion_tokens": self._mean(n_sampled / rewards.size),
            "ended": self._mean(float(np.mean([c.ended for group in groups for c in group]))),
            "rollout_tokens_per_second": round(n_sampled / seconds, 1),
        }
        rows = [
            (task.tokens, completion, advantage)
            for task, group, of_group in zip(tasks, groups, advantages, strict=True)
            for completion, advantage in zip(group, of_group, strict=True)
        ]
        # rows of similar length share a micro-batch: little padding
        rows.sort(key=lambda row: len(row[0]) + len(row[1].tokens))
        n = self.settings.micro_batch
        batches = [self._with_reference(self._collate(rows[i : i + n])) for i in range(0, len(rows), n)]
        self._kl = 0.0
        for _ in range(self.policy.updates):
            yield batches
        self.step_record["kl"] = self._mean(self._kl / (self.policy.updates * max(n_sampled, 1)))

    def _tasks(self, step: int) -> list[Task]:
        """This process's share of the step's tasks; every epoch has an order of its own."""
        s, accelerator = self.settings, self.accelerator
        chosen = []
        for i in range(
            step * s.batch + accelerator.process_index, (step + 1) * s.batch, accelerator.num_processes
        ):
            epoch, place = divmod(i, len(self.train))
            chosen.append(
                self.train[np.random.default_rng((s.seed, epoch)).permutation(len(self.train))[place]]
            )
        return chosen

    @contextlib.contextmanager
    def _engine(self) -> Iterator[engine.Engine]:
        """An Engine with the current weights, exported to a temporary model.bin."""
        import torch

        from .. import engine
        from ..convert.export import export

        directory = self.settings.out / ROLLOUTS
        path = directory / "model.bin"
        self.save_model(directory)
        if self.is_main:
            export(directory, path, group_size=self._group_size())
        self.accelerator.wait_for_everyone()
        model = engine.Engine(str(path), torch.get_num_threads())
        try:
            yield model
        finally:
            self.accelerator.wait_for_everyone()

    def _group_size(self) -> int:
        c = self.plain_model.config
        widths = (c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim)
        return next(size for size in (64, 32) if not any(width % size for width in widths))

    def _complete(
        self, model: engine.Engine, tasks: Sequence[Task], n: int, temperature: float, step: int
    ) -> list[list[Completion]]:
        p = self.policy
        seed = (self.settings.seed, step, self.accelerator.process_index)
        return rollout(model, [t.tokens for t in tasks], n, p.max_tokens, self.end_tokens, temperature, seed)

    def _rewards(self, task: Task, group: Sequence[Completion]) -> list[float]:
        rewards = []
        for completion in group:
            tokens = completion.tokens[:-1] if completion.ended else completion.tokens
            text = str(self.tokenizer.decode(tokens))
            try:
                reward = float(self.reward(task.text, text, {**task.values, "ended": completion.ended}))
            except Exception as error:  # whatever the user's function raises
                what = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise TrainingError(f"the reward function failed on {text!r}: {what}") from None
            if not math.isfinite(reward):
                raise TrainingError(f"the reward function returned {reward} for {text!r}")
            rewards.append(reward)
        return rewards

    # ------------------------------------------------------------------------
    # Learning from them

    def _collate(self, rows: Sequence[tuple[list[int], Completion, float]]) -> Batch:
        """tokens (n, length); targets' mask, old (sampled) logprobs and advantages, each (n, length - 1)."""
        import torch

        length = max(len(prompt) + len(completion.tokens) for prompt, completion, _ in rows)
        tokens = np.full((len(rows), length), end_of_text(self.tokenizer), np.int64)
        mask = np.zeros((len(rows), length - 1), bool)
        old, advantages = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)
        for i, (prompt, completion, advantage) in enumerate(rows):
            end = len(prompt) + len(completion.tokens)
            tokens[i, :end] = prompt + completion.tokens
            reply = slice(len(prompt) - 1, end - 1)
            mask[i, reply], old[i, reply], advantages[i, reply] = True, completion.logprobs, advantage
        arrays = {"tokens": tokens, "mask": mask, "old": old, "advantages": advantages}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _with_reference(self, batch: Batch) -> Batch:
        import torch

        with torch.no_grad():
            reference = self._logprobs(self.reference, batch["tokens"].to(self.accelerator.device))
        return {**batch, "reference": reference.cpu()}

    def _logprobs(self, model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (n, length - 1) of each token after the first, at the policy's temperature."""
        import torch

        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[..., : self.n_tokens].float()
        logprobs = torch.log_softmax(logits / self.policy.temperature, dim=-1)
        return logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        mask = batch["mask"]
        losses, kl = token_losses(self._logprobs(self.model, batch["tokens"]), batch, self.policy)
        self._kl += float((kl.detach() * mask).sum())
        losses = losses * mask
        if self.policy.loss == "grpo":
            losses = losses / mask.sum(1, keepdim=True)
        return losses.sum(), self.count(batch)

    def count(self, batch: Batch) -> int:
        """How many tokens (dapo) or completions (grpo) the mean is taken over."""
        return len(batch["mask"]) if self.policy.loss == "grpo" else super().count(batch)

    def judge(self) -> tuple[float, dict[str, Any]]:
        with self._engine() as model:
            sampled = self._complete(model, self.validation, 1, self.policy.temperature, 0)
            greedy = self._complete(model, self.validation, 1, 0.0, 0)
        mean = {}
        for name, groups in (("validation_reward", sampled), ("validation_reward_greedy", greedy)):
            mean[name] = float(
                np.mean([self._rewards(t, g) for t, g in zip(self.validation, groups, strict=True)])
            )
        samples = [
            task.text + str(self.tokenizer.decode(group[0].tokens))
            for task, group in zip(self.validation[:SAMPLES], greedy[:SAMPLES], strict=True)
        ]
        return mean["validation_reward"], {**mean, "samples": samples}

    def _mean(self, value: float) -> float:
        import torch

        return float(self._sum(torch.tensor(value, dtype=torch.float32))) / self.accelerator.num_processes

    def _status(self, record: dict[str, Any]) -> str:
        return f"reward {record['reward']:.3f}, kl {record['kl']:.3f}"
