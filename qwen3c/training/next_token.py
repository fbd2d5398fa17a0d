"""What pretraining and fine-tuning share: the cross-entropy of the next token, over the targets of a row.

They differ in what a row is, and in which tokens are targets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .trainer import Batch, Trainer
from .vocabulary import end_of_text

if TYPE_CHECKING:
    import torch

IGNORED = -100  # a target that is not learned
SAMPLES = 4  # texts that show the model's progress
SAMPLE_TOKENS = 120
VALIDATION_ROWS = 64


class NextToken(Trainer):
    """A batch has tokens and targets (n, context) int64; packed rows also have positions and attention."""

    samples_end = True  # whether an end token ends a sample

    @abstractmethod
    def row(self, index: int) -> Any:
        """The training row number `index` of an endless sequence."""

    @abstractmethod
    def validation_rows(self) -> Sequence[Any]:
        """At most VALIDATION_ROWS rows, always the same ones."""

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> Batch:
        """Rows as one batch."""

    @abstractmethod
    def sample_prompts(self) -> list[list[int]]:
        """At most SAMPLES prompts of the texts that show the model's progress."""

    def updates(self, step: int) -> Iterator[Sequence[Batch]]:
        s, accelerator = self.settings, self.accelerator
        first = step * s.batch
        indices = range(first + accelerator.process_index, first + s.batch, accelerator.num_processes)
        yield list(self._batches([self.row(i) for i in indices]))

    def _batches(self, rows: Sequence[Any]) -> Iterator[Batch]:
        n = self.settings.micro_batch
        return (self.collate(rows[i : i + n]) for i in range(0, len(rows), n))

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        from torch.nn.functional import cross_entropy

        logits = self.model(
            input_ids=batch["tokens"],
            position_ids=batch.get("positions"),
            attention_mask=batch.get("attention"),
            use_cache=False,
        ).logits.float()
        targets = batch["targets"].flatten()
        total = cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
        return total, self.count(batch)

    def count(self, batch: Batch) -> int:
        return int((batch["targets"] != IGNORED).sum())

    def judge(self) -> tuple[float, dict[str, Any]]:
        total, count = 0.0, 0
        for batch in self._batches(self.validation_rows()):
            loss, n = self.loss_of(batch)
            total, count = total + float(loss), count + n
        mean = total / max(count, 1)
        return mean, {"validation_loss": mean, "samples": self._samples()}

    def _samples(self) -> list[str]:
        """Continuations of the prompts at temperature 0.8; none if the weights are sharded."""
        import torch

        context = self.plain_model.config.max_position_embeddings
        prompts = [prompt[: max(1, context // 2)] for prompt in self.sample_prompts()]
        length = max(map(len, prompts))
        room = min(SAMPLE_TOKENS, context - length)
        if self.settings.shard or room < 1:
            return []
        padding = end_of_text(self.tokenizer)
        # padding on the left, so that all prompts end together
        rows = [[padding] * (length - len(prompt)) + prompt for prompt in prompts]
        seen = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        model: Any = self.plain_model
        never = model.config.vocab_size  # an id that no token has: no end token
        ends: Any = {} if self.samples_end else {"eos_token_id": never}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            out = model.generate(
                torch.tensor(rows, device=self.accelerator.device),
                attention_mask=torch.tensor(seen, device=self.accelerator.device),
                max_new_tokens=room,
                do_sample=True,
                temperature=0.8,
                top_k=0,
                top_p=1.0,
                pad_token_id=padding,
                **ends,
            )
        return [
            self._as_text(row[length - len(prompt) :])
            for row, prompt in zip(out.tolist(), prompts, strict=True)
        ]

    def _as_text(self, ids: list[int]) -> str:
        """The text of `ids`, without the padding behind a sample that ended early."""
        padding = end_of_text(self.tokenizer)
        while self.samples_end and ids[-1:] == [padding]:
            ids = ids[:-1]
        return str(self.tokenizer.decode(ids))
