"""Trackers: a run's events sent on to TensorBoard or Weights & Biases, which draw them while it trains.

`metrics.jsonl` in the run's folder is complete without them. A tracker that fails says so once and is left out.
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


def tracker_callback(
    name: str | None, project: str, run_dir: str | os.PathLike[str], config: Mapping[str, Any] | None = None
) -> Callable[[Event], None]:
    """What to put into a Trainer's `callbacks` so that its events are tracked.

    TensorBoard's files go to `<run_dir>/tensorboard`. Weights & Biases gets its key and its mode from its own
    environment (WANDB_MODE=offline keeps everything in `<run_dir>/wandb`); a resumed run goes on there as the same one.

    Args:
        name: "tensorboard", "wandb" or None for no tracker.
        project: the project's name at Weights & Biases.
        run_dir: the run's folder, made where it is missing.
        config: shown beside the curves; JSON values.

    Raises:
        ValueError: for another name.
        ModuleNotFoundError: if the tracker's package is not installed.
    """
    if name is None:
        return lambda event: None
    if name not in TRACKERS:
        raise ValueError(f"tracker={name!r}: {nearest(name, TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"tracker={name!r} is not installed; run: pip install 'llmcore[{name}]'")
    begin = _tensorboard if name == "tensorboard" else _wandb
    folder, about = resolve(run_dir), dict(config or {})
    send: Callable[[Event], None] | None = None
    failed = False

    def callback(event: Event) -> None:
        nonlocal send, failed
        if failed:
            return
        try:
            send = send or begin(project, folder, about, event["step"])
            send(event)
        except Exception as error:  # whatever the package, the disk or the network raise: training is worth more
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

    # what a killed run wrote after its last checkpoint is drawn no more
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

    remembered = run_dir / "wandb-id.txt"
    if not remembered.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(remembered, uuid.uuid4().hex[:12])
    run = wandb.init(
        project=project,
        name=run_dir.name,
        id=remembered.read_text(encoding="utf-8"),
        resume="allow",
        dir=run_dir,
        config=config,
        settings=wandb.Settings(console="off", init_timeout=30),  # cells print as ever; seconds to wait for the network
    )

    def send(event: Event) -> None:
        samples = {"sample": visible(event["sample"])} if "sample" in event else {}
        run.log({**_numbers(event), **samples}, step=event["step"])

    return send
