"""Checkpoints: whole or not at all, checked before use, never a pickle."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import llmcore.checkpoint
from llmcore.checkpoint import (
    CheckpointError,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)
from llmcore.model import Transformer
from llmcore.tokenizer import Tokenizer

from .helpers import examples, printed_by, random_ids, sign, tiny_model

FILES = ["config.json", "model.safetensors", "trainer_state.json", "trainer_state.safetensors"]


def save(run: Path, model: Transformer | None = None, step: int = 1, loss: float = 3.0, **more: Any) -> Path:
    state: dict[str, Any] = {"tensors": {"rng": torch.arange(5)}, "state": {"step": step}}
    return save_checkpoint(run, model or tiny_model(step), None, step=step, loss=loss, **state, **more)


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    sign(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
def test_round_trip_keeps_every_bit(tie: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(std=0.3, tie_embeddings=tie, n_kv_heads=2).to(dtype)
    model.reset_rope()  # angles stay float32
    before = torch.get_rng_state()
    loaded = load_checkpoint(save(tmp_path, model), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    weights = loaded.model.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert weights[name].dtype == dtype and torch.equal(weights[name], tensor), name
    assert torch.equal(loaded.model(random_ids(2, 24)), model(random_ids(2, 24)))
    assert (loaded.model.output.weight is loaded.model.tok_embeddings.weight) is tie
    assert (loaded.model.config, loaded.step, loaded.tokenizer) == (model.config, 1, None)
    assert not loaded.model.training


def test_loaded_model_can_be_trained_on(tmp_path: Path) -> None:
    model = load_checkpoint(save(tmp_path, tiny_model(tie_embeddings=True)), device="cpu").model
    model(random_ids(1, 9), random_ids(1, 9)).backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_folder_moves_anywhere_with_its_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    path = save_checkpoint(tmp_path / "run", model, tokenizer, step=7, loss=2.5, config={"note": "三国"})
    assert path.name == "step=000007_loss=2.500"
    copy = shutil.copytree(path, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run")
    loaded = load_checkpoint(copy)
    assert loaded.tokenizer is not None and loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert (loaded.step, loaded.path, loaded.config["note"], loaded.config["loss"]) == (7, copy, "三国", 2.5)


def test_every_file_is_json_safetensors_or_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = save_checkpoint(
        tmp_path, tiny_model(), tokenizer, step=1, loss=1.0, tensors={"rng": torch.get_rng_state()}, state={"step": 1}
    )
    names = {file.name for file in path.iterdir()}
    assert names == {*FILES, "manifest.json", "tokenizer.model"}
    assert all(load_file(path / name) for name in names if name.endswith(".safetensors"))
    assert all(json.loads((path / name).read_text()) for name in names if name.endswith(".json"))
    assert (path / "tokenizer.model").read_bytes() == tokenizer.model_bytes


class Malicious:
    """A pickle that creates a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pickle_is_refused_and_never_executed(name: str, archive: bool, tmp_path: Path) -> None:
    path, trap = save(tmp_path / "run"), tmp_path / "trap"
    if archive:
        torch.save({"weight": Malicious(trap)}, path / name)
    else:
        (path / name).write_bytes(pickle.dumps(Malicious(trap)))
    sign(path)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)
    assert not trap.exists()
    if not archive:  # the trap works
        pickle.loads((path / name).read_bytes()).close()
        assert trap.exists()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_latest_falls_back(name: str, damage: Any, tmp_path: Path) -> None:
    older, newer = save(tmp_path, step=1), save(tmp_path, step=2)
    damage(newer / name)
    with pytest.raises(CheckpointError, match=f"{newer.name}/{name} is (damaged|missing)"):
        load_checkpoint(newer)
    with pytest.warns(UserWarning, match=f"passed over: .*{newer.name}/{name}"):
        assert find_checkpoint(tmp_path) == older
    with pytest.warns(UserWarning, match="passed over"):
        assert load_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
def test_a_folder_without_a_whole_manifest_is_no_checkpoint(damage: Any, tmp_path: Path) -> None:
    older, newer = save(tmp_path, step=1), save(tmp_path, step=2)
    damage(newer / "manifest.json")
    with pytest.raises(CheckpointError, match=r"step=000002.* is not a checkpoint: .*manifest\.json"):
        load_checkpoint(newer)
    assert checkpoints(tmp_path) == [older]
    with pytest.warns(UserWarning, match=r"passed over: .*step=000002.*manifest\.json"):
        assert find_checkpoint(tmp_path) == older


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"step": "1", "loss": 1.0, "saved_at": 1.0, "sha256": []}'])
def test_a_manifest_of_another_kind_is_no_manifest(content: str, tmp_path: Path) -> None:
    older, newer = save(tmp_path, step=1), save(tmp_path, step=2)
    (newer / "manifest.json").write_text(content)
    with pytest.warns(UserWarning, match="passed over"):
        assert find_checkpoint(tmp_path) == older


def test_a_manifest_that_leaves_out_the_weights_vouches_for_nothing(tmp_path: Path) -> None:
    path = save(tmp_path)
    edit_manifest(path, sha256={})
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)


def test_every_bit_of_a_checkpoint_matters(tmp_path: Path) -> None:
    path = save(tmp_path)
    for name in FILES:
        original = (path / name).read_bytes()
        for place in range(0, len(original), max(1, len(original) // 5)):
            changed = bytearray(original)
            changed[place] ^= 1 << place % 8
            (path / name).write_bytes(changed)
            with pytest.raises(CheckpointError, match=name):
                load_checkpoint(path)
        (path / name).write_bytes(original)
    load_checkpoint(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A checkpoint, and what its files hold."""
    path = save(tmp_path_factory.mktemp("whole"))
    return path, {file.name: file.read_bytes() for file in path.iterdir()}


@settings(deadline=None, max_examples=examples(300))
@given(
    name=st.sampled_from([*FILES, "manifest.json"]),
    place=st.integers(0, 2**17),
    damage=st.one_of(st.just(None), st.binary(min_size=1, max_size=40)),
    signed=st.booleans(),
)
def test_any_damage_is_an_error_or_none(
    whole: tuple[Path, dict[str, bytes]], name: str, place: int, damage: bytes | None, signed: bool
) -> None:
    """A file cut short, or with other bytes in it: never other weights, never another kind of error.

    Signed by a forger, damage to the tensors themselves cannot be seen; then it loads as what it says.
    """
    path, originals = whole
    for file, original in originals.items():
        (path / file).write_bytes(original)
    content = bytearray(originals[name])
    place %= len(content)
    content[place:] = damage + content[place + len(damage) :] if damage else b""
    (path / name).write_bytes(content)
    if signed and name != "manifest.json":
        sign(path)
    try:
        loaded = load_checkpoint(path)
    except CheckpointError as error:
        assert str(path.parent) in str(error)
    else:
        assert loaded.step == 1
        same = {name: torch.equal(t, loaded.model.state_dict()[name]) for name, t in tiny_model(1).state_dict().items()}
        assert all(same.values()) or (signed and name == "model.safetensors")


def test_a_step_unlike_the_manifests_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path)
    edit_manifest(path, step=7)
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged: its step or loss"):
        load_checkpoint(path)


def test_leftovers_of_a_killed_save_are_ignored_and_then_cleaned(tmp_path: Path) -> None:
    path = save(tmp_path, step=1)
    leftover = shutil.copytree(path, tmp_path / ".step=000009_loss=1.000.12345.tmp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint(tmp_path) == path
    prune_checkpoints(tmp_path, 2)
    assert not leftover.exists() and path.exists()


def forge_header(file: Path, header: bytes, length: int | None = None) -> None:
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)


def test_a_header_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    file = path / "model.safetensors"
    claim = {"norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    for header, length in ((json.dumps(claim).encode(), None), (b"{}", 2**62), (b"", 2**42)):
        forge_header(file, header, length)
        sign(path)
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
            load_checkpoint(path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = save(tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["extra.weight"] = weights.pop("layers.0.ffn_norm.weight")
    weights["layers.1.attention.wq.weight"] = torch.zeros(3, 5)
    save_file(weights, path / "model.safetensors")
    sign(path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    for fault in (
        "missing layers.0.ffn_norm.weight",
        "unexpected extra.weight",
        "layers.1.attention.wq.weight is (3, 5), the model's (32, 32)",
    ):
        assert fault in str(caught.value)
    model = tiny_model(5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"extra\.weight"):
        load_weights(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_newer_format_is_refused_naming_both_versions(tmp_path: Path) -> None:
    path = save(tmp_path)
    edit_manifest(path, format_version=7)
    with pytest.raises(CheckpointError, match="format version 7; this code reads 1"):
        load_checkpoint(path)


@pytest.mark.parametrize("model", [None, {}, {"dim": 7}, [], {**tiny_model().config.to_dict(), "n_head": 3}])
def test_a_configuration_of_another_kind_is_refused(model: Any, tmp_path: Path) -> None:
    path = save(tmp_path)
    edit_config(path, model=model)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used"):
        load_checkpoint(path)


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.5, 3: 4.0, 4: 3.0, 5: 3.5}
    paths = {step: save(tmp_path, step=step, loss=loss) for step, loss in losses.items()}
    prune_checkpoints(tmp_path, 2)
    assert checkpoints(tmp_path) == [paths[2], paths[4], paths[5]]
    assert {path.name for path in tmp_path.iterdir()} == {paths[step].name for step in (2, 4, 5)}
    assert find_checkpoint(tmp_path, "best") == paths[2]
    assert find_checkpoint(tmp_path, "latest") == paths[5]


@pytest.mark.parametrize("step", [11, 31])
@pytest.mark.parametrize("jump", [0.0, 1e6])
def test_the_latest_is_what_was_saved_last(step: int, jump: float, tmp_path: Path) -> None:
    # though the run has gone back to step 10, and the clock by eleven days
    for earlier in (10, 20, 30):
        edit_manifest(save(tmp_path, step=earlier, loss=earlier / 10), saved_at=time.time() + jump)
    last = save(tmp_path, step=step, loss=5.0)
    assert find_checkpoint(tmp_path, "latest") == last
    prune_checkpoints(tmp_path, 2)
    assert [path.name[:11] for path in checkpoints(tmp_path)] == ["step=000010", "step=000030", last.name[:11]]


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    paths = [save(tmp_path, step=step, loss=loss) for step, loss in enumerate([float("nan"), 3.0, 2.0, float("nan")])]
    assert find_checkpoint(tmp_path, "best") == paths[2]
    prune_checkpoints(tmp_path, 1)
    assert checkpoints(tmp_path) == paths[2:]


def test_of_equal_losses_the_first_is_the_best_and_is_kept(tmp_path: Path) -> None:
    # a checkpoint between two validations carries the loss of the first: it is the first that was measured
    first, *_ = [save(tmp_path, step=step, loss=2.0) for step in (1, 2, 3)]
    assert find_checkpoint(tmp_path, "best") == first
    prune_checkpoints(tmp_path, 1)
    assert find_checkpoint(tmp_path, "best") == first


def test_best_falls_back_to_the_next_best(tmp_path: Path) -> None:
    paths = [save(tmp_path, step=step, loss=loss) for step, loss in enumerate([2.0, 1.0, 3.0])]
    (paths[1] / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="passed over"):
        assert find_checkpoint(tmp_path, "best") == paths[0]


def test_a_folder_of_runs_means_the_run_that_saved_last(tmp_path: Path) -> None:
    paths = [save(tmp_path / run, step=step) for run, step in (("b", 900), ("c", 5), ("a", 10))]
    for age, path in enumerate(reversed(paths)):
        edit_manifest(path, saved_at=1000.0 - age)
    assert find_checkpoint(tmp_path) == paths[2]
    (tmp_path / "more").mkdir()
    for run in ("a", "b"):
        (tmp_path / run).rename(tmp_path / "more" / run)
    assert find_checkpoint(tmp_path) == tmp_path / "more" / "a" / paths[2].name  # two levels below
    shutil.rmtree(tmp_path / "more" / "a")
    assert find_checkpoint(tmp_path) == paths[1]


def test_checkpoint_dir_may_name_another_folder(tmp_path: Path) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other", step=2)
    assert find_checkpoint(tmp_path / "one", str(other)) == other
    assert find_checkpoint(tmp_path / "one", str(tmp_path / "other")) == other
    assert find_checkpoint(one, "best") == one


@pytest.mark.parametrize("name", ["", "missing", "step=000001_loss=1.000"])
def test_nothing_there_says_where_it_looked(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path / name)):
        load_checkpoint(tmp_path / name)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, tiny_model(1))
    path = save(tmp_path, tiny_model(2))
    assert checkpoints(tmp_path) == [path] and len(list(tmp_path.iterdir())) == 1
    assert torch.equal(load_checkpoint(path).model.norm.weight, tiny_model(2).norm.weight)


@pytest.mark.parametrize("limit", [0, 100, 30_000])
def test_a_full_disk_loses_nothing(limit: int, tmp_path: Path) -> None:
    """The system itself refuses to write files beyond a size: a fault as a full disk gives it."""
    save(tmp_path, tiny_model(1))
    before, model = contents(tmp_path), tiny_model(2)
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, allowed[1]))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(CheckpointError, match=r"step=000002.*File too large.*It needs 0\.1 MB"):
            save(tmp_path, model, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 1


def test_save_fsyncs_files_then_renames_then_fsyncs_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str | int] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        log.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        log.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    path = save(tmp_path)
    before, after = log[: log.index("rename")], log[log.index("rename") :]
    files = {name: (path / name).stat().st_ino for name in (*FILES, "manifest.json")}
    assert set(files.values()) | {path.stat().st_ino} <= set(before)
    assert all(before.index(files[name]) < before.index(files["manifest.json"]) for name in FILES)
    assert tmp_path.stat().st_ino in after


def test_an_error_while_saving_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, tiny_model(1))
    before = contents(tmp_path)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "write_atomic", "save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(llmcore.checkpoint, name, full)
            with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device"):
                save(tmp_path, tiny_model(2), step=2)
    assert contents(tmp_path) == before
    assert find_checkpoint(tmp_path) == path


KILLED_WHILE_SAVING = """
import os, shutil, sys, warnings
from pathlib import Path
import torch
from llmcore.checkpoint import checkpoints, find_checkpoint, load_weights, prune_checkpoints, verify_checkpoint
from tests.kill import kill_at, survives
from tests.test_checkpoint import save, tiny_model

run = Path(sys.argv[1])
models = {step: tiny_model(step) for step in (1, 2, 3)}
save(run, models[1], step=1), save(run, models[2], step=2)
warnings.simplefilter("error")  # nothing half-done is even met
at, finished = 0, False

def save_and_prune():
    kill_at(at)
    save(run, models[3], step=3)
    prune_checkpoints(run, 1)

while not finished:
    at += 1
    finished = survives(save_and_prune)
    path = find_checkpoint(run)
    step = int(path.name[5:11])
    load_weights(tiny_model(9), path)
    assert step >= 2, path
    assert [verify_checkpoint(one)["step"] for one in checkpoints(run)][0] == 1  # the best, with its state or without
    print(at, step, flush=True)
    if step == 3 and not finished:
        shutil.rmtree(path), shutil.rmtree(find_checkpoint(run, "best"))
        save(run, models[1], step=1), save(run, models[2], step=2)
assert sorted(p.name[:11] for p in run.iterdir()) == ["step=000001", "step=000003"], os.listdir(run)
"""


@pytest.mark.slow
def test_a_save_killed_anywhere_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    kills = [line.split() for line in printed_by(KILLED_WHILE_SAVING, tmp_path).splitlines()]
    assert len(kills) > 20 and kills[0][1] == "2" and kills[-1][1] == "3"
