"""What the three stages share: optimiser, schedule, the loop, evaluation, checkpoints, metrics, resume.

A stage, a subclass of Trainer, chooses the samples of a step, computes their loss and judges the model. All
of that is a function of (settings, step), so a run that was killed and resumed gives the same losses to the
bit.

A run is resumed with the settings (Settings.deciding) and inputs that it began with. The number of steps
and the warm-up may change; the learning rate then follows the new schedule.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..system.files import replacing
from . import TrainingError
from .checkpoint import (
    CURVES,
    FOLDER,
    METRICS,
    STATE,
    Inputs,
    Metrics,
    begin,
    check_inputs,
    checkpoints,
    prune,
    publish,
    tidy,
    write_directory,
    writing,
)
from .telling import Telling

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Batch = dict[str, "torch.Tensor"]  # of one forward and backward pass; each stage has its own keys


@dataclass(frozen=True)
class Settings:
    """How to train. The stage knows what to train on."""

    out: Path
    steps: int
    batch: int  # sequences (prompts, in GRPO) per step, over all processes
    micro_batch: int  # sequences per forward pass and process
    learning_rate: float  # the highest, after the warm-up
    warmup: int  # steps in which the learning rate rises linearly; then a cosine to min_learning_rate
    min_learning_rate: float = 0.1  # as a fraction of learning_rate
    weight_decay: float = 0.1  # on matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of the gradient
    precision: str = "fp32"  # or "bf16": matrix products in bfloat16, weights and sums in float32
    seed: int = 1
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep: int = 2  # how many checkpoints are kept
    # split weights, gradients and optimiser state between processes (FSDP); else each has a copy
    shard: bool = False
    compile: bool = False
    quiet: bool = False

    def deciding(self) -> dict[str, Any]:
        """The settings that must stay for a run to be resumed.

        The others may change: the schedule can be extended, and micro-batches only change how sums are
        rounded.
        """
        others = (
            "out", "steps", "warmup", "micro_batch", "evaluate_every", "checkpoint_every", "keep", "compile",
            "quiet",
        )  # fmt: skip
        return {
            name: list(v) if isinstance(v, tuple) else v
            for name, v in asdict(self).items()
            if name not in others
        }

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        return self.learning_rate * (self.min_learning_rate + (1 - self.min_learning_rate) * cosine)


@dataclass(frozen=True)
class Start:
    """What a run starts from: a model and tokenizer, new, loaded or of a checkpoint."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    resume: Path | None  # the checkpoint that model and tokenizer were read from
    inputs: Inputs  # data, shapes, ...: must be equal for a run to be resumed
    telling: Telling


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint."""

    def __init__(self, number: int, step: int) -> None:
        where = f"after step {step}; --resume goes on from there" if step else "before the first step"
        super().__init__(f"stopped {where}")
        self.signal = number


class Trainer(ABC):
    """Runs a stage. TrainingError, one line, if it cannot go on; older checkpoints stay."""

    best_is_highest = False  # whether a higher judge() is better

    def __init__(self, settings: Settings, start: Start) -> None:
        import torch
        from accelerate import Accelerator

        model = start.model
        self.settings, self.tokenizer, self.inputs = settings, start.tokenizer, start.inputs
        self.telling = start.telling
        self.accelerator = Accelerator(
            mixed_precision="no" if settings.precision == "fp32" else settings.precision
        )
        world = self.accelerator.num_processes
        if settings.batch % world:
            raise TrainingError(f"--batch {settings.batch} does not divide among {world} processes")
        self.plain_model = model.to(self.accelerator.device)
        if settings.shard:
            _shard(model)
        self.step = 0
        self.best: float | None = None
        self.step_record: dict[str, Any] = {}  # figures that the stage adds to the record of a step
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        compiled: Any = torch.compile(model) if settings.compile else model
        self.model = compiled if settings.shard else self.accelerator.prepare(compiled)
        if start.resume:
            self._load(start.resume)
        if self.is_main:
            if not start.resume:
                begin(settings.out)
            tidy(settings.out)
        self.accelerator.wait_for_everyone()
        self.metrics = Metrics(settings.out / METRICS, self.step) if self.is_main else None
        self._signal: int | None = None

    # ------------------------------------------------------------------------
    # What a stage defines

    @abstractmethod
    def updates(self, step: int) -> Iterator[Sequence[Batch]]:
        """This process's share of each update of a step, as micro-batches."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """(sum of the losses, how many losses) of a micro-batch."""

    @abstractmethod
    def judge(self) -> tuple[float, dict[str, Any]]:
        """(how good the model is, further figures to record); every process computes all of it."""

    @abstractmethod
    def describe(self) -> str:
        """One line that describes the data."""

    # ------------------------------------------------------------------------
    # The loop

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def run(self) -> None:
        """Train to the last step. Stopped, after a checkpoint, on SIGINT, SIGTERM or SIGHUP."""
        s, telling = self.settings, self.telling
        telling.say(self.describe())
        with self._catching_signals(), telling.steps(self.step):
            if self.step == 0:
                self._evaluate()
                self._leave_if_asked()
            while self.step < s.steps:
                telling.step(self.step, s.steps)  # draw it again: evaluating erased it
                begin = time.perf_counter()
                record = self._train_step()
                record["tokens_per_second"] = round(record["tokens"] / (time.perf_counter() - begin), 1)
                self._record(record)
                telling.step(self.step, s.steps, self._status(record))
                last = self.step == s.steps
                stopping = self._stop_requested()
                judged = last or self.step % s.evaluate_every == 0
                better = self._evaluate() if judged else False
                if last or stopping or better or self.step % s.checkpoint_every == 0:
                    self._save(better)
                if stopping and not last:
                    raise Stopped(stopping, self.step)
        telling.say(self._outcome())

    def _leave_if_asked(self) -> None:
        if stopping := self._stop_requested():
            raise Stopped(stopping, self.step)

    def _outcome(self) -> str:
        out = self.settings.out
        if self.best is None:
            return f"{out}: no model in there yet"
        return f"{out}: the best model of {self.step:,} steps; `export.py {out} model.bin` makes it run"

    def _train_step(self) -> dict[str, Any]:
        learning_rate = self.settings.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        total = count = norm = 0.0
        for micro_batches in self.updates(self.step):
            loss, n, norm = self._update(micro_batches)
            total, count = total + loss, count + n
        self.step += 1
        mean = total / max(count, 1)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            saved = checkpoints(self.settings.out)
            kept = f"; {saved[-1]} is intact" if saved else ""
            raise TrainingError(
                f"step {self.step}: the loss is {mean:g} and its gradient's norm {norm:g}: training has "
                "diverged; "
                f"try a lower --learning-rate than {self.settings.learning_rate:g}{kept}"
            )
        record = {
            "step": self.step,
            "loss": mean,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "tokens": int(count),
        }
        return {**record, **self.step_record}

    def _update(self, micro_batches: Sequence[Batch]) -> tuple[float, float, float]:
        """One step of the optimiser; (sum of losses, count, gradient norm) over all processes."""
        import torch

        world = self.accelerator.num_processes
        losses = torch.zeros((), dtype=torch.float64)
        own = sum(self.count(batch) for batch in micro_batches)
        total = int(self._sum(torch.tensor(own)))
        for i, batch in enumerate(micro_batches):
            with self._syncing(i == len(micro_batches) - 1):
                loss, _ = self.loss_of(batch)
                # data parallelism averages gradients over processes; scale that to the mean over all samples
                (loss * (world / max(total, 1))).backward()
            losses += loss.detach().cpu().double()  # Apple's GPUs have no float64
        norm: Any = torch.nn.utils.clip_grad_norm_(self.plain_model.parameters(), self.settings.clip)
        norm = norm.full_tensor() if self.settings.shard else norm
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(self._sum(losses)), float(total), float(norm)

    def loss_of(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """`loss`, on this process's device and at the run's precision."""
        with self.accelerator.autocast():
            return self.loss({name: tensor.to(self.accelerator.device) for name, tensor in batch.items()})

    @contextlib.contextmanager
    def _syncing(self, last: bool) -> Iterator[None]:
        """Within, processes exchange gradients only if this is the last micro-batch of an update."""
        if self.settings.shard:
            self.plain_model.set_requires_gradient_sync(last)
            yield
        else:
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                yield

    def count(self, batch: Batch) -> int:
        """How many losses `loss` will sum over."""
        return int(batch["mask"].sum())

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.to(self.accelerator.device), reduction="sum")

    def _evaluate(self) -> bool:
        """Judge the model and record the result; returns whether it is the best so far."""
        import torch

        self.model.eval()
        with self.telling.doing(f"step {self.step:,}: evaluating"), torch.no_grad():
            judgement, record = self.judge()
        self._record({"step": self.step, **record})
        better = self.step > 0 and (  # at step 0 nothing was trained
            self.best is None or (judgement > self.best if self.best_is_highest else judgement < self.best)
        )
        if better:
            self.best = judgement
        figures = ", ".join(
            f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float)
        )
        self.telling.say(f"step {self.step}: {figures}")
        self._draw()
        return better

    # ------------------------------------------------------------------------
    # Checkpoints

    def save_model(self, directory: Path) -> None:
        """Write the model as a Hugging Face directory. Every process calls this, the first one writes."""
        weights = self._weights()
        if self.is_main:
            self.plain_model.save_pretrained(directory, state_dict=weights)
            self.tokenizer.save_pretrained(directory)

    def _save(self, is_best: bool) -> None:
        path = self.settings.out / FOLDER / f"step-{self.step:07d}"
        with self.telling.doing(f"step {self.step:,}: writing a checkpoint"), writing(path):
            self._write(path, is_best)

    def _write(self, path: Path, is_best: bool) -> None:
        s, out = self.settings, self.settings.out
        weights, optimizer = self._weights(), self._optimizer_state()
        if self.is_main:

            def fill(directory: Path) -> None:
                self.plain_model.save_pretrained(directory, state_dict=weights)
                self.tokenizer.save_pretrained(directory)
                state = {
                    "step": self.step,
                    "best": self.best,
                    "settings": {**s.deciding(), "steps": s.steps},
                    "inputs": self.inputs,
                    "optimizer": optimizer,
                }
                _save_state(state, directory / STATE)

            write_directory(path, fill)
            if is_best:
                publish(path, out)
            prune(out, s.keep)
        self.accelerator.wait_for_everyone()

    def _load(self, path: Path) -> None:
        """Restore optimiser and step from a checkpoint, whose weights are loaded already."""
        import torch

        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        for name, value in self.settings.deciding().items():
            if state["settings"].get(name) != value:
                flag = name.replace("_", "-")
                raise TrainingError(
                    f"{path}: was made with --{flag} {state['settings'].get(name)}, not {value}"
                )
        check_inputs(path, state.get("inputs", self.inputs), self.inputs)
        self.step, self.best = state["step"], state["best"]
        steps, now = state["settings"]["steps"], self.settings.steps
        if now < self.step:
            raise TrainingError(f"{path}: is past --steps {now}")
        line = (
            f"going on from step {self.step:,}" if self.step < now else f"all {now:,} steps are done already"
        )
        if steps != now:
            line += f"; --steps was {steps:,} and is {now:,}: the learning rate follows the new schedule"
        self.telling.say(line)
        if self.settings.shard:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.plain_model, self.optimizer, state["optimizer"], options=options)
        else:
            self.optimizer.load_state_dict(state["optimizer"])

    def _weights(self) -> dict[str, torch.Tensor]:
        """All weights by name. If they are sharded, every process must call this."""
        if not self.settings.shard:
            return self.plain_model.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(self.plain_model, options=options)
        tied = self.plain_model.all_tied_weights_keys
        return {name: weight for name, weight in weights.items() if name not in tied}

    def _optimizer_state(self) -> dict[str, Any]:
        if not self.settings.shard:
            return self.optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.plain_model, self.optimizer, options=options)

    # ------------------------------------------------------------------------
    # Telling

    def _record(self, record: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.add(record)

    def _status(self, record: dict[str, Any]) -> str:
        return f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tok/s"

    def _draw(self) -> None:
        from .curves import draw

        if self.metrics:
            path = self.settings.out / CURVES
            with writing(path), replacing(path) as temporary:
                draw(self.metrics.records, temporary)

    # ------------------------------------------------------------------------
    # Signals

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP (a closed terminal) end the run after the step at hand.

        A second SIGINT or SIGTERM ends it at once. A second SIGHUP does not: both system and shell may send
        one.
        """

        def request(number: int, frame: FrameType | None) -> None:
            if self._signal is not None and number != hangup:
                raise KeyboardInterrupt
            if self._signal is None and number == signal.SIGINT:
                self.telling.at_once("stopping after this step; another Ctrl-C stops at once")
            self._signal = self._signal or number

        hangup = getattr(signal, "SIGHUP", None)
        numbers = [signal.SIGINT, signal.SIGTERM]
        # not under nohup, which ignores SIGHUP
        if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
            numbers.append(hangup)
        previous = {number: signal.signal(number, request) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop_requested(self) -> int:
        """The number of a signal that any of the processes got; 0 if none did."""
        import torch

        if self.accelerator.num_processes == 1:
            return self._signal or 0
        return int(
            self.accelerator.gather(torch.tensor([self._signal or 0]).to(self.accelerator.device)).max()
        )


def _save_state(state: dict[str, Any], path: Path) -> None:
    """torch.save. OSError, with the system's reason, if it cannot write all of it."""
    import torch

    try:
        torch.save(state, path)
    # torch says "unexpected pos 704 vs 598" on a full disk: write a little to get the system's own error
    except RuntimeError:
        with open(path, "ab") as file:
            file.write(bytes(1 << 20))
        raise


def _shard(model: PreTrainedModel) -> None:
    """Shard a model by FSDP (https://arxiv.org/abs/2304.11277), one transformer block at a time."""
    import torch
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        raise TrainingError(
            "--shard needs several processes: accelerate launch --num_processes N train.py ..."
        )
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
