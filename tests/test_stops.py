"""Every way a run stops before its end: requests, signals, errors, no memory, no disk."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcore.checkpoint import CheckpointError, checkpoints, find_checkpoint, load_checkpoint
from llmcore.runs import TrainingError, read_metrics
from llmcore.train import Event, Trainer, TrainResult

from .helpers import (
    Batches,
    assert_same_tensors,
    numbers,
    quick,
    read_until,
    start,
    state,
    tiny_model,
    trainer,
    weights,
)


def test_stop_from_a_callback_ends_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_model()
    one = trainer(tmp_path, quick(), model, callbacks=[lambda e: one.request_stop() if e["step"] == 2 else None])
    result = one.fit()
    assert (result.step, result.stopped_early, len(read_metrics(tmp_path))) == (2, True, 2)
    assert result.checkpoint == find_checkpoint(tmp_path)
    assert_same_tensors(load_checkpoint(result.checkpoint).model.state_dict(), model.state_dict())


def test_a_consumer_that_walks_away_loses_nothing(tmp_path: Path) -> None:
    one, handler = trainer(tmp_path, quick(), val=False), signal.getsignal(signal.SIGINT)
    steps = one.steps()
    assert [next(steps)["step"], next(steps)["step"]] == [1, 2]
    assert not checkpoints(tmp_path)
    steps.close()
    path = find_checkpoint(tmp_path)
    assert one.result() == TrainResult(2, None, True, path)
    assert path.name == f"step=000002_train_loss={read_metrics(tmp_path)[-1]['loss']:.3f}"
    assert_same_tensors(load_checkpoint(path).model.state_dict(), one.model.state_dict())
    assert signal.getsignal(signal.SIGINT) is handler
    assert one.fit().step == 6  # and it goes on when asked to


@pytest.mark.parametrize("where", ["callback", "data", "backward"])
def test_after_an_error_the_run_is_saved_and_goes_on_exactly(where: str, tmp_path: Path) -> None:
    broken = {"now": False}

    def fail(*_: Any) -> None:
        if broken["now"]:
            raise MemoryError("injected")

    class Failing(Batches):
        def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
            if where == "data" and step == 5:
                fail()
            return super().batch(step, batch_size, seed)

    def callback(event: Event) -> None:
        if where == "callback" and event["step"] == 2:
            fail()

    straight, model = tiny_model(), tiny_model()
    config = quick(grad_accum_steps=2)
    Trainer(straight, Batches(), None, config, tmp_path / "a", device="cpu").fit()
    one = Trainer(model, Failing(), None, config, tmp_path / "b", device="cpu", callbacks=[callback])
    if where == "backward":
        # fails late in the third step's backward pass, when most of the gradient is there
        model.tok_embeddings.weight.register_hook(lambda gradient: fail() if one.step == 2 else None)
    broken["now"] = True
    with pytest.raises(MemoryError, match="injected"):
        one.fit()
    assert find_checkpoint(tmp_path / "b").name.startswith("step=000002")
    broken["now"] = False
    assert one.fit().step == 6
    assert_same_tensors(weights(model), weights(straight))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_an_error_between_two_halves_of_a_step_saves_nothing(tmp_path: Path) -> None:
    """Some weights have moved, others have not: what is on disk must be the step before."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    config = quick(optimizer="muon", checkpoint_interval=2)
    straight = trainer(tmp_path / "a", config).fit()
    one = trainer(tmp_path / "b", config)
    steps = one.steps()
    next(steps), next(steps), next(steps)
    one.optimizers[-1].step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert [path.name[:11] for path in checkpoints(tmp_path / "b")] == ["step=000002"]
    with pytest.raises(TrainingError, match="step 4 half-way; resume from the last checkpoint"):
        one.fit()
    result = trainer(tmp_path / "b", config, tiny_model(3), resume="latest").fit()
    assert result.checkpoint and straight.checkpoint
    assert_same_tensors(state(result.checkpoint), state(straight.checkpoint))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_out_of_memory_says_what_to_lower_and_loses_nothing(tmp_path: Path) -> None:
    class Greedy(Batches):
        room = 3

        def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
            if step == self.room:
                torch.empty(2**50)  # torch's own error, from its own allocator
            return super().batch(step, batch_size, seed)

    straight, model, data = tiny_model(), tiny_model(), Greedy()
    trainer(tmp_path / "a", quick(), straight).fit()
    one = Trainer(model, data, Batches(), quick(), tmp_path / "b", device="cpu")
    with pytest.raises(TrainingError) as caught:
        one.fit()
    for word in ("in step 4 on cpu", "batch_size=4", "context_size=24", "activation_checkpointing=", "preset"):
        assert word in str(caught.value)
    assert load_checkpoint(tmp_path / "b", device="cpu").step == 3
    data.room = -1
    Trainer(model, data, Batches(), quick(), tmp_path / "b", device="cpu", resume="latest").fit()
    assert_same_tensors(weights(model), weights(straight))


def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    straight, model = tiny_model(), tiny_model()
    trainer(tmp_path / "a", quick(), straight).fit()
    one = trainer(tmp_path / "b", quick(checkpoint_interval=2), model)
    steps = one.steps()
    next(steps), next(steps), next(steps)
    with monkeypatch.context() as patch:
        patch.setattr("llmcore.checkpoint.save_file", full)
        with pytest.raises(CheckpointError, match=r"No space left on device. It needs 0\.\d MB"):
            next(steps)
    assert [path.name[:11] for path in (tmp_path / "b").glob("*step*")] == ["step=000002"]
    assert one.fit().step == 6
    assert_same_tensors(weights(model), weights(straight))


SIGNALLED = """
import json, sys
from pathlib import Path
from tests.helpers import quick, trainer

one = trainer(Path(sys.argv[1]), quick(max_steps=10**6), callbacks=[lambda e: print(e["step"], flush=True)])
result = one.fit()
print(json.dumps([result.step, result.stopped_early, str(result.checkpoint)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    with start(SIGNALLED, tmp_path) as process:
        read_until(process, "3")
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    *_, last = output.splitlines()
    step, stopped_early, checkpoint = json.loads(last)
    assert stopped_early and step >= 3
    assert read_metrics(tmp_path)[-1]["step"] == step
    assert load_checkpoint(tmp_path).step == step and checkpoint == str(find_checkpoint(tmp_path))


def test_a_signal_within_a_step_lets_it_finish(tmp_path: Path) -> None:
    class Interrupting(Batches):
        def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
            if step == 2:
                signal.raise_signal(signal.SIGINT)
            return super().batch(step, batch_size, seed)

    previous = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    one = Trainer(tiny_model(), Interrupting(), Batches(), quick(), tmp_path, device="cpu")
    result = one.fit()
    assert (result.step, result.stopped_early) == (3, True)
    assert "val_loss" not in read_metrics(tmp_path)[-1]  # a stop adds nothing: resumed, the run is as if never stopped
    assert result.checkpoint and result.checkpoint.name.startswith("step=000003_")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == previous


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    class Interrupting(Batches):
        def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
            if step == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super().batch(step, batch_size, seed)

    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny_model(), Interrupting(), None, quick(), tmp_path, device="cpu").fit()
    assert find_checkpoint(tmp_path).name.startswith("step=000002")


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(trainer(tmp_path, quick()).fit()))
    thread.start()
    thread.join()
    assert results[0].step == 6
