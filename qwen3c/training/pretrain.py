"""Pretraining: the next token of text, everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .next_token import SAMPLES, VALIDATION_ROWS, NextToken
from .text import Windows
from .trainer import Batch, Settings, Start

PROMPT_TOKENS = 16  # length of a sample's prompt, the beginning of a validation text


class Pretraining(NextToken):
    samples_end = False  # in a window another text follows the end of a text

    def __init__(self, settings: Settings, start: Start, train: Windows, validation: Windows) -> None:
        super().__init__(settings, start)
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

    def sample_prompts(self) -> list[list[int]]:
        return self.validation.starts(SAMPLES, min(PROMPT_TOKENS, self.validation.context))
