"""The training loop: mixed precision, accumulation, validation, samples, checkpoints, and an exact resume.

`Trainer.steps()` is a plain generator that takes one optimizer step at a time and yields what happened, so that a
notebook can draw, pause or stop between two steps; `fit()` runs it to the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import shutil
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
    find_checkpoint,
    load_weights,
    prune_checkpoints,
    read_config,
    read_tensors,
    save_checkpoint,
)
from llmcore.config import TrainConfig
from llmcore.dataset import IGNORED
from llmcore.device import autocast, pick_device, pick_precision
from llmcore.files import resolve, shown, write_atomic
from llmcore.generate import stream
from llmcore.memory import advice, check_memory
from llmcore.model import Transformer
from llmcore.optim import build_optimizers, learning_rate_at
from llmcore.runs import TrainingError, changes, environment, only_run, read_metrics
from llmcore.tokenizer import Tokenizer

Event = dict[str, Any]

# attributes of a Trainer that a checkpoint keeps, besides tensors and the scaler's state
SAVED = ("step", "tokens", "skipped", "skipped_in_a_row", "val_loss", "best_loss", "plateau")


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
        stop_requested: set by `stop()`: the current step is finished, then the run saves and ends.
        interrupted: whether a signal asked for that.

    Raises:
        TrainingError: before anything is built, if this cannot work.
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
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"output_dir={shown(self.run_dir)!r} cannot be written: {error.strerror}") from None
        if not os.access(self.run_dir, os.W_OK):
            raise TrainingError(f"output_dir={shown(self.run_dir)!r} is read-only; choose another")
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise TrainingError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model only vocab_size={model.config.vocab_size}"
            )
        if resume is None and (self.run_dir / "metrics.jsonl").exists():
            raise TrainingError(
                f"{shown(self.run_dir)} holds a run already; resume it (resume='latest') or choose another output_dir"
            )
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
        self._train_loss = math.nan  # the last that was finite
        self.val_loss: float | None = None
        self.best_loss = math.inf
        self.last_checkpoint: Path | None = None
        self.stop_requested = self.interrupted = False
        self._save_requested = self._sample_requested = False
        self._sample_prompt: str | None = None
        self._half_a_step = False  # an error has left the weights between two steps
        self._environment = environment(self.device)
        self._history: list[Event] = []
        self.plateau = {"scale": 1.0, "best": math.inf, "bad": 0}
        self._loss: Callable[..., Tensor] = self.model
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        with only_run(self.run_dir):
            if resume is not None:
                self._resume(resume)
        if init_step is not None and init_step != self.step:
            raise TrainingError(
                f"init_step={init_step}, but training starts at step {self.step}; "
                "leave it out, or name the checkpoint of that step"
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

    def stop(self) -> None:
        """Finish the current step, save and end."""
        self.stop_requested = True

    def save(self) -> None:
        """Write a checkpoint after the current step."""
        self._save_requested = True

    def sample(self, prompt: str | None = None) -> None:
        """Write a sample after the current step, of the configured prompt or another."""
        self._sample_requested, self._sample_prompt = True, prompt

    def catch_up(self) -> Event:
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

        SIGINT and SIGTERM end the run after the current step as `stop()` does; a second one raises at once.

        Raises:
            TrainingError: after `max_skipped_steps` steps without a finite gradient in a row, if memory runs out, or
                if another run is at work in the same folder.
            CheckpointError: if a checkpoint cannot be written. Once there is room, training may go on from here.
        """
        config = self.config
        if self._half_a_step:
            raise TrainingError(f"an error ended step {self.step + 1} half-way; resume from the last checkpoint")
        self.stop_requested = self.interrupted = False
        self._loss = self._compiled()
        saved_at = self.step if self.last_checkpoint else -1
        with (
            only_run(self.run_dir),
            self._signals_stop(),
            open(self.run_dir / "metrics.jsonl", "a", encoding="utf-8") as metrics,
        ):
            write_atomic(self.run_dir / "config.json", json.dumps(self._description(), indent=1, ensure_ascii=False))
            prune_checkpoints(self.run_dir, config.keep_checkpoints)  # a kill may have come between save and deletion
            try:
                while self.step < config.max_steps and not self.stop_requested:
                    try:
                        event = self._train_step()
                    except RuntimeError as error:
                        if is_out_of_memory(error):
                            raise self._out_of_memory() from error
                        raise
                    last = self.step == config.max_steps  # a stop does nothing that a run without it would not do
                    new_best = False
                    if self.val_data is not None and (last or _due(self.step, config.eval_interval)):
                        event |= self.validate()
                        new_best = event["val_loss"] < self.best_loss
                        self.best_loss = min(self.best_loss, event["val_loss"])
                        self._update_plateau(event["val_loss"])
                    sound = self._sound()
                    sample_due = _due(self.step, config.sample_interval) or (last and config.sample_interval)
                    if sound and (self._sample_requested or sample_due):
                        event |= self._sample()
                    try:
                        for callback in self.callbacks:
                            callback(event)
                    finally:  # the step was taken, whatever a callback thinks of it
                        metrics.write(json.dumps(event, ensure_ascii=False) + "\n")
                        metrics.flush()
                    due = _due(self.step, config.checkpoint_interval)
                    if sound and (last or new_best or due or self._save_requested or self.stop_requested):
                        event["checkpoint"] = str(self._save())
                        saved_at = self.step
                    yield event
            finally:
                # reached early when the consumer closes the generator or an error ends it
                worth_it = self.skipped_in_a_row < config.max_skipped_steps and not self._half_a_step
                if self.step > saved_at and worth_it and self._sound():
                    self._save()

    def measured_steps(self, count: int) -> list[Event]:
        """Take a few steps just as a run would, compiled or not, but write nothing: for measuring speed."""
        self._loss = self._compiled()
        return [self._train_step() for _ in range(count)]

    def _sound(self) -> bool:
        """Whether the weights are worth keeping: a skipped step may mean that they themselves are broken."""
        return not self.skipped_in_a_row or all(bool(p.isfinite().all()) for p in self.model.parameters())

    @contextlib.contextmanager
    def _signals_stop(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the run after the current step. Only the main thread may set handlers."""
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
            optimizer.zero_grad(set_to_none=True)  # a step that an error broke off may have left some
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
        first = self.step * config.grad_accum_steps
        batches = [
            self.train_data.batch(first + i, config.batch_size, config.seed) for i in range(config.grad_accum_steps)
        ]
        counts = [int((y != IGNORED).sum()) for _, y in batches]
        self.model.train()
        loss = torch.zeros((), device=self.device)
        for (x, y), count in zip(batches, counts, strict=True):
            if not count:
                continue
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            with autocast(self.precision, self.device):
                part = self._loss(x, y) * (count / sum(counts))
            self.scaler.scale(part).backward()
            loss += part.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        values = torch.stack((loss, norm)).tolist()
        finite = all(map(math.isfinite, values))
        self._half_a_step = True
        if finite or self.scaler.is_enabled():  # the scaler itself leaves out what is not finite, and backs off
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._half_a_step = False
        self.tokens += sum(x.numel() for x, _ in batches)
        if finite:
            self._train_loss = values[0]
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

    def _count_skipped(self, finite: bool) -> None:
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise TrainingError(
                f"loss or gradient was not finite {self.skipped_in_a_row} steps in a row, up to step {self.step}. "
                f"Last good checkpoint: {shown(self.last_checkpoint) if self.last_checkpoint else 'none'}. "
                "Lower learning_rate, raise warmup_steps, or use precision='fp32'"
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
            wanted = work > (2e12 if self.device.type == "cpu" else 2e16) and has_compiler()
            wanted = wanted and self.device.type != "mps"
        return torch.compile(self.model) if wanted else self.model

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
        self.val_loss = total / count
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
        """Write a checkpoint named by the validation loss (or the training loss where there is none)."""
        self._save_requested = False
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
        loss = self.val_loss if self.val_loss is not None else self._train_loss
        self.last_checkpoint = save_checkpoint(
            self.run_dir,
            self.model,
            self.tokenizer,
            step=self.step,
            loss=loss,
            config={**self._description(), "tokens": self.tokens},
            tensors=tensors,
            state=state,
        )
        prune_checkpoints(self.run_dir, self.config.keep_checkpoints)
        return self.last_checkpoint

    def _resume(self, resume: str | os.PathLike[str]) -> None:
        """Take over a checkpoint's weights, optimizer, counts and random state, and cut later metrics off."""
        path = find_checkpoint(self.run_dir, os.fspath(resume))
        if path.parent != self.run_dir and (self.run_dir / "metrics.jsonl").exists():
            raise TrainingError(
                f"{shown(self.run_dir)} holds a run already, and {shown(path)} is of another; choose another output_dir"
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
            raise CheckpointError(f"{shown(path)} is of another run: " + "; ".join(differing))
        tensors = read_tensors(path / "trainer_state.safetensors")
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            counts, random_state = {name: state[name] for name in SAVED}, tensors["rng.cpu"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the trainer's state in {shown(path)} cannot be used: {error!r}") from None
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
        for name, value in counts.items():
            setattr(self, name, value)
        if state["scaler"]:  # empty unless the run was in fp16
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(random_state)
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.last_checkpoint = path
        self._history = [*config.get("history", []), {"step": self.step, "changed": changes(config, now)}]
        if path.parent == self.run_dir:
            kept = [line for line in read_metrics(self.run_dir) if line["step"] <= self.step]
            write_atomic(
                self.run_dir / "metrics.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            )


@contextlib.contextmanager
def always_the_same_sums(device: torch.device) -> Iterator[None]:
    """On a CPU, let the threads of a compiled model add up in a fixed order, so that a seed gives one result.

    Without this the gradient of the embeddings is summed in the order in which threads happen to arrive.
    """
    if device.type != "cpu":
        yield
        return
    debugging: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), debugging.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    debugging.fill_uninitialized_memory = False  # makes bugs visible, but takes time
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        debugging.fill_uninitialized_memory = before[1]


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, instead of asking the system for zeroed pages again.

    An uncompiled step on a CPU gains a tenth. Tensors of 32 MiB and more are left out: among them gaps would cost
    memory, and models with such tensors multiply for longer than pages take. Elsewhere (macOS, Windows, musl), and
    where the environment says MALLOC_MMAP_THRESHOLD_ itself, this does nothing.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_threshold, 2**25)
        mallopt(m_trim_threshold, 2**31 - 1)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is how torch says so: CUDA has an exception for it, CPU and MPS have only their words."""
    words = ("can't allocate memory", "not enough memory", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def has_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs on a CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
