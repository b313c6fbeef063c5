"""Trackers get a run's events, and no fault of theirs reaches the training."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmcore.notebook.trackers import tracker_callback
from llmcore.runs import read_metrics
from llmcore.train import Trainer

from .helpers import Batches, quick, tiny_model


def trained(run_dir: Path, callback: Any, **options: Any) -> Trainer:
    one = Trainer(tiny_model(), Batches(), Batches(), quick(eval_interval=3), run_dir, callbacks=[callback], **options)
    one.fit()
    return one


def drawn(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_reads_every_number_of_the_run_back(tmp_path: Path) -> None:
    trained(tmp_path, tracker_callback("tensorboard", "p", tmp_path, {"dim": 32}))
    found, events = drawn(tmp_path), read_metrics(tmp_path)
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "val_loss", "val_bits_per_byte"):
        expected = [(event["step"], pytest.approx(event[name], rel=1e-6)) for event in events if name in event]
        assert [(point.step, point.value) for point in found.Scalars(name)] == expected
    assert len(found.Scalars("loss")) == 6 and len(found.Scalars("val_loss")) == 2
    assert b'"dim": 32' in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_after_a_resume_each_step_is_drawn_once(tmp_path: Path) -> None:
    track = tracker_callback("tensorboard", "p", tmp_path)
    first = Trainer(tiny_model(), Batches(), None, quick(checkpoint_interval=2), tmp_path, callbacks=[track])
    first.callbacks.append(lambda event: first.request_stop() if event["step"] == 4 else None)
    first.fit()
    # go back to step 2, as after a kill
    older = next(tmp_path.glob("step=000002*"))
    second = tracker_callback("tensorboard", "p", tmp_path)
    Trainer(tiny_model(), Batches(), None, quick(), tmp_path, callbacks=[second], resume=older).fit()
    assert [point.step for point in drawn(tmp_path).Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_wandb_works_offline_and_leaves_its_files_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from tests.test_trackers import trained
from llmcore.notebook.trackers import tracker_callback
run = Path({str(tmp_path / "run")!r})
trained(run, tracker_callback("wandb", "novels", run, {{"dim": 32}}))
"""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "error::UserWarning:llmcore", "-c", program], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"left out from here on" not in done.stderr
    [file] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    identity = (tmp_path / "run" / "wandb-id.txt").read_text()
    assert file.name == f"run-{identity}.wandb"
    content = file.read_bytes()
    for word in (b"novels", b"learning_rate", b"val_bits_per_byte"):
        assert word in content


@pytest.mark.parametrize("begins", [True, False])
def test_a_tracker_that_fails_is_named_once_and_training_goes_on(begins: bool, tmp_path: Path) -> None:
    """The tracker's folder is a file from the start, or its files are taken away from under it."""
    track = tracker_callback("tensorboard", "p", tmp_path)
    if not begins:
        (tmp_path / "tensorboard").write_text("in the way")

    def sabotage(event: dict[str, Any]) -> None:
        if begins and event["step"] == 3:
            event["sample"] = 7  # no text: TensorBoard's own code raises

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        one = Trainer(tiny_model(), Batches(), None, quick(), tmp_path, callbacks=[sabotage, track])
        one.fit()
    assert one.step == 6 and len(read_metrics(tmp_path)) == 6
    [warning] = [str(w.message) for w in said if "tracker" in str(w.message)]
    assert f"tracker='tensorboard' failed at step {3 if begins else 1} and is left out from here on" in warning


def test_names_and_packages_are_checked_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tracker='tensorbord': did you mean tensorboard"):
        tracker_callback("tensorbord", "p", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"tracker='wandb' is not installed; run: pip install 'llmcore\[wandb"
    ):
        tracker_callback("wandb", "p", tmp_path)
    tracker_callback(None, "p", tmp_path)({"step": 1})
    assert not list(tmp_path.iterdir())
