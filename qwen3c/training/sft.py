"""Supervised fine-tuning: the assistant's tokens of conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .conversations import IGNORED, Rows, Sample, collate, pack
from .pretrain import sample
from .trainer import Batch, Settings, Trainer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SAMPLE_TOKENS = 120


class FineTuning(Trainer):
    def __init__(
        self,
        settings: Settings,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        resume: Path | None,
        train: list[Sample],
        validation: list[Sample],
        context: int,
        validation_rows: int = 64,
    ) -> None:
        super().__init__(settings, model, tokenizer, resume)
        self.train, self.context = Rows(train, context, settings.seed), context
        self.validation = pack(validation, context)[:validation_rows]

    def describe(self) -> str:
        epochs = self.settings.steps * self.settings.batch / self.train.rows_per_epoch
        learned = sum(len(s.tokens) - s.prompt_length for s in self.train.samples)
        return (
            f"{len(self.train.samples):,} replies of {learned:,} tokens, packed into {self.train.rows_per_epoch:,} rows of "
            f"{self.context}; {sum(map(len, self.validation)):,} held out; {self.settings.steps:,} steps are {epochs:.2f} epochs"
        )

    def updates(self, step: int) -> Iterator[Sequence[Batch]]:
        s, accelerator = self.settings, self.accelerator
        indices = range(
            step * s.batch + accelerator.process_index, (step + 1) * s.batch, accelerator.num_processes
        )
        rows = [self.train[i] for i in indices]
        yield [self._collate(rows[i : i + s.micro_batch]) for i in range(0, len(rows), s.micro_batch)]

    def _collate(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        return collate(rows, self.context, self.tokenizer.pad_token_id)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        from torch.nn.functional import cross_entropy

        logits = self.model(
            input_ids=batch["tokens"],
            position_ids=batch["positions"],
            attention_mask=batch["attention"],
            use_cache=False,
        ).logits.float()
        targets = batch["targets"].flatten()
        return cross_entropy(
            logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
        ), self.count(batch)

    def count(self, batch: Batch) -> int:
        return int((batch["targets"] != IGNORED).sum())

    def judge(self) -> tuple[float, dict[str, Any]]:
        total, count = 0.0, 0
        for i in range(0, len(self.validation), self.settings.micro_batch):
            batch = self._collate(self.validation[i : i + self.settings.micro_batch])
            loss, n = self.loss_of(batch)
            total, count = total + float(loss), count + n
        first = self.validation[0][0]
        mean = total / max(count, 1)
        return mean, {
            "validation_loss": mean,
            "sample": sample(self, first.tokens[: first.prompt_length], SAMPLE_TOKENS),
        }
