"""What only a GPU can show: `python -m tests.test_cuda`, or by pytest, which skips all of it where there is none.

It needs torch, numpy, sentencepiece and safetensors, and not even pytest (see `tests/bare.py`). With TEST_DEVICE=cpu
the same code runs on the CPU, at smaller shapes: so that it runs at all is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may add up in another order each time

import torch
from torch import Tensor

import llmcore.model
from llmcore.checkpoint import load_checkpoint
from llmcore.config import ModelConfig
from llmcore.generate import generate_ids
from llmcore.measure.memory import predict_memory
from llmcore.measure.planner import measure_memory
from llmcore.model import Transformer
from llmcore.runs import TrainingError, read_metrics
from llmcore.train import Trainer
from tests.bare import do_without_jsonschema
from tests.helpers import Batches, assert_same_tensors, quick, state, tiny_config, weights

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"
with contextlib.suppress(ImportError):  # as a program it does without
    import pytest

    pytestmark = [
        pytest.mark.skipif(not ON_CUDA or not torch.cuda.is_available(), reason="needs a GPU"),
        pytest.mark.slow,
    ]

# heads of 64, so that PyTorch's own kernels for attention are used, and more than one of their blocks of tokens
SHAPE = tiny_config(vocab_size=600, dim=128, n_heads=2, head_dim=64, hidden_dim=256, max_seq_len=256)
LONG = 200  # tokens in a window of `SHAPE`
WIDE: dict[str, ModelConfig] = {
    "40M": ModelConfig(vocab_size=8000, dim=512, n_layers=10, n_heads=8, hidden_dim=1408, max_seq_len=1024),
    "117M": ModelConfig(vocab_size=16_000, dim=768, n_layers=12, n_heads=12, hidden_dim=2304, max_seq_len=1024),
}
if not ON_CUDA:  # on a CPU these take minutes
    WIDE = {"6M": ModelConfig(vocab_size=8000, dim=256, n_layers=4, n_heads=4, hidden_dim=704, max_seq_len=512)}


@contextlib.contextmanager
def fp16_anywhere() -> Iterator[None]:
    """fp16 is refused on a CPU, because it is slow there; it computes all the same."""
    refused = contextlib.nullcontext() if ON_CUDA else mock.patch("llmcore.train.pick_precision", lambda name, _: name)
    with refused:
        yield


def build(folder: Path, seed: int = 0, device: str = DEVICE, **changes: Any) -> Trainer:
    """A run of `SHAPE` on random windows."""
    options = {key: changes.pop(key) for key in ("resume",) if key in changes}
    torch.manual_seed(seed)
    data = Batches(LONG, vocab_size=SHAPE.vocab_size)
    with fp16_anywhere():
        return Trainer(Transformer(SHAPE), data, None, quick(**changes), folder, device=device, **options)


def far(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors: of norms, relative to theirs."""
    assert ours.keys() == theirs.keys()
    pairs = ((ours[name].cpu().double(), theirs[name].cpu().double()) for name in theirs)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def loss_and_gradients(model: Transformer, tokens: Tensor, precision: str = "fp32") -> dict[str, Tensor]:
    """Loss, logits and gradients, as the trainer computes them: in fp16 with a scaled loss."""
    dtype, scale = torch.float16 if precision == "fp16" else torch.bfloat16, 2.0**10 if precision == "fp16" else 1.0
    x, y = tokens[:, :-1], tokens[:, 1:]
    model.zero_grad()
    with torch.autocast(tokens.device.type, dtype, enabled=precision in ("fp16", "bf16")):
        logits, loss = model(x), model(x, y)
    (loss * scale).backward()
    gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logits": logits.detach(), **gradients}


def test_logits_and_gradients_are_float64s() -> None:
    """In fp32 within 1e-4: with TF32, which rounds to 10 bits, they would be a hundred times further away."""
    torch.manual_seed(0)
    for changes in ({}, {"n_kv_heads": 1, "tie_embeddings": True}):
        model = Transformer(SHAPE.replace(**changes))
        tokens = torch.randint(SHAPE.vocab_size, (4, LONG))
        twin = Transformer(model.config)
        twin.load_state_dict(model.state_dict())
        exact = loss_and_gradients(twin.double(), tokens)
        model = model.to(DEVICE)
        for precision, close in (("fp32", 1e-4), ("bf16", 3e-2), ("fp16", 4e-3)):
            for policy, above in (("none", 2**23), ("selective", 2**23), ("full", 0)):  # 0: the chunked loss
                model.activation_checkpointing = policy
                with mock.patch.object(llmcore.model, "CHUNK_ABOVE", above):
                    found = far(loss_and_gradients(model, tokens.to(DEVICE), precision), exact)
                print(f"{changes or 'plain'}, {precision}, {policy}: {found:.1e}")
                assert found < close, (changes, precision, policy, found)


def test_greedy_writing_is_the_cpus() -> None:
    """With the KV cache, a batch of prompts of different lengths."""
    torch.manual_seed(0)
    model = Transformer(SHAPE).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    here = list(generate_ids(model, prompts, 40, temperature=0))
    assert list(generate_ids(model.to(DEVICE), prompts, 40, temperature=0)) == here


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that add up in a fixed order, where PyTorch has them."""
    before = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)


def run_in_pieces(folder: Path, stops: list[int], **changes: Any) -> dict[str, Tensor]:
    """The state at the end of a run of 12 steps that was stopped after some of them, and begun anew each time."""
    for number, end in enumerate([*stops, 12]):
        one = build(folder, seed=number, max_steps=12, **({"resume": "latest"} if number else {}), **changes)
        one.callbacks.append(lambda event, one=one, end=end: one.request_stop() if event["step"] == end else None)
        result = one.fit()
    assert result.step == 12 and result.checkpoint is not None
    return state(result.checkpoint)


def test_a_resume_is_bit_exact_or_as_near_as_a_second_run(tmp_path: Path) -> None:
    """Bit-exact with deterministic kernels. Without, attention's backward pass may add up in another order each time:

    then a resumed run is no further from a straight one than ten times what two straight runs differ by.
    """
    for precision in ("fp32", "bf16", "fp16"):
        with deterministic():
            ends = [run_in_pieces(tmp_path / f"{precision}-d{n}", [5] * n, precision=precision) for n in (0, 1)]
        rng = [name for name in ends[0] if name.startswith("rng.")]  # of the process, which the runs share
        for end in ends:
            for name in rng:
                end.pop(name, None)
        assert_same_tensors(*ends)
        straight = [run_in_pieces(tmp_path / f"{precision}-{n}", [], precision=precision) for n in range(3)]
        resumed = run_in_pieces(tmp_path / f"{precision}-r", [3, 7], precision=precision)
        for end in (*straight, resumed):
            for name in rng:
                end.pop(name, None)
        noise = max(far(straight[0], straight[1]), far(straight[0], straight[2]))
        found = far(resumed, straight[0])
        print(f"{precision}: two straight runs differ by {noise:.1e}, a resumed one by {found:.1e}")
        assert found <= 10 * noise, (precision, noise, found)


def test_a_loss_scale_that_overflows_falls_and_is_resumed(tmp_path: Path) -> None:
    """fp16: a scale too large by far is halved at each step, and no weight changes. Then it trains as fp32 does."""
    one = build(tmp_path / "fp16", precision="fp16", max_steps=60, max_skipped_steps=60)
    assert one.scaler.is_enabled()
    one.scaler.load_state_dict({**one.scaler.state_dict(), "scale": 2.0**40})
    before = weights(one.model)
    scales = []
    for event in one.steps():
        scales.append(one.scaler.get_scale())
        if event["skipped"] == event["step"]:
            assert scales[-1] == 2.0 ** (40 - event["step"])
            assert_same_tensors(weights(one.model), before)
        elif event["step"] == 45:
            break  # saves
    skipped = one.progress.skipped
    assert 5 < skipped < 40, skipped

    again = build(tmp_path / "fp16", precision="fp16", max_steps=60, max_skipped_steps=60, resume="latest")
    assert again.scaler.state_dict() == one.scaler.state_dict()
    again.fit()
    last = read_metrics(tmp_path / "fp16")[-1]
    steps = last["step"] - last["skipped"]
    plain = build(tmp_path / "fp32", precision="fp32", max_steps=60)
    plain_loss = [event["loss"] for event in plain.steps()][steps - 1]
    print(
        f"fp16: {skipped} steps skipped, then a scale of {scales[-1]:g}; loss {last['loss']:.3f}, fp32 {plain_loss:.3f}"
    )
    assert abs(last["loss"] - plain_loss) < 0.1 * plain_loss


def test_a_checkpoint_goes_to_the_cpu_and_back(tmp_path: Path) -> None:
    """The tensors are the same to the bit on either; the run goes on and ends near one that stayed."""
    stayed = build(tmp_path / "stayed", max_steps=12)
    stayed.fit()
    for end, device in ((4, DEVICE), (8, "cpu"), (12, DEVICE)):
        options = {"resume": "latest"} if end > 4 else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the device has changed
            one = build(tmp_path / "moved", seed=end - 4, device=device, max_steps=12, **options)
        if options:
            saved = load_checkpoint(tmp_path / "moved", device="cpu").model.state_dict()
            assert_same_tensors({name: value.cpu() for name, value in weights(one.model).items()}, saved)
        one.callbacks.append(lambda event, one=one, end=end: one.request_stop() if event["step"] == end else None)
        assert one.fit().step == end
        assert {
            moment.device.type for o in one.optimizers for each in o.state.values() for moment in each.values()
        } == {device}
    found = far(weights(one.model), weights(stayed.model))
    print(f"after twelve steps, four of them on the CPU: weights differ by {found:.1e}")
    assert found < 1e-2


def test_memory_is_as_predicted() -> None:
    """Within a tenth of what PyTorch allocates, for each policy."""
    precision = "auto" if ON_CUDA else "fp32"
    for name, shape in WIDE.items():
        for policy in ("none", "selective", "full"):
            how = quick(batch_size=4, precision=precision, activation_checkpointing=policy)
            predicted, measured = predict_memory(shape, how, DEVICE)["total"], measure_memory(shape, how, DEVICE)
            ratio = predicted / measured["peak_bytes"]
            print(f"{name}, {policy}: {predicted / 1e6:,.0f} MB predicted, {ratio:.1%} of what is allocated")
            assert abs(ratio - 1) < 0.1, (name, policy, ratio)


@contextlib.contextmanager
def little_memory(more: int) -> Iterator[None]:
    """Let the device hand out so many bytes more, and no further ones."""
    if ON_CUDA:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / torch.cuda.mem_get_info()[1])
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        import resource  # Linux and macOS

        before = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


def test_out_of_memory_says_what_to_lower_and_the_run_goes_on(tmp_path: Path) -> None:
    """A batch far too large, after three steps of a small one: what was learned is saved and goes on."""
    first = build(tmp_path, max_steps=6)
    steps = first.steps()
    next(steps), next(steps), next(steps)
    steps.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of windows that another batch size misses
        large = build(tmp_path, max_steps=6, batch_size=4096, resume="latest")
        with little_memory(10**9):
            try:
                large.fit()
                raise AssertionError("4096 windows did not run out of memory")
            except TrainingError as error:
                said = str(error)
        print(said)
        for word in (f"out of memory in step 4 on {DEVICE}", "batch_size=4096", "activation_checkpointing=", "resume"):
            assert word in said, said
        del large
        assert load_checkpoint(tmp_path, device="cpu").step == 3
        assert build(tmp_path, max_steps=6, resume="latest").fit().step == 6


def test_a_step_waits_for_the_device_once(tmp_path: Path) -> None:
    """Where the loss and the norm are read; a batch is copied without a wait."""
    for precision in ("fp32", "fp16"):
        one = build(tmp_path / precision, precision=precision, grad_accum_steps=3)
        one.measured_steps(2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if ON_CUDA:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                one.measured_steps(1)
            finally:
                if ON_CUDA:
                    torch.cuda.set_sync_debug_mode("default")
        waits = [str(each.message) for each in caught if "synchroniz" in str(each.message)]
        assert len(waits) == (1 if ON_CUDA else 0), waits


def test_a_compiled_run_ends_near_the_plain_one(tmp_path: Path) -> None:
    """fp32 and the precision of this device, with the activation policy that is hardest to compile."""
    for precision, close in (("fp32", 1e-2), ("auto", 5e-2)):
        losses = []
        for compiled in ("off", "on"):
            options = {"compile": compiled, "precision": precision, "activation_checkpointing": "selective"}
            one = build(tmp_path / f"{precision}-{compiled}", max_steps=8, **options)
            losses.append([event["loss"] for event in one.steps()][-1])
        print(f"{precision}: loss {losses[0]:.4f}, compiled {losses[1]:.4f}")
        assert abs(losses[0] - losses[1]) < close * losses[0], losses


def test_float32_is_not_tf32() -> None:
    """Neither torch's default nor anything here turns TF32 on."""
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32


def main() -> int:
    """Run the tests one after the other, each with its time; returns how many failed."""
    if ON_CUDA and not torch.cuda.is_available():
        print("there is no GPU here; TEST_DEVICE=cpu runs the same code on the CPU")
        return 1
    do_without_jsonschema()
    print(f"{torch.cuda.get_device_name() if ON_CUDA else DEVICE}, torch {torch.__version__}", flush=True)
    failed, begun = 0, time.perf_counter()
    wanted = sys.argv[1:] or [""]
    for name, test in [pair for pair in globals().items() if pair[0].startswith("test_")]:
        if not any(word in name for word in wanted):
            continue
        started, fault = time.perf_counter(), ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                test(**({"tmp_path": Path(folder)} if "tmp_path" in test.__annotations__ else {}))
            except Exception as error:  # the next test may still say something
                fault, failed = f"{type(error).__name__}: {error}", failed + 1
        print(f"{'FAILED' if fault else 'ok':6} {time.perf_counter() - started:5.1f} s  {name}  {fault}", flush=True)
    print(f"{failed} failed, {time.perf_counter() - begun:.0f} s in all")
    return failed


if __name__ == "__main__":
    sys.exit(main())
