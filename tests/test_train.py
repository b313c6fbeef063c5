"""The training loop: its arithmetic, an exact resume, and every way to stop."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from llmcore.checkpoint import CheckpointError, checkpoints, find_checkpoint, load_checkpoint
from llmcore.config import TrainConfig
from llmcore.device import has_bf16
from llmcore.model import Transformer
from llmcore.optim import Muon, build_optimizers, learning_rate_at, orthogonalised
from llmcore.runs import TrainingError, free_run_dir, read_metrics
from llmcore.tokenizer import Tokenizer
from llmcore.train import Event, Trainer, TrainResult

from .helpers import Batches, quick, tiny_model

ROOT = Path(__file__).parents[1]


def trainer(
    run: Path, config: TrainConfig, model: Transformer | None = None, val: bool = True, **options: Any
) -> Trainer:
    data = Batches()
    return Trainer(model or tiny_model(), data, data if val else None, config, run, device="cpu", **options)


def state(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, the optimizer's and the random state included."""
    return load_file(path / "model.safetensors") | load_file(path / "trainer_state.safetensors")


def numbers(run: Path) -> list[Event]:
    """The metrics, without what the clock says."""
    return [{k: v for k, v in e.items() if k not in ("seconds", "tokens_per_second")} for e in read_metrics(run)]


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def weights(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Schedules


@settings(deadline=None, max_examples=100)
@given(
    schedule=st.sampled_from(["cosine", "wsd", "plateau"]),
    max_steps=st.integers(1, 300),
    warmup_steps=st.integers(0, 100),
    min_lr_ratio=st.floats(0, 1),
    decay_fraction=st.floats(0, 1),
)
def test_learning_rate_rises_to_its_peak_and_falls_to_its_floor(schedule: str, max_steps: int, **changes: Any) -> None:
    config = TrainConfig(schedule=schedule, max_steps=max_steps, **changes)
    warmup = min(config.warmup_steps, max_steps)
    rates = [learning_rate_at(step, config) for step in range(max_steps + 1)]
    assert rates[:warmup] == pytest.approx([(step + 1) / config.warmup_steps for step in range(warmup)])
    after = rates[warmup:] if config.warmup_steps < max_steps else []
    assert all(config.min_lr_ratio - 1e-9 <= rate <= 1 for rate in after)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    if after and schedule == "plateau":
        assert set(after) == {1.0}
    elif after:
        assert after[-1] == pytest.approx(config.min_lr_ratio)


def test_cosine_is_halfway_down_in_the_middle() -> None:
    config = TrainConfig(max_steps=110, warmup_steps=10, min_lr_ratio=0.2)
    assert [learning_rate_at(step, config) for step in (0, 9, 10, 60, 110)] == pytest.approx([0.1, 1, 1, 0.6, 0.2])


def test_wsd_is_flat_and_then_a_line() -> None:
    config = TrainConfig(schedule="wsd", max_steps=100, warmup_steps=0, decay_fraction=0.2, min_lr_ratio=0)
    assert [learning_rate_at(step, config) for step in (0, 80, 85, 90, 99)] == pytest.approx([1, 1, 0.75, 0.5, 0.05])


@pytest.mark.parametrize(("supported", "tolerance"), [(True, 0.02), (False, 1e-5)])
def test_muon_orthogonalises_in_bf16_only_where_the_cpu_has_it(
    supported: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    a, b, c = coefficients = (3.4445, -4.775, 2.0315)
    matrices = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    exact = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = exact @ exact.mT
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    near = orthogonalised(matrices, coefficients, 5, 1e-7)
    assert near.dtype == (torch.bfloat16 if supported else torch.float32)
    assert (near - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_on_many_matrices_at_once_is_torchs_muon(nesterov: bool) -> None:
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8), (8, 24), (1, 5)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    pair = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for before, one, other in zip(start, ours, theirs, strict=True):
        moved = (other - before).norm()
        # bf16 has eight bits; without it ours are float32's
        assert (one - other).norm() < (0.01 if has_bf16(torch.device("cpu")) else 0.02) * moved
    assert pair[0].state_dict()["param_groups"] == pair[1].state_dict()["param_groups"]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(pair[0].state[one]["momentum_buffer"], pair[1].state[other]["momentum_buffer"])


def test_plateau_lowers_the_rate_when_validation_stalls(tmp_path: Path) -> None:
    config = quick(schedule="plateau", max_steps=12, warmup_steps=0, eval_interval=1, plateau_patience=2, grad_clip=0)
    config = config.replace(min_lr_ratio=0.3, learning_rate=1e-30, weight_decay=0)  # nothing is learned: all stall
    trainer(tmp_path, config).fit()
    rates = [event["learning_rate"] / 1e-30 for event in read_metrics(tmp_path)]
    assert rates == pytest.approx([1] * 3 + [0.5] * 2 + [0.3] * 7)


def test_plateau_counts_validations_in_a_row(tmp_path: Path) -> None:
    class Course(Batches):
        """One window at each validation, chosen by how hard it is for a model that learns nothing."""

        def sequential(self, batch_size: int) -> Any:
            yield ranked[next(course)]

    def hardness(window: tuple[Tensor, Tensor]) -> float:
        with torch.no_grad():
            return float(model(*window))

    model, course = tiny_model(std=0.3), iter([7, 8, 6, 9, 5, 6, 7, 4])
    ranked = sorted(Batches().sequential(1), key=hardness)
    config = quick(schedule="plateau", max_steps=8, warmup_steps=0, eval_interval=1, plateau_patience=2)
    config = config.replace(learning_rate=1e-30, weight_decay=0)
    Trainer(model, Batches(), Course(), config, tmp_path, device="cpu").fit()
    rates = [event["learning_rate"] / 1e-30 for event in read_metrics(tmp_path)]
    assert rates == pytest.approx([1] * 7 + [0.5])


# One step


def test_accumulated_steps_equal_one_large_batch(tmp_path: Path) -> None:
    """Windows differ in how many targets count, so a mean of means would not do."""
    whole, parts = tiny_model(), tiny_model()
    a = trainer(tmp_path / "a", quick(batch_size=8), whole).fit()
    b = trainer(tmp_path / "b", quick(batch_size=2, grad_accum_steps=4), parts).fit()
    assert a.step == b.step == 6
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)
    for one, other in zip(read_metrics(tmp_path / "a"), read_metrics(tmp_path / "b"), strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-4)
        assert one["tokens"] == other["tokens"]


def test_a_step_is_torchs_own_adamw_on_the_clipped_gradient(tmp_path: Path) -> None:
    config = quick(max_steps=4, warmup_steps=3, weight_decay=0.3, grad_clip=0.1)
    model, reference = tiny_model(), tiny_model()
    matrices = [p for p in reference.parameters() if p.dim() > 1]
    vectors = [p for p in reference.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    norms = []
    for step in range(4):
        x, y = Batches().batch(step, 4)
        optimizer.zero_grad()
        F.cross_entropy(reference(x).flatten(0, 1), y.flatten()).backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in reference.parameters()))
        for parameter in reference.parameters():
            parameter.grad *= min(1, 0.1 / norm)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * learning_rate_at(step, config)
        optimizer.step()
        norms.append(norm)
    trainer(tmp_path, config, model).fit()
    assert min(norms) > 0.2  # clipping took place
    assert [event["grad_norm"] for event in read_metrics(tmp_path)] == pytest.approx(norms, rel=1e-4)
    for (name, one), other in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(one, other[1], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tie", [False, True])
def test_every_parameter_is_optimized_once_and_matrices_alone_decay(optimizer: str, tie: bool) -> None:
    model = tiny_model(tie_embeddings=tie)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for o in build_optimizers(model, quick(optimizer=optimizer)) for group in o.param_groups]
    seen = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        assert all((p.dim() == 2) == (group["weight_decay"] == 0.1) for p in group["params"])
    if optimizer == "muon":
        *_, last = build_optimizers(model, quick(optimizer=optimizer))
        assert {names[id(p)].split(".")[0] for group in last.param_groups for p in group["params"]} == {"layers"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_is_learned_by_heart(optimizer: str, tmp_path: Path) -> None:
    class OneBatch(Batches):
        def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
            return super().batch(0, batch_size)

    config = quick(max_steps=150, optimizer=optimizer, weight_decay=0.0)
    Trainer(tiny_model(), OneBatch(), None, config, tmp_path, device="cpu").fit()
    events = read_metrics(tmp_path)
    assert events[0]["loss"] > 3 and events[-1]["loss"] < 0.1


def test_validation_counts_every_target_once_and_converts_to_bits_per_byte(tmp_path: Path) -> None:
    model, data = tiny_model(std=0.2), Batches(windows=7)
    found = trainer(tmp_path, quick(batch_size=3), model)
    found.val_data = data
    event = found.validate()
    nats = []
    with torch.no_grad():
        for x, y in data.sequential(1):
            surprise = -model(x).double().log_softmax(-1)[0]
            nats += [float(surprise[t, target]) for t, target in enumerate(y[0].tolist()) if target >= 0]
    mean = sum(nats) / len(nats)
    assert event["val_loss"] == pytest.approx(mean, rel=1e-6)
    assert event["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    total_bytes = len(nats) * data.bytes_per_token
    assert event["val_bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / total_bytes, rel=1e-6)


def test_validation_stops_after_eval_batches(tmp_path: Path) -> None:
    model, data = tiny_model(std=0.2), Batches()
    x, y = next(iter(data.sequential(4)))
    with torch.no_grad():
        expected = float(model(x, y))
    assert trainer(tmp_path, quick(eval_batches=1), model).validate()["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_batches_without_targets_change_nothing(tmp_path: Path) -> None:
    class Gaps(Batches):
        def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
            x, y = super().batch(step // 2, batch_size)
            return x, y if step % 2 else torch.full_like(y, -100)

        def sequential(self, batch_size: int) -> Any:
            for x, y in super().sequential(batch_size):
                yield x, torch.full_like(y, -100)
                yield x, y

    one, other = tiny_model(), tiny_model()
    Trainer(one, Batches(), Batches(), quick(), tmp_path / "a", device="cpu").fit()
    Trainer(other, Gaps(), Gaps(), quick(grad_accum_steps=2), tmp_path / "b", device="cpu").fit()
    assert_same_tensors(weights(one), weights(other))
    assert read_metrics(tmp_path / "a")[-1]["val_loss"] == read_metrics(tmp_path / "b")[-1]["val_loss"]


# Resume

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wsd-muon": {"schedule": "wsd", "optimizer": "muon", "decay_fraction": 0.5},
    "plateau": {"schedule": "plateau", "eval_interval": 1, "plateau_patience": 2, "learning_rate": 0.3},
    "bf16-accumulated": {"precision": "bf16", "grad_accum_steps": 3, "batch_size": 2},
    "muon-checkpointed-bf16": {"precision": "bf16", "optimizer": "muon", "activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("at", [1, 5])
def test_resume_is_bit_exact(variant: str, at: int, tmp_path: Path) -> None:
    config = quick(**{"max_steps": 9, "eval_interval": 3, **VARIANTS[variant]})

    def run(folder: str, seed: int, stop_at: int = 0, **options: Any) -> TrainResult:
        def stop(event: Event) -> None:
            if event["step"] == stop_at:
                one.request_stop()

        torch.manual_seed(seed)  # a resumed run must not lean on how the process began
        model = tiny_model(seed, tie_embeddings=True)
        one = trainer(tmp_path / folder, config, model, callbacks=[stop], **options)
        return one.fit()

    straight = run("straight", 0)
    if variant == "plateau":
        rates = [event["learning_rate"] for event in read_metrics(tmp_path / "straight")]
        assert rates[4] < rates[1] == rates[2]  # lowered between the two stops
    first = run("resumed", 0, stop_at=at)
    assert first.stopped_early and first.step == at
    second = run("resumed", 5, resume="latest")
    assert (second.step, second.val_loss, second.stopped_early) == (9, straight.val_loss, False)
    assert straight.checkpoint and second.checkpoint
    assert straight.checkpoint.name == second.checkpoint.name
    assert_same_tensors(state(straight.checkpoint), state(second.checkpoint))
    assert numbers(tmp_path / "straight") == numbers(tmp_path / "resumed")
    saved = [json.loads((r.checkpoint / "trainer_state.json").read_text()) for r in (straight, second)]
    assert saved[0] == saved[1]


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(1, 11), max_size=3, unique=True),
    schedule=st.sampled_from(["cosine", "wsd", "plateau"]),
    optimizer=st.sampled_from(["adamw", "muon"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    grad_accum_steps=st.integers(1, 2),
    activation_checkpointing=st.sampled_from(["none", "selective", "full"]),
)
def test_stops_anywhere_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], **changes: Any
) -> None:
    config = quick(max_steps=12, eval_interval=4, plateau_patience=1, batch_size=2, **changes)
    folder = tmp_path_factory.mktemp("runs")
    straight = trainer(folder / "straight", config).fit()
    for number, stop in enumerate([*sorted(stops), 12]):
        one = trainer(folder / "stopped", config, tiny_model(number), resume="latest" if number else None)
        one.callbacks.append(lambda event, one=one, stop=stop: one.request_stop() if event["step"] == stop else None)
        result = one.fit()
    assert straight.checkpoint and result.checkpoint
    assert_same_tensors(state(straight.checkpoint), state(result.checkpoint))
    assert numbers(folder / "straight") == numbers(folder / "stopped")
    saved = [json.loads((r.checkpoint / "trainer_state.json").read_text()) for r in (straight, result) if r.checkpoint]
    assert saved[0] == saved[1]


SEEDED = """
import hashlib, sys, torch
from pathlib import Path
from tests.helpers import Batches, quick, tiny_model
from llmcore.train import Trainer

torch.set_num_threads(4)
run, stop = Path(sys.argv[1]), int(sys.argv[2])
config = quick(max_steps=12, batch_size=64, compile="on", precision="bf16", optimizer="muon")
resume = {"resume": "latest"} if run.exists() else {}
one = Trainer(tiny_model(dim=64, max_seq_len=64), Batches(time=64), None, config, run, device="cpu", **resume)
one.callbacks.append(lambda event: one.request_stop() if event["step"] == stop else None)
one.fit()
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in one.model.parameters())).hexdigest())
"""


@pytest.mark.slow
def test_compiled_and_on_many_threads_one_seed_gives_one_result_stopped_or_not(tmp_path: Path) -> None:
    def run(folder: str, stop: int = 0) -> str:
        with start(SEEDED, tmp_path / folder, stop) as process:
            return process.communicate()[0]

    straight = run("straight")
    assert len(straight) == 65
    assert run("again") == straight
    assert run("stopped", stop=5) != straight
    assert run("stopped") == straight
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "straight") == numbers(tmp_path / "again")


KILLED = """
import sys
from pathlib import Path
from tests.test_train import quick, trainer

config = quick(max_steps=10**6, schedule="plateau", checkpoint_interval=3)
trainer(Path(sys.argv[1]), config, callbacks=[lambda e: print(e["step"], flush=True)]).fit()
"""


def start(script: str, *arguments: Path | int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_until(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert line in map(str.strip, process.stdout), "it ended before"


@pytest.mark.slow
def test_a_killed_run_keeps_others_out_while_it_lives_and_resumes_exactly_when_dead(tmp_path: Path) -> None:
    with start(KILLED, tmp_path / "killed") as process:
        read_until(process, "8")
        with pytest.raises(TrainingError, match=f"in use by a run of process {process.pid};"):
            trainer(tmp_path / "killed", quick(), resume="latest")
        process.kill()
    reached = read_metrics(tmp_path / "killed")[-1]["step"]
    config = quick(max_steps=reached + 4, schedule="plateau")  # a rate that max_steps does not change
    resumed = trainer(tmp_path / "killed", config, tiny_model(3), resume="latest")
    assert resumed.step % 3 == 0 and 6 <= resumed.step <= reached
    result, straight = resumed.fit(), trainer(tmp_path / "straight", config).fit()
    assert result.checkpoint and straight.checkpoint
    assert_same_tensors(state(result.checkpoint), state(straight.checkpoint))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "straight")


def test_resume_refuses_what_is_of_another_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    big = {"vocab_size": tokenizer.vocab_size}
    trainer(tmp_path, quick(max_steps=1), tiny_model(**big), tokenizer=tokenizer).fit()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def resume(match: str, model: Transformer, data: Batches | None = None, **changes: Any) -> None:
        options = {"tokenizer": tokenizer, **changes}
        config = quick(optimizer=options.pop("optimizer", "adamw"))
        untouched = weights(model)
        with pytest.raises(CheckpointError, match=match):
            Trainer(model, data or Batches(), Batches(), config, tmp_path, device="cpu", resume="latest", **options)
        assert_same_tensors(weights(model), untouched)

    resume("tokenizer: .* there, None here", tiny_model(**big), tokenizer=None)
    resume("data: .*'this'.* there, .*'other'.* here", tiny_model(**big), Batches(fingerprint="other"))
    resume(r"model.hidden_dim: 48 there, 64 here", tiny_model(hidden_dim=64, **big))
    resume(
        r"model.n_layers: 2 there, 1 here; model.max_seq_len: 24 there", tiny_model(n_layers=1, max_seq_len=30, **big)
    )
    resume("optimizer: adamw there, muon here", tiny_model(**big), optimizer="muon")
    assert {file: file.read_bytes() for file in before} == before


def test_resume_may_go_on_longer_and_from_another_runs_checkpoint(tmp_path: Path) -> None:
    first = trainer(tmp_path / "a", quick(max_steps=3)).fit()
    assert first.checkpoint
    longer = trainer(tmp_path / "b", quick(max_steps=5), tiny_model(4), resume=first.checkpoint).fit()
    assert (longer.step, longer.stopped_early) == (5, False)
    assert [event["step"] for event in read_metrics(tmp_path / "b")] == [4, 5]
    with pytest.raises(TrainingError, match="holds a run already"):
        trainer(tmp_path / "b", quick(max_steps=5), resume=first.checkpoint)


def test_resume_takes_the_older_checkpoint_when_the_newest_is_damaged(tmp_path: Path) -> None:
    straight = tiny_model()
    trainer(tmp_path / "a", quick(schedule="plateau"), straight).fit()
    trainer(tmp_path / "b", quick(schedule="plateau", checkpoint_interval=2)).fit()
    newest = find_checkpoint(tmp_path / "b")
    os.truncate(newest / "trainer_state.safetensors", 100)
    again = tiny_model(7)
    with pytest.warns(UserWarning, match=r"passed over: .*trainer_state\.safetensors is damaged"):
        resumed = trainer(tmp_path / "b", quick(schedule="plateau"), again, resume="latest")
    assert resumed.step == 4
    resumed.fit()
    assert_same_tensors(weights(again), weights(straight))
    assert [event["step"] for event in read_metrics(tmp_path / "b")] == [1, 2, 3, 4, 5, 6]


def test_what_a_kill_left_after_the_last_save_is_deleted_by_the_next_run(tmp_path: Path) -> None:
    config = quick(checkpoint_interval=1, keep_checkpoints=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmcore.train.prune_checkpoints", lambda run_dir, keep: None)
        last = trainer(tmp_path, config, val=False).fit().checkpoint
    saved = checkpoints(tmp_path)
    assert last and len(saved) == 6  # as if killed before the deletion, and here in its middle:
    shutil.copytree(last, tmp_path / ".step=000001_loss=1.000.deleted.tmp")
    again = trainer(tmp_path, config, tiny_model(3), val=False, resume="latest")
    assert again.fit().step == 6
    kept = {*saved[-2:], find_checkpoint(tmp_path, "best")}
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == kept and len(kept) < 6


# Faults in the numbers


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
    assert one.step == 6 and one.skipped == 0
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


# Stopping


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


def test_out_of_memory_says_what_the_run_needs_and_loses_nothing(tmp_path: Path) -> None:
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
    for word in ("in step 4 on cpu", "0.01 GB", "batch_size=4", "context_size=24", "activation_checkpointing="):
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
from tests.test_train import quick, trainer

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


# Before the start


def test_an_output_dir_that_cannot_hold_a_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(TrainingError, match=r"output_dir='.*file.*' cannot be written"):
            trainer(path, quick())
        with pytest.raises(TrainingError, match=r"output_dir='.*file.*' cannot be written"):
            free_run_dir(path, "run")
    assert file.read_text() == "mine"


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    trainer(tmp_path / "run", quick(max_steps=2)).fit()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError, match="holds a run already; resume it"):
        trainer(tmp_path / "run", quick())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert free_run_dir(tmp_path, "run") == tmp_path / "run-2"
    assert free_run_dir(tmp_path, "new") == tmp_path / "new"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    one = trainer(tmp_path, quick())
    steps = one.steps()
    next(steps)
    for _ in range(2):
        with pytest.raises(TrainingError, match=rf"in use by a run of process {os.getpid()} \(this one\)"):
            trainer(tmp_path, quick(), resume="latest")
    steps.close()
    assert trainer(tmp_path, quick(), resume="latest").fit().step == 6


def test_resume_without_a_checkpoint_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        trainer(tmp_path, quick(), resume="latest")


def test_a_run_starts_from_the_step_it_is_told_to_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="init_step=3, but training starts at step 0"):
        trainer(tmp_path, quick(), init_step=3)
    trainer(tmp_path, quick(max_steps=2), init_step=0).fit()
    with pytest.raises(TrainingError, match="init_step=0, but training starts at step 2"):
        trainer(tmp_path, quick(), resume="latest", init_step=0)
    assert trainer(tmp_path, quick(), resume="latest", init_step=2).fit().step == 6


def test_fp16_on_a_cpu_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="precision='fp16' needs a CUDA device, not cpu; use auto, bf16 or fp32"):
        trainer(tmp_path / "run", quick(precision="fp16"))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(TrainingError, match=f"tokenizer has {tokenizer.vocab_size} ids, the model only vocab_size=37"):
        trainer(tmp_path, quick(), tokenizer=tokenizer)


# What a run leaves behind


def test_metrics_are_one_line_a_step(tmp_path: Path) -> None:
    trainer(tmp_path, quick(eval_interval=4)).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [4 * 12 * step for step in range(1, 7)]
    assert ["val_loss" in line for line in lines] == [False, False, False, True, False, True]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a crash in the middle of a line
    assert read_metrics(tmp_path) == lines


def test_every_line_is_on_disk_when_its_event_is_out(tmp_path: Path) -> None:
    for event in trainer(tmp_path, quick()).steps():
        assert read_metrics(tmp_path)[-1]["step"] == event["step"]


def test_checkpoints_are_written_when_due_or_asked_for_and_old_ones_go(tmp_path: Path) -> None:
    one = trainer(tmp_path, quick(max_steps=7, checkpoint_interval=2), val=False)
    saved = []
    for event in one.steps():
        if "checkpoint" in event:
            saved.append(event["step"])
        if event["step"] == 4:
            one.request_save()
    assert saved == [2, 4, 5, 6, 7]
    kept = {int(path.name[5:11]) for path in checkpoints(tmp_path)}
    assert {6, 7} <= kept and len(kept) <= 3


def test_run_folder_says_how_it_was_made(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = quick(max_steps=1)
    result = trainer(tmp_path, config, tiny_model(vocab_size=tokenizer.vocab_size), tokenizer=tokenizer).fit()
    for folder in (tmp_path, result.checkpoint):
        assert folder
        said = json.loads((folder / "config.json").read_text())
        assert TrainConfig.from_dict(said["train"]) == config
        assert said["data"] == {"train": "this", "val": "this"}
        assert (said["tokenizer"], said["precision"]) == (tokenizer.fingerprint, "fp32")
        assert said["train"]["seed"] == 0
        versions = said["environment"]
        assert torch.__version__.startswith(versions["torch"])  # the package says it with or without "+cu130"
        assert versions["threads"] == torch.get_num_threads()
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert (versions["commit"] or "").removesuffix("+changes") == head


def test_what_a_resume_changes_is_in_the_history(tmp_path: Path) -> None:
    trainer(tmp_path, quick(max_steps=2)).fit()
    trainer(tmp_path, quick(max_steps=4, learning_rate=0.02, batch_size=2), resume="latest").fit()
    result = trainer(tmp_path, quick(max_steps=5, learning_rate=0.02, batch_size=2), resume="latest").fit()
    assert result.checkpoint
    for folder in (tmp_path, result.checkpoint):
        history = json.loads((folder / "config.json").read_text())["history"]
        assert [entry["step"] for entry in history] == [2, 4]
        assert history[0]["changed"] == {
            "train.max_steps": [2, 4],
            "train.batch_size": [4, 2],
            "train.learning_rate": [0.01, 0.02],
        }
        assert history[1]["changed"] == {"train.max_steps": [4, 5]}


def test_samples_and_validation_do_not_disturb_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    quiet, chatty = (tiny_model(vocab_size=tokenizer.vocab_size) for _ in range(2))
    trainer(tmp_path / "a", quick(), quiet, val=False).fit()
    config = quick(sample_interval=2, eval_interval=1, sample_tokens=8, sample_prompt="曹操" * 30)
    trainer(tmp_path / "b", config, chatty, tokenizer=tokenizer).fit()
    assert_same_tensors(weights(quiet), weights(chatty))
    assert ["sample" in event for event in read_metrics(tmp_path / "b")] == [False, True] * 3
