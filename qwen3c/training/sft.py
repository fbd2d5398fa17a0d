"""Supervised fine-tuning: the assistant's tokens of conversations, and plain text beside them."""

from __future__ import annotations

from collections.abc import Sequence

from .conversations import Rows, Sample, collate, pack
from .next_token import SAMPLES, VALIDATION_ROWS, NextToken
from .trainer import Batch, Settings, Start
from .vocabulary import end_of_text


class FineTuning(NextToken):
    def __init__(
        self, settings: Settings, start: Start, train: list[Sample], validation: list[Sample], context: int
    ) -> None:
        super().__init__(settings, start)
        self.train, self.context = Rows(train, context, settings.seed), context
        self.validation = pack(validation, context)[:VALIDATION_ROWS]

    def describe(self) -> str:
        epochs = self.settings.steps * self.settings.batch / self.train.rows_per_epoch
        learned = sum(len(s.tokens) - s.prompt_length for s in self.train.samples)
        return (
            f"{len(self.train.samples):,} samples with {learned:,} tokens to learn, packed into "
            f"{self.train.rows_per_epoch:,} "
            f"rows of {self.context}; {sum(map(len, self.validation)):,} held out; "
            f"{self.settings.steps:,} steps are {epochs:.2f} epochs"
        )

    def row(self, index: int) -> list[Sample]:
        return self.train[index]

    def validation_rows(self) -> list[list[Sample]]:
        return self.validation

    def collate(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        return collate(rows, self.context, end_of_text(self.tokenizer))

    def sample_prompts(self) -> list[list[int]]:
        samples = [row[0] for row in self.validation[:SAMPLES]]
        return [sample.tokens[: max(sample.prompt_length, 1)] for sample in samples]
