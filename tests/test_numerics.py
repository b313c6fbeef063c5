"""Numbers that are not finite: the step is skipped, counted, and never saved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcore.checkpoint import checkpoints, find_checkpoint, load_checkpoint
from llmcore.model import Transformer
from llmcore.runs import TrainingError, read_metrics
from llmcore.tokenizer import Tokenizer
from llmcore.train import Trainer

from .helpers import (
    Batches,
    assert_same_tensors,
    numbers,
    quick,
    state,
    tiny_model,
    trainer,
    weights,
)


def poison(model: Transformer, one: Callable[[], Trainer], steps: range, value: float) -> None:
    """Spoil the gradient of some steps, as an overflow in the backward pass does."""

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * value if one().step + 1 in steps else gradient

    model.layers[0].attention.wq.weight.register_hook(spoil)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(value: float, optimizer: str, tmp_path: Path) -> None:
    model = tiny_model()
    seen = [weights(model)]
    one = trainer(
        tmp_path, quick(optimizer=optimizer), model, callbacks=[lambda event: seen.append(weights(one.model))]
    )
    poison(model, lambda: one, range(3, 4), value)
    result = one.fit()
    assert result.step == 6 and result.val_loss is not None and math.isfinite(result.val_loss)
    changed = [not torch.equal(a["norm.weight"], b["norm.weight"]) for a, b in itertools.pairwise(seen)]
    assert changed == [True, True, False, True, True, True]
    assert_same_tensors(seen[2], seen[3])
    assert [event["skipped"] for event in read_metrics(tmp_path)] == [0, 0, 1, 1, 1, 1]
    assert not math.isfinite(read_metrics(tmp_path)[2]["grad_norm"])


def test_the_fp16_scaler_backs_off_grows_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 is refused on a CPU because it is slow there; torch's scaler works, so that its part can be seen."""
    monkeypatch.setattr("llmcore.train.pick_precision", lambda *_: "fp16")

    def fp16(run: str, seed: int = 0, **options: Any) -> Trainer:
        one = trainer(tmp_path / run, quick(max_steps=8), tiny_model(seed), val=False, **options)
        one.scaler.set_growth_interval(3)
        one.model.tok_embeddings.weight.register_hook(lambda grad: grad * (math.inf if one.step == 2 else 1))
        return one

    straight = fp16("a")
    scales = [straight.scaler.get_scale() / 2**15 for _ in straight.steps()]
    assert scales == [2, 2, 1, 1, 1, 2, 2, 2]  # halved when a gradient overflows, doubled after three good steps
    assert [event["skipped"] for event in read_metrics(tmp_path / "a")] == [0, 0, 1, 1, 1, 1, 1, 1]
    first = fp16("b")
    first.callbacks.append(lambda event: first.request_stop() if event["step"] == 4 else None)
    first.fit()
    second = fp16("b", seed=3, resume="latest")
    assert second.fit().checkpoint and straight.last_checkpoint
    assert second.scaler.state_dict() == straight.scaler.state_dict()
    assert_same_tensors(weights(second.model), weights(straight.model))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_fp16_run_is_near_the_fp32_run(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norms too, all above `grad_clip`: the loss scale is taken out of the gradient before it is clipped."""
    seen = {}
    for precision in ("fp32", "fp16"):
        monkeypatch.setattr("llmcore.train.pick_precision", lambda *_, precision=precision: precision)
        config = quick(optimizer=optimizer, max_steps=20, grad_clip=0.2, grad_accum_steps=2)
        one = trainer(tmp_path / precision, config, tiny_model(std=0.1), val=False)
        assert one.scaler.get_scale() == (2.0**16 if precision == "fp16" else 1)
        one.fit()
        assert one.progress.skipped == 0
        seen[precision] = [[event["loss"], event["grad_norm"]] for event in read_metrics(tmp_path / precision)]
    torch.testing.assert_close(torch.tensor(seen["fp16"]), torch.tensor(seen["fp32"]), rtol=0.02, atol=0)
    assert min(norm for _, norm in seen["fp32"]) > 0.2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_fp16_scale_that_is_too_large_falls_until_it_fits(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that float16 itself cannot hold, and not such as a test has spoiled."""
    monkeypatch.setattr("llmcore.train.pick_precision", lambda *_: "fp16")
    config = quick(optimizer=optimizer, max_steps=40, max_skipped_steps=40)
    one = trainer(tmp_path, config, tiny_model(std=0.1), val=False)
    one.scaler.load_state_dict({**one.scaler.state_dict(), "scale": 2.0**40})
    seen, scales = [everything(one)], [one.scaler.get_scale()]
    for event in one.steps():
        seen.append(everything(one))
        scales.append(one.scaler.get_scale())
        if event["skipped"] < event["step"]:
            break  # a larger gradient may overflow later again
    skipped = one.progress.skipped
    assert one.step == skipped + 1 and 5 < skipped < 35
    assert scales == [*(2.0 ** (40 - step) for step in range(skipped + 1)), scales[skipped]]
    assert [event["skipped"] for event in read_metrics(tmp_path)] == [*range(1, skipped + 1), skipped]
    for untouched in seen[1:-1]:
        assert_same_tensors(untouched, seen[0])
    assert not torch.equal(seen[-1]["norm.weight"], seen[0]["norm.weight"])


def everything(one: Trainer) -> dict[str, Tensor]:
    """Copies of a run's weights and of all that its optimizers remember."""
    names = {id(parameter): name for name, parameter in one.model.named_parameters()}
    held = [
        (f"{names[id(parameter)]}/{key}", value)
        for optimizer in one.optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    ]
    return weights(one.model) | {name: value.clone() for name, value in held}


BROKEN_STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "inf": lambda gradient: gradient * math.inf,
    "nan in one number": lambda gradient: gradient.flatten().index_fill(0, torch.tensor(0), math.nan).view_as(gradient),
    "norm": lambda gradient: torch.full_like(gradient, 1e30),  # each number is finite, the sum of squares is not
}


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("broken", [*BROKEN_STEPS, "loss"])
@pytest.mark.parametrize("where", ["tok_embeddings.weight", "layers.1.feed_forward.w2.weight", "norm.weight"])
def test_all_optimizers_take_a_step_or_none_does(
    where: str, broken: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcore.train.pick_precision", lambda *_: precision)
    model = tiny_model()
    one = trainer(tmp_path, quick(optimizer="muon", grad_accum_steps=2, grad_clip=1.0), model, val=False)
    assert len(one.optimizers) == 2
    one.scaler.set_growth_interval(4) if precision == "fp16" else None
    backward_passes = itertools.count()

    def third(value: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:
        """Spoiled in the second half of the third step."""
        return spoil(value) if one.step == 2 and next(backward_passes) == 1 else value

    if broken == "loss":
        model.register_forward_hook(lambda module, inputs, loss: third(loss, lambda loss: loss + math.inf))
    else:
        dict(model.named_parameters())[where].register_hook(lambda gradient: third(gradient, BROKEN_STEPS[broken]))
    seen, scales = [everything(one)], [one.scaler.get_scale()]
    for _ in one.steps():
        seen.append(everything(one))
        scales.append(one.scaler.get_scale())
    assert_same_tensors(seen[2], seen[3])
    for before, after in ((seen[1], seen[2]), (seen[3], seen[4])):
        assert [name for name in before if torch.equal(before[name], after[name]) and "rope" not in name] == []
    assert [event["skipped"] for event in read_metrics(tmp_path)] == [0, 0, 1, 1, 1, 1]
    if precision == "fp16":  # and good steps are counted from there: three of the four that it takes to grow again
        assert [scale / scales[0] for scale in scales] == [1, 1, 1, 0.5, 0.5, 0.5, 0.5]


def test_fp16_steps_without_targets_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gaps(Batches):
        def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
            x, y = super().batch(step, batch_size)
            return x, y if step in (1, 3) else torch.full_like(y, -100)

    monkeypatch.setattr("llmcore.train.pick_precision", lambda *_: "fp16")
    one = Trainer(tiny_model(), Gaps(), None, quick(optimizer="muon"), tmp_path, device="cpu")
    one.fit()
    assert one.step == 6 and one.progress.skipped == 0
    assert {values.get("step", torch.tensor(2.0)).item() for values in one.optimizers[0].state.values()} == {2}


def test_steps_skipped_before_a_stop_are_resumed_exactly(tmp_path: Path) -> None:
    for folder, stop_at in (("straight", 0), ("resumed", 2)):
        model = tiny_model()
        one = trainer(tmp_path / folder, quick(max_skipped_steps=3), model)
        poison(model, lambda one=one: one, range(1, 3), math.nan)  # type: ignore[misc]
        for event in one.steps():
            if event["step"] == stop_at:
                break
    resumed = trainer(tmp_path / "resumed", quick(max_skipped_steps=3), tiny_model(8), resume="latest")
    assert resumed.step == 2
    resumed.fit()
    assert_same_tensors(state(find_checkpoint(tmp_path / "straight")), state(find_checkpoint(tmp_path / "resumed")))
    assert numbers(tmp_path / "resumed")[2:] == numbers(tmp_path / "straight")[2:]


def test_a_row_of_skipped_steps_goes_on_counting_after_a_resume(tmp_path: Path) -> None:
    for resume in (None, "latest"):
        model = tiny_model()
        one = trainer(tmp_path, quick(max_skipped_steps=3), model, resume=resume)
        poison(model, lambda one=one: one, range(1, 7), math.nan)  # type: ignore[misc]
        steps = one.steps()
        if resume:
            with pytest.raises(TrainingError, match="3 steps in a row, up to step 3"):
                next(steps)
        else:
            next(steps), next(steps)
            steps.close()


def test_broken_weights_end_the_run_and_are_never_saved(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = quick(max_steps=50, max_skipped_steps=5, checkpoint_interval=1, eval_interval=2, sample_interval=1)
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    one = trainer(tmp_path, config, model, tokenizer=tokenizer)
    with pytest.raises(TrainingError, match=r"5 steps in a row, up to step 9\..*step=000004.*learning_rate"):
        for event in one.steps():
            if event["step"] == 4:
                with torch.no_grad():
                    one.model.norm.weight[3] = math.nan
    assert [event["step"] for event in read_metrics(tmp_path)] == [*range(1, 9)]
    assert checkpoints(tmp_path)[-1].name.startswith("step=000004")
    for path in checkpoints(tmp_path):
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(path).model.state_dict().values())


def test_a_stop_in_a_row_of_skipped_steps_still_saves(tmp_path: Path) -> None:
    model = tiny_model()
    one = trainer(
        tmp_path, quick(), model, val=False, callbacks=[lambda e: one.request_stop() if e["step"] == 4 else None]
    )
    poison(model, lambda: one, range(4, 5), math.nan)
    result = one.fit()
    assert result.stopped_early and result.checkpoint
    assert result.checkpoint.name.startswith("step=000004_train_loss=3.")
