"""Supervised fine-tuning: the assistant's tokens of conversations, and plain text beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .conversations import Rows, Sample, collate, pack
from .next_token import VALIDATION_ROWS, NextToken
from .trainer import Batch, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class FineTuning(NextToken):
    def __init__(
        self,
        settings: Settings,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        resume: Path | None,
        train: list[Sample],
        validation: list[Sample],
        context: int,
    ) -> None:
        super().__init__(settings, model, tokenizer, resume)
        self.train, self.context = Rows(train, context, settings.seed), context
        self.validation = pack(validation, context)[:VALIDATION_ROWS]

    def describe(self) -> str:
        epochs = self.settings.steps * self.settings.batch / self.train.rows_per_epoch
        learned = sum(len(s.tokens) - s.prompt_length for s in self.train.samples)
        return (
            f"{len(self.train.samples):,} samples with {learned:,} tokens to learn, packed into {self.train.rows_per_epoch:,} "
            f"rows of {self.context}; {sum(map(len, self.validation)):,} held out; "
            f"{self.settings.steps:,} steps are {epochs:.2f} epochs"
        )

    def row(self, index: int) -> list[Sample]:
        return self.train[index]

    def validation_rows(self) -> list[list[Sample]]:
        return self.validation

    def collate(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        return collate(rows, self.context, self.tokenizer.pad_token_id)

    def sample_prompt(self) -> list[int]:
        first = self.validation[0][0]
        return first.tokens[: max(first.prompt_length, 1)]
