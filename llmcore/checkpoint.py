"""Checkpoints: folders written whole or not at all, and checked by hash before they are used. No pickle anywhere.

A checkpoint `<run>/step=000400_loss=3.214/` holds `model.safetensors`, `config.json`, `tokenizer.model`,
`trainer_state.safetensors` and `trainer_state.json`, and, written last, `manifest.json` with the hash of each.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcore.config import ModelConfig
from llmcore.device import pick_device
from llmcore.files import fsync, resolve, sha256_file, shown, to_json, write_atomic
from llmcore.model import Transformer
from llmcore.tokenizer import Tokenizer

FORMAT_VERSION = 1


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or made for something else. The message names the file or field."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: with its weights, in evaluation mode, on the device asked for.
        tokenizer: the one it was trained with; None where training used none (the reversal task).
        config: everything in `config.json`: model, train, data, step, tokens, losses.
        step: optimizer steps taken.
        path: the folder.
    """

    model: Transformer
    tokenizer: Tokenizer | None
    config: dict[str, Any]
    step: int
    path: Path


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    model: Transformer,
    tokenizer: Tokenizer | None,
    *,
    step: int,
    loss: float,
    loss_of: str = "validation",
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint into a run folder: to a temporary sibling, flushed to disk, then renamed.

    Args:
        run_dir: the run's folder.
        model: whose weights to save, in their own dtype.
        tokenizer: copied along.
        step: optimizer steps taken.
        loss: what to name the folder by, in nats per token,
        loss_of: and whether it is the "validation" or the "training" loss of that step.
        config: more entries for `config.json`; JSON values.
        tensors: the trainer's tensors (optimizer moments, random states).
        state: the trainer's numbers; JSON values.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: if the disk is full or cannot be written; what was there before is as it was.
    """
    run_dir = Path(run_dir)
    path = run_dir / f"step={step:06d}_{'loss' if loss_of == 'validation' else 'train_loss'}={loss:.3f}"
    temporary = run_dir / f".{path.name}.{os.getpid()}.tmp"
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["output.weight"]  # the same tensor as tok_embeddings.weight
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        if tensors is not None:
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
                temporary / "trainer_state.safetensors",
            )
        if state is not None:
            (temporary / "trainer_state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        content = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "loss": float(loss),
            "loss_of": loss_of,
            "model": model.config.to_dict(),
            **(config or {}),
        }
        (temporary / "config.json").write_text(to_json(content, indent=1), encoding="utf-8")
        if tokenizer is not None:
            (temporary / "tokenizer.model").write_bytes(tokenizer.model_bytes)
        hashes = {}
        for file in sorted(temporary.iterdir()):
            fsync(file)
            hashes[file.name] = sha256_file(file)
        later = math.nextafter(_last_saved(run_dir), math.inf)
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "loss": float(loss),
            "loss_of": loss_of,
            "saved_at": max(time.time(), later),  # clocks may jump back
            "sha256": hashes,
        }
        write_atomic(temporary / "manifest.json", json.dumps(manifest, indent=1))
        if path.exists():
            _delete(path)
        os.rename(temporary, path)
        fsync(run_dir)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in (*weights.values(), *(tensors or {}).values()))
        raise CheckpointError(
            f"{shown(path)} cannot be written: {error}. It needs {size / 1e6:,.1f} MB; "
            "make room on the disk and save again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _delete(path: Path) -> None:
    """Delete a checkpoint by a rename first, so that half of one is never taken for a whole."""
    doomed = path.with_name(f".{path.name}.deleted.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A checkpoint folder's manifest; None if the folder is no finished checkpoint."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        kinds = {"step": int, "loss": float, "saved_at": float, "sha256": dict}
        return manifest if all(isinstance(manifest[key], kind) for key, kind in kinds.items()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _loss(path: Path) -> tuple[bool, float]:
    """For finding the best checkpoint: validation losses come before training losses, what is no number comes last.

    Checkpoints of older versions do not say of what their loss is; it counts as validation's.
    """
    manifest = read_manifest(path) or {}
    loss = manifest.get("loss", math.nan)
    if math.isnan(loss):
        return True, math.inf
    return manifest.get("loss_of", "validation") != "validation", loss


def loss_in_words(config: Mapping[str, Any]) -> str:
    """What a checkpoint's `config.json` knows of its loss, and of which text and step each figure is."""
    loss, val_loss, val_step = (config.get(name) for name in ("loss", "val_loss", "val_step"))
    if config.get("loss_of") == "validation":
        return f"{loss:.3f} nats per token on held-out text"
    if config.get("loss_of") != "training":
        return f"{loss:.3f} nats per token (an older checkpoint: of an earlier step, perhaps)"
    known = val_loss is not None and val_step is not None
    validated = f"; at step {val_step:,}, {val_loss:.3f} on held-out text" if known else ", not validated"
    return f"{loss:.3f} nats per token in training{validated}"


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the manifest.

    Raises:
        CheckpointError: naming the file that is missing or differs.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise CheckpointError(f"{shown(path)} is not a checkpoint: it has no readable manifest.json")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{shown(path)} has format version {manifest.get('format_version')}; "
            f"this code reads {FORMAT_VERSION}: update llmcore"
        )
    for name in {"model.safetensors", "config.json", *manifest["sha256"]}:
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{shown(file)} is missing")
        if sha256_file(file) != manifest["sha256"].get(name):
            raise CheckpointError(f"{shown(file)} is damaged: its hash differs from the manifest's")
    config = read_config(path)
    if any(repr(config.get(key)) != repr(manifest[key]) for key in ("step", "loss")):  # repr: NaN is not itself
        raise CheckpointError(f"{shown(path / 'manifest.json')} is damaged: its step or loss is not config.json's")
    return manifest


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint's `config.json`.

    Raises:
        CheckpointError: if it is none.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown(path / 'config.json')} cannot be used: {error!r}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{shown(path / 'config.json')} cannot be used: it describes no model")
    return config


def checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """The finished checkpoints of one run in the order of saving. Hashes are not checked here.

    That is the order of steps, unless the run has gone back to an earlier one and on from there.
    """
    found = [
        (manifest["saved_at"], manifest["step"], path)
        for path in Path(run_dir).glob("step=*")
        if (manifest := read_manifest(path))
    ]
    return [path for _, _, path in sorted(found)]


def _last_saved(run_dir: Path) -> float:
    """When a run saved last, by its manifests; 0 if it never did."""
    return max(((read_manifest(path) or {}).get("saved_at", 0.0) for path in run_dir.glob("step=*")), default=0.0)


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path:
    """The newest whole checkpoint of a run, or of the newest run in a folder of runs.

    Damaged checkpoints are passed over with a warning.

    Raises:
        CheckpointError: if there is none, saying where it looked.
    """
    return find_checkpoint(run_dir, "latest")


def find_checkpoint(folder: str | os.PathLike[str], which: str = "latest") -> Path:
    """The checkpoint meant by a folder: itself if it is one, else the latest or best of the run it is.

    For a folder of runs, the run that saved last counts. Files are checked by hash.

    Args:
        folder: a checkpoint, a run or a folder of runs.
        which: "latest", "best", or another folder to look in instead, as a notebook's `checkpoint_dir` may be.

    Raises:
        CheckpointError: if there is none, saying where it looked, or if the one named is damaged.
    """
    if which not in ("latest", "best"):
        folder, which = which, "latest"
    folder = resolve(folder)
    if (folder / "manifest.json").exists() or folder.name.startswith("step="):
        verify_checkpoint(folder)
        return folder
    runs = {path.parent for pattern in ("step=*", "*/step=*", "*/*/step=*") for path in folder.glob(pattern)}
    for run in sorted(runs, key=_last_saved, reverse=True):
        candidates = checkpoints(run)
        for path in sorted(set(run.glob("step=*")) - set(candidates)):
            warnings.warn(f"passed over: {shown(path)} has no readable manifest.json", stacklevel=2)
        for path in sorted(candidates, key=_loss) if which == "best" else reversed(candidates):
            try:
                verify_checkpoint(path)
                return path
            except CheckpointError as error:
                warnings.warn(f"passed over: {error}", stacklevel=2)
    raise CheckpointError(
        f"no checkpoint in {shown(folder)} (looked for step=*/manifest.json in it and two levels "
        "below); train one with notebook 04_scifi_train, or name another folder"
    )


def load_checkpoint(folder_or_run: str | os.PathLike[str], which: str = "latest", device: str = "auto") -> Checkpoint:
    """Load a model and its tokenizer from a checkpoint, a run or a folder of runs.

    Args:
        folder_or_run: see `find_checkpoint`.
        which: "latest" or "best" where the folder holds several, or another folder to use instead.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        CheckpointError: if it is missing, damaged, or its tensors are not those of its configuration.
    """
    path = find_checkpoint(folder_or_run, which)
    config = read_config(path)
    try:
        model_config, step = ModelConfig.from_dict(config["model"]), int(config["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{shown(path / 'config.json')} cannot be used: {error!r}") from None
    model = empty_model(model_config)
    load_weights(model, path)
    tokenizer_file = path / "tokenizer.model"
    tokenizer = Tokenizer(tokenizer_file) if tokenizer_file.exists() else None
    return Checkpoint(model.to(pick_device(device)).eval(), tokenizer, config, step, path)


def empty_model(config: ModelConfig) -> Transformer:
    """A model whose weights are still to come: no time lost on initial values, nor the random state touched."""
    with torch.device("meta"):
        model = Transformer(config)
    model.reset_rope()
    return model


def load_weights(model: Transformer, path: Path) -> None:
    """Copy a checkpoint's weights into a model of the same shape.

    Raises:
        CheckpointError: naming tensors that are missing, too many or of another shape.
    """
    fill_model(model, read_tensors(path / "model.safetensors"), path / "model.safetensors")


def fill_model(model: Transformer, weights: dict[str, Tensor], source: Path) -> None:
    """Give a model its weights, by our names; a tied output matrix need not be among them.

    Raises:
        CheckpointError: naming the source, and tensors that are missing, too many or of another shape.
    """
    if model.config.tie_embeddings and "tok_embeddings.weight" in weights:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    own = model.state_dict()
    wrong = [f"missing {name}" for name in own if name not in weights]
    wrong += [f"unexpected {name}" for name in weights if name not in own]
    wrong += [
        f"{name} is {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{shown(source)} does not fit the model: " + "; ".join(wrong[:8]))
    model.load_state_dict(weights, assign=model.tok_embeddings.weight.is_meta)
    if model.config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors, on the CPU.

    Raises:
        CheckpointError: if it is missing or no such file.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{shown(file)} cannot be read: {error}") from None


def prune_checkpoints(run_dir: str | os.PathLike[str], keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one, and what an interrupted save or deletion left."""
    everything = checkpoints(run_dir)
    best = min(everything, key=_loss, default=None)
    for path in everything[:-keep]:
        if path != best:
            _delete(path)
    for leftover in Path(run_dir).glob(".step=*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
