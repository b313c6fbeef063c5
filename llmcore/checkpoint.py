"""Checkpoints: folders written whole or not at all, and checked by hash before they are used. No pickle anywhere.

A checkpoint `<run>/step=000400_loss=3.214/` holds `model.safetensors`, `config.json`, `tokenizer.model` or
`tokenizer.json`, `trainer_state.safetensors` and `trainer_state.json`, and, written last, `manifest.json` with the hash
of each. The best checkpoint of a run loses its trainer's state once it is older than those that the run may go on from.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcore.config import ConfigError, ModelConfig
from llmcore.device import pick_device
from llmcore.files import (
    check_json,
    display_path,
    fsync,
    pointer_hint,
    read_json,
    resolve,
    sha256_file,
    to_json,
    warn_once,
    write_atomic,
)
from llmcore.model import Transformer
from llmcore.tokenizer import Tokenizer, TokenizerError

FORMAT_VERSION = 1
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATE = ("trainer_state.json", "trainer_state.safetensors")
# all files of a checkpoint that are ever read, besides its manifest
TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # of which a checkpoint has one at most
FILES = ("model.safetensors", "config.json", *TOKENIZERS, *STATE)
ATTEMPTS = 100  # at reading while another process saves and deletes

# What the JSON files of a checkpoint must look like. They may hold more.
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**53}
INIT_FROM = {  # of a run that started from another model
    "type": ["object", "null"],
    "required": ["source", "sha256"],
    "properties": {"source": {"type": "string"}, "sha256": {"type": "string"}},
}
_OBJECT = {"type": "object"}
_TEXT = {"type": ["string", "null"]}
_SAVED = {
    "step": COUNT,
    "loss": {"type": "number"},  # NaN where nothing was measured yet
    "loss_of": {"enum": ["validation", "training"]},
}
_MANIFEST = {
    "type": "object",
    "required": ["format_version", "step", "loss", "saved_at", "sha256"],
    "properties": {
        **_SAVED,
        "format_version": {"enum": [FORMAT_VERSION]},
        "saved_at": {"type": "finite number", "minimum": 0, "maximum": 1e11},  # what follows it must be a time too
        "weights_only": {"type": "boolean"},  # the trainer's state was deleted, or is about to be
        "sha256": {
            "type": "object",
            "patternProperties": {"^[A-Za-z0-9._-]{1,100}$": {"type": "string", "pattern": "^[0-9a-f]{64}$"}},
            "additionalProperties": False,
        },
    },
}
_COUNTS = ("batch_size", "grad_accum_steps", "max_steps")
_CONFIG = {
    "type": "object",
    "required": ["step", "loss", "model"],
    "properties": {
        **_SAVED,
        **dict.fromkeys(("model", "environment"), _OBJECT),
        "train": {"type": "object", "properties": dict.fromkeys(_COUNTS, COUNT)},
        **dict.fromkeys(("tokenizer", "precision", "device"), _TEXT),
        "tokens": COUNT,
        "val_loss": {"type": ["number", "null"]},
        "val_step": {**COUNT, "type": ["integer", "null"]},
        "data": {"type": ["object", "null"]},
        "init_from": INIT_FROM,
        "sources": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
        "bytes_per_token": {"type": ["finite number", "null"], "minimum": 0},
        "history": {"type": "array", "items": _OBJECT},
    },
}


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or made for something else. The message names the file or field."""


def _fault(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{display_path(path)} {fault}")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    model: Transformer  # with its weights, in evaluation mode, on the device asked for
    tokenizer: Tokenizer | None  # the one it was trained with; None where training used none (the reversal task)
    config: dict[str, Any]  # everything in `config.json`: model, train, data, step, tokens, losses
    step: int  # optimizer steps taken
    path: Path  # the folder; of a GGUF file, the file itself


# Saving


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
        loss: of that step, in nats per token. The folder's name shows it.
        loss_of: which loss that is: "validation" or "training".
        config: more entries for `config.json`; JSON values.
        tensors: the trainer's tensors (optimizer moments, random states).
        state: the trainer's numbers; JSON values.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: if the disk is full or cannot be written. What was there before is unchanged.
    """
    run_dir = Path(run_dir)
    path = run_dir / f"step={step:06d}_{'loss' if loss_of == 'validation' else 'train_loss'}={loss:.3f}"
    temporary = run_dir / f".{path.name}.{os.getpid()}.tmp"
    weights = model.state_dict()
    if model.config.tie_embeddings:
        del weights["output.weight"]  # the same tensor as tok_embeddings.weight
    head = {"format_version": FORMAT_VERSION, "step": step, "loss": float(loss), "loss_of": loss_of}
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

        # the files, and last the manifest with their hashes
        _save_tensors(weights, temporary / "model.safetensors", {"format": "pt"})
        content = {**head, "model": model.config.to_dict(), **(config or {})}
        (temporary / "config.json").write_text(to_json(content, indent=1), encoding="utf-8")
        if tokenizer is not None:
            (temporary / tokenizer.file_name).write_bytes(tokenizer.model_bytes)
        if tensors is not None:
            _save_tensors(tensors, temporary / "trainer_state.safetensors")
        if state is not None:
            (temporary / "trainer_state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        _write_manifest(temporary, head, after=last_saved(run_dir))

        _publish(temporary, path)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in (*weights.values(), *(tensors or {}).values()))
        raise CheckpointError(
            f"{display_path(path)} cannot be written: {error}. It needs {size / 1e6:,.1f} MB; "
            "make room on the disk and save again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file, metadata)


def _write_manifest(folder: Path, head: Mapping[str, Any], after: float) -> None:
    """Flush a checkpoint's files to disk, and write the manifest with their hashes and a time later than `after`."""
    files = sorted(folder.iterdir())
    with ThreadPoolExecutor() as threads:  # one waits for the disk while another computes
        list(threads.map(fsync, files))
        hashes = dict(zip((file.name for file in files), threads.map(sha256_file, files), strict=True))
    saved_at = max(time.time(), math.nextafter(after, math.inf))  # clocks may jump back
    write_atomic(folder / "manifest.json", json.dumps({**head, "saved_at": saved_at, "sha256": hashes}, indent=1))


def _publish(temporary: Path, path: Path) -> None:
    """Let a finished folder become a checkpoint, by one rename."""
    if path.exists():
        _delete(path)
    os.rename(temporary, path)
    fsync(path.parent)


def _delete(path: Path) -> None:
    """Delete a checkpoint, by a rename first, so that half of it is never taken for a whole one."""
    renamed = path.with_name(f".{path.name}.deleted.tmp")
    shutil.rmtree(renamed, ignore_errors=True)
    os.rename(path, renamed)
    shutil.rmtree(renamed)


def prune_checkpoints(run_dir: str | os.PathLike[str], keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one, and what an interrupted save or deletion left.

    If the best one is older than those `keep`, its trainer's state is deleted: it is kept for its weights.
    """
    saved = checkpoints(run_dir)
    best = min(saved, key=_rank, default=None)
    for path in saved[:-keep]:
        if path == best:
            _delete_state(path)
        else:
            _delete(path)
    _delete_leftovers(Path(run_dir))


def _delete_leftovers(run_dir: Path) -> None:
    for leftover in run_dir.glob(".step=*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _delete_state(path: Path) -> None:
    """Delete a checkpoint's trainer state. The manifest says so first: killed anywhere, the checkpoint is whole."""
    manifest = _checked_manifest(path)
    if not manifest.get("weights_only"):
        hashes = {name: digest for name, digest in manifest["sha256"].items() if name not in STATE}
        changed = {**manifest, "weights_only": True, "sha256": hashes}
        write_atomic(path / "manifest.json", json.dumps(changed, indent=1))
    for leftover in path.glob(".llmcore-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for name in STATE:
        (path / name).unlink(missing_ok=True)


def back_up(run_dir: Path, copy: Path | None) -> None:
    """Bring the copy of a run up to date, if it has one: metrics, configuration, checkpoints. Others there go.

    Each file and each checkpoint is copied whole or not at all. A fault is a warning, once for each kind of it.
    """
    try:
        if copy is not None:
            _copy_run(run_dir, copy)
    except (OSError, CheckpointError) as error:
        warn_once(
            f"{copy} {type(error).__name__} {getattr(error, 'errno', None)}",
            f"backup_dir: the copy {display_path(copy or '')} is not up to date: {error}. Training goes on; the next "
            "checkpoint will try again",
        )


def _copy_run(run_dir: Path, copy: Path) -> None:
    copy.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "config.json"):
        write_atomic(copy / name, (run_dir / name).read_bytes())
    saved = checkpoints(run_dir)
    for path in saved:
        _copy_checkpoint(path, copy / path.name)
    for path in checkpoints(copy):
        if path.name not in {kept.name for kept in saved}:
            _delete(path)
    _delete_leftovers(copy)


def _copy_checkpoint(path: Path, target: Path) -> None:
    """Copy a checkpoint, unless it is there: then only its trainer's state may have to go."""
    manifest, there = _checked_manifest(path), read_manifest(target)
    if there and there["saved_at"] == manifest["saved_at"]:
        if manifest.get("weights_only"):
            _delete_state(target)
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name in (*manifest["sha256"], "manifest.json"):
            shutil.copyfile(path / name, temporary / name)
            fsync(temporary / name)
        _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# Checking


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A checkpoint folder's manifest; None if the folder is not a finished checkpoint that this code can read."""
    try:
        return _checked_manifest(path)
    except CheckpointError:
        return None


def _checked_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint folder's manifest, checked against its schema. Raises CheckpointError naming the field at fault."""
    file = path / "manifest.json"
    if not file.is_file():
        raise _fault(path, "is not a checkpoint: it has no manifest.json")
    try:
        manifest = read_json(file, {"type": "object", "required": ["format_version"]})
        version = manifest["format_version"]
        if type(version) is int and version != FORMAT_VERSION:
            raise _fault(file, f"has format version {version}; this code reads {FORMAT_VERSION}: update llmcore")
        check_json(manifest, _MANIFEST, display_path(file))
        return manifest
    except (OSError, ValueError) as error:
        raise _fault(path, f"is not a checkpoint: {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint's `config.json`, checked against its schema.

    Raises:
        CheckpointError: naming the field that is not as it must be.
    """
    return read_part(path / "config.json", _CONFIG)


def read_part(file: Path, schema: Mapping[str, Any]) -> Any:
    """A JSON file of a checkpoint, checked against a schema.

    Raises:
        CheckpointError: naming the file, and the field that is not as it must be.
    """
    try:
        return read_json(file, schema)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(error) if isinstance(error, ValueError) else f"{display_path(file)}: {error}"
        ) from None


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the manifest.

    Raises:
        CheckpointError: naming the file that is missing or differs, or that the manifest should list and does not.
    """
    manifest = _checked_manifest(path)
    hashes = manifest["sha256"]
    for name in FILES:
        left_over = manifest.get("weights_only", False) and name in STATE  # by a kill, and never read
        if name not in hashes and not left_over and (path / name).exists():
            raise _fault(path, f"is damaged: it holds {name}, which its manifest.json does not list")
    files = [path / name for name in sorted({"model.safetensors", "config.json", *hashes})]
    for file in files:
        if not file.is_file():
            raise _fault(file, "is missing")
    with ThreadPoolExecutor() as threads:
        for file, digest in zip(files, threads.map(sha256_file, files), strict=True):
            if digest != hashes.get(file.name):
                reason = pointer_hint(file) or "its hash differs from the manifest's"
                raise _fault(file, f"is damaged: {reason}")

    config = read_config(path)
    if any(repr(config.get(key)) != repr(manifest[key]) for key in ("step", "loss")):  # by repr, since NaN != NaN
        raise _fault(path / "manifest.json", "is damaged: its step or loss is not that of config.json")
    return manifest


def loss_in_words(config: Mapping[str, Any]) -> str:
    """What a checkpoint's `config.json` says of its loss, with the text and step of each figure."""
    loss, val_loss, val_step = (config.get(name) for name in ("loss", "val_loss", "val_step"))
    if config.get("loss_of") == "validation":
        return f"{loss:.3f} nats per token on held-out text"
    if config.get("loss_of") != "training":
        return f"{loss:.3f} nats per token (an older checkpoint: of an earlier step, perhaps)"
    known = val_loss is not None and val_step is not None
    validated = f"; at step {val_step:,}, {val_loss:.3f} on held-out text" if known else ", not validated"
    return f"{loss:.3f} nats per token in training{validated}"


# Finding


def checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """The finished checkpoints of one run in the order of saving. Hashes are not checked here.

    That is the order of steps, unless the run was resumed from an earlier one.
    """
    return _finished(Path(run_dir).glob("step=*"))


def _finished(folders: Iterable[Path]) -> list[Path]:
    """Those of the folders that are finished checkpoints, in the order of saving."""
    manifests = {path: read_manifest(path) for path in folders}
    saved = [(manifest["saved_at"], manifest["step"], path) for path, manifest in manifests.items() if manifest]
    return [path for _, _, path in sorted(saved)]


def has_state(path: Path) -> bool:
    """Whether a finished checkpoint has its trainer's state, so that a run can go on from it."""
    manifest = read_manifest(path)
    return manifest is not None and {*STATE} <= manifest["sha256"].keys()


def check_has_state(path: Path) -> None:
    """Raise CheckpointError for a checkpoint that no run can go on from, naming the newest beside it that can."""
    if has_state(path):
        return
    others = [display_path(other) for other in checkpoints(path.parent) if has_state(other)]
    raise _fault(
        path,
        "holds a model, but not the optimizer's state: a run cannot go on from it. (The best checkpoint keeps only its "
        f"weights once it is old.) The newest one there that has it: {others[-1] if others else 'none'}",
    )


def latest_with_state(run_dir: Path) -> Path | None:
    """The newest checkpoint of one run that a run can go on from, verified; None if there is none."""
    for path in reversed(checkpoints(run_dir)):
        try:
            if has_state(path):
                verify_checkpoint(path)
                return path
        except CheckpointError as error:
            warnings.warn(f"passed over: {error}", stacklevel=3)
    return None


def last_saved(run_dir: Path) -> float:
    """When a run saved last, by its manifests; 0 if it never did."""
    return max(((read_manifest(path) or {}).get("saved_at", 0.0) for path in run_dir.glob("step=*")), default=0.0)


def _rank(path: Path) -> tuple[int, float]:
    """What the best checkpoint is the lowest of: validation losses come before training losses, NaN comes last.

    Checkpoints of older versions do not say which loss theirs is; it counts as validation's.
    """
    manifest = read_manifest(path) or {}
    loss = manifest.get("loss", math.nan)
    if math.isnan(loss):
        return 2, math.inf
    return (0 if manifest.get("loss_of", "validation") == "validation" else 1), loss


def find_checkpoint(folder: str | os.PathLike[str], checkpoint_dir: str | os.PathLike[str] = "latest") -> Path:
    """The checkpoint meant by a folder: itself if it is one, else the latest or best of the run it is.

    For a folder of runs, the run that saved last counts. Files are checked by hash; a damaged checkpoint of a run is
    passed over with a warning.

    Args:
        folder: a checkpoint, a run or a folder of runs.
        checkpoint_dir: as in the notebooks: "latest" or "best" in that folder, or a folder to look in instead of it.

    Raises:
        CheckpointError: if there is none, saying where it looked, or if the one named is damaged.
    """
    return _use_checkpoint(folder, checkpoint_dir, lambda path, manifest: path)


Result = TypeVar("Result")


def _use_checkpoint(
    folder: str | os.PathLike[str],
    checkpoint_dir: str | os.PathLike[str],
    use: Callable[[Path, dict[str, Any]], Result],
) -> Result:
    """Call `use` with the checkpoint meant and its manifest.

    A trainer may save and delete meanwhile. A checkpoint that is deleted while it is read is not damaged: look again.
    """
    choice = os.fspath(checkpoint_dir)
    if choice not in ("latest", "best"):
        folder, choice = choice, "latest"
    folder, last_error = resolve(folder), None
    for _ in range(ATTEMPTS):
        try:
            path, manifest = _select(folder, choice)
            with _noticing_replacement(path):
                return use(path, manifest)
        except (_ReplacedError, FileNotFoundError) as error:
            last_error = error
    raise CheckpointError(f"checkpoints in {display_path(folder)} change faster than they can be read") from last_error


class _ReplacedError(CheckpointError):
    """A checkpoint that was deleted or replaced while it was read."""


@contextlib.contextmanager
def _noticing_replacement(path: Path) -> Iterator[None]:
    """Turn an error into _ReplacedError if the checkpoint was deleted or replaced meanwhile."""
    before = read_manifest(path)
    try:
        yield
    except (CheckpointError, OSError) as error:
        after = read_manifest(path)
        if path.exists() and repr(before) == repr(after):  # by repr, since NaN != NaN
            raise
        raise _ReplacedError(f"{display_path(path)} was deleted or replaced while it was read") from error


def _select(folder: Path, choice: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint meant by a folder, verified, and its manifest; see `find_checkpoint`."""
    if (folder / "manifest.json").exists() or folder.name.startswith("step="):
        return folder, verify_checkpoint(folder)

    runs = {path.parent for pattern in ("step=*", "*/step=*", "*/*/step=*") for path in folder.glob(pattern)}
    for run in sorted(runs, key=last_saved, reverse=True):
        folders = set(run.glob("step=*"))
        finished = _finished(folders)
        unfinished = sorted(folders - set(finished))  # they come first, so that each gets its warning
        ordered = sorted(finished, key=_rank) if choice == "best" else finished[::-1]
        for path in (*unfinished, *ordered):
            try:
                with _noticing_replacement(path):
                    return path, verify_checkpoint(path)
            except _ReplacedError:
                raise
            except CheckpointError as error:
                warnings.warn(f"passed over: {error}", stacklevel=4)
    raise CheckpointError(
        f"no checkpoint in {display_path(folder)} (looked for step=*/manifest.json in it and two levels "
        "below); train one with notebook 04_scifi_train, or name another folder"
    )


# Loading


def load_checkpoint(
    folder: str | os.PathLike[str], checkpoint_dir: str | os.PathLike[str] = "latest", device: str = "auto"
) -> Checkpoint:
    """Load a model and its tokenizer from a checkpoint, a run or a folder of runs.

    Only files that the manifest lists are read. While a trainer saves and deletes in the folder, the newest checkpoint
    of the moment is loaded.

    Args:
        folder, checkpoint_dir: see `find_checkpoint`.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        CheckpointError: if it is missing, damaged, or its tensors are not those of its configuration, or not finite.
    """
    return _use_checkpoint(folder, checkpoint_dir, lambda path, manifest: _load(path, manifest, device))


def _load(path: Path, manifest: dict[str, Any], device: str) -> Checkpoint:
    """A verified checkpoint as a model with its tokenizer."""
    config, tokenizer = read_config(path), None
    try:
        file = path / "config.json"
        model_config = ModelConfig.from_dict(config["model"])
        for file in (path / name for name in TOKENIZERS if name in manifest["sha256"]):
            if tokenizer is not None:
                raise _fault(path, f"is damaged: it has two tokenizers, {' and '.join(TOKENIZERS)}")
            tokenizer = Tokenizer(file)
    except (ConfigError, TokenizerError) as error:
        raise _fault(file, f"cannot be used: {error}") from None
    weights = path / "model.safetensors"
    model = model_with(model_config, read_tensors(weights), weights, "the model in config.json")

    # the tokenizer must be the one that the model was trained with
    if tokenizer is not None and tokenizer.vocab_size > model_config.vocab_size:
        ids, room = tokenizer.vocab_size, model_config.vocab_size
        raise _fault(file, f"has {ids} ids, the model in config.json only vocab_size={room}")
    if config.get("tokenizer") is not None and (tokenizer is None or tokenizer.fingerprint != config["tokenizer"]):
        raise _fault(path / "config.json", "names another tokenizer than the checkpoint's own")
    return Checkpoint(model.to(pick_device(device)).eval(), tokenizer, config, config["step"], path)


def model_with(
    config: ModelConfig, weights: dict[str, Tensor], source: Path, described: str = "the model"
) -> Transformer:
    """A model of this shape with these weights, by our names. A shape that cannot fit them is refused unbuilt.

    The arguments are those of `fill_model`.

    Raises:
        CheckpointError: see `fill_model`.
    """
    if config.n_layers > len(weights):
        few = f"it holds {len(weights)} tensors, too few for n_layers={config.n_layers}"
        raise _fault(source, f"does not fit {described}: {few}")
    with torch.device("meta"):  # no time lost on initial values, and the random state stays as it is
        model = Transformer(config)
    model.reset_rope()
    fill_model(model, weights, source, described)
    return model


def load_weights(model: Transformer, path: Path) -> None:
    """Copy a checkpoint's weights into a model of the same shape.

    Raises:
        CheckpointError: see `fill_model`.
    """
    fill_model(model, read_tensors(path / "model.safetensors"), path / "model.safetensors")


def fill_model(model: Transformer, weights: dict[str, Tensor], source: Path, described: str = "the model") -> None:
    """Give a model its weights, by our names; a tied output matrix may be left out.

    Args:
        model: of any device. One on the meta device takes over these tensors themselves, and their dtype.
        weights: by name, all of one dtype: float32, bfloat16, float16 or float64.
        source: the file they come from.
        described: the model in words, for an error: with the file that its shape comes from, if it is another one.

    Raises:
        CheckpointError: naming the source, and tensors that are missing, too many, of another shape or dtype, or not
            finite. The model is then unchanged.
    """
    own, is_empty = model.state_dict(), model.tok_embeddings.weight.is_meta
    tied = weights.get("tok_embeddings.weight") if model.config.tie_embeddings else None
    if tied is not None:
        weights = {"output.weight": tied, **weights}

    wrong = _misfits(own, weights)
    if not wrong:
        used = ((name, tensor if is_empty else tensor.to(own[name].dtype)) for name, tensor in weights.items())
        wrong = [f"{name} holds what is not finite" for name, tensor in used if not is_finite(tensor)]
    if not wrong and tied is not None and not torch.equal(weights["output.weight"], tied):
        wrong = ["output.weight is not tok_embeddings.weight, though tie_embeddings is true"]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise _fault(source, f"does not fit {described}: " + "; ".join(wrong[:8]) + more)

    model.load_state_dict(weights, assign=is_empty)
    if model.config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight


def _misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """How weights differ from a model's own in names, shapes and type, in words."""
    wrong = [f"missing {name}" for name in own if name not in weights]
    wrong += [f"unexpected {name}" for name in weights if name not in own]
    common = {name: weights[name] for name in own if name in weights}
    for name, tensor in common.items():
        if tensor.shape != own[name].shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, the model's {tuple(own[name].shape)}")
        if tensor.dtype not in WEIGHT_TYPES:
            wrong.append(
                f"{name} is {dtype_name(tensor.dtype)}; weights must be {', '.join(map(dtype_name, WEIGHT_TYPES))}"
            )

    examples = {tensor.dtype: name for name, tensor in common.items()}  # of each type
    if len(examples) > 1 and set(examples) <= set(WEIGHT_TYPES):
        both = [f"{name} is {dtype_name(dtype)}" for dtype, name in examples.items()]
        wrong.append(f"{' and '.join(both[:2])}: all weights must be of one type")
    return wrong


def has_finite_weights(model: Transformer) -> bool:
    """Whether all weights of a model are finite."""
    return all(is_finite(parameter.detach()) for parameter in model.parameters())


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor is finite, in one pass and without a copy."""
    return all(map(math.isfinite, torch.stack(torch.aminmax(tensor)).tolist()))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype by its name: float32, bfloat16, …"""
    return str(dtype).removeprefix("torch.")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors, on the CPU.

    Raises:
        CheckpointError: if it is missing or no such file.
    """
    try:
        if hint := pointer_hint(file):
            raise SafetensorError(hint)
        return load_file(file)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last from torch, if the file was just deleted
        raise _fault(file, f"cannot be read: {error}") from None
