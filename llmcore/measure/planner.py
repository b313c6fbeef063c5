"""What a run will cost, before it starts: memory, compute, time and disk, counted from the shapes or measured.

Also what a run should be where nobody says: how many steps for this text, and which batch for this memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcore.config import PRESETS, ModelConfig, TrainConfig
from llmcore.dataset import TrainData
from llmcore.device import pick_device
from llmcore.files import visible
from llmcore.measure.disk import kept_bytes
from llmcore.measure.memory import available_memory, check_memory, predict_memory
from llmcore.model import Transformer
from llmcore.train import Trainer

# for a process whose memory is measured: glibc returns freed blocks of this size and more to the system
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
TOKENS_PER_PARAMETER = 20  # compute-optimal, by Hoffmann et al., "Chinchilla", arXiv:2203.15556, table 3
GOOD_EPOCHS = 4  # reading a text so often is nearly as good as new text, by Muennighoff et al., arXiv:2305.16264
REPEATS_LEARNT = 15.4  # repetitions of a text after which little is left to learn from more: R* of their equation 5
LANGUAGE_PRESETS = {name: configs for name, configs in PRESETS.items() if name != "toy-reverse"}
FIXED_STEPS = ("toy-reverse", "scifi-mini")  # presets whose number of steps does not follow from the text

HEAD_ROOM = 0.1  # of the memory, left free by a batch that `fit_batch` chooses
POLICIES = {"none": 1.0, "selective": 1.1, "full": 4 / 3}  # time of a step; full computes the forward pass twice
MOST_TOKENS = 32_768  # in a forward pass; with more, a step is hardly faster
# Each forward and backward pass moves some 20 bytes for a parameter: weights, their copies, added gradients. A device
# computes about 120 operations meanwhile for each byte, and a token needs six for a parameter.
PASS_AS_TOKENS = 20 * 120 / 6


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    Attributes:
        parameters: exact.
        tokens: seen in training.
        step: what an optimizer step is made of, in words.
        activation_checkpointing: the policy.
        flops: forward and backward, of the whole run, without recomputation.
        memory: bytes at the moment that needs most, by what they are for, and "total" (`memory.predict_memory`).
        available: bytes free on the device.
        largest_batch: windows per forward pass that would fit, 0 if one does not fit.
        disk: bytes of the checkpoints that are kept.
        best_size_for_compute: compute-optimal parameters for these FLOPs, with C = 6 N D and D = 20 N.
        tokens_per_second: measured, or assumed, or None.
        speed_is: where the speed comes from, in words.
    """

    parameters: int
    tokens: int
    step: str
    activation_checkpointing: str
    flops: float
    memory: dict[str, int]
    available: int
    largest_batch: int
    disk: int
    best_size_for_compute: float
    tokens_per_second: float | None = None
    speed_is: str = "not measured"

    @property
    def best_tokens_for_compute(self) -> float:
        """Compute-optimal tokens for `best_size_for_compute` parameters."""
        return TOKENS_PER_PARAMETER * self.best_size_for_compute

    @property
    def best_tokens_for_size(self) -> int:
        """Compute-optimal tokens for this plan's own parameters."""
        return TOKENS_PER_PARAMETER * self.parameters

    @property
    def hours(self) -> float | None:
        """Hours of training, without validation and samples; None if the speed is not known."""
        return self.tokens / self.tokens_per_second / 3600 if self.tokens_per_second else None

    def epochs(self, tokens: int) -> float:
        """How often the run reads a corpus of `tokens` tokens."""
        return self.tokens / tokens

    def rows(self) -> dict[str, str]:
        """The plan as rows of a table: names and values, both as text."""
        memory = {f"memory: {part}": f"{size / 1e6:,.0f} MB" for part, size in self.memory.items()}
        speed = "–" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens per second"
        time = "–"
        if self.hours is not None:
            time = f"{self.hours:,.1f} hours" if self.hours >= 2 else f"{60 * self.hours:,.1f} minutes"
        return {
            "parameters": f"{self.parameters:,}",
            "tokens": f"{self.tokens:,}",
            "a step": self.step,
            "activation_checkpointing": self.activation_checkpointing,
            "compute": f"{self.flops:.2e} FLOPs",
            **memory,
            "memory free": f"{self.available / 1e6:,.0f} MB",
            "largest batch_size that fits": f"{self.largest_batch:,}",
            "checkpoints on disk": f"{self.disk / 1e6:,.0f} MB",
            f"speed ({self.speed_is})": speed,
            "time": time,
            "compute-optimal for these FLOPs": f"{self.best_size_for_compute:,.0f} parameters, "
            f"{self.best_tokens_for_compute:,.0f} tokens",
        }


def step_tokens(model: ModelConfig, train: TrainConfig) -> int:
    """Tokens that an optimizer step reads."""
    return train.grad_accum_steps * train.batch_size * (train.context_size or model.max_seq_len)


def choose_steps(
    preset: str | None,
    model: ModelConfig,
    train: TrainConfig,
    text_tokens: int,
    *,
    max_steps: int | None = None,
    epochs: float | None = None,
    saved: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Set the number of steps, and what follows from it: a short run has a short warm-up, and is looked at more often.

    Args:
        preset: its name; None: a run that starts from another model. Where nothing is given, those in `FIXED_STEPS`
            keep their steps. The others read the text `GOOD_EPOCHS` times, in their own number of steps at most.
        model: the shape.
        train: the preset's settings, with the batch of the run.
        text_tokens: tokens of the training text.
        max_steps: steps, if given.
        epochs: how often to read the text, if given instead.
        saved: settings of the run that goes on; it keeps its steps unless others are given.
    """
    if saved and not (max_steps or epochs):
        names = ("max_steps", "warmup_steps", "eval_interval", "checkpoint_interval", "sample_interval")
        return train.replace(**{name: saved[name] for name in names if name in saved})

    fixed, steps = preset in FIXED_STEPS and not epochs, max_steps or train.max_steps
    if not (fixed or max_steps):
        reading = math.ceil((epochs or GOOD_EPOCHS) * text_tokens / step_tokens(model, train))
        steps = reading if epochs else min(reading, steps)
    changes = {"max_steps": steps, "warmup_steps": min(train.warmup_steps, steps // 10)}
    if not fixed:  # ten validations, four checkpoints and four samples at least
        for name, times in (("eval_interval", 10), ("checkpoint_interval", 4), ("sample_interval", 4)):
            changes[name] = min(getattr(train, name), math.ceil(steps / times))
    return train.replace(**changes)


def choose_batch(
    preset: str | None,
    model: ModelConfig,
    train: TrainConfig,
    device: str,
    *,
    tokens_per_step: int | None = None,
    batch_size: int | None = None,
    grad_accum_steps: int | None = None,
    activation_checkpointing: str | None = None,
    saved: Mapping[str, Any] | None = None,
    memory: int | None = None,
) -> TrainConfig:
    """Cut the tokens of a step into windows, and these into batches as given, or as they fit into memory.

    If only one of `batch_size` and `grad_accum_steps` is given, the other makes the step as large as it should be, as
    near as it can. If the tokens are not whole windows, a large step has a multiple of eight, for its many divisors.

    Args:
        preset: its name. A step has the tokens of the preset's, unless `tokens_per_step` is given. None: a run that
            starts from another model; a step has the windows of `train`.
        model: the shape.
        train: the preset's settings.
        device: "cpu", "cuda" or "mps".
        tokens_per_step, batch_size, grad_accum_steps, activation_checkpointing: if given.
        saved: settings of the run that goes on. It keeps its windows in a step; and its batch, if that fits.
        memory: bytes free; None: as many as there are now.
    """
    context = train.context_size or model.max_seq_len
    kept = ("batch_size", "grad_accum_steps", "activation_checkpointing")
    train = train.replace(**{name: saved[name] for name in kept if saved and name in saved})
    windows = train.batch_size * train.grad_accum_steps
    whole = tokens_per_step / context if tokens_per_step else windows
    if preset and not (saved or tokens_per_step):
        whole *= PRESETS[preset][0].max_seq_len / context
    if whole != windows:
        windows = max(1, round(whole) if whole < 32 or whole == int(whole) else 8 * round(whole / 8))
        train = train.replace(batch_size=windows, grad_accum_steps=1)

    # as given
    if activation_checkpointing:
        train = train.replace(activation_checkpointing=activation_checkpointing)
    if batch_size or grad_accum_steps:
        size = batch_size or max(1, round(windows / (grad_accum_steps or 1)))
        return train.replace(batch_size=size, grad_accum_steps=grad_accum_steps or max(1, round(windows / size)))

    # as it fits
    free = available_memory(device) if memory is None else memory
    same = saved and not tokens_per_step and not activation_checkpointing
    if same and predict_memory(model, train, device)["total"] <= free:
        return train
    return fit_batch(model, train, device, free, [activation_checkpointing] if activation_checkpointing else POLICIES)


def fit_batch(
    model: ModelConfig,
    train: TrainConfig,
    device: str,
    memory: int | None = None,
    policies: Iterable[str] = POLICIES,
) -> TrainConfig:
    """Choose batch_size and activation_checkpointing so that a step fits into memory and takes the least time.

    The windows of a step stay the same, and so does the learning curve, but for rounding: they are read in turn. The
    time is an estimate. A pass over the weights takes as long as some tokens, so a small batch takes longer, and so
    does a policy that computes again. The batch is a divisor of the step's windows.

    Args:
        model: the shape.
        train: its batch_size x grad_accum_steps are the windows of a step.
        device: "cpu", "cuda" or "mps".
        memory: bytes free there; None: as many as there are now.
        policies: of activation checkpointing, to choose from.

    Returns:
        What fits with a tenth of the memory left free. If nothing fits, what needs least.
    """
    memory = available_memory(device) if memory is None else memory
    context, windows = train.context_size or model.max_seq_len, train.batch_size * train.grad_accum_steps
    most = max(1, min(windows, MOST_TOKENS // context))
    sizes = [size for size in range(1, most + 1) if not windows % size]
    choices = [
        train.replace(batch_size=size, grad_accum_steps=windows // size, activation_checkpointing=policy)
        for policy in policies
        for size in sizes
    ]
    needs = [predict_memory(model, choice, device)["total"] for choice in choices]
    fitting = [choice for choice, need in zip(choices, needs, strict=True) if need <= (1 - HEAD_ROOM) * memory]
    if not fitting:
        return choices[needs.index(min(needs))]

    def time(choice: TrainConfig) -> float:
        return POLICIES[choice.activation_checkpointing] * (1 + PASS_AS_TOKENS / (choice.batch_size * context))

    return min(fitting, key=time)


def text_advice(parameters: int, tokens: int, text_tokens: int) -> str:
    """What a text can feed, and what a run loses that reads it too often, in words.

    By Muennighoff et al., arXiv:2305.16264, equation 5: R repetitions of a text are worth R* (1 - exp(-R / R*)) of it.

    Args:
        parameters: of the model.
        tokens: that the run reads.
        text_tokens: tokens of the training text.
    """
    fed = _parameters_fed(text_tokens)
    names = [*LANGUAGE_PRESETS]
    best = max((name for name in names if PRESETS[name][0].n_params() <= fed), key=names.index, default=names[0])
    lines = [f"this text, read {GOOD_EPOCHS} times, can feed {fed / 1e6:,.1f}M parameters: preset {best}"]
    if parameters > 2 * fed:
        lines.append(f"this model has {parameters / fed:,.0f} times as many: it learns, but much of it by heart")
    epochs = tokens / text_tokens
    if epochs > 1.25 * GOOD_EPOCHS:
        worth = 1 + REPEATS_LEARNT * (1 - math.exp(-(epochs - 1) / REPEATS_LEARNT))
        lines.append(
            f"warning: past about {GOOD_EPOCHS} times, a text teaches less and less. These {epochs:,.1f} are worth "
            f"{worth:,.1f} times of new text: {1 - worth / epochs:.0%} of the compute is lost. "
            f"Set epochs={GOOD_EPOCHS}, or add text"
        )
    return "\n".join(lines)


def _parameters_fed(text_tokens: int) -> float:
    """Parameters for which a text, read `GOOD_EPOCHS` times, is as much as is best."""
    return GOOD_EPOCHS * text_tokens / TOKENS_PER_PARAMETER


def preset_advice(tokens: int) -> list[dict[str, str]]:
    """What a text of this many tokens can feed: a row for each preset, but for the toy task."""
    rows = []
    for name, (model, train) in LANGUAGE_PRESETS.items():
        parameters, step = model.n_params(), step_tokens(model, train)
        steps = choose_steps(name, model, train, tokens).max_steps
        share = _parameters_fed(tokens) / parameters
        rows.append(
            {
                "preset": name,
                "parameters": f"{parameters:,}",
                "its plan reads the text": f"{steps * step / tokens:,.1f} times",
                f"text, read {GOOD_EPOCHS} times": "enough" if share >= 1 else f"{share:.1%} of what is best",
            }
        )
    return rows


def plan(
    model: ModelConfig,
    train: TrainConfig,
    device: str = "auto",
    *,
    data: TrainData | None = None,
    peak_flops: float | None = None,
    mfu: float = 0.4,
) -> Plan:
    """Plan a run. The model is built only to measure the speed.

    Args:
        model: the shape.
        train: how to train.
        device: "auto", "cpu", "cuda" or "mps".
        data: measure the speed on it, with a few steps of a throw-away model.
        peak_flops: without data: operations per second that the device's maker states (an H100: 989e12 in bf16).
        mfu: the share of `peak_flops` that training is assumed to reach (PaLM, arXiv:2204.02311, reports 0.46).
    """
    device = pick_device(device).type
    context = train.context_size or model.max_seq_len
    parameters, per_token = model.n_params(), model.flops_per_token(context)
    tokens = train.max_steps * step_tokens(model, train)
    optimal = math.sqrt(tokens * per_token / (6 * TOKENS_PER_PARAMETER))
    memory, available = predict_memory(model, train, device), available_memory(device)

    speed, speed_is = None, "not measured"
    if data is not None:
        speed, speed_is = measure_speed(model, train, data, device)["tokens_per_second"], "measured"
    elif peak_flops is not None:
        speed, speed_is = mfu * peak_flops / per_token, f"assumed: {mfu:.0%} of {peak_flops:.3g} FLOP/s"

    return Plan(
        parameters=parameters,
        tokens=tokens,
        step=f"{step_tokens(model, train):,} tokens: batch_size {train.batch_size} x grad_accum_steps "
        f"{train.grad_accum_steps} x context {context}",
        activation_checkpointing=train.activation_checkpointing,
        flops=tokens * per_token,
        memory=memory,
        available=available,
        largest_batch=largest_batch(model, train, available, device),
        disk=kept_bytes(train.keep_checkpoints, parameters, memory["optimizer"]),
        best_size_for_compute=optimal,
        tokens_per_second=speed,
        speed_is=speed_is,
    )


def largest_batch(model: ModelConfig, train: TrainConfig, memory: int, device: str = "cpu") -> int:
    """The largest batch_size whose estimated need fits into `memory` bytes; 0 if one window does not fit."""
    low, high = 0, 1
    while predict_memory(model, train.replace(batch_size=high), device)["total"] <= memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = predict_memory(model, train.replace(batch_size=middle), device)["total"] <= memory
        low, high = (middle, high) if fits else (low, middle)
    return low


def measure_speed(
    model: ModelConfig, train: TrainConfig, data: TrainData, device: str = "auto", steps: int = 5
) -> dict[str, Any]:
    """Train a throw-away model for a few steps, as in the run itself, but of four batches at most.

    Returns:
        tokens_per_second (median of the steps after the first) and start_seconds (the first step, which compiles).
    """
    check_memory(model, train, pick_device(device).type)
    train = train.replace(grad_accum_steps=min(4, train.grad_accum_steps))
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        probe = Trainer(Transformer(model), data, None, train, folder, device=device)
        events = probe.measured_steps(1 + steps)
    speed = statistics.median(event["tokens_per_second"] for event in events[1:])
    return {"tokens_per_second": speed, "start_seconds": events[0]["seconds"]}


class RandomTokens:
    """Batches of random ids. Memory and speed do not depend on the ids."""

    def __init__(self, model: ModelConfig, context: int | None = None) -> None:
        self.vocab_size, self.context = model.vocab_size, context or model.max_seq_len

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """x and y, int64 (batch, time)."""
        generator = torch.Generator().manual_seed(seed + step)
        ids = torch.randint(self.vocab_size, (batch_size, self.context + 1), generator=generator)
        return ids[:, :-1], ids[:, 1:]


def measure_memory(model: ModelConfig, train: TrainConfig, device: str = "auto") -> dict[str, float]:
    """Take two training steps of a throw-away model in a fresh process.

    The process first trains a tiny model, so that the code of torch and its libraries is loaded and not counted. On a
    CPU, glibc is told to return freed memory to the system at once. A training run does not do that, because it is
    slow. Its memory then has gaps: for a model of a few million parameters they are nearly as large as the tensors.

    Returns:
        peak_bytes (more than the process held before it built the model; on CUDA, what PyTorch allocated), base_bytes
        (held before) and seconds (of the second step).

    Raises:
        RuntimeError: with the end of the process's error output, if it failed.
    """
    request = json.dumps({"model": model.to_dict(), "train": train.to_dict(), "device": pick_device(device).type})
    process = subprocess.run(
        [sys.executable, "-c", "from llmcore.measure.planner import _measure_here; _measure_here()"],
        input=request,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, **RETURN_FREED_MEMORY},
        check=False,
    )
    if process.returncode:
        last = visible(process.stderr.strip()[-500:])
        raise RuntimeError(f"measuring memory failed (a notebook with thorough=False does without): {last}")
    return json.loads(process.stdout.splitlines()[-1])


def _measure_here() -> None:
    """In the fresh process: read from standard input what to measure, and print the result as JSON."""
    request = json.loads(sys.stdin.read())
    model, train = ModelConfig.from_dict(request["model"]), TrainConfig.from_dict(request["train"])
    device = request["device"]
    tiny = model.replace(dim=64, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=32, hidden_dim=64)
    _two_steps(tiny, train.replace(batch_size=1), device)
    base = resident_bytes()[0]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    seconds = _two_steps(model, train, device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes()[1]
    print(json.dumps({"peak_bytes": peak - base, "base_bytes": base, "seconds": seconds}))


def _two_steps(model: ModelConfig, train: TrainConfig, device: str) -> float:
    check_memory(model, train, device)
    data = RandomTokens(model, train.context_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Transformer(model), data, None, train, folder, device=device)
        return trainer.measured_steps(2)[1]["seconds"]


def resident_bytes() -> tuple[int, int]:
    """This process's resident memory in bytes: now, and the largest since it began.

    Linux has both in /proc. Elsewhere `ru_maxrss` stands for both; on Linux it would include the parent's memory.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        import resource  # Windows has none

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
        return most, most
    sizes = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status.read_text()))
    return 1024 * int(sizes["VmRSS"]), 1024 * int(sizes["VmHWM"])
