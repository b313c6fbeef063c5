"""The room that a run's checkpoints take on a disk, and whether it is there, before the run starts."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from llmcore.config import ModelConfig, TrainConfig
from llmcore.files import display_path, resolve
from llmcore.measure.memory import predict_memory
from llmcore.runs import TrainingError


def kept_bytes(keep: int, parameters: int, optimizer: int) -> int:
    """Bytes that a run keeps: its newest `keep` checkpoints, and the weights of the best one.

    Args:
        keep: the run's `keep_checkpoints`.
        parameters: of the model, saved in float32.
        optimizer: bytes of the optimizer's state, of which each of the newest checkpoints has its own.
    """
    return keep * (4 * parameters + optimizer) + 4 * parameters


def check_disk(
    model: ModelConfig,
    train: TrainConfig,
    device: str,
    run_dir: str | os.PathLike[str],
    backup_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Check that a disk holds what a run will keep, and one checkpoint more, which is written before an old one goes.

    What the folder has of this run already counts as room. For `backup_dir` there is only a warning: a fault there does
    not end a run.

    Raises:
        TrainingError: with what is needed, what is free, and what to change.
    """
    parameters, optimizer = model.n_params(), predict_memory(model, train, device)["optimizer"]
    kept = kept_bytes(train.keep_checkpoints, parameters, optimizer)
    needed = kept + 4 * parameters + optimizer
    folders = {"output_dir": resolve(run_dir)}
    if backup_dir is not None:
        folders["backup_dir"] = resolve(backup_dir) / folders["output_dir"].name

    for name, folder in folders.items():
        missing = needed - _held(folder) - _free(folder)
        if missing > 0:
            message = (
                f"{name}={display_path(folder.parent)!r} has too little room: the run needs {needed / 1e9:,.1f} GB (it "
                f"keeps {kept / 1e9:,.1f} GB, and writes a checkpoint before it deletes one), and "
                f"{missing / 1e9:,.1f} GB are missing. Make room, choose another folder or a smaller preset"
                + ("" if train.optimizer == "muon" else ", or optimizer='muon', which keeps half as much state")
            )
            if name == "output_dir":
                raise TrainingError(message)
            warnings.warn(message, stacklevel=2)


def _held(run_dir: Path) -> int:
    """Bytes of the checkpoints in a run's folder."""
    return sum(file.stat().st_size for file in run_dir.glob("step=*/*") if file.is_file())


def _free(folder: Path) -> int:
    """Bytes free where a folder is or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
