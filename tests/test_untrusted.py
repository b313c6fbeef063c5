"""What is read from disk is not believed: any other type, shape or range ends in words, never in a crash."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmcore.dataset
from llmcore.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, load_weights, save_checkpoint
from llmcore.config import ConfigError, ModelConfig
from llmcore.corpus.token_files import finish_split, publish, write_manifest
from llmcore.dataset import SPLITS, DatasetError, TokenDataset, verify_dataset
from llmcore.files import check_json, read_json
from llmcore.formats.huggingface import from_hf, to_hf
from llmcore.runs import TrainingError, read_metrics
from llmcore.tokenizer import Tokenizer, TokenizerError
from llmcore.train import Trainer

from .helpers import ROOT, Batches, examples, quick, sign, tiny_config, tiny_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
DEEP = "[" * 200_000


def in_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code that may crash in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)


# Checkpoints


def edit_json(file: Path, place: tuple[Any, ...], value: Any) -> None:
    content = json.loads(file.read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    file.write_text(json.dumps(content))
    if file.name != "manifest.json":
        sign(file.parent)


def edit_tensor(file: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, file)
    sign(file.parent)


def trained(run: Path, optimizer: str = "muon", steps: int = 2, **options: Any) -> Path:
    """A checkpoint of a few steps, with what an fp16 run keeps of its scaler."""
    config = quick(max_steps=steps, optimizer=optimizer)
    path = Trainer(tiny_model(), Batches(), Batches(), config, run, device="cpu", **options).fit().checkpoint
    assert path
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    edit_json(path / "trainer_state.json", ("scaler",), {**scaler, "_growth_tracker": 2})
    return path


def resumed(path: Path, run: Path, optimizer: str = "muon") -> Trainer:
    config = quick(max_steps=4, optimizer=optimizer)
    return Trainer(tiny_model(5), Batches(), Batches(), config, run, device="cpu", resume=path)


def places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where JSON holds values."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*place, key)
        if isinstance(value, dict | list):
            yield from places(value, (*place, key))


MOMENT_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda t: t.flatten()[: t.numel() // 2],
    "longer": lambda t: torch.cat([t.flatten()] * 3),
    "flat": lambda t: t.reshape(1, -1),
    "empty": lambda t: t.flatten()[:0],
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "integer": lambda t: t.to(torch.int32),
    "boolean": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "NaN": lambda t: t.fill_(math.nan) if t.is_floating_point() else torch.zeros_like(t),
    "infinite": lambda t: t.fill_(math.inf) if t.is_floating_point() else torch.ones_like(t),
}
ODD_VALUES = [
    *(None, True, False, "", "x", "1", [], {}, [1], {"a": 1}, 0, 0.0, 1.5, -1, -1.5, 7, 10**7, 2**63, 2**70, 10**400),
    *(1e30, 1e300, math.nan, math.inf, -math.inf),
]


@pytest.mark.parametrize("saved_at", [sys.float_info.max, 1e300, 2.0**53])
def test_a_time_that_nothing_could_follow_is_refused(saved_at: float, tmp_path: Path) -> None:
    """Else the next checkpoint of the run, saved a moment later, would not be read again."""
    path = trained(tmp_path)
    edit_json(path / "manifest.json", ("saved_at",), saved_at)
    with pytest.raises(CheckpointError, match="saved_at"):
        resumed(path, tmp_path)


@pytest.mark.parametrize("vocab_size", [38, 1 << 16])
def test_data_with_more_ids_than_the_model_are_refused(vocab_size: int, tmp_path: Path) -> None:
    large = Batches(vocab_size=vocab_size)
    for train, val in ((large, Batches()), (Batches(), large)):
        with pytest.raises(TrainingError, match=f"data have {vocab_size} ids, the model only vocab_size=37"):
            Trainer(tiny_model(), train, val, quick(), tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()


@contextlib.contextmanager
def ending_within(seconds: int) -> Iterator[None]:
    """Break off what waits for longer, for a pipe that nobody writes to, say."""

    def too_long(*_: Any) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_metrics_that_are_no_file_are_refused_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = trained(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    metrics.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda link: os.symlink("/dev/null", link)}[kind](metrics)
    with ending_within(60):
        with pytest.raises(TrainingError, match=r"metrics\.jsonl is no file"):
            read_metrics(tmp_path)
        with pytest.raises(TrainingError, match=r"metrics\.jsonl is no file"):
            resumed(path, tmp_path)


@pytest.mark.parametrize("change", MOMENT_CHANGES)
@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        ("adamw", "layers.0.feed_forward.w1.weight/exp_avg"),
        ("adamw", "norm.weight/exp_avg_sq"),
        ("adamw", "norm.weight/step"),
        ("muon", "layers.1.attention.wq.weight/momentum_buffer"),
        ("muon", "rng.cpu"),
    ],
)
def test_a_moment_unlike_its_parameter_is_refused_by_name(
    optimizer: str, name: str, change: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint_of(optimizer)
    edit_tensor(path / "trainer_state.safetensors", name, MOMENT_CHANGES[change])
    with pytest.raises(CheckpointError, match=rf"trainer_state\.safetensors cannot be used: {name}"):
        resumed(path, tmp_path / "new", optimizer)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: trained(tmp_path_factory.mktemp(kind) / "run", kind) for kind in ("adamw", "muon")}


@pytest.fixture
def checkpoint_of(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a trained checkpoint, to damage."""
    return lambda optimizer: shutil.copytree(originals[optimizer], tmp_path / originals[optimizer].name)


@pytest.mark.slow
def test_moments_of_another_size_write_nowhere(tmp_path: Path) -> None:
    path = trained(tmp_path / "run", "adamw")
    for key in ("exp_avg", "exp_avg_sq"):
        name = f"tok_embeddings.weight/{key}"
        edit_tensor(path / "trainer_state.safetensors", name, lambda t: t.flatten()[:1])
    code = """
import sys
from pathlib import Path
from tests.test_untrusted import CheckpointError, resumed
for number in range(3):
    try:
        resumed(Path(sys.argv[1]), Path(sys.argv[2], str(number)), "adamw").fit()
    except CheckpointError as error:
        print(error)
"""
    done = in_python(code, str(path), str(tmp_path))
    assert done.returncode == 0, done.stderr  # a crash is below 0
    assert done.stdout.count("tok_embeddings.weight/exp_avg is (1,) float32, not (37, 32) float32") == 3


@pytest.mark.parametrize(("left", "place"), [(624, 624), (600, 600), (624, 0), (2, 0), (1, 2**32), (625, 0), (300, -1)])
def test_a_random_state_that_would_be_read_past_its_end_is_refused(
    left: int, place: int, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    def forge(state: Tensor) -> Tensor:
        state[8:12] = torch.tensor([left], dtype=torch.int32).view(torch.uint8)
        state[16:24] = torch.tensor([place]).view(torch.uint8)
        return state

    path = checkpoint_of("muon")
    edit_tensor(path / "trainer_state.safetensors", "rng.cpu", forge)
    with pytest.raises(CheckpointError, match=r"trainer_state\.safetensors cannot be used: rng\.cpu"):
        resumed(path, tmp_path / "new")


@pytest.mark.parametrize("drawn", [0, 1, 623, 624, 625])
def test_a_random_state_is_taken_wherever_it_stands(drawn: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = trained(run)
    generator = torch.Generator().manual_seed(3)
    torch.randint(9, (drawn,), generator=generator)
    edit_tensor(path / "trainer_state.safetensors", "rng.cpu", lambda _: generator.get_state())
    resumed(path, tmp_path / "new")
    assert torch.equal(torch.get_rng_state(), generator.get_state())


def test_moments_missing_or_of_nothing_are_refused(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint_of("adamw")
    file = path / "trainer_state.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(file).items()}  # else the file's own bytes
    half = {name: tensor for name, tensor in whole.items() if name != "norm.weight/exp_avg"}
    for tensors, words in (
        (half, "missing norm.weight/exp_avg"),
        ({**whole, "norm.weight/momentum_buffer": torch.ones(32)}, "unexpected norm.weight/momentum_buffer"),
        ({**whole, "layers.9.ffn_norm.weight/step": torch.tensor(1.0)}, "unexpected layers.9"),
        ({name: tensor for name, tensor in whole.items() if name != "rng.cpu"}, "missing rng.cpu"),
        ({**whole, "norm.weight/step": torch.tensor(3.0)}, "norm.weight/step is out of range: 3.0"),
        ({**whole, "norm.weight/step": torch.tensor(-1.0)}, "norm.weight/step is out of range: -1.0"),
        ({**whole, "norm.weight/exp_avg_sq": -torch.ones(32)}, "norm.weight/exp_avg_sq is out of range"),
    ):
        save_file(tensors, file)
        sign(path)
        with pytest.raises(CheckpointError, match=words):
            resumed(path, tmp_path / "new", "adamw")


@pytest.mark.parametrize("field", ["vocab_size", "n_layers", "hidden_dim", "n_kv_heads"])
def test_a_shape_that_the_weights_do_not_have_names_both_files(
    field: str, checkpoint_of: Callable[[str], Path]
) -> None:
    path = checkpoint_of("adamw")
    value = {"n_layers": 9, "n_kv_heads": 1}.get(field, 7)
    edit_json(path / "config.json", ("model", field), value)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit the model in config\.json: "):
        load_checkpoint(path, device="cpu")


@settings(deadline=None, max_examples=500, suppress_health_check=list(HealthCheck))
@given(st.data())
def any_one_change_is_refused_or_harmless(original: Path, folder: Path, data: st.DataObject) -> None:
    """Any field or tensor of a resealed checkpoint changed: refused, naming the file, or all others load as they were.

    A weight or moment of another type or shape is always refused. Whatever is accepted, the next step does not crash.
    """
    shutil.rmtree(folder, ignore_errors=True)
    path = shutil.copytree(original, folder / original.name)
    file = path / data.draw(st.sampled_from(sorted(file.name for file in path.iterdir())))
    must_refuse, changed = False, ""
    if file.suffix == ".json":
        place = data.draw(st.sampled_from(list(places(json.loads(file.read_text())))))
        edit_json(file, place, data.draw(st.sampled_from(ODD_VALUES)))
        changed = place[0]
    else:
        name = data.draw(st.sampled_from(sorted(load_file(file))))
        change = data.draw(st.sampled_from(sorted(MOMENT_CHANGES)))
        before = load_file(file)[name]
        edit_tensor(file, name, MOMENT_CHANGES[change])
        after = load_file(file)[name]
        must_refuse = (before.shape, before.dtype) != (after.shape, after.dtype)
    try:
        load_checkpoint(path, device="cpu")
        trainer = resumed(path, folder / "new")
    except CheckpointError as error:
        assert file.name in str(error) or "belongs to another run" in str(error) or "manifest.json" in str(error), error
        return
    assert not must_refuse, f"{file.name} {name} {change}"
    state = json.loads((original / "trainer_state.json").read_text())
    for key, value in dataclasses.asdict(trainer.progress).items():
        assert key == changed or value == state[key], key
    weights = trainer.model.state_dict()
    for name, tensor in load_file(original / "model.safetensors").items():
        assert torch.equal(weights[name], tensor), name
    assert trainer.measured_steps(1)[0]["step"] == trainer.step


FUZZ = """
import sys
from pathlib import Path
from tests.test_untrusted import any_one_change_is_refused_or_harmless
any_one_change_is_refused_or_harmless(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_any_one_change_to_a_checkpoint_is_refused_or_harmless(originals: dict[str, Path], tmp_path: Path) -> None:
    done = in_python(FUZZ, str(originals["muon"]), str(tmp_path / "copy"))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("place", "value"), [("batch_size", None), ("batch_size", "8"), ("grad_accum_steps", 1.5)])
def test_a_training_setting_that_is_no_count_is_refused_by_name(
    place: str, value: Any, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint_of("muon")
    edit_json(path / "config.json", ("train", place), value)
    with pytest.raises(CheckpointError, match=rf"config\.json cannot be used: train\.{place}: "):
        resumed(path, tmp_path / "new")


WEIGHT_CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "integers": (lambda t: t.to(torch.int64), "is int64; weights must be"),
    "booleans": (lambda t: t.bool(), "is bool; weights must be"),
    "complex": (lambda t: t.to(torch.complex64), "is complex64; weights must be"),
    "float8": (lambda t: t.to(torch.float8_e5m2), "is float8_e5m2; weights must be"),
    "another type": (lambda t: t.to(torch.float64), "is float64: all weights must be of one type"),
    "one NaN": (lambda t: t.view(-1).index_fill_(0, torch.tensor([5]), math.nan), "holds what is not finite"),
    "one -inf": (lambda t: t.view(-1).index_fill_(0, torch.tensor([31]), -math.inf), "holds what is not finite"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("change", WEIGHT_CHANGES)
def test_weights_of_another_type_or_not_finite_are_refused(change: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_model().to(dtype), None, step=1, loss=3.0)
    load_checkpoint(path, device="cpu")
    edit, words = WEIGHT_CHANGES[change]
    edit_tensor(path / "model.safetensors", "layers.1.ffn_norm.weight", lambda t: edit(t).view(32))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors .*layers\.1\.ffn_norm\.weight {words}"):
        load_checkpoint(path, device="cpu")
    model = tiny_model(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        load_weights(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_too_large_for_the_model_they_go_into_are_refused(tmp_path: Path) -> None:
    model = tiny_model().double()
    with torch.no_grad():
        model.norm.weight[0] = 1e300
    path = save_checkpoint(tmp_path, model, None, step=1, loss=3.0)
    load_checkpoint(path, device="cpu")
    with pytest.raises(CheckpointError, match=r"norm\.weight holds what is not finite"):
        load_weights(tiny_model(), path)


def test_foreign_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tie_embeddings=True)
    save_checkpoint(tmp_path / "run", model, None, step=1, loss=3.0)
    to_hf(find_checkpoint(tmp_path / "run"), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 2] = math.inf
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"feed_forward\.w3\.weight holds what is not finite"):
        from_hf(tmp_path / "hf", device="cpu")


def test_a_tied_model_with_another_output_matrix_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_model(tie_embeddings=True), None, step=1, loss=3.0)
    tensors = load_file(path / "model.safetensors")
    for output, fits in ((tensors["tok_embeddings.weight"].clone(), True), (torch.zeros(37, 32), False)):
        save_file({**tensors, "output.weight": output}, path / "model.safetensors")
        sign(path)
        if fits:
            load_checkpoint(path, device="cpu")
        else:
            with pytest.raises(CheckpointError, match=r"output\.weight is not tok_embeddings\.weight"):
                load_checkpoint(path, device="cpu")


ENORMOUS: list[dict[str, Any]] = [
    *({name: 10**7} for name in ("n_layers", "dim", "n_heads", "hidden_dim", "vocab_size")),
    *({"max_seq_len": size} for size in (10**8, 10**12, 2**62)),
    {"max_seq_len": 2**23, "head_dim": 4096},
    {"n_layers": 512, "dim": 2**17, "n_heads": 2**12},
    {"n_layers": 500},
]


@pytest.mark.slow
def test_an_enormous_shape_is_refused_without_building_it(tmp_path: Path) -> None:
    code = """
import resource, sys, time
from pathlib import Path
from llmcore.checkpoint import CheckpointError, load_checkpoint
load_checkpoint(sys.argv[1], device="cpu")
for path in sys.argv[2:]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    try:
        load_checkpoint(path, device="cpu")
    except CheckpointError as error:
        now = resource.getrusage(resource.RUSAGE_SELF)
        print(now.ru_utime - used.ru_utime, now.ru_maxrss - used.ru_maxrss, error, flush=True)
"""
    paths = [save_checkpoint(tmp_path / "whole", tiny_model(), None, step=1, loss=3.0)]
    for number, shape in enumerate(ENORMOUS):
        paths.append(save_checkpoint(tmp_path / str(number), tiny_model(), None, step=1, loss=3.0))
        for key, value in shape.items():
            edit_json(paths[-1] / "config.json", ("model", key), value)
    done = in_python(code, *map(str, paths))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(ENORMOUS)
    for shape, line in zip(ENORMOUS, lines, strict=True):
        seconds, kilobytes, words = line.split(" ", 2)
        assert float(seconds) < 1 and int(kilobytes) < 50_000, line
        assert next(iter(shape)) in words, line


def test_bounds_of_a_configuration_name_field_and_limit() -> None:
    for changes, words in (
        ({"n_layers": 10**7}, "n_layers=10000000 must be above 0 and at most 512"),
        ({"norm_eps": 2.0}, "norm_eps=2.0 must be above 0 and at most 1"),
        ({"max_seq_len": 2**24, "head_dim": 32}, "max_seq_len=16777216 with head_dim=32"),
        ({"dim": [[["x" * 10**6]]]}, "dim=.{,60} must be of type int"),
    ):
        with pytest.raises(ConfigError, match=words):
            tiny_config(**changes)
    values = {**tiny_config().to_dict(), **{f"key {number}" * 1000: 1 for number in range(10_000)}}
    with pytest.raises(ConfigError, match="unknown key") as caught:
        ModelConfig.from_dict(values)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "trainer_state.json"])
@pytest.mark.parametrize(
    "content", [DEEP, "{" + '"a":{' * 50_000, '{"a": ' + "9" * 10_000 + "}", "\ud800", "\x00", "[1]"]
)
def test_json_of_any_other_kind_is_refused_by_file(
    name: str, content: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint_of("muon")
    (path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    if name != "manifest.json":
        sign(path)
    with pytest.raises(CheckpointError, match=name):
        resumed(path, tmp_path / "new")


def test_json_nested_less_deeply_than_it_reads_is_refused_too(tmp_path: Path) -> None:
    for depth in range(100, 1500, 200):  # somewhere between the reader's limit and the message's
        (tmp_path / "a.json").write_text('{"a": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ValueError, match=r"a\.json cannot be used: (a: .*|it is nested)"):
            read_json(tmp_path / "a.json", {"properties": {"a": {"type": "integer"}}})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None])
def test_a_number_that_must_be_finite_is(value: Any) -> None:
    with pytest.raises(ValueError, match="here cannot be used: a: "):
        check_json({"a": value}, {"properties": {"a": {"type": "finite number"}}}, "here")
    wanted = {"properties": {"a": {"type": "number or Infinity"}}}
    if value == math.inf:
        check_json({"a": value}, wanted, "here")
    else:
        with pytest.raises(ValueError, match="a: "):
            check_json({"a": value}, wanted, "here")


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "trainer_state.safetensors", "manifest.json"])
def test_a_git_lfs_pointer_in_a_files_place_is_called_so(
    name: str, signed: bool, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint_of("muon")
    (path / name).write_bytes(POINTER)
    if signed and name != "manifest.json":
        sign(path)
    with pytest.raises(CheckpointError, match=rf"{name} .*Git LFS pointer.*git lfs pull"):
        resumed(path, tmp_path / "new")


def test_a_file_that_the_manifest_does_not_list_is_never_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = save_checkpoint(run, tiny_model(vocab_size=tokenizer.vocab_size), None, step=1, loss=3.0)
    (path / "notes.txt").write_text("never read, so nobody minds")
    assert load_checkpoint(path, device="cpu").tokenizer is None
    for name in ("tokenizer.model", "trainer_state.json", "trainer_state.safetensors"):
        (path / name).write_bytes(tokenizer.model_bytes)
        with pytest.raises(CheckpointError, match=rf"it holds {name}, which its manifest\.json does not list"):
            load_checkpoint(path, device="cpu")
        (path / name).unlink()


def test_a_tokenizer_that_cannot_end_a_text_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Else data sets would hold the id -1 after each document, as 65535."""
    proto = tokenizer.model_proto()
    proto.pieces[tokenizer.eos_id].type = 1
    proto.trainer_spec.eos_id = -1
    file = tmp_path / "endless.model"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(TokenizerError, match=r"endless\.model.*eos"):
        Tokenizer(file)


def test_a_tokenizer_that_does_not_fit_its_checkpoint_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = save_checkpoint(tmp_path / "small", tiny_model(), tokenizer, step=1, loss=3.0)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model has 4000 ids, .*vocab_size=37"):
        load_checkpoint(small, device="cpu")
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    other = save_checkpoint(tmp_path / "other", model, tokenizer, step=1, loss=3.0, config={"tokenizer": "0" * 64})
    with pytest.raises(CheckpointError, match=r"config\.json names another tokenizer"):
        load_checkpoint(other, device="cpu")
    broken = save_checkpoint(tmp_path / "broken", model, tokenizer, step=1, loss=3.0)
    (broken / "tokenizer.model").write_bytes(b"\x0a\x03abc")
    sign(broken)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be used"):
        load_checkpoint(broken, device="cpu")


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a" * 5000, "a\x00b", "", ".", "sub/x"])
def test_a_manifest_may_list_plain_names_only(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_model(), None, step=1, loss=3.0)
    edit_json(path / "manifest.json", ("sha256", name), "0" * 64)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be used: sha256|is missing"):
        load_checkpoint(path, device="cpu")


SAVING = """
import sys
from pathlib import Path
from llmcore.checkpoint import prune_checkpoints, save_checkpoint
from tests.helpers import tiny_model
run, model, step = Path(sys.argv[1]), tiny_model(), 0
while True:
    step += 1
    save_checkpoint(run, model, None, step=step % 50, loss=float(step % 7))
    prune_checkpoints(run, int(sys.argv[2]))
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("which", "keep"), [("latest", 1), ("latest", 2), ("best", 1)])
def test_reading_beside_a_trainer_that_saves_and_deletes(which: str, keep: int, tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path / "run"), str(keep)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert writer.stdout and writer.stdout.readline()
        for number in range(30):
            if number % 2:
                assert find_checkpoint(tmp_path, which).parent.name == "run"
            else:
                assert load_checkpoint(tmp_path, which, device="cpu").model.config == tiny_config()
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait()


# Data sets


def data_set(folder: Path, ids: np.ndarray, documents: int = 3, tokenizer: str = "this") -> Path:
    """A finished data set in a folder, both splits with the same ids, in documents of about the same length."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [len(part) for part in np.array_split(ids, documents)]
    splits = {}
    for split in SPLITS:
        (folder / f"{split}.bin").write_bytes(ids.astype("<u4").tobytes())
        splits[split] = {**finish_split(folder, split, lengths), "characters": len(ids), "bytes": 3 * len(ids)}
    sources = [
        {"path": f"{split}-{number}.txt", "sha256": "0" * 64, "bytes": 3 * n, "tokens": n, "split": split}
        for split in SPLITS
        for number, n in enumerate(lengths)
    ]
    manifest = {"format_version": 2, "dtype": "<u4", "vocab_size": 70_000, "tokenizer": tokenizer, "val_fraction": 0.5}
    write_manifest(folder, {**manifest, "splits": splits, "sources": sources, "errors": "strict", "refused": {}})
    return folder


def reseal(folder: Path, manifest: dict[str, Any]) -> None:
    write_manifest(folder, {key: value for key, value in manifest.items() if key != "sha256"})


@settings(deadline=None, max_examples=examples(120), suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_one_change_to_a_data_set_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    folder = data_set(tmp_path / "d", np.arange(100) + 5)
    manifest = json.loads((folder / "meta.json").read_text())
    place = data.draw(st.sampled_from(list(places(manifest))))
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = data.draw(st.sampled_from(ODD_VALUES))
    reseal(folder, manifest)
    try:
        opened = TokenDataset(folder, "train", 7)
        assert opened.read(0, 100).tolist() == [*range(5, 105)] and opened.offsets.tolist() == [0, 34, 67, 100]
        assert len(opened.names) == 3 and opened.bytes_per_token >= 0 and opened.count_ids().sum() == 100
    except DatasetError as error:
        assert str(folder) in str(error)


@pytest.mark.parametrize("gone", [3, {}, [{}], [None], [{"path": "a", "sha256": 7, "split": "val", "tokens": 1}]])
def test_a_record_of_held_out_texts_that_cannot_be_read_is_refused(gone: Any, tmp_path: Path) -> None:
    folder = data_set(tmp_path / "d", np.arange(100) + 5)
    reseal(folder, {**json.loads((folder / "meta.json").read_text()), "gone": gone})
    with pytest.raises(DatasetError, match=r"meta\.json cannot be used"):
        TokenDataset(folder, "train", 7)


def offsets_file(folder: Path, offsets: list[int]) -> None:
    """Other offsets, in a data set sealed again."""
    manifest, raw = json.loads((folder / "meta.json").read_text()), np.array(offsets, "<u8").tobytes()
    for split in SPLITS:
        (folder / f"{split}.offsets").write_bytes(raw)
        manifest["splits"][split]["offsets_sha256"] = hashlib.sha256(raw).hexdigest()
    reseal(folder, manifest)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([0, 67, 34, 100], "offsets must rise"),
        ([0, 34, 67, 2**63], "offsets must rise"),
        ([1, 34, 67, 100], "offsets must rise"),
        ([0, 34, 67], "train.offsets is damaged: it has 24 bytes, not 32"),
        ([], "train.offsets is damaged: it has 0 bytes, not 32"),
        ([0, 33, 67, 100], "not the documents of train.offsets"),
    ],
)
def test_offsets_at_odds_with_the_manifest_are_refused(offsets: list[int], words: str, tmp_path: Path) -> None:
    folder = data_set(tmp_path / "d", np.arange(100))
    offsets_file(folder, offsets)
    with pytest.raises(DatasetError, match=words):
        TokenDataset(folder, "train", 7)
    with pytest.raises(DatasetError, match=words):
        verify_dataset(folder)


@pytest.mark.parametrize("depth", [900, 990, 5000, 200_000])
def test_a_data_set_nested_without_end_is_refused_by_file(depth: int, tmp_path: Path) -> None:
    folder = data_set(tmp_path / "d", np.arange(100))
    (folder / "meta.json").write_text('{"format_version": 2, "a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(DatasetError, match=r"meta\.json"):
        TokenDataset(folder, "train", 7)


@pytest.mark.parametrize("name", ["meta.json", "train.bin", "train.offsets", "train.hashes"])
def test_a_git_lfs_pointer_in_a_data_set_is_called_so(name: str, tmp_path: Path) -> None:
    folder = data_set(tmp_path / "d", np.arange(100))
    (folder / name).write_bytes(POINTER)
    with pytest.raises(DatasetError, match=rf"{name} .*Git LFS pointer.*git lfs pull"):
        TokenDataset(folder, "train", 7)


def test_a_data_set_replaced_while_it_is_opened_is_one_or_the_other(tmp_path: Path) -> None:
    """One thread replaces it as fast as it can; each opening holds ids, offsets and manifest of the same one."""
    folder, ended = tmp_path / "d", threading.Event()
    kinds = {"this": np.arange(20_000), "that": np.arange(30_000) + 20_000}
    data_set(folder, kinds["this"])

    def replace() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            kind = ("this", "that")[number % 2]
            publish(data_set(folder / ".unfinished", kinds[kind], 3 + number % 2, kind), folder)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        opened = [TokenDataset(folder, "train", 16) for _ in range(40)]
    finally:
        ended.set()
        thread.join()
    for data in opened:  # long after their files have been replaced
        ids = kinds[data.manifest["tokenizer"]]
        assert (data.read(0, len(ids)) == ids).all() and data.n_targets == len(ids) - 1
        assert len(data.offsets) == data.manifest["splits"]["train"]["documents"] + 1 == len(data.names) + 1


def test_a_data_set_replaced_while_it_is_opened_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = data_set(tmp_path / "d", np.arange(100)), llmcore.dataset.verify_dataset
    data_set(folder / ".unfinished", np.arange(300) + 100, 5, "that")

    def and_then_replaced(*arguments: Any, **options: Any) -> dict[str, Any]:
        manifest = real(*arguments, **options)
        publish(folder / ".unfinished", folder)
        return manifest

    monkeypatch.setattr(llmcore.dataset, "verify_dataset", and_then_replaced)
    data = TokenDataset(folder, "train", 7)
    assert data.manifest["tokenizer"] == "that" and len(data.names) == 5
    assert data.read(0, 300).tolist() == [*range(100, 400)]
    publish(data_set(folder / ".unfinished", np.arange(50)), folder)
    assert data.read(0, 300).tolist() == [*range(100, 400)] and data.n_targets == 299


def test_a_preparation_broken_off_while_publishing_says_so(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "d", np.arange(100))
    data_set(folder / ".unfinished", np.arange(100))
    (folder / "meta.json").unlink()  # where a kill came in `publish`
    with pytest.raises(DatasetError, match="is being replaced, or a preparation broke off; .*02_dataset"):
        TokenDataset(folder, "train", 7)
