"""The training loop: mixed precision, accumulation, validation, samples, checkpoints, and an exact resume.

`Trainer.steps()` is a plain generator that takes one optimizer step at a time and yields what happened, so that a
notebook can draw, pause or stop between two steps; `fit()` runs it to the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmcore.checkpoint import (
    CheckpointError,
    checkpoints,
    find_checkpoint,
    load_weights,
    prune_checkpoints,
    read_config,
    read_trainer_state,
    save_checkpoint,
)
from llmcore.config import TrainConfig
from llmcore.dataset import IGNORED
from llmcore.device import (
    always_the_same_sums,
    autocast,
    compiled,
    is_out_of_memory,
    keep_freed_memory,
    pick_device,
    pick_precision,
    reason,
)
from llmcore.files import display_path, fsync, resolve, to_json, write_atomic
from llmcore.generate import stream
from llmcore.measure.memory import advice, check_memory
from llmcore.model import Transformer
from llmcore.optim import back_off, build_optimizers, learning_rate_at
from llmcore.runs import TrainingError, changes, check_writable, environment, metric_lines, nobody_at_work, only_run
from llmcore.tokenizer import Tokenizer

Event = dict[str, Any]

# attributes of a Trainer that a checkpoint keeps, besides tensors and the scaler's state
SAVED = ("step", "tokens", "skipped", "skipped_in_a_row", "val_loss", "val_step", "best_loss", "plateau")


class TrainData(Protocol):
    """What the trainer asks of its data: batches that are a pure function of (step, seed)."""

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """x and y, int64 (batch, time)."""


class ValData(Protocol):
    """What the trainer asks of its validation data: the whole split, once, in order.

    Where it has `bytes_per_token`, the raw bytes of its text per token, losses are given in bits per byte too.
    """

    def sequential(self, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of x and y, int64 (batch, time)."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps taken in all.
        val_loss: of the last validation, nats per token; None if there was none yet.
        stopped_early: whether it was stopped before max_steps.
        checkpoint: the last checkpoint written.
    """

    step: int
    val_loss: float | None
    stopped_early: bool
    checkpoint: Path | None


class Trainer:
    """One training run in one folder.

    Building one checks everything and writes nothing. The disk changes when `steps()` has taken a first step.

    Args:
        model: moved to the device.
        train_data: batches by (step, seed).
        val_data: None for no validation.
        config: how to train.
        output_dir: the run's folder; `metrics.jsonl` and checkpoints go there.
        tokenizer: copied into checkpoints and used for samples.
        sampler: what makes a sample of a prompt where there is no tokenizer to do it with.
        callbacks: each is called with every event before it is logged, and may add to it.
        device: "auto", "cpu", "cuda" or "mps".
        resume: a checkpoint to go on from: its folder, or "latest" or "best" of this run.
        init_step: if given, the step that the run must start from.

    Attributes:
        step: optimizer steps taken.
        stop_requested: set by `request_stop()`: the current step is finished, then the run saves and ends.
        interrupted: whether a signal asked for that.

    Raises:
        TrainingError: before anything is built or written, if this cannot work.
        CheckpointError: if the checkpoint to resume from is missing, damaged or does not fit.
    """

    def __init__(
        self,
        model: Transformer,
        train_data: TrainData,
        val_data: ValData | None,
        config: TrainConfig,
        output_dir: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | None = None,
        sampler: Callable[[str], str] | None = None,
        callbacks: Sequence[Callable[[Event], None]] = (),
        device: str = "auto",
        resume: str | os.PathLike[str] | None = None,
        init_step: int | None = None,
    ) -> None:
        self.device = pick_device(device)
        self.precision = pick_precision(config.precision, self.device)
        self.run_dir = resolve(output_dir)
        check_writable(self.run_dir)
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise TrainingError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model only vocab_size={model.config.vocab_size}"
            )
        check_same_tokenizer(tokenizer, train_data, val_data)
        nobody_at_work(self.run_dir)
        if resume is None and ((self.run_dir / "metrics.jsonl").exists() or any(self.run_dir.glob("step=*"))):
            raise TrainingError(
                f"{display_path(self.run_dir)} holds a run already; resume it (resume='latest') "
                "or choose another output_dir"
            )
        if resume is None:
            self._check_start(0, init_step, config)
        check_memory(model.config, config, self.device.type)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model, self.train_data, self.val_data = model.to(self.device), train_data, val_data
        self.config, self.tokenizer, self.callbacks = config, tokenizer, list(callbacks)
        self.sampler = sampler or (self._write if tokenizer is not None else None)
        self.model.activation_checkpointing = config.activation_checkpointing
        self.optimizers = build_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.step = self.tokens = self.skipped = self.skipped_in_a_row = 0
        self._train_loss = math.nan  # of the last step
        self.val_loss: float | None = None
        self.val_step: int | None = None  # the step of that validation
        self.best_loss = math.inf
        self.last_checkpoint: Path | None = None
        self.stop_requested = self.interrupted = False
        self._save_requested = self._sample_requested = False
        self._sample_prompt: str | None = None
        self._half_a_step = False  # an error has left the weights between two steps
        self._environment = environment(self.device)
        self._history: list[Event] = []
        self._begun = False  # whether the run's folder has become this run's
        self._unlogged: list[Event] = []  # events that are not in metrics.jsonl yet
        self._metrics = hashlib.sha256(_content(self.run_dir / "metrics.jsonl"))  # as this trainer knows it
        self.plateau = {"scale": 1.0, "best": math.inf, "bad": 0}
        self._loss: Callable[..., Tensor] = self.model
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        if resume is not None:
            self._resume(resume, init_step)
        self._start = self._saved_step = self.step

    @staticmethod
    def _check_start(step: int, init_step: int | None, config: TrainConfig) -> None:
        """Refuse a run that does not start where it is told to, or starts beyond its end."""
        if init_step is not None and init_step != step:
            raise TrainingError(
                f"init_step={init_step}, but training starts at step {step}; "
                "leave it out, or name the checkpoint of that step"
            )
        if step > config.max_steps:
            raise TrainingError(
                f"max_steps={config.max_steps}, but the run has reached step {step}; "
                "raise max_steps, or resume from an earlier checkpoint"
            )

    # Running

    def fit(self) -> TrainResult:
        """Train to the end, or until stopped, and say how it went."""
        for _ in self.steps():
            pass
        return self.result()

    def result(self) -> TrainResult:
        """How the run stands."""
        return TrainResult(self.step, self.val_loss, self.step < self.config.max_steps, self.last_checkpoint)

    def request_stop(self) -> None:
        """Finish the current step, save and end."""
        self.stop_requested = True

    def request_save(self) -> None:
        """Write a checkpoint after the current step."""
        self._save_requested = True

    def request_sample(self, prompt: str | None = None) -> None:
        """Write a sample after the current step, of the configured prompt or another."""
        self._sample_requested, self._sample_prompt = True, prompt

    def serve_requests(self) -> Event:
        """Do at once what `save` and `sample` asked for: for a run that is paused between two steps."""
        event = self._sample() if self._sample_requested else {}
        if self._save_requested and self._sound():
            event["checkpoint"] = str(self._save())
        return event

    def steps(self) -> Generator[Event]:
        """Train step by step, yielding one event per optimizer step; saves at the end, or when closed.

        An event has step, tokens, loss (nats per token), learning_rate, grad_norm, skipped (steps so far),
        seconds (of this step) and tokens_per_second; after a validation also val_loss, val_perplexity and
        val_bits_per_byte; after a sample, sample and sample_prompt; after a save, checkpoint.

        SIGINT and SIGTERM end the run after the current step as `request_stop()` does; a second one raises at once.

        Raises:
            TrainingError: before anything is written, if another run is at work in the same folder or has trained there
                since; after `max_skipped_steps` steps without a finite gradient in a row; if memory runs out, or the
                room for `metrics.jsonl`.
            CheckpointError: if a checkpoint cannot be written. Once there is room, training may go on from here.
        """
        config = self.config
        if self._half_a_step:
            raise TrainingError(f"an error ended step {self.step + 1} half-way; resume from the last checkpoint")
        with only_run(self.run_dir), self._signals_stop():
            self._check_still_ours()
            if config.max_steps <= self.step <= self._saved_step:
                warnings.warn(
                    f"nothing is left to train: the run is at step {self.step} of max_steps={config.max_steps}; "
                    "raise max_steps to go on",
                    stacklevel=2,
                )
                changed = self._history[-1]["changed"] if self._history else {}
                newest = checkpoints(self.run_dir)[-1:] == [self.last_checkpoint]
                if newest and "train.keep_checkpoints" not in changed:  # a kill may have come before the run did so
                    prune_checkpoints(self.run_dir, config.keep_checkpoints)
                return
            self._loss = self._compiled()
            try:
                while self.step < config.max_steps and not self.stop_requested:
                    try:
                        event = self._train_step()
                    except RuntimeError as error:
                        if is_out_of_memory(error):
                            raise self._out_of_memory() from error
                        raise
                    self._train_loss = event["loss"]
                    self._unlogged.append(event)
                    last = self.step == config.max_steps  # a stop does nothing that a run without it would not do
                    new_best = False
                    try:
                        if self.val_data is not None and (last or _due(self.step, config.eval_interval)):
                            event |= self.validate()
                            new_best = event["val_loss"] < self.best_loss
                            self.best_loss = min(self.best_loss, event["val_loss"])
                            self._update_plateau(event["val_loss"])
                        sample_due = _due(self.step, config.sample_interval) or (last and config.sample_interval)
                        if (self._sample_requested or sample_due) and self._sound():
                            event |= self._sample()
                        for callback in self.callbacks:
                            callback(event)
                    finally:  # the step was taken, whatever a callback thinks of it
                        self._log()
                    due = _due(self.step, config.checkpoint_interval)
                    wanted = last or new_best or due or self._save_requested or self.stop_requested
                    if wanted and self._sound():
                        event["checkpoint"] = str(self._save())
                    yield event
            finally:
                # reached early when the consumer closes the generator or an error ends it
                worth_it = self.skipped_in_a_row < config.max_skipped_steps and not self._half_a_step
                if self.step > self._saved_step and worth_it:
                    if self._sound():
                        self._save()
                    else:
                        warnings.warn(
                            f"step {self.step} is not saved: its weights are not finite. {self._last_good()}",
                            stacklevel=2,
                        )

    def measured_steps(self, count: int) -> list[Event]:
        """Take a few steps just as a run would, compiled or not, but write nothing: for measuring speed."""
        self._loss = self._compiled()
        return [self._train_step() for _ in range(count)]

    def _sound(self) -> bool:
        """Whether there is something worth keeping: a step was taken here, and all weights are finite."""
        return self.step > self._start and all(bool(p.isfinite().all()) for p in self.model.parameters())

    def _last_good(self) -> str:
        return f"Last good checkpoint: {display_path(self.last_checkpoint) if self.last_checkpoint else 'none'}"

    @contextlib.contextmanager
    def _signals_stop(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the run after the current step. Only the main thread may set handlers."""
        self.stop_requested = self.interrupted = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous: dict[int, Any] = {}

        def handle(number: int, frame: Any) -> None:
            if self.interrupted:
                signal.signal(number, previous[number])
                raise KeyboardInterrupt
            self.stop_requested = self.interrupted = True

        for caught in (signal.SIGINT, signal.SIGTERM):
            previous[caught] = signal.signal(caught, handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # One step

    def _train_step(self) -> Event:
        with always_the_same_sums(self.device):
            return self._step()

    def _step(self) -> Event:
        config, started = self.config, time.perf_counter()
        rate = learning_rate_at(self.step, config) * self.plateau["scale"]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
        first = self.step * config.grad_accum_steps
        batches = [
            self.train_data.batch(first + i, config.batch_size, config.seed) for i in range(config.grad_accum_steps)
        ]
        counts = [int((y != IGNORED).sum()) for _, y in batches]
        self.model.train()
        loss = None
        try:
            loss = self._gradients(batches, counts)
        except Exception as error:
            if self._loss is self.model or is_out_of_memory(error):
                raise
            self._loss = self._uncompiled(error)
        if loss is None:  # only here, where the error no longer holds on to its tensors
            loss = self._gradients(batches, counts)
        for optimizer in self.optimizers if any(counts) else ():
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        values = torch.stack((loss, norm)).tolist()
        finite = all(map(math.isfinite, values))
        self._half_a_step = True
        if not finite:  # all optimizers step, or none: the scaler's own step() would decide for each by itself
            back_off(self.scaler)
        elif any(counts):
            for optimizer in self.optimizers:
                optimizer.step()
            self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._half_a_step = False
        self.tokens += sum(x.numel() for x, _ in batches)
        self._count_skipped(finite)
        seconds = time.perf_counter() - started
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": values[0],
            "learning_rate": rate * config.learning_rate,
            "grad_norm": values[1],
            "skipped": self.skipped,
            "seconds": seconds,
            "tokens_per_second": sum(x.numel() for x, _ in batches) / seconds,
        }

    def _gradients(self, batches: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int]) -> Tensor:
        """Add up the gradients of the batches, which have so many targets; returns their mean loss, a scalar."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)  # a step that an error broke off may have left some
        loss = torch.zeros((), device=self.device)
        for (x, y), count in zip(batches, counts, strict=True):
            if not count:
                continue
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            with autocast(self.precision, self.device):
                part = self._loss(x, y) * (count / sum(counts))
            self.scaler.scale(part).backward()
            loss += part.detach()
        return loss

    def _count_skipped(self, finite: bool) -> None:
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise TrainingError(
                f"loss or gradient was not finite {self.skipped_in_a_row} steps in a row, up to step {self.step}. "
                f"{self._last_good()}. Try a lower learning_rate (here {self.config.learning_rate:g}) or precision "
                f"fp32 (here {self.precision}); where neither can be set, another seed or preset"
            )

    def _out_of_memory(self) -> TrainingError:
        """The error to raise when memory has run out, with what the shapes say the run needs."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)  # room to save what the steps before have learnt
        what = advice(self.model.config, self.config, self.device.type)
        return TrainingError(f"out of memory in step {self.step + 1} on {self.device}. {what}, and resume")

    def _compiled(self) -> Callable[..., Tensor]:
        """The model, compiled where that is asked for or pays: about ten seconds to win back on a CPU.

        The whole run counts, not what is left of it: compiled code rounds otherwise, and a resume must not change that.
        """
        wanted = self.config.compile == "on"
        if self.config.compile == "auto":
            windows = self.config.max_steps * self.config.batch_size * self.config.grad_accum_steps
            work = windows * self.model.config.max_seq_len * self.model.config.flops_per_token()
            wanted = work > (2e12 if self.device.type == "cpu" else 2e16) and self.device.type != "mps"
        try:
            return compiled(self.model) if wanted else self.model
        except Exception as error:
            return self._uncompiled(error)

    def _uncompiled(self, error: Exception) -> Callable[..., Tensor]:
        """The model as it is, because compiling it, or a compiled step, has failed; nothing of that step was taken.

        Raises:
            TrainingError: if the configuration insists on compiling.
        """
        if self.config.compile == "on":
            raise TrainingError(
                f"compile='on', but the model cannot be trained compiled: {reason(error)}. "
                "Mend that, or set compile='auto' or 'off'"
            ) from error
        warnings.warn(f"the model is trained uncompiled, which takes longer: {reason(error)}", stacklevel=2)
        return self.model

    def _update_plateau(self, val_loss: float) -> None:
        """Lower the rate when validation has not improved for `plateau_patience` validations."""
        state = self.plateau
        if self.config.schedule != "plateau":
            return
        if val_loss < state["best"]:
            state["best"], state["bad"] = val_loss, 0
        else:
            state["bad"] += 1
        if state["bad"] >= self.config.plateau_patience:
            state["scale"], state["bad"] = max(state["scale"] * self.config.plateau_factor, self.config.min_lr_ratio), 0

    # Looking at the model

    @torch.no_grad()
    def validate(self) -> Event:
        """Loss on the validation data: nats per token, perplexity, and bits per byte of raw text.

        Quick, to watch a run by: windows cut across documents. Bits per byte are exact but for the split's very first
        token, which follows nothing and is counted at the mean. To quote a figure, use `evaluate.evaluate`.
        """
        assert self.val_data is not None
        self.model.eval()
        total, count = 0.0, 0
        for number, (x, y) in enumerate(self.val_data.sequential(self.config.batch_size)):
            if self.config.eval_batches and number >= self.config.eval_batches:
                break
            targets = int((y != IGNORED).sum())
            if not targets:
                continue
            with autocast(self.precision, self.device):
                total += float(self.model(x.to(self.device), y.to(self.device))) * targets
            count += targets
        self.val_loss, self.val_step = total / count, self.step
        event = {"val_loss": self.val_loss, "val_perplexity": math.exp(min(self.val_loss, 700.0))}
        if bytes_per_token := getattr(self.val_data, "bytes_per_token", None):
            event["val_bits_per_byte"] = self.val_loss / math.log(2) / bytes_per_token
        return event

    def _sample(self) -> Event:
        prompt = self.config.sample_prompt if self._sample_prompt is None else self._sample_prompt
        self._sample_requested, self._sample_prompt = False, None
        if self.sampler is None:
            return {}
        self.model.eval()
        try:
            return {"sample": self.sampler(prompt), "sample_prompt": prompt}
        except ValueError as error:  # someone typed what cannot be encoded: no reason for a run to die
            return {"sample": f"(no sample: {error})", "sample_prompt": prompt}

    def _write(self, prompt: str) -> str:
        assert self.tokenizer is not None
        config = self.config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pieces = stream(
                self.model,
                self.tokenizer,
                prompt,
                config.sample_tokens,
                temperature=0.8,
                top_p=0.95,
                seed=config.seed,
            )
            return "".join(pieces)

    # Saving and resuming

    def _description(self) -> Event:
        """What `config.json` says besides the model: how and on what it is trained."""
        data = {
            name: getattr(part, "fingerprint", None)
            for name, part in (("train", self.train_data), ("val", self.val_data))
        }
        return {
            "model": self.model.config.to_dict(),
            "train": self.config.to_dict(),
            "data": data,
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else None,
            "bytes_per_token": getattr(self.val_data, "bytes_per_token", None),
            "precision": self.precision,
            "device": str(self.device),
            "environment": self._environment,
            "history": self._history,
        }

    def _save(self) -> Path:
        """Write a checkpoint, named by the loss of its own step: of the validation if there was one, else of training.

        The events up to its step reach the disk first: no checkpoint is ahead of `metrics.jsonl`.
        """
        self._log(to_disk=True)
        tensors = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                for key, value in values.items():
                    tensors[f"{self._names[id(parameter)]}/{key}"] = torch.as_tensor(value)
        state = {
            **{name: getattr(self, name) for name in SAVED},
            "scaler": self.scaler.state_dict(),
        }
        validated = self.val_loss is not None and self.val_step == self.step
        self.last_checkpoint = save_checkpoint(
            self.run_dir,
            self.model,
            self.tokenizer,
            step=self.step,
            loss=self.val_loss if validated and self.val_loss is not None else self._train_loss,
            loss_of="validation" if validated else "training",
            config={
                **self._description(),
                "tokens": self.tokens,
                "val_loss": self.val_loss,
                "val_step": self.val_step,
            },
            tensors=tensors,
            state=state,
        )
        self._save_requested, self._saved_step = False, self.step
        prune_checkpoints(self.run_dir, self.config.keep_checkpoints)
        return self.last_checkpoint

    def _check_still_ours(self) -> None:
        """Refuse to go on where another trainer has trained since this one was built or stepped last."""
        if hashlib.sha256(_content(self.run_dir / "metrics.jsonl")).digest() != self._metrics.digest():
            raise TrainingError(
                f"the run in {display_path(self.run_dir)} has gone on since this Trainer, at step {self.step}, was "
                "built or stopped. Build the Trainer again with resume='latest', or choose another output_dir"
            )

    def _begin(self) -> None:
        """Let the folder become this run's: what it holds of later steps is set aside, and none of it is deleted.

        Whenever this is broken off, the checkpoint that the run goes on from is still the latest, with all its events.
        """
        metrics = self.run_dir / "metrics.jsonl"
        kept: list[bytes] = []
        cut: list[bytes] = []
        for line, event in metric_lines(self.run_dir):
            (kept if event and event["step"] <= self._start else cut).append(line)
        later = [path for path in sorted(self.run_dir.glob("step=*")) if _step_of(path) > self._start]
        if cut or later:
            names = (f"cut.{number}" for number in itertools.count(1))
            name = next(name for name in names if not any(self.run_dir.glob(f"{name}.*")))
            for path in later:
                os.rename(path, self.run_dir / f"{name}.{path.name}")
            if cut:
                write_atomic(self.run_dir / f"{name}.metrics.jsonl", b"\n".join(cut) + b"\n")
            self._history[-1:] = [{**entry, "set_aside": name} for entry in self._history[-1:]]
            warnings.warn(
                f"{display_path(self.run_dir)}: what does not belong to the first {self._start} steps is kept "
                f"as {name}.* (lines of metrics.jsonl: {len(cut)}, checkpoints: {len(later)}); delete it if you do not "
                "need it",
                stacklevel=2,
            )
        content = b"".join(line + b"\n" for line in kept)
        if content != _content(metrics):
            write_atomic(metrics, content)
        self._metrics = hashlib.sha256(content)
        write_atomic(self.run_dir / "config.json", to_json(self._description(), indent=1))
        self._begun = True

    def _log(self, to_disk: bool = False) -> None:
        """Append to `metrics.jsonl` the events that it does not have yet: all of them or, if that fails, none.

        Raises:
            TrainingError: if the disk is full. The events are kept, and written by the next call.
        """
        metrics, lines = (
            self.run_dir / "metrics.jsonl",
            "".join(to_json(event) + "\n" for event in self._unlogged).encode(),
        )
        known = self._metrics.copy()
        try:
            if not self._begun:
                self._begin()
                known = self._metrics.copy()
            known.update(lines)
            with open(metrics, "ab", buffering=0) as file:
                end = file.tell()
                try:
                    while file.tell() < end + len(lines):
                        file.write(lines[file.tell() - end :])
                    self._metrics, self._unlogged = known, []
                except BaseException:
                    file.truncate(end)
                    raise
            if to_disk:
                fsync(metrics)
        except OSError as error:
            raise TrainingError(
                f"{display_path(metrics)} cannot be written: {error}. Make room on the disk and train on; "
                "nothing is lost yet"
            ) from error

    def _resume(self, resume: str | os.PathLike[str], init_step: int | None) -> None:
        """Take over a checkpoint's weights, optimizer, counts and random state. Nothing on disk changes."""
        path = find_checkpoint(self.run_dir, os.fspath(resume))
        ours = path.resolve().parent == self.run_dir.resolve() and path.name.startswith("step=")
        if not ours and ((self.run_dir / "metrics.jsonl").exists() or any(self.run_dir.glob("step=*"))):
            raise TrainingError(
                f"{display_path(self.run_dir)} holds a run already, and {display_path(path)} is of another; "
                "choose another output_dir, or copy that checkpoint into a folder of its own and go on there"
            )
        config = read_config(path)
        now = self._description()
        differing = [
            f"model.{key}: {config['model'].get(key)} there, {value} here"
            for key, value in now["model"].items()
            if config["model"].get(key) != value
        ]
        differing += [
            f"{key}: {config.get(key)} there, {now[key]} here"
            for key in ("tokenizer", "data")
            if config.get(key) != now[key]
        ]
        if config.get("train", {}).get("optimizer") != self.config.optimizer:
            differing.append(
                f"optimizer: {config.get('train', {}).get('optimizer')} there, {self.config.optimizer} here"
            )
        if differing:
            raise CheckpointError(f"{display_path(path)} is of another run: " + "; ".join(differing))
        self._check_start(config["step"], init_step, self.config)
        state, tensors = read_trainer_state(path, self.optimizers, self._names, self.device)
        state.setdefault("val_step", None)  # older checkpoints do not say it
        load_weights(self.model, path)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    prefix = self._names[id(parameter)] + "/"
                    values = {
                        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
                    }
                    if not values:  # no step taken yet that was not skipped
                        continue
                    # "step" stays where the optimizer wants it: on the CPU unless fused on a GPU
                    optimizer.state[parameter] = {
                        key: value.to(self.device) if key != "step" or group.get("fused") else value
                        for key, value in values.items()
                    }
        for name in SAVED:
            setattr(self, name, state[name])
        if state["scaler"]:  # empty unless the run was in fp16
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.last_checkpoint = path
        changed = {"step": self.step, "changed": changes(config, now)}
        if moved := moved_in_data(config.get("train", {}), now["train"], self.step):
            warnings.warn(moved, stacklevel=3)
            changed["data"] = moved
        self._history = [*config.get("history", []), changed]


def check_same_tokenizer(tokenizer: Tokenizer | None, train_data: TrainData, val_data: ValData | None) -> None:
    """Compare tokenizers by their fingerprints: the run's, and those that the data were made with, where they say it.

    Raises:
        TrainingError: if they are not the same one.
    """
    found = {} if tokenizer is None else {"tokenizer": tokenizer.fingerprint}
    for name, data in (("training data", train_data), ("validation data", val_data)):
        manifest = getattr(data, "manifest", None)
        if isinstance(manifest, dict) and manifest.get("tokenizer"):
            found[name] = manifest["tokenizer"]
    if len(set(found.values())) > 1:
        raise TrainingError(
            "the data were made with another tokenizer, and its ids mean other pieces ("
            + ", ".join(f"{name}: {fingerprint[:16]}" for name, fingerprint in found.items())
            + "); prepare the data again with this tokenizer (notebook 02_dataset), or give the tokenizer of the data"
        )


def moved_in_data(before: dict[str, Any], after: dict[str, Any], step: int) -> str | None:
    """What a resume with other settings does to the order in which windows are read, in words; None if nothing.

    Args:
        before, after: the training configurations, as dictionaries.
        step: where the run goes on. A step's windows follow from its number.
    """
    there, here = (config.get("batch_size", 0) * config.get("grad_accum_steps", 1) * step for config in (before, after))
    if there and before.get("seed") != after["seed"]:
        return (
            f"seed was {before.get('seed')} and is {after['seed']}: from step {step} on the windows come in another "
            "order, so in this epoch some are read twice and others never"
        )
    if there and there != here:
        what = f"{abs(there - here):,} windows are {'read twice' if here < there else 'never read'}"
        return (
            f"batch_size x grad_accum_steps was {there // step} windows a step and is {here // step}: step {step} "
            f"starts at window {here:,} of the data's order, not {there:,}, and so {what}"
        )
    return None


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for another name."""
    found = re.match(r"step=(\d+)", path.name)
    return int(found[1]) if found else -1
