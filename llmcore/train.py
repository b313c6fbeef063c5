"""The training loop: mixed precision, accumulation, validation, samples, checkpoints, and an exact resume.

`Trainer.steps()` is a plain generator: it takes one optimizer step at a time and yields what happened, so that a
notebook can draw, pause or stop between two steps. `Trainer.fit()` runs it to the end.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcore.checkpoint import back_up, find_checkpoint, has_finite_weights, prune_checkpoints
from llmcore.config import TrainConfig
from llmcore.dataset import IGNORED, TrainData, ValData
from llmcore.device import (
    autocast,
    compile_if_worth,
    deterministic_sums,
    error_line,
    is_out_of_memory,
    keep_freed_memory,
    pick_device,
    pick_precision,
    sent_to,
    ways_to_save_memory,
)
from llmcore.files import display_path, resolve
from llmcore.generate import generate
from llmcore.model import Transformer
from llmcore.optim import build_optimizers, clear_gradient, clip_gradient, learning_rate_at, set_rates, update_or_skip
from llmcore.runs import RunFolder, TrainingError, signals_call
from llmcore.tokenizer import Tokenizer
from llmcore.trainer_state import Progress, check_start, check_tokenizer, describe_run, load_run, prune_late, save_run

Event = dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int  # optimizer steps taken in all
    val_loss: float | None  # of the last validation, nats per token; None if there was none yet
    stopped_early: bool  # whether it was stopped before max_steps
    checkpoint: Path | None  # the last one


class Trainer:
    """One training run in one folder.

    Building one checks everything and writes nothing. The disk changes when `steps()` has taken a first step. Whether
    the run fits into memory is not checked: `measure.memory.check_memory` can say so before the model is built.

    Args:
        model: moved to the device, its weights to float32.
        train_data: batches by (step, seed).
        val_data: None for no validation.
        config: how to train.
        output_dir: the run's folder; `metrics.jsonl` and checkpoints go there.
        tokenizer: copied into checkpoints and used for samples.
        sampler: writes a sample of a prompt; None for the tokenizer and `generate`.
        callbacks: each is called with every event before it is logged, and may add to it.
        device: "auto", "cpu", "cuda" or "mps".
        init_from: where the weights come from, if they are trained already, for the run's record: the "init_from" in
            the config of a model from `open_pretrained`. A resumed run keeps the record that it has.
        resume: a checkpoint to go on from: its folder, or "latest" or "best" of this run. See also `auto_start`.
        init_step: if given, the step that the run must start from.
        backup_dir: an existing folder, on another drive say. After each save, `<backup_dir>/<run>` is made a copy.

    Attributes:
        step: optimizer steps taken.
        progress: this and the other numbers that a checkpoint keeps.
        last_checkpoint: written or resumed from.
        stop_requested: set by `request_stop()`: the current step is finished, then the run saves and ends.
        interrupted: whether a signal asked for that.

    Raises:
        TrainingError: before anything is built or written, if this cannot work.
        DeviceError: for a device that is not here, or a precision that it does not compute in.
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
        init_from: Mapping[str, Any] | None = None,
        resume: str | os.PathLike[str] | None = None,
        init_step: int | None = None,
        backup_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        # check
        self.device = pick_device(device)
        self.precision = pick_precision(config.precision, self.device)
        self.run_dir = resolve(output_dir)
        self._folder = RunFolder(self.run_dir)
        self._copy = self._folder.copy_in(backup_dir)
        check_tokenizer(tokenizer, model, train_data, val_data)
        if resume is None:
            self._folder.check_free()
            check_start(0, init_step, config.max_steps)

        # build
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model, self.train_data, self.val_data = model.to(self.device, torch.float32), train_data, val_data
        self.config, self.tokenizer, self.callbacks = config, tokenizer, list(callbacks)
        self.sampler = sampler or (self._continue_prompt if tokenizer is not None else None)
        self.model.activation_checkpointing = config.activation_checkpointing
        self.optimizers = build_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.progress = Progress()
        self._forward: Callable[..., Tensor] = self.model  # compiled, once the run has begun
        self._train_loss = math.nan  # of the last step
        self._update_unfinished = False  # an error has ended a step while the weights were changing
        self.stop_requested = self.interrupted = self._save_requested = self._sample_requested = False
        self._sample_prompt: str | None = None
        parts = (model, config, tokenizer, train_data, val_data)
        self._description = describe_run(*parts, self.precision, self.device, init_from)

        # resume
        self.last_checkpoint: Path | None = None
        if resume is not None:
            path = find_checkpoint(self.run_dir, resume) if resume in ("latest", "best") else find_checkpoint(resume)
            self._folder.check_own(path)
            self.progress = load_run(path, self.model, self.optimizers, self.scaler, self._description, init_step)
            self.last_checkpoint = path
        self._start = self._saved_step = self.step
        self._saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.progress.step

    # The loop

    def fit(self) -> TrainResult:
        """Train to the end, or until stopped, and say how it went."""
        for _ in self.steps():
            pass
        return self.result()

    def result(self) -> TrainResult:
        """How the run stands."""
        stopped_early = self.step < self.config.max_steps
        return TrainResult(self.step, self.progress.val_loss, stopped_early, self.last_checkpoint)

    def steps(self) -> Generator[Event]:
        """Train step by step, yielding one event per optimizer step; saves at the end, or when closed.

        An event has step, tokens, loss (nats per token), learning_rate, grad_norm, skipped (steps so far),
        seconds (of this step) and tokens_per_second; after a validation also val_loss, val_perplexity and
        val_bits_per_byte; after a sample, sample and sample_prompt; after a save, checkpoint and checkpoint_seconds.

        SIGINT and SIGTERM end the run after the current step as `request_stop()` does; a second one raises at once.

        Raises:
            TrainingError: before anything is written, if another run is at work in the folder or has trained there
                since; after `max_skipped_steps` skipped steps in a row; if memory or the room on the disk runs out.
            CheckpointError: if a checkpoint cannot be written. Once there is room, training may go on from here.
        """
        if self._update_unfinished:
            raise TrainingError(f"an error ended step {self.step + 1} half-way; resume from the last checkpoint")
        with self._folder.held(self.step):
            self.stop_requested = self.interrupted = False
            with signals_call(self._interrupt):
                yield from self._loop()

    def _loop(self) -> Generator[Event]:
        config = self.config
        if config.max_steps <= self.step <= self._saved_step:
            where = f"step {self.step} of max_steps={config.max_steps}"
            warnings.warn(f"nothing is left to train: the run is at {where}; raise max_steps to go on", stacklevel=3)
            prune_late(self.run_dir, self.last_checkpoint, self._description, config.keep_checkpoints)
            back_up(self.run_dir, self._copy)
            return

        self._forward = compile_if_worth(self.model, self.model.config, self.config, self.device)
        try:
            while self.step < config.max_steps and not self.stop_requested:
                # train
                with self._out_of_memory_explained():
                    event = self._train_step()
                self._folder.add(event)

                # validate, sample and log; the step is logged even if something before it fails
                try:
                    if self.val_data is not None and self._due(config.eval_interval):
                        event |= self.validate(config.validation_batches)
                        if self.progress.count_validation(event["val_loss"], config):
                            self.request_save()  # of a new best
                    if self._sample_requested or (config.sample_interval and self._due(config.sample_interval)):
                        event |= self._sample()
                    for callback in self.callbacks:
                        callback(event)
                finally:
                    self._folder.write(self._start, self._description)

                # save
                late = 0 < config.checkpoint_minutes <= (time.monotonic() - self._saved_at) / 60
                if self._save_requested or self.stop_requested or late or self._due(config.checkpoint_interval):
                    event |= self._save()
                yield event
        finally:  # also after an error, and when the consumer closes the generator
            self._save_last_step()

    def measured_steps(self, count: int) -> list[Event]:
        """Take a few steps just as a run would, compiled or not, but write nothing: for measuring speed."""
        self._forward = compile_if_worth(self.model, self.model.config, self.config, self.device)
        return [self._train_step() for _ in range(count)]

    # One step

    def _train_step(self) -> Event:
        """Set the rates, take batches, compute the gradient, clip it, update the weights or skip, and report."""
        config, progress, started = self.config, self.progress, time.perf_counter()
        rate = learning_rate_at(self.step, config) * progress.plateau.scale
        set_rates(self.optimizers, rate)

        # batches are a pure function of their number and the seed
        first = self.step * config.grad_accum_steps
        numbers = range(first, first + config.grad_accum_steps)
        batches = [self.train_data.batch(number, config.batch_size, config.seed) for number in numbers]
        tokens = sum(x.numel() for x, _ in batches)

        # forward and backward
        self.model.train()
        loss = self._compute_gradient(batches)
        norm = clip_gradient(self.model, self.optimizers, self.scaler, config.grad_clip)
        mean_loss, grad_norm = torch.stack((loss, norm)).tolist()  # waits for the device, once a step

        # update, unless something is not finite
        finite = math.isfinite(mean_loss) and math.isfinite(grad_norm)
        self._update_unfinished = True
        update_or_skip(self.optimizers, self.scaler, finite)
        progress.count_step(tokens, finite)
        self._train_loss = mean_loss
        self._update_unfinished = False
        if progress.skipped_in_a_row >= config.max_skipped_steps:
            raise progress.too_many_skipped(config, self.precision, self._last_good())

        # report
        seconds = time.perf_counter() - started
        return {
            "step": self.step,
            "tokens": progress.tokens,
            "loss": mean_loss,
            "learning_rate": rate * config.learning_rate,
            "grad_norm": grad_norm,
            "skipped": progress.skipped,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }

    def _compute_gradient(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """See `_accumulate`. What fails when compiled is computed once more, uncompiled, with a warning."""
        try:
            return self._accumulate(batches)
        except Exception as error:
            if self._forward is self.model or is_out_of_memory(error):
                raise
            if self.config.compile == "on":
                raise TrainingError(
                    f"compile='on', but the model cannot be trained compiled: {error_line(error)}. "
                    "Mend that, or set compile='auto' or 'off'"
                ) from error
            warnings.warn(f"the model is trained uncompiled, which takes longer: {error_line(error)}", stacklevel=2)
        self._forward = self.model
        return self._accumulate(batches)  # only here, where the error no longer holds on to its tensors

    def _accumulate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Add up the gradients of the batches; returns their mean loss over all targets, a scalar."""
        clear_gradient(self.optimizers)  # a step that an error ended may have left some
        targets = [int((y != IGNORED).sum()) for _, y in batches]
        total = torch.zeros((), device=self.device)
        with deterministic_sums(self.device):
            for (x, y), count in zip(batches, targets, strict=True):
                if not count:
                    continue
                with autocast(self.precision, self.device):
                    loss = self._forward(*sent_to(self.device, x, y)) * (count / sum(targets))
                self.scaler.scale(loss).backward()
                total += loss.detach()
        return total

    @contextlib.contextmanager
    def _out_of_memory_explained(self) -> Iterator[None]:
        """Say which settings need less memory, where a step runs out of it."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            clear_gradient(self.optimizers)  # makes room to save what the steps before have learned
            ways = ways_to_save_memory(self.model.config, self.config)
            where = f"in step {self.step + 1} on {self.device}"
            raise TrainingError(f"out of memory {where}. {ways}, and resume") from error

    # Looking at the model

    @torch.no_grad()
    def validate(self, most: int = 0) -> Event:
        """Loss on the validation data: nats per token, perplexity, and bits per byte of raw text.

        It is quick, to watch a run by: windows cut across documents, and if `most` is not 0, at most so many batches
        are read, spread over the split. Bits per byte of the whole split are exact but for its very first token, which
        follows nothing and is counted at the mean. To quote a figure, use `evaluate.evaluate`.
        """
        assert self.val_data is not None
        self.model.eval()
        total, count = 0.0, 0
        for x, y in self.val_data.sequential(self.config.batch_size, most):
            targets = int((y != IGNORED).sum())
            if not targets:
                continue
            with autocast(self.precision, self.device):
                total += float(self.model(*sent_to(self.device, x, y))) * targets
            count += targets

        loss = total / count
        self.progress.val_loss, self.progress.val_step = loss, self.step
        event = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
        if bytes_per_token := getattr(self.val_data, "bytes_per_token", None):
            event["val_bits_per_byte"] = loss / math.log(2) / bytes_per_token
        return event

    def _sample(self) -> Event:
        """A sample of the prompt asked for, or else of the configured one; nothing if the weights are not finite."""
        prompt = self.config.sample_prompt if self._sample_prompt is None else self._sample_prompt
        self._sample_requested, self._sample_prompt = False, None
        if self.sampler is None or not has_finite_weights(self.model):
            return {}
        self.model.eval()
        try:
            return {"sample": self.sampler(prompt), "sample_prompt": prompt}
        except ValueError as error:  # a person typed what cannot be encoded: no reason to end the run
            return {"sample": f"(no sample: {error})", "sample_prompt": prompt}

    def _continue_prompt(self, prompt: str) -> str:
        assert self.tokenizer is not None
        tokens, seed = self.config.sample_tokens, self.config.seed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a prompt that is cut to the context
            return str(generate(self.model, self.tokenizer, prompt, tokens, temperature=0.8, top_p=0.95, seed=seed))

    # Requests, of another thread, a callback or a signal

    def request_stop(self) -> None:
        """Finish the current step, save and end."""
        self.stop_requested = True

    def request_save(self) -> None:
        """Write a checkpoint after the current step."""
        self._save_requested = True

    def request_sample(self, prompt: str | None = None) -> None:
        """Write a sample after the current step, of the configured prompt or another."""
        self._sample_prompt, self._sample_requested = prompt, True  # the flag last: another thread waits for it

    def serve_requests(self) -> Event:
        """Sample and save at once if that is requested: for a run that is paused between two steps."""
        event = self._sample() if self._sample_requested else {}
        return event | (self._save() if self._save_requested else {})

    def _interrupt(self) -> None:
        self.stop_requested = self.interrupted = True

    def _due(self, interval: int) -> bool:
        """Whether the step is one of every `interval` steps (0: none), or the last one."""
        return self.step == self.config.max_steps or (interval > 0 and self.step % interval == 0)

    # Saving

    def _save(self) -> Event:
        """Write a checkpoint, and return where; nothing if no step was taken here or the weights are not finite.

        The events up to its step reach the disk first, so that no checkpoint is ahead of them.
        """
        if self.step == self._start or not has_finite_weights(self.model):
            return {}
        started = time.perf_counter()
        self._folder.write(self._start, self._description, to_disk=True)
        trained = (self.model, self.optimizers, self.scaler, self.tokenizer, self.progress)
        self.last_checkpoint = save_run(self.run_dir, *trained, self._train_loss, self._description)
        self._save_requested, self._saved_step = False, self.step
        prune_checkpoints(self.run_dir, self.config.keep_checkpoints)
        back_up(self.run_dir, self._copy)
        self._saved_at = time.monotonic()
        return {"checkpoint": str(self.last_checkpoint), "checkpoint_seconds": time.perf_counter() - started}

    def _save_last_step(self) -> None:
        """Save what the run has reached, however it ended, unless it is saved already or of no use."""
        of_no_use = self._update_unfinished or self.progress.skipped_in_a_row >= self.config.max_skipped_steps
        if self.step > self._saved_step and not of_no_use and not self._save():
            warnings.warn(
                f"step {self.step} is not saved: its weights are not finite. {self._last_good()}", stacklevel=3
            )

    def _last_good(self) -> str:
        return f"Last good checkpoint: {display_path(self.last_checkpoint) if self.last_checkpoint else 'none'}"
