"""What pretraining and fine-tuning share: the cross-entropy of the next token, over the targets of a row.

They differ in what a row is, and in which tokens are targets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .trainer import Batch, Trainer

if TYPE_CHECKING:
    import torch

IGNORED = -100  # a target that is not learned
SAMPLE_TOKENS = 120
VALIDATION_ROWS = 64


class NextToken(Trainer):
    """A batch has tokens and targets (n, context) int64; packed rows also have positions and attention."""

    @abstractmethod
    def row(self, index: int) -> Any:
        """The training row number `index` of an endless sequence."""

    @abstractmethod
    def validation_rows(self) -> Sequence[Any]:
        """At most VALIDATION_ROWS, the same each time."""

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> Batch:
        """Rows as one batch."""

    @abstractmethod
    def sample_prompt(self) -> list[int]:
        """What the text that shows the model's progress goes on from."""

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
        return mean, {"validation_loss": mean, "sample": self._sample()}

    def _sample(self) -> str | None:
        """Text that goes on from the prompt, at temperature 0.8; None where the weights are sharded."""
        import torch

        if self.settings.shard:
            return None
        prompt = self.sample_prompt()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            ids = torch.tensor([prompt], device=self.accelerator.device)
            room = self.plain_model.config.max_position_embeddings - len(prompt)
            model: Any = self.plain_model
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(SAMPLE_TOKENS, room),
                do_sample=True,
                temperature=0.8,
                top_k=0,
                top_p=1.0,
            )
        return str(self.tokenizer.decode(out[0].tolist()))
