"""What a resume needs: what is saved of a training run besides its weights, how it is checked and taken over again."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmcore.checkpoint import (
    COUNT,
    CheckpointError,
    check_has_state,
    checkpoints,
    dtype_name,
    last_saved,
    latest_with_state,
    load_weights,
    prune_checkpoints,
    read_config,
    read_part,
    read_tensors,
    save_checkpoint,
)
from llmcore.config import TrainConfig
from llmcore.files import display_path, replacing_folder, resolve
from llmcore.model import Transformer
from llmcore.optim import Plateau
from llmcore.runs import (
    TrainingError,
    backup_folder,
    check_not_in_use,
    check_same_first_event,
    check_writable,
    environment,
    holds_run,
)
from llmcore.tokenizer import Tokenizer

MOST_SOURCES = 10_000  # files of a data set that config.json lists
# What trainer_state.json must look like.
_SCALER = ["scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"]
_TRAINER_STATE = {
    "type": "object",
    "required": ["step", "tokens", "skipped", "skipped_in_a_row", "val_loss", "best_loss", "plateau", "scaler"],
    "properties": {
        **dict.fromkeys(("step", "tokens", "skipped", "skipped_in_a_row"), COUNT),
        "val_loss": {"type": ["number", "null"]},
        "val_step": {**COUNT, "type": ["integer", "null"]},
        "best_loss": {"type": "number or Infinity"},  # Infinity before the first validation
        "plateau": {
            "type": "object",
            "required": ["scale", "best", "bad"],
            "properties": {
                "scale": {"type": "finite number", "minimum": 0, "maximum": 1},
                "best": {"type": "number or Infinity"},
                "bad": COUNT,
            },
            "additionalProperties": False,
        },
        "scaler": {  # torch's GradScaler; {} where the run is not in fp16
            "type": "object",
            "properties": {
                "scale": {"type": "finite number", "minimum": 0, "exclusiveMinimum": True, "maximum": 2.0**127},
                "growth_factor": {"type": "finite number", "minimum": 1, "maximum": 1024},
                "backoff_factor": {"type": "finite number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1},
                "growth_interval": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
                "_growth_tracker": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
            },
            "dependencies": dict.fromkeys(_SCALER, _SCALER),  # all of them, or none
            "additionalProperties": False,
        },
    },
}


@dataclass
class Progress:
    """How far a run has come: the numbers that a checkpoint keeps.

    Attributes:
        step: optimizer steps taken, the skipped ones included.
        tokens: read for them.
        skipped: steps whose loss or gradient was not finite.
        skipped_in_a_row: those since the last good step.
        val_loss: of the last validation, nats per token; None before the first.
        val_step: the step of that validation.
        best_loss: the lowest validation loss.
        plateau: of the learning rate's schedule.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    val_loss: float | None = None
    val_step: int | None = None
    best_loss: float = math.inf
    plateau: Plateau = field(default_factory=Plateau)

    def count_step(self, tokens: int, finite: bool) -> None:
        """Count a step that has read some tokens, and was skipped unless loss and gradient were finite."""
        self.step += 1
        self.tokens += tokens
        if finite:
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1

    def too_many_skipped(self, config: TrainConfig, precision: str, last_good: str) -> TrainingError:
        """The error that ends a run after too many skipped steps in a row."""
        return TrainingError(
            f"loss or gradient was not finite {self.skipped_in_a_row} steps in a row, up to step {self.step}. "
            f"{last_good}. Try a lower learning_rate (here {config.learning_rate:g}) or precision fp32 (here "
            f"{precision}); where neither can be set, another seed or preset"
        )

    def count_validation(self, val_loss: float, config: TrainConfig) -> bool:
        """Take in a validation's loss, for the schedule "plateau" too; returns whether it is a new best."""
        if config.schedule == "plateau":
            self.plateau.update(val_loss, config)
        is_best = val_loss < self.best_loss
        self.best_loss = min(self.best_loss, val_loss)
        return is_best


# Saving


def describe_run(
    model: Transformer,
    config: TrainConfig,
    tokenizer: Tokenizer | None,
    train_data: object,
    val_data: object,
    precision: str,
    device: torch.device,
    init_from: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run is, for `config.json`: its model, and how, on what and where it is trained. JSON values."""
    return {
        "init_from": None if init_from is None else dict(init_from),
        "model": model.config.to_dict(),
        "train": config.to_dict(),
        "data": {"train": getattr(train_data, "fingerprint", None), "val": getattr(val_data, "fingerprint", None)},
        "sources": _sources(train_data),
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "bytes_per_token": getattr(val_data, "bytes_per_token", None),
        "precision": precision,
        "device": str(device),
        "environment": environment(device),
        # an entry for each resume, and for a start from another model
        "history": [] if init_from is None else [{"step": 0, "changed": {}, "init_from": init_from.get("source")}],
    }


def _sources(data: object) -> dict[str, str] | None:
    """The files of a data set, and the start of the hash of each; None where there are none, or too many to keep."""
    manifest = getattr(data, "manifest", None)
    sources = manifest.get("sources", []) if isinstance(manifest, dict) else []
    return {source["path"]: source["sha256"][:16] for source in sources} if 0 < len(sources) <= MOST_SOURCES else None


def save_run(
    run_dir: Path,
    model: Transformer,
    optimizers: Sequence[Optimizer],
    scaler: torch.amp.GradScaler,
    tokenizer: Tokenizer | None,
    progress: Progress,
    train_loss: float,
    description: dict[str, Any],
) -> Path:
    """Write a checkpoint with all that a resume needs, and errors as of `save_checkpoint`.

    It is named by the validation loss where its own step was validated, else by `train_loss`.
    """
    tensors = {"rng.cpu": torch.get_rng_state()}
    device = model.tok_embeddings.weight.device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    names = _names(model)
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            tensors |= {f"{names[parameter]}/{key}": torch.as_tensor(value) for key, value in values.items()}

    numbers = {"tokens": progress.tokens, "val_loss": progress.val_loss, "val_step": progress.val_step}
    validated = progress.val_loss is not None and progress.val_step == progress.step
    return save_checkpoint(
        run_dir,
        model,
        tokenizer,
        step=progress.step,
        loss=progress.val_loss if validated and progress.val_loss is not None else train_loss,
        loss_of="validation" if validated else "training",
        config=description | numbers,
        tensors=tensors,
        state={**asdict(progress), "scaler": scaler.state_dict()},
    )


def prune_late(run_dir: Path, last: Path | None, description: dict[str, Any], keep: int) -> None:
    """Delete what the run itself would have deleted, had no kill come between its last save and that."""
    history = description["history"]
    changed = history[-1]["changed"] if history else {}
    if checkpoints(run_dir)[-1:] == [last] and "train.keep_checkpoints" not in changed:
        prune_checkpoints(run_dir, keep)


# Checks before a run


def check_start(step: int, init_step: int | None, max_steps: int) -> None:
    """Raise TrainingError for a run that does not start at the step asked for, or starts beyond its end."""
    if init_step is not None and init_step != step:
        raise TrainingError(
            f"init_step={init_step}, but training starts at step {step}; "
            "leave it out, or name the checkpoint of that step"
        )
    if step > max_steps:
        raise TrainingError(
            f"max_steps={max_steps}, but the run has reached step {step}; "
            "raise max_steps, or resume from an earlier checkpoint"
        )


def check_tokenizer(tokenizer: Tokenizer | None, model: Transformer, train_data: object, val_data: object) -> None:
    """Raise TrainingError if tokenizer or data have more ids than the model, or the data name another tokenizer."""
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise TrainingError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only vocab_size={model.config.vocab_size}"
        )
    for data in (train_data, val_data):
        if (ids := getattr(data, "vocab_size", 0)) > model.config.vocab_size:
            raise TrainingError(f"the data have {ids} ids, the model only vocab_size={model.config.vocab_size}")
    fingerprints = {} if tokenizer is None else {"tokenizer": tokenizer.fingerprint}
    for name, data in (("training data", train_data), ("validation data", val_data)):
        manifest = getattr(data, "manifest", None)
        if isinstance(manifest, dict) and manifest.get("tokenizer"):
            fingerprints[name] = manifest["tokenizer"]
    if len(set(fingerprints.values())) > 1:
        raise TrainingError(
            "the data were made with another tokenizer, and its ids mean other pieces ("
            + ", ".join(f"{name}: {fingerprint[:16]}" for name, fingerprint in fingerprints.items())
            + "); prepare the data again with this tokenizer (notebook 02_dataset), or give the tokenizer of the data"
        )


def check_same_run(path: Path, saved: dict[str, Any], description: dict[str, Any]) -> None:
    """Raise CheckpointError, naming all that differs, if a checkpoint is not of the run that would resume from it."""
    names = {**description["model"], **saved["model"]}
    pairs = {f"model.{key}": (saved["model"].get(key), description["model"].get(key)) for key in names}
    pairs |= {key: (saved.get(key), description[key]) for key in ("tokenizer", "data")}
    pairs["optimizer"] = saved.get("train", {}).get("optimizer"), description["train"]["optimizer"]
    differing = [f"{name}: {there} there, {here} here" for name, (there, here) in pairs.items() if there != here]
    if differing:
        way_out = ""
        if saved.get("data") != description["data"]:
            differing += changed_files(saved.get("sources"), description["sources"])
            way_out = (
                ". To resume is to go on with the same data. To train this model on other data, start a new run from "
                f"its weights: init_from={display_path(path)!r} in place of checkpoint_dir"
            )
        raise CheckpointError(f"{display_path(path)} belongs to another run: " + "; ".join(differing) + way_out)


def changed_files(before: dict[str, str] | None, after: dict[str, str] | None) -> list[str]:
    """Which files of a data set were added, removed or changed, in words. Empty if that is not known.

    Args:
        before, after: the hash of each file by its path.
    """
    if not before or not after:
        return []
    changes = {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": sorted(path for path in before.keys() & after.keys() if before[path] != after[path]),
    }
    return [
        f"{len(paths):,} file{'s' * (len(paths) > 1)} {what} ({', '.join(map(display_path, paths[:3]))}"
        f"{', …' * (len(paths) > 3)})"
        for what, paths in changes.items()
        if paths
    ]


# Resuming


def auto_start(run_dir: str | os.PathLike[str], backup_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """What `checkpoint_dir="auto"` means: the checkpoint to go on from, or None for a run that is to be started.

    The run's folder and its copy are looked at, first the one that saved last. If the copy is taken, the run's folder
    becomes what the copy is. A run that was killed before its first checkpoint, or whose checkpoints are all damaged,
    is set aside: its folder gets another name.

    Args:
        run_dir: the run's folder, which need not exist.
        backup_dir: as given to the Trainer. The copy is `<backup_dir>/<the run's name>`.

    Raises:
        TrainingError: if another process is at work in the folder, it cannot be written, or holds another run than the
            copy does.
    """
    run_dir = resolve(run_dir)
    check_writable(run_dir)
    check_not_in_use(run_dir)
    folders = [run_dir]
    if backup_dir is not None:
        folders.append(backup_folder(run_dir, backup_dir))
        if all(map(checkpoints, folders)):
            check_same_first_event(*folders)
    start = None
    for folder in sorted(folders, key=last_saved, reverse=True):
        start = start or latest_with_state(folder)
    if start is not None and start.parent == run_dir:
        return start

    for folder in folders:
        if holds_run(folder) and (start is None or folder != start.parent):
            aside = next(path for n in itertools.count(1) if not (path := Path(f"{folder}.set-aside-{n}")).exists())
            os.rename(folder, aside)
            warnings.warn(
                f"{display_path(folder)} holds a run without a checkpoint to go on from. It is now "
                f"{display_path(aside)}; delete it if you do not need it",
                stacklevel=2,
            )
    if start is None:
        return None
    try:
        with replacing_folder(run_dir, known={".lock"}) as new:
            shutil.copytree(start.parent, new, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    except OSError as error:
        raise TrainingError(f"the copy {display_path(start.parent)} of the run cannot be taken: {error}") from error
    warnings.warn(f"{display_path(run_dir)} was lost, and is taken from {display_path(start.parent)}", stacklevel=2)
    return run_dir / start.name


def load_run(
    path: Path,
    model: Transformer,
    optimizers: Sequence[Optimizer],
    scaler: torch.amp.GradScaler,
    description: dict[str, Any],
    init_step: int | None = None,
) -> Progress:
    """Take over a checkpoint's weights, moments, loss scale and random state. Nothing on disk changes.

    Args:
        path: a verified checkpoint.
        model, optimizers, scaler: of the run that goes on. If the checkpoint is refused, they are as they were.
        description: of that run. Its `history` becomes the checkpoint's, with an entry for this resume.
        init_step: if given, the step that it must go on from.

    Raises:
        TrainingError: if its step is not the one asked for, or the run is to start from another model.
        CheckpointError: if it belongs to another run, or holds only weights; or naming the file and the field or tensor
            at fault.
    """
    if description["init_from"] is not None:
        raise TrainingError(
            "init_from starts a new run at step 0 with another model's weights, and resume (checkpoint_dir) goes on "
            "with a run as it was: leave out one of them"
        )
    saved = read_config(path)
    check_same_run(path, saved, description)
    check_has_state(path)
    check_start(saved["step"], init_step, description["train"]["max_steps"])
    state, tensors = read_trainer_state(path, model, optimizers)
    load_weights(model, path)

    names, device = _names(model), model.tok_embeddings.weight.device
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = names[parameter] + "/"
                moments = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
                if not moments:  # every step so far was skipped
                    continue
                # "step" stays where the optimizer wants it: on the CPU unless fused on a GPU
                optimizer.state[parameter] = {
                    key: moment.to(device) if key != "step" or group.get("fused") else moment
                    for key, moment in moments.items()
                }

    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
    loss_scale = state.pop("scaler")
    if loss_scale:  # empty unless the run was in fp16
        scaler.load_state_dict(loss_scale)
    description["init_from"] = saved.get("init_from")
    description["history"] = [*saved.get("history", []), history_entry(saved, description, state["step"])]
    known = {name: state[name] for name in Progress.__dataclass_fields__ if name in state}  # older ones lack val_step
    return Progress(**{**known, "plateau": Plateau(**state["plateau"])})


def history_entry(saved: dict[str, Any], description: dict[str, Any], step: int) -> dict[str, Any]:
    """What a resume at a step changes: settings as `group.name: [before, after]`, and the order of data in words."""
    pairs = {
        f"{group}.{key}": [saved.get(group, {}).get(key), value]
        for group in ("train", "environment")
        for key, value in description[group].items()
    }
    pairs |= {key: [saved.get(key), description[key]] for key in ("precision", "device")}
    changed = {name: [before, after] for name, (before, after) in pairs.items() if before != after}
    entry: dict[str, Any] = {"step": step, "changed": changed}
    if moved := moved_windows(saved.get("train", {}), description["train"], step):
        warnings.warn(moved, stacklevel=4)  # where the Trainer is built
        entry["data"] = moved
    return entry


def moved_windows(before: dict[str, Any], after: dict[str, Any], step: int) -> str | None:
    """What other training settings do to the order in which windows are read from a step on, in words; None if nothing.

    A step's windows follow from its number.
    """
    there, here = (config.get("batch_size", 0) * config.get("grad_accum_steps", 1) * step for config in (before, after))
    if there and before.get("seed") != after["seed"]:
        return (
            f"seed was {before.get('seed')} and is {after['seed']}: from step {step} on the windows come in another "
            "order, so in this epoch some are read twice and others never"
        )
    if there and there != here:
        windows = f"{abs(there - here):,} windows are {'read twice' if here < there else 'never read'}"
        return (
            f"batch_size x grad_accum_steps was {there // step} windows a step and is {here // step}: step {step} "
            f"starts at window {here:,} of the data's order, not {there:,}, and so {windows}"
        )
    return None


def read_trainer_state(
    path: Path, model: Transformer, optimizers: Sequence[Optimizer]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The numbers and tensors of a checkpoint's trainer, checked before any of them is used.

    An optimizer's kernel trusts the sizes of its moments and writes there, so each must be as its parameter.

    Returns:
        `trainer_state.json`, and `trainer_state.safetensors` on the CPU: `rng.cpu`, `rng.cuda` (both uint8) and
        `<parameter>/<key>`.

    Raises:
        CheckpointError: naming the file and the field or tensor that is not as it must be.
    """
    file, config = path / "trainer_state.json", read_config(path)
    state = read_part(file, _TRAINER_STATE)
    for key in ("step", "tokens"):
        if state[key] != config.get(key, state[key]):
            raise CheckpointError(f"{display_path(file)} cannot be used: {key}: {state[key]} is not config.json's")
    if not state["skipped_in_a_row"] <= state["skipped"] <= state["step"]:
        raise CheckpointError(f"{display_path(file)} cannot be used: skipped: more than there were steps")

    file = path / "trainer_state.safetensors"
    tensors = read_tensors(file)
    random_states = {name: tensor for name, tensor in tensors.items() if name in ("rng.cpu", "rng.cuda")}
    faults = _random_state_faults(random_states, model.tok_embeddings.weight.device)
    unknown = tensors.keys() - random_states.keys()

    # each parameter has all of its moments, or none before its first step
    names = _names(model)
    for optimizer in optimizers:
        keys = ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("exp_avg", "exp_avg_sq", "step")
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            moments = {key: f"{names[parameter]}/{key}" for key in keys}
            present = unknown & set(moments.values())
            unknown -= present
            for key, name in moments.items():
                if name in present:
                    faults += _moment_fault(name, key, tensors[name], parameter, state["step"])
                elif present:
                    faults.append(f"missing {name}")

    faults += [f"unexpected {name}" for name in sorted(unknown)]
    if faults:
        raise CheckpointError(f"{display_path(file)} cannot be used: " + "; ".join(faults[:8]))
    return state, tensors


def _random_state_faults(states: dict[str, Tensor], device: torch.device) -> list[str]:
    """What is wrong with the random states of the CPU and of a GPU. torch itself judges the ones that will be used."""
    faults = [] if "rng.cpu" in states else ["missing rng.cpu"]
    for name, tensor in states.items():
        if tensor.dim() != 1 or tensor.dtype != torch.uint8:
            faults.append(f"{name} is {_shape_and_type(tensor.shape, tensor.dtype)}, not bytes in a row")
        elif name in ("rng.cpu", f"rng.{device.type}"):
            try:
                torch.Generator("cpu" if name == "rng.cpu" else device).set_state(tensor)
            except RuntimeError as error:
                faults.append(f"{name}: {error}")
                continue
            # torch does not see that the two places of a CPU's state lead out of its 624 words, and would read there
            if name == "rng.cpu":
                words, place = tensor[8:24].clone().view(torch.int64).tolist()
                if (words & 0xFFFFFFFF) + place != 625 and (words & 0xFFFFFFFF, place) != (1, 0):
                    faults.append(f"{name}: its places are not those of a random state")
    return faults


def _moment_fault(name: str, key: str, tensor: Tensor, parameter: nn.Parameter, steps: int) -> list[str]:
    """What is wrong with one tensor of an optimizer, as a list of none or one."""
    shape, dtype = (torch.Size(), torch.float32) if key == "step" else (parameter.shape, parameter.dtype)
    if (tensor.shape, tensor.dtype) != (shape, dtype):
        return [f"{name} is {_shape_and_type(tensor.shape, tensor.dtype)}, not {_shape_and_type(shape, dtype)}"]
    least, most = torch.stack(torch.aminmax(tensor)).tolist()
    if not (math.isfinite(least) and math.isfinite(most)):
        return [f"{name} holds what is not finite"]
    if (key == "exp_avg_sq" and least < 0) or (key == "step" and not (0 <= least <= steps and least.is_integer())):
        return [f"{name} is out of range: {least}"]
    return []


def _shape_and_type(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {dtype_name(dtype)}"


def _names(model: Transformer) -> dict[Tensor, str]:
    """The model's parameters with their names. A tensor as a key is compared by identity."""
    return {parameter: name for name, parameter in model.named_parameters()}
