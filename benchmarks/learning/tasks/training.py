"""The training loop: resumable, seeded, and stopped by Ctrl-C without loss."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.common.memory import peak_mib, reset_peak
from benchmarks.learning.tasks.config import RESUMABLE, Config, RunError
from benchmarks.learning.tasks.data import IGNORED, Batch, Task
from benchmarks.learning.tasks.files import (
    CHECKPOINT,
    METRICS,
    MetricsFile,
    load_checkpoint,
    save_checkpoint,
)
from benchmarks.learning.tasks.inspection import sample_recall
from benchmarks.learning.tasks.model import Encoder
from benchmarks.learning.tasks.ranks import ALONE, Ranks, joined_ranks
from benchmarks.learning.tasks.registry import TASKS
from benchmarks.learning.tasks.weights import gather, load_parts, save_parts, spread
from smartbird.nn import DenseWarmup, SampleAnneal, seed_evaluation, sketch_loss

WARMUP_SHARE = 0.05  # of the steps, in which the learning rate rises
MAX_GRADIENT_NORM = 1.0
PARTS = "parts"  # of a checkpoint: the folder of its model and optimizer, if it has them not itself

Row = dict[str, Any]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed and the run is safe in its checkpoint."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        config: of the run.
        test_loss, test_accuracy: of the last weights, on the test split.
        valid_loss, valid_accuracy: likewise on the validation split.
        majority_accuracy: what answering the commonest target scores on the test split.
        seconds: spent in training steps, over all parts of a resumed run.
        peak_mib: largest resident set of the process, in MiB.
        parameters: number of weights.
        recall: of each layer, the share of dense attention's mass on the keys that it chooses, a
            mean over the heads and queries of the first test batch; see `sample_recall`. Empty for
            runs that were finished before it was measured, and where ranks share sequences.
        fingerprint: of the task's data. Empty for runs that were finished before it was kept.
    """

    config: Config
    test_loss: float
    test_accuracy: float
    valid_loss: float
    valid_accuracy: float
    majority_accuracy: float
    seconds: float
    peak_mib: float
    parameters: int
    recall: tuple[float, ...] = ()
    fingerprint: str = ""


def train(
    config: Config, *, resume: bool = False, report: Callable[[Row], None] | None = None
) -> Result:
    """Trains the model of `config`, writing metrics and checkpoints into `config.out`.

    `metrics.jsonl` gets one JSON object a line: step, split ("train": mean over the steps since the
    last such line; "valid": every `eval_every` steps and at the end; "test": once, at the end, with
    the last weights), loss (mean cross-entropy in nats per target), accuracy, seconds (spent in
    training steps so far), peak_mib. `checkpoint.pt` is replaced every `checkpoint_every` steps.
    With `dcp` it names a folder beside it, into which each process writes the weights that it has.

    The learning rate rises linearly over the first 5 % of the steps and falls to 0 as a half
    cosine; the optimizer is AdamW, gradients are clipped to norm 1. The sketch's own loss is added
    to the task's, times `config.distill_weight`.

    Of the processes that torchrun starts each takes its share of every batch: of the sequences and,
    among `context_parallel` of them, of the tokens. With `fsdp` it has a part of the weights. They
    train what one would but for random numbers and rounding, whatever their number, so a run may go
    on with another. The first writes; Ctrl-C or SIGTERM of any stops all at the same step.

    Args:
        config: the run; see `default_config`.
        resume: go on from the checkpoint in `config.out`, bit for bit as if the run had never
            stopped (with the same number of threads and processes); a finished run just gives its
            result. With more `steps` than before, it trains longer: from there on the learning rate
            and the curriculum are those of a run of so many steps.
        report: is called with every row of metrics.

    Raises:
        RunError: the directory holds a run already (without `resume`) or none to go on with, the
            checkpoint is broken, of another configuration or of more steps, a package is missing,
            sizes do not fit together, processes cannot share this work, the loss is no longer
            finite, or another process is gone.
        OSError: the directory cannot be written.
        Interrupted: after Ctrl-C, once a checkpoint is written. A second Ctrl-C does not wait.
    """
    threads = torch.get_num_threads()
    with joined_ranks(config) as ranks, torch.random.fork_rng(devices=[]):
        torch.set_num_threads(config.threads or ranks.threads(threads))
        try:
            with contextlib.closing(_Run(config, resume, report or _ignore, ranks)) as run:
                return run.finish()
        finally:
            torch.set_num_threads(threads)


def load_model(checkpoint: str | Path) -> tuple[Encoder, Task]:
    """The model of a checkpoint, in evaluation mode, and its task (for `tokenizer` and batches).

    It chooses keys as at the checkpoint's step: in dense warm-up, all of them.

    Raises:
        RunError: the checkpoint is missing or broken, or its task cannot be built here.
    """
    path = Path(checkpoint)
    state = load_checkpoint(path)
    config = _config_of(state, path)
    task, model = _build(config)
    _restore(path, state, task, model, _schedules(config, model))
    return model.eval(), task


def saved_config(directory: str | Path) -> Config:
    """The configuration of the run in `directory`, with `out` set to it.

    Raises:
        RunError: there is no checkpoint, or it is broken.
    """
    path = Path(directory) / CHECKPOINT
    return dataclasses.replace(_config_of(load_checkpoint(path), path), out=str(directory))


class _Stop(Exception):
    """Ctrl-C was seen at a point where the run's state is whole."""


class _Run:
    """The state of a run, and its loop."""

    def __init__(
        self,
        config: Config,
        resume: bool,
        report: Callable[[Row], None],
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.resume, self.report, self.ranks = config, resume, report, ranks
        directory = Path(config.out)
        self.checkpoint = directory / CHECKPOINT
        self._saved_state()  # refuses a directory before the work of building
        torch.manual_seed(config.seed)
        self.task, self.model = _build(config)
        ranks.spread(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr)
        self.schedules = _schedules(config, self.model)
        self.step = 0
        self.parts = ""
        self.evaluated_at = 0
        self.valid: list[float] = []
        self.test: list[float] = []
        self.pending = [0.0, 0.0, 0.0]  # loss, correct and targets since the last train row
        self.seconds = 0.0
        self.peak_before = 0.0
        ranks.any(False)  # once all have looked at the directory
        self.metrics: MetricsFile | None = None
        if ranks.is_first:
            directory.mkdir(parents=True, exist_ok=True)
            self.metrics = MetricsFile(directory / METRICS)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()

    def finish(self) -> Result:
        """Does what is left to do."""
        with _interrupts_are_a_flag(self.ranks) as self.interrupted:
            self._begin()
            try:
                self._loop()
                peak, recall = self._peak(), self._recall()
            except _Stop:
                self._save()
                raise Interrupted(
                    f"stopped at step {self.step} of {self.config.steps}, "
                    f"saved in {self.checkpoint}; --resume goes on from there"
                ) from None
        return Result(
            config=self.config,
            test_loss=self.test[0],
            test_accuracy=self.test[1],
            valid_loss=self.valid[0],
            valid_accuracy=self.valid[1],
            majority_accuracy=self.task.majority_accuracy,
            seconds=self.seconds,
            peak_mib=peak,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            recall=recall,
            fingerprint=self.task.fingerprint,
        )

    def _recall(self) -> tuple[float, ...]:
        if self.ranks.context is not None:
            return ()
        first = next(iter(self.task.eval_batches("test")))
        return tuple(sample_recall(self.model, first).mean(1).tolist())

    def _begin(self) -> None:
        # Asked again: until the metrics were locked, another process may have trained here.
        state = self._saved_state() if self.metrics is not None or self.resume else None
        if self.metrics is not None:
            self.metrics.cut(state["metrics_bytes"] if state else 0)
        reset_peak()
        if state is None:
            self._save()
        else:
            self._load(state)

    def _loop(self) -> None:
        config = self.config
        with tqdm(
            total=config.steps,
            initial=self.step,
            desc=f"{config.task} {config.attention}",
            unit="step",
            disable=None if self.ranks.is_first else True,
        ) as bar:
            self._steps(bar)
        if not self.test:
            self.test = self._evaluate("test")
            self._save()

    def _steps(self, bar: tqdm[NoReturn]) -> None:
        config = self.config
        while True:
            # Comes first, so that a run that was stopped while it evaluated begins with that.
            finished = self.step == config.steps
            if self.step > self.evaluated_at and (finished or self.step % config.eval_every == 0):
                self.valid = self._evaluate("valid")
                self.evaluated_at = self.step
            if finished:
                break
            bar.set_postfix(loss=f"{self._train_step():.3f}", refresh=False)
            bar.update()
            if self.step % config.log_every == 0 or self.step == config.steps:
                self._write_row("train", self.pending)
                self.pending = [0.0, 0.0, 0.0]
            if self.step % config.checkpoint_every == 0:
                self._save()
            self._stop_if_interrupted()

    def _train_step(self) -> float:
        """One optimizer step; gives its mean cross-entropy."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        batch = self.ranks.share(self.task.train_batch(self.step))
        self.ranks.seed(self.config.seed, self.step)
        self.model.train()
        loss_sum, own_correct, own_count = _score(self.model, batch)
        own_tokens = batch.tokens.numel() if batch.key_mask is None else int(batch.key_mask.sum())
        task_loss, correct, count, tokens = self.ranks.sums(
            loss_sum.item(), own_correct, own_count, own_tokens
        )
        # A sketch's loss is a mean over the tokens of a group.
        weight = self.config.distill_weight * (own_tokens * self.ranks.sharers / tokens)
        loss = loss_sum / count + weight * sketch_loss(self.model)
        if self.ranks.any(not math.isfinite(loss.item())):
            raise RunError(
                f"the loss became {loss.item()} at step {self.step + 1}; "
                f"{self.checkpoint} holds the last checkpoint"
            )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.ranks.add_gradients(self.model.parameters())
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        for schedule in self.schedules.values():
            schedule.step()
        self.step += 1
        for place, part in enumerate((task_loss, correct, count)):
            self.pending[place] += part
        self.seconds += time.perf_counter() - start
        return task_loss / count

    def _evaluate(self, split: str) -> list[float]:
        """Mean loss and accuracy over `split`, which also become a row of metrics."""
        total = [0.0, 0.0, 0.0]
        batches, group = self.task.eval_batches(split), self.ranks.group
        self.model.eval()
        with torch.no_grad():  # FSDP trains with what its forward pass has made here
            while turn := list(itertools.islice(batches, self.ranks.groups)):
                # At the end some groups look again at the last batch, as FSDP needs all of them.
                batch = self.ranks.cut(turn[min(group, len(turn) - 1)])
                loss_sum, correct, count = _score(self.model, batch)
                if group < len(turn):
                    for place, part in enumerate((loss_sum.item(), correct, count)):
                        total[place] += part
                self._stop_if_interrupted()
        total = self.ranks.sums(*total)
        self._write_row(split, total)
        return [total[0] / total[2], total[1] / total[2]]

    def _write_row(self, split: str, sums: list[float]) -> None:
        if self.metrics is None:
            return
        loss_sum, correct, count = sums
        row = {
            "step": self.step,
            "split": split,
            "loss": loss_sum / count,
            "accuracy": correct / count,
            "seconds": round(self.seconds, 3),
            "peak_mib": round(self._peak(), 1),
        }
        self.metrics.write(row)
        self.report(row)

    def _peak(self) -> float:
        return max(self.peak_before, peak_mib())

    def _stop_if_interrupted(self) -> None:
        if self.ranks.any(self.interrupted()):
            raise _Stop

    def _save(self) -> None:
        # Of what is spread over ranks all of them have a part in this.
        held = self._save_parts() if self.config.dcp else gather(self.model, self.optimizer)
        if self.metrics is None:
            return
        state = {
            "config": self.config.as_dict(),
            "fingerprint": self.task.fingerprint,
            "step": self.step,
            "evaluated_at": self.evaluated_at,
            "valid": self.valid,
            "test": self.test,
            "pending": self.pending,
            "seconds": self.seconds,
            "peak_mib": self._peak(),
            "metrics_bytes": self.metrics.sync(),
            **held,
            **{name: schedule.state_dict() for name, schedule in self.schedules.items()},
            "random": torch.get_rng_state(),
        }
        save_checkpoint(self.checkpoint, state)
        for folder in self.checkpoint.parent.glob(f"{self.checkpoint.stem}-[0-9]*"):
            if folder.name != held.get(PARTS):
                shutil.rmtree(folder)

    def _save_parts(self) -> dict[str, Any]:
        # Those of the last checkpoint must stay until there are others.
        parts = f"{self.checkpoint.stem}-{self.step}"
        if parts != self.parts:
            save_parts(self.checkpoint.parent / parts, self.model, self.optimizer)
            self.parts = parts
        return {PARTS: parts}

    def _saved_state(self) -> dict[str, Any] | None:
        """What to go on from; None where the run begins."""
        if not self.resume:
            _refuse_used(self.checkpoint.parent)
            return None
        state = load_checkpoint(self.checkpoint)
        saved = _config_of(state, self.checkpoint).as_dict()
        for name, value in self.config.as_dict().items():
            if name not in RESUMABLE and saved[name] != value:
                raise RunError(
                    f"{self.checkpoint}: was made with {name}={saved[name]}, not {name}={value}"
                )
        if self.config.steps < state["step"]:
            raise RunError(
                f"{self.checkpoint}: has made {state['step']} steps, more than "
                f"steps={self.config.steps}"
            )
        return state

    def _load(self, state: dict[str, Any]) -> None:
        self.parts = state.get(PARTS, "")
        if self.ranks.fsdp and not self.parts:
            spread(state, self.model)
        _restore(self.checkpoint, state, self.task, self.model, self.schedules, self.optimizer)
        self.step, self.evaluated_at = state["step"], state["evaluated_at"]
        self.valid, self.pending = state["valid"], state["pending"]
        self.test = state["test"] if self.step == self.config.steps else []
        self.seconds, self.peak_before = state["seconds"], state["peak_mib"]
        torch.set_rng_state(state["random"])


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of training step `step` (from 0): linear rise, then half a cosine to 0."""
    warmup = max(1, round(WARMUP_SHARE * config.steps))
    rise = (step + 1) / warmup
    fall = 0.5 * (1.0 + math.cos(math.pi * max(0, step - warmup) / max(1, config.steps - warmup)))
    return config.lr * min(rise, fall)


def _score(model: nn.Module, batch: Batch) -> tuple[Tensor, int, int]:
    """Summed cross-entropy, right answers, and number of targets of a batch."""
    logits = model(batch.tokens, batch.key_mask, batch.positions).flatten(0, -2)
    targets = batch.targets.flatten()
    asked = targets != IGNORED
    logits, targets = logits[asked], targets[asked]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss, int((logits.argmax(-1) == targets).sum()), len(targets)


def _build(config: Config) -> tuple[Task, Encoder]:
    try:
        task = TASKS[config.task](config)
        model = Encoder(config, task)
    except (ValueError, RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"task {config.task}: {reason}") from error
    seed_evaluation(model, config.seed)
    return task, model


def _schedules(config: Config, model: Encoder) -> dict[str, DenseWarmup | SampleAnneal]:
    """What changes in the model with the steps, by its name in a checkpoint."""
    most = config.anneal_samples or config.num_samples
    return {
        "warmup": DenseWarmup(model, config.dense_warmup),
        "anneal": SampleAnneal(model, most, config.anneal_steps),
    }


def _refuse_used(directory: Path) -> None:
    metrics = directory / METRICS
    if (directory / CHECKPOINT).exists() or (metrics.exists() and metrics.stat().st_size):
        raise RunError(
            f"{directory}: already holds a run; resume it (--resume) or choose another (--out)"
        )


def _config_of(state: dict[str, Any], path: Path) -> Config:
    try:
        return Config(**state["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: its configuration is of another version ({error})") from error


def _restore(
    path: Path,
    state: dict[str, Any],
    task: Task,
    model: Encoder,
    schedules: dict[str, DenseWarmup | SampleAnneal],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    if state["fingerprint"] != task.fingerprint:
        raise RunError(f"{path}: was trained on other data than its task gives here")
    # Checkpoints from before there was one lack it.
    state.setdefault("anneal", schedules["anneal"].state_dict())
    parts: dict[str, Any] = dict(schedules)
    if PARTS in state:
        load_parts(path.parent / state[PARTS], model, optimizer)
    else:
        parts |= {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"{path}: its {name} does not fit this model ({reason})") from error


def _ignore(row: Row) -> None:
    """Reports nothing."""


@contextlib.contextmanager
def _interrupts_are_a_flag(ranks: Ranks) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed; a second one raises at once.

    Among several ranks SIGTERM, which torchrun sends, is the same, and none after the first raises:
    each of them may get both. Python delivers signals to the main thread only; in another thread
    this does nothing.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        pressed.set()
        if ranks.size == 1:
            signal.signal(number, before[number])

    numbers = (signal.SIGINT,) if ranks.size == 1 else (signal.SIGINT, signal.SIGTERM)
    before = {int(number): signal.signal(number, note) for number in numbers}
    try:
        yield pressed.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
