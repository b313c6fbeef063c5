"""Trackers: a run's events are sent to TensorBoard or Weights & Biases, which draw them while it trains.

`metrics.jsonl` in the run's folder is complete without them. If a tracker fails, there is one warning, and the run goes
on without it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmcore.config import nearest
from llmcore.files import resolve, visible, write_atomic

TRACKERS = ("tensorboard", "wandb")
Event = dict[str, Any]


def check_tracker(name: str | None) -> None:
    """Check that a tracker can be used: `tracker_callback` would accept its name.

    Raises:
        ValueError: for a name that is not in `TRACKERS`; None means no tracker.
        ModuleNotFoundError: if the tracker's package is not installed.
    """
    if name is None:
        return
    if name not in TRACKERS:
        raise ValueError(f"tracker={name!r}: {nearest(name, TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"tracker={name!r} is not installed; run: pip install 'llmcore[{name}]'")


def tracker_callback(
    name: str | None, project: str, run_dir: str | os.PathLike[str], config: Mapping[str, Any] | None = None
) -> Callable[[Event], None]:
    """A function for a Trainer's `callbacks` that sends each event to a tracker.

    TensorBoard's files go to `<run_dir>/tensorboard`. Weights & Biases reads its key and its mode from its own
    environment variables (WANDB_MODE=offline keeps everything in `<run_dir>/wandb`). A resumed run continues the same
    run there.

    Args:
        name: "tensorboard", "wandb" or None for no tracker.
        project: the project's name at Weights & Biases.
        run_dir: the run's folder, made where it is missing.
        config: shown beside the curves; JSON values.

    Raises:
        ValueError, ModuleNotFoundError: as `check_tracker`.
    """
    check_tracker(name)
    if name is None:
        return lambda event: None
    start = _tensorboard if name == "tensorboard" else _wandb
    folder, settings = resolve(run_dir), dict(config or {})
    send: Callable[[Event], None] | None = None
    failed = False

    def callback(event: Event) -> None:
        nonlocal send, failed
        if failed:
            return
        try:
            send = send or start(project, folder, settings, event["step"])
            send(event)
        except Exception as error:  # whatever the package, the disk or the network raises: the training goes on
            failed = True
            warnings.warn(
                f"tracker={name!r} failed at step {event['step']} and is left out from here on "
                f"({type(error).__name__}: {visible(str(error))}); metrics.jsonl has everything",
                stacklevel=2,
            )

    return callback


def _numbers(event: Event) -> dict[str, float]:
    return {key: value for key, value in event.items() if isinstance(value, int | float) and key != "step"}


def _tensorboard(project: str, run_dir: Path, config: Event, first_step: int) -> Callable[[Event], None]:
    from torch.utils.tensorboard import SummaryWriter

    # a killed run may have written events after its last checkpoint: they are no longer drawn
    writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
    writer.add_text("config", f"```json\n{visible(json.dumps(config, indent=1, ensure_ascii=False))}\n```", first_step)

    def send(event: Event) -> None:
        for key, value in _numbers(event).items():
            writer.add_scalar(key, value, event["step"])
        if "sample" in event:
            writer.add_text("sample", visible(event["sample"]), event["step"])
        writer.flush()

    return send


def _wandb(project: str, run_dir: Path, config: Event, first_step: int) -> Callable[[Event], None]:
    import wandb

    id_file = run_dir / "wandb-id.txt"
    if not id_file.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(id_file, uuid.uuid4().hex[:12])
    run = wandb.init(
        project=project,
        name=run_dir.name,
        id=id_file.read_text(encoding="utf-8"),
        resume="allow",
        dir=run_dir,
        config=config,
        settings=wandb.Settings(console="off", init_timeout=30),  # cells print as usual; 30 seconds for the network
    )

    def send(event: Event) -> None:
        samples = {"sample": visible(event["sample"])} if "sample" in event else {}
        run.log({**_numbers(event), **samples}, step=event["step"])

    return send
