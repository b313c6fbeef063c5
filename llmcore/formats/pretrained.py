"""A model to start from, whatever its format: our own, Hugging Face's, Meta's, GGUF, or one from the Hub."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from llmcore.checkpoint import Checkpoint, load_checkpoint, read_manifest
from llmcore.files import display_path, resolve, sha256_file
from llmcore.formats.gguf import from_gguf
from llmcore.formats.hub import from_hub
from llmcore.formats.huggingface import from_hf
from llmcore.formats.meta import from_meta
from llmcore.formats.shared import FormatError

WEIGHTS = (".safetensors", ".pth", ".gguf")  # endings of files that hold weights
OWN_FILES = ("manifest.json", "metrics.jsonl")  # of a checkpoint and of a run of ours, beside config.json
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def open_pretrained(init_from: str | os.PathLike[str], device: str = "cpu") -> Checkpoint:
    """Open a model to train on from its weights, which become float32. Its `config["init_from"]` says what it was.

    Args:
        init_from: a checkpoint or a run of ours; a folder of Hugging Face or of Meta; a GGUF file, or a folder with
            one; or "<user or organisation>/<name>", a model on the Hub.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        The model and its tokenizer, step 0. `config["init_from"]` has source (its path or name), format, sha256 (of its
        files of weights; of several, of their names and hashes) and, of a model of ours, step and its own init_from.
        Then `config["train"]` is how that was trained.

    Raises:
        FormatError: if it is nothing of these, has no tokenizer, or is a model that ours cannot be.
        CheckpointError: if it is damaged.
        HubError: if it cannot be downloaded.
    """
    path = resolve(init_from)
    name = os.fspath(init_from)
    if not path.exists():
        if HUB_NAME.fullmatch(name) is None:
            raise FormatError(f"init_from={name!r} does not exist, and is no name on the Hub (<organisation>/<name>)")
        checkpoint = from_hub(name, device)
        return _as_start(checkpoint, {"source": name, "format": "Hugging Face", "sha256": _hash(checkpoint.path)})

    gguf = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if (path / "params.json").exists():
        kind, checkpoint, files = "Meta", from_meta(path, device), path
    elif (path / "config.json").exists() and not any((path / name).exists() for name in OWN_FILES):
        kind, checkpoint, files = "Hugging Face", from_hf(path, device), path
    elif gguf:
        if len(gguf) > 1:
            raise FormatError(f"{display_path(path)} holds {len(gguf)} GGUF files; name one of them in init_from")
        kind, checkpoint, files = "GGUF", from_gguf(gguf[0], device), gguf[0]
    else:
        checkpoint = load_checkpoint(path, device=device)
        own = {"step": checkpoint.step, "init_from": checkpoint.config.get("init_from")}
        manifest = read_manifest(checkpoint.path) or {}
        sha256 = manifest["sha256"]["model.safetensors"]
        source = {"source": display_path(checkpoint.path), "format": "llm workbook", "sha256": sha256}
        return _as_start(checkpoint, source | own, checkpoint.config.get("train"))
    return _as_start(checkpoint, {"source": display_path(files), "format": kind, "sha256": _hash(files)})


def check_started_from(run_config: dict[str, Any], init_from: str | os.PathLike[str]) -> None:
    """Check that a run which is to go on started from this model.

    Raises:
        FormatError: if it began with random weights, or with another model's.
    """
    source = (run_config.get("init_from") or {}).get("source")
    given = [os.fspath(init_from), display_path(resolve(init_from))]
    if source is None or not any(source == name or source.startswith(f"{name}/") for name in given):
        raise FormatError(
            f"init_from={given[0]!r}, but the run that goes on started from {source or 'random weights'}; leave out "
            "init_from to go on with it, or give a new run another name (project)"
        )


def _as_start(checkpoint: Checkpoint, source: dict[str, Any], train: dict[str, Any] | None = None) -> Checkpoint:
    """The same in float32 at step 0, with a record of where it is from."""
    if checkpoint.tokenizer is None:
        raise FormatError(f"{source['source']} has no tokenizer that can be read, so no text can be made into its ids")
    config = {"model": checkpoint.model.config.to_dict(), "init_from": source, "step": 0, "train": train}
    return Checkpoint(checkpoint.model.float(), checkpoint.tokenizer, config, 0, checkpoint.path)


def _hash(path: Path) -> str:
    """SHA-256 of a file of weights; of a folder's, of their names and hashes."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)
    if len(files) == 1:
        return sha256_file(files[0])
    return hashlib.sha256("".join(f"{file.name} {sha256_file(file)}\n" for file in files).encode()).hexdigest()
