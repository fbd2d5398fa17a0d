"""Pretraining: the next token of text, everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .text import Windows
from .trainer import Batch, Settings, Trainer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SAMPLE_TOKENS = 120
PROMPT_TOKENS = 16  # of a validation text that a sample goes on from


class Pretraining(Trainer):
    def __init__(
        self,
        settings: Settings,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        resume: Path | None,
        train: Windows,
        validation: Windows,
        validation_windows: int = 64,
    ) -> None:
        super().__init__(settings, model, tokenizer, resume)
        self.train, self.validation, self.validation_windows = train, validation, validation_windows

    def describe(self) -> str:
        epochs = self.settings.steps * self.settings.batch / self.train.n_windows
        return (
            f"{self.train.n_tokens:,} tokens of text ({self.train.bytes_per_token:.2f} bytes each), "
            f"{self.validation.n_tokens:,} held out; {self.settings.steps:,} steps are {epochs:.2f} epochs"
        )

    def updates(self, step: int) -> Iterator[Sequence[Batch]]:
        s, accelerator = self.settings, self.accelerator
        indices = range(
            step * s.batch + accelerator.process_index, (step + 1) * s.batch, accelerator.num_processes
        )
        windows = [self.train[i] for i in indices]
        yield [collate(windows[i : i + s.micro_batch]) for i in range(0, len(windows), s.micro_batch)]

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        from torch.nn.functional import cross_entropy

        logits = self.model(input_ids=batch["tokens"][:, :-1], use_cache=False).logits.float()
        targets = batch["tokens"][:, 1:]
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()

    def count(self, batch: Batch) -> int:
        rows, columns = batch["tokens"].shape
        return rows * (columns - 1)

    def judge(self) -> tuple[float, dict[str, Any]]:
        total, count = 0.0, 0
        windows = list(self.validation.in_order(self.validation_windows))
        for i in range(0, len(windows), self.settings.micro_batch):
            batch = collate(windows[i : i + self.settings.micro_batch])
            loss, n = self.loss_of(batch)
            total, count = total + float(loss), count + n
        prompt = windows[0][:PROMPT_TOKENS].tolist()
        mean = total / count
        return mean, {"validation_loss": mean, "sample": sample(self, prompt, SAMPLE_TOKENS)}


def collate(windows: Sequence[np.ndarray]) -> Batch:
    """tokens: (n, context + 1) int64."""
    import torch

    return {"tokens": torch.from_numpy(np.stack(windows).astype(np.int64))}


def sample(trainer: Trainer, prompt: list[int], n_tokens: int) -> str | None:
    """Text that goes on from `prompt`, at temperature 0.8; None where the weights are sharded."""
    import torch

    if trainer.settings.shard:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.settings.seed)
        ids = torch.tensor([prompt], device=trainer.accelerator.device)
        room = trainer.plain_model.config.max_position_embeddings - len(prompt)
        out = trainer.plain_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=min(n_tokens, room),
            do_sample=True, temperature=0.8, top_k=0, top_p=1.0,
        )  # fmt: skip
    return str(trainer.tokenizer.decode(out[0].tolist()))
