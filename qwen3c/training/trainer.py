"""What the three stages share: optimiser, schedule, the loop, evaluation, checkpoints, metrics, resume.

A stage says which samples a step trains on, what their loss is and how a model is judged. Everything that
decides a step is a function of (settings, step): after a kill, a resumed run gives the same losses to the
bit.

A run is resumed with the settings (Settings.deciding) and inputs that it began with. The number of steps may
change, and the warm-up, which follows from it: from there on the learning rate has the new schedule.
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

Batch = dict[str, "torch.Tensor"]  # one forward and backward pass; the keys are the stage's


@dataclass(frozen=True)
class Settings:
    """How to train; what to train on is the stage's."""

    out: Path
    steps: int
    batch: int  # sequences (prompts, in GRPO) per step, over all processes
    micro_batch: int  # sequences per forward pass and process
    learning_rate: float  # at its highest
    warmup: int  # steps of linear rise; then a cosine falls to min_learning_rate
    min_learning_rate: float = 0.1  # as a fraction of learning_rate
    weight_decay: float = 0.1  # on matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of the gradient
    precision: str = "fp32"  # or bf16: matrix products in bfloat16, weights and sums in float32
    seed: int = 1
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep: int = 2  # checkpoints that stay
    shard: bool = False  # weights, gradients and optimiser over the processes (FSDP), else copies in each
    compile: bool = False
    quiet: bool = False

    def deciding(self) -> dict[str, Any]:
        """The settings that must stay for a run to be resumed.

        Of the others, the schedule may be drawn out, and micro-batches change nothing but how sums are rounded.
        """
        others = (
            "out", "steps", "warmup", "micro_batch", "evaluate_every", "checkpoint_every", "keep", "compile", "quiet",
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
    """What a run begins with, or goes on from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    resume: Path | None  # the checkpoint that model and tokenizer were read from
    inputs: Inputs  # what else must be the same for a run to be resumed: data, shapes, ...
    telling: Telling


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint."""

    def __init__(self, number: int, step: int) -> None:
        where = f"after step {step}; --resume goes on from there" if step else "before the first step"
        super().__init__(f"stopped {where}")
        self.signal = number


class Trainer(ABC):
    """Runs a stage. TrainingError, one line, when it cannot; the checkpoints are then what they were."""

    best_is_highest = False  # of the judgement that picks the best checkpoint

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
        self.step_record: dict[str, Any] = {}  # what a stage adds to the record of a step
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
    # What a stage says

    @abstractmethod
    def updates(self, step: int) -> Iterator[Sequence[Batch]]:
        """This process's share of each update of a step, as micro-batches."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """(sum of the losses, how many they are) of a micro-batch."""

    @abstractmethod
    def judge(self) -> tuple[float, dict[str, Any]]:
        """How good the model is, and what to record beside it; every process computes all of it."""

    @abstractmethod
    def describe(self) -> str:
        """One line on what is trained on."""

    # ------------------------------------------------------------------------
    # The loop

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def run(self) -> None:
        """Train from the current step to the last; Stopped after SIGINT, SIGTERM or SIGHUP, with a checkpoint."""
        s, telling = self.settings, self.telling
        telling.say(self.describe())
        with self._catching_signals(), telling.steps(self.step):
            if self.step == 0:
                self._evaluate()
                self._leave_if_asked()
            while self.step < s.steps:
                telling.step(self.step, s.steps)  # evaluating has erased it
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
                f"step {self.step}: the loss is {mean:g} and its gradient's norm {norm:g}: training has diverged; "
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
                # data parallelism averages the gradients of the processes; the mean over all samples is wanted
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
        """Gradients of the processes meet in the last micro-batch of an update only."""
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
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.to(self.accelerator.device), reduction="sum")

    def _evaluate(self) -> bool:
        """Judge the model and record it; whether it is the best so far."""
        import torch

        self.model.eval()
        with self.telling.doing(f"step {self.step:,}: evaluating"), torch.no_grad():
            judgement, record = self.judge()
        self._record({"step": self.step, **record})
        better = self.step > 0 and (  # the model that training began with is no result of it
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
        """A Hugging Face directory of the model as it is; called by every process, written by the first."""
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
        """Go on from a checkpoint; the weights were read from it already."""
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
        """All of them, by their names; every process takes part where they are sharded."""
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

        A second SIGINT or SIGTERM ends it at once; a second SIGHUP does not: a shell sends its own after the system's.
        """

        def request(number: int, frame: FrameType | None) -> None:
            if self._signal is not None and number != hangup:
                raise KeyboardInterrupt
            if self._signal is None and number == signal.SIGINT:
                self.telling.at_once("stopping after this step; another Ctrl-C stops at once")
            self._signal = self._signal or number

        hangup = getattr(signal, "SIGHUP", None)
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:  # nohup has it ignored
            numbers.append(hangup)
        previous = {number: signal.signal(number, request) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop_requested(self) -> int:
        """The signal that any of the processes got, or 0."""
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
    except RuntimeError:  # "unexpected pos 704 vs 598" on a full disk: ask the system itself
        with open(path, "ab") as file:
            file.write(bytes(1 << 20))
        raise


def _shard(model: PreTrainedModel) -> None:
    """Fully sharded data parallelism (https://arxiv.org/abs/2304.11277), a block at a time."""
    import torch
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        raise TrainingError(
            "--shard needs several processes: accelerate launch --num_processes N train.py ..."
        )
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
