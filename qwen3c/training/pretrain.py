"""Pretraining: the next token of text, everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .next_token import VALIDATION_ROWS, NextToken
from .text import Windows
from .trainer import Batch, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PROMPT_TOKENS = 16  # of a validation text that a sample goes on from


class Pretraining(NextToken):
    def __init__(
        self,
        settings: Settings,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        resume: Path | None,
        train: Windows,
        validation: Windows,
    ) -> None:
        super().__init__(settings, model, tokenizer, resume)
        self.train, self.validation = train, validation

    def describe(self) -> str:
        epochs = self.settings.steps * self.settings.batch / self.train.n_windows
        return (
            f"{self.train.n_tokens:,} tokens of text ({self.train.bytes_per_token:.2f} bytes each), "
            f"{self.validation.n_tokens:,} held out; {self.settings.steps:,} steps are {epochs:.2f} epochs"
        )

    def row(self, index: int) -> NDArray[np.int32]:
        return self.train[index]

    def validation_rows(self) -> list[NDArray[np.int32]]:
        return list(self.validation.in_order(VALIDATION_ROWS))

    def collate(self, rows: Sequence[NDArray[np.int32]]) -> Batch:
        import torch

        windows = torch.from_numpy(np.stack(rows).astype(np.int64))
        return {"tokens": windows[:, :-1].contiguous(), "targets": windows[:, 1:].contiguous()}

    def sample_prompt(self) -> list[int]:
        return [int(token) for token in self.validation_rows()[0][:PROMPT_TOKENS]]
