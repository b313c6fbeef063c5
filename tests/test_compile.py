"""Compiling that fails: no compiler, a broken one, a cache folder of no use, a path with spaces."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from llmcore.checkpoint import find_checkpoint
from llmcore.measure.planner import measure_speed
from llmcore.runs import TrainingError
from llmcore.train import Trainer

from .helpers import ROOT, Batches, assert_same_tensors, numbers, quick, state, tiny_config, tiny_model

LONG = {"max_steps": 10**7, "schedule": "wsd"}  # worth compiling


def fails(*_: Any) -> Any:
    raise OSError("the disk\nis full")


def as_it_is(graph: Any, _: Any) -> Any:
    return graph.forward


class OutOfReach(Batches):
    """Ids that no vocabulary has, from the second batch on."""

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = super().batch(step, batch_size, seed)
        return x + 10**6 * (step > 0), y


COMPILERS: dict[str, Callable[..., Any]] = {  # that fail when asked for a compiled model, in its first call, or after
    "at once": fails,
    "forward": functools.partial(torch.compile, backend=fails),
    "backward": functools.partial(torch.compile, backend=aot_autograd(fw_compiler=as_it_is, bw_compiler=fails)),
}
WHEN = ["at once", *(pytest.param(when, marks=pytest.mark.slow) for when in ("forward", "backward"))]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


def stopped_at_three(run: Path, resume: str | None = None, **changes: Any) -> None:
    config = quick(**LONG, optimizer="muon", grad_accum_steps=2, **changes)
    one = Trainer(tiny_model(), Batches(), None, config, run, device="cpu", resume=resume)
    one.callbacks.append(lambda event: one.request_stop() if event["step"] % 3 == 0 else None)
    one.fit()


@pytest.mark.parametrize("when", WHEN)
def test_a_run_that_cannot_be_compiled_is_the_uncompiled_one(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", COMPILERS[when])
    for resume in (None, "latest"):
        with pytest.warns(UserWarning, match=r"uncompiled, which takes longer: .*the disk$"):
            stopped_at_three(tmp_path / "tried", resume, compile="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for resume in (None, "latest"):
            stopped_at_three(tmp_path / "plain", resume, compile="off")
    assert numbers(tmp_path / "tried") == numbers(tmp_path / "plain")
    assert len(numbers(tmp_path / "tried")) == 6
    assert_same_tensors(state(find_checkpoint(tmp_path / "tried")), state(find_checkpoint(tmp_path / "plain")))


@pytest.mark.parametrize("when", WHEN)
def test_compile_on_says_why_it_cannot_be(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", COMPILERS[when])
    with pytest.raises(TrainingError, match=r"compile='on', but .*the disk. Mend that, or set compile='auto' or 'off'"):
        stopped_at_three(tmp_path, compile="on")


@pytest.mark.parametrize("when", WHEN)
def test_a_speed_that_is_measured_does_without_a_compiler(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", COMPILERS[when])
    with pytest.warns(UserWarning, match="uncompiled"):
        assert measure_speed(tiny_config(), quick(**LONG, compile="auto"), Batches(), "cpu", steps=1)["start_seconds"]


def test_an_error_of_the_run_itself_is_not_laid_on_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    one = Trainer(tiny_model(), OutOfReach(), None, quick(**LONG, compile="auto"), tmp_path, device="cpu")
    with pytest.warns(UserWarning, match="uncompiled"), pytest.raises(IndexError, match="index out of range"):
        one.fit()
    assert find_checkpoint(tmp_path).name.startswith("step=000001")


RUN = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from tests.helpers import Batches, quick, tiny_model
from llmcore.train import Trainer

config = quick(compile=sys.argv[2], max_steps=10**7)
one = Trainer(tiny_model(n_layers=1), Batches(), None, config, Path(sys.argv[1]), device="cpu")
one.callbacks.append(lambda event: one.request_stop() if event["step"] == 2 else None)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    one.fit()
print(*(warning.message for warning in said if "compiled" in str(warning.message)), sep="\\n")
"""


def real_run(folder: Path, compile: str, **environment: str) -> str:
    """What a run of two steps in a fresh process warns of."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    cache["TORCHINDUCTOR_VEC_ISA_OK"] = "0"  # which vector instructions there are takes half a minute to find out
    done = subprocess.run(
        [sys.executable, "-c", RUN, folder / "run", compile],
        cwd=ROOT,
        env={**os.environ, **cache, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


OPTIMIZED = """
from tests.helpers import tiny_model, random_ids, quick
from llmcore.optim import build_optimizers

model = tiny_model()
model(random_ids(1, 8), random_ids(1, 8)).backward()
for optimizer in build_optimizers(model, quick(optimizer="muon")):
    optimizer.step()
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["named below a file", "name too long", "default is a file", "user without a name"])
def test_a_cache_folder_of_no_use_is_replaced_with_a_word(fault: str, tmp_path: Path) -> None:
    """Even without compiling, torch needs it for every optimizer."""
    (tmp_path / "torchinductor_someone").touch()
    environment = {"TMPDIR": str(tmp_path), "LOGNAME": "someone", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = OPTIMIZED
    if fault == "named below a file":
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "torchinductor_someone" / "cache")
    elif fault == "name too long":
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / ("x" * 300))
    elif fault == "user without a name":  # as in a container that runs under a number
        script = "import getpass, pwd\npwd.getpwuid = {}.__getitem__\n" + OPTIMIZED
        environment |= dict.fromkeys(("LOGNAME", "USER", "LNAME", "USERNAME"), "")
    here = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}  # torch has set it
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=here | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch's cache folder cannot be used") == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no compiler", "compiler fails", "linker fails", "cache has space"])
def test_real_compilers_and_caches_of_no_use_are_done_without(fault: str, tmp_path: Path) -> None:
    fake = tmp_path / "g++"
    complaint = "case \"$*\" in *-shared*) echo 'ld: cannot find it' >&2; exit 1;; esac"
    if fault == "compiler fails":
        complaint = "echo 'cc1plus: fatal error: no headers' >&2; exit 1"
    version = 'case "$*" in *--version*) ;; *) ' + complaint + ";; esac"
    fake.write_text(f'#!/bin/sh\n{version}\nexec {shutil.which("g++")} "$@"\n')
    fake.chmod(0o755)
    environment, reason = {
        "no compiler": ({"CXX": str(tmp_path / "none")}, "No working C\\+\\+ compiler found"),
        "compiler fails": ({"CXX": str(fake)}, "cc1plus: fatal error: no headers"),
        "linker fails": ({"CXX": str(fake)}, "ld: cannot find it"),
        "cache has space": ({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "a b")}, "fatal error: input file"),
    }[fault]
    environment["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"  # takes longer than the few kernels until the fault
    said = real_run(tmp_path, "auto", **environment)
    assert re.fullmatch(f"the model is trained uncompiled, which takes longer: [^\\n]*{reason}[^\\n]*", said), said


@pytest.mark.slow
def test_a_project_folder_with_spaces_and_chinese_compiles(tmp_path: Path) -> None:
    """torch's own folder lies there too, as in a virtual environment of the project."""
    packages = tmp_path / "my novels 小说" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "torch").symlink_to(Path(torch.__file__).parent)
    environment = {"PYTHONPATH": f"{packages}:{ROOT}", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    assert real_run(tmp_path / "my novels 小说", "on", **environment) == ""
