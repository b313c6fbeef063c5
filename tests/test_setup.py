"""What is installed, and how: the lock files, the make targets in folders with odd names, the package on its own."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from papermill import inspect_notebook

from llmcore.config import PRESETS

from .tools import lock

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = """#!/bin/sh
printf '%s|%s' "$PWD" "$JUPYTER_CONFIG_PATH" >> "$CALLS"
for argument; do printf '|%s' "$argument" >> "$CALLS"; done
echo >> "$CALLS"
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""
TARGETS = ["demo", "test", "test-fast", "test-oldest", "test-browser", "lint", "lab", "notebooks", "bench", "lock"]

Call = tuple[str, str, list[str]]  # working folder, JUPYTER_CONFIG_PATH, arguments


def pins(path: Path) -> dict[str, str]:
    """Package to version of one lock file; each is pinned exactly and once."""
    found: dict[str, str] = {}
    for pin in lock.read_lock(path):
        [specifier] = pin.specifier
        assert specifier.operator == "==", pin
        assert found.setdefault(canonicalize_name(pin.name), specifier.version) is specifier.version, f"{pin} twice"
    return found


@pytest.mark.parametrize("extra", ["lab", "test"])
def test_locks_pin_all_that_pyproject_asks_for(extra: str) -> None:
    pinned = pins(lock.SMALL) | (pins(lock.FULL) if extra == "test" else {})
    for requirement in lock.extra(extra):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is in no lock: make lock"
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}: make lock"


def test_no_package_is_in_both_locks_and_torch_is_first() -> None:
    small, more = pins(lock.SMALL), pins(lock.FULL)
    assert not small.keys() & more.keys()
    assert next(iter(small)) == "torch"
    assert "-r requirements.lock" in lock.FULL.read_text(encoding="utf-8").splitlines()  # the larger holds the smaller
    tests_only = {"pytest", "hypothesis", "playwright", "mypy", "ruff", "wandb", "tensorboard", "dask", "xllamacpp"}
    assert tests_only <= more.keys()


def test_a_lock_keeps_the_markers_of_pyproject() -> None:
    [pinned] = [pin for pin in lock.read_lock(lock.FULL) if pin.name == "xllamacpp"]
    [wanted] = [requirement for requirement in lock.extra("test") if requirement.name == "xllamacpp"]
    assert str(pinned.marker) == str(wanted.marker)


def test_what_demo_lab_and_bench_import_is_in_the_small_lock() -> None:
    files = [
        ROOT / "tests" / "tools" / "demo.py",
        ROOT / "tests" / "tools" / "render.py",
        *ROOT.glob("tests/benchmarks/*.py"),
    ]
    files += [*ROOT.glob("notebooks/*.py"), *ROOT.glob("llmcore/**/*.py")]
    imported = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module.split(".")[0])
    imported -= sys.stdlib_module_names | {"llmcore", "tests", "wandb"}  # wandb: only where a tracker is asked for
    packages = importlib.metadata.packages_distributions()
    found = {module: {canonicalize_name(name) for name in packages.get(module, ["none"])} for module in imported}
    assert {"torch", "transformers", "papermill", "ipywidgets"} <= found.keys()
    assert not {module: names for module, names in found.items() if not names & pins(lock.SMALL).keys()}


@pytest.mark.slow
def test_the_core_needs_nothing_of_the_notebooks_packages() -> None:
    own = {canonicalize_name(requirement.name) for requirement in lock.extra("lab")}
    own -= {canonicalize_name(requirement.name) for requirement in lock.dependencies()}
    distributions = importlib.metadata.packages_distributions().items()
    modules = [module for module, names in distributions if {canonicalize_name(name) for name in names} & own]
    assert {"matplotlib", "ipywidgets", "jupyterlab"} <= set(modules)
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "llmcore").glob("**/*.py")]
    names = sorted(".".join(path.parts) for path in paths if "notebook" not in path.parts and path.name != "__init__")
    assert {"llmcore.train", "llmcore.corpus.prepare", "llmcore.formats.hub", "llmcore.measure.planner"} <= set(names)
    blocked = dict.fromkeys([*modules, "IPython", "nbclient", "nbformat"])
    code = f"import importlib, sys\nsys.modules.update({blocked})\n"
    code += f"for name in {names}:\n    importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_an_installed_package_writes_into_the_working_folder(tmp_path: Path) -> None:
    package, work = tmp_path / "site-packages" / "llmcore", tmp_path / "work"
    shutil.copytree(ROOT / "llmcore", package, ignore=shutil.ignore_patterns("__pycache__"))
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    environment.pop("LLM_WORKBOOK_ROOT", None)
    command = [sys.executable, "-c", "from llmcore.files import resolve; print(resolve('runs'))"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == work.resolve() / "runs"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile and the files that it reads, in a folder whose name a shell would take apart."""
    folder = tmp_path / "my models 中文 $HOME 'x' (1) & co"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-test.lock"):
        shutil.copy(ROOT / name, folder)
    for python in (folder / "python", tmp_path / "a python"):
        python.write_text(STAND_IN)
        python.chmod(0o755)
    return folder


def make(folder: Path, *arguments: str, active: bool = False) -> list[Call]:
    """Run targets with a stand-in for Python; the calls that it got. With or without an active environment."""
    calls = folder.parent / "calls"
    calls.unlink(missing_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name not in ("CONDA_PREFIX", "VIRTUAL_ENV")}
    environment = {**inherited, "CALLS": str(calls)}
    if active:
        environment |= {"VIRTUAL_ENV": str(folder), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = ["make", f"PYTHON={folder.parent / 'a python'}", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
    return [(place, config, words) for place, config, *words in (line.split("|") for line in lines)]


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize("active", [False, True])
def test_every_make_target_runs_in_a_folder_of_any_name(checkout: Path, active: bool) -> None:
    calls = make(checkout, *TARGETS, active=active)
    assert {place for place, _, _ in calls} == {str(checkout)}
    modules = [words[words.index("-m") + 1] for _, _, words in calls]
    assert {"pip", "tests.tools.demo", "pytest", "mypy", "jupyterlab", "tests.tools.render", "tests.benchmarks"} < set(
        modules
    )
    made = [words[-1] for _, _, words in calls if "venv" in words]
    assert made == (["build/oldest"] if active else [".venv", "build/oldest"])  # the oldest versions stand apart always
    [(_, config, words)] = [call for call in calls if "jupyterlab" in call[2]]
    assert config == str(checkout / ".jupyter")
    assert ("--allow-root" in words) is (os.geteuid() == 0) and "--ip=localhost" in words
    pieces = set(checkout.name.split())  # no argument is a part of the name that lost the rest
    assert not [words for _, _, words in calls if pieces & set(words)]


@needs_make
@pytest.mark.parametrize("active", [False, True])
def test_one_environment_grows_from_the_small_lock(checkout: Path, active: bool) -> None:
    def installed(*targets: str) -> list[str]:
        """What pip was asked for, call by call."""
        calls = [words for _, _, words in make(checkout, *targets, active=active)]
        return [words[-1] for words in calls if words[:3] == ["-m", "pip", "install"]]

    torch = f"torch=={pins(lock.SMALL)['torch']}"
    assert installed("demo", "lab") == [torch, "requirements.lock", "."]
    assert installed("lint", "test-fast") == ["requirements-test.lock"]
    assert installed("demo", "lab", "test") == []


def hosted_lines() -> list[str]:
    """The lines that the notebooks' README gives to users of a hosted notebook."""
    page = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    section = page[page.index("## On a hosted machine") :]
    return section.split("```")[1].strip().splitlines()


def test_the_lines_for_a_hosted_notebook_name_what_there_is() -> None:
    """Six lines, Python or shell; each parameter is one of its notebook, each preset one of ours."""
    lines = hosted_lines()
    assert len(lines) == 6
    runs = 0
    for line in lines:
        if not line.startswith("!"):
            ast.parse(line)
            continue
        subprocess.run(["bash", "-n", "-c", line[1:]], check=True)
        words = shlex.split(line[1:])
        if "papermill" not in words:
            continue
        runs += 1
        [name] = [Path(word).name for word in words if "/notebooks/" in word]
        known = inspect_notebook(str(ROOT / "notebooks" / name))
        given = {words[place + 1]: words[place + 2] for place, word in enumerate(words) if word == "-p"}
        assert given and given.keys() <= known.keys()
        assert given.get("preset", "scifi-mini") in PRESETS
    assert runs == 2


@pytest.mark.slow
@pytest.mark.parametrize("program", ["test_cuda float32_is", "test_cuda greedy", "benchmarks.gpu toy"])
def test_what_runs_on_a_borrowed_gpu_needs_few_packages(program: str) -> None:
    """torch, numpy, sentencepiece, safetensors, transformers, psutil and tqdm, and what these need."""
    allowed, todo = set(), ["torch", "numpy", "sentencepiece", "safetensors", "transformers", "psutil", "tqdm"]
    while todo:
        name = canonicalize_name(todo.pop())
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            needed = [] if name in allowed else map(Requirement, importlib.metadata.requires(name) or [])
            allowed.add(name)
            todo += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    distributions = importlib.metadata.packages_distributions().items()
    blocked = [module for module, names in distributions if not {canonicalize_name(name) for name in names} & allowed]
    assert {"jsonschema", "pytest", "matplotlib", "charset_normalizer"} <= set(blocked)
    # setuptools brings packages of its own, which are seen here if it was imported before
    in_setuptools = {path.stem for path in Path(setuptools.__file__).with_name("_vendor").iterdir()}
    module, *words = program.split()
    code = f"""
import runpy, sys
from importlib.machinery import PathFinder

blocked = {sorted({*blocked} - {"llmcore", "tests", "_distutils_hack", "setuptools", *in_setuptools})}
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name.split(".")[0] in blocked else find(name, *where)
sys.argv[1:] = {words}
runpy.run_module("tests.{module}", run_name="__main__")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TEST_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "jsonschema is not installed" in done.stdout


def test_the_lowest_versions_are_those_that_pyproject_names() -> None:
    lowest = dict(pin.split("==") for pin in lock.lowest())
    assert lowest["torch"] == "2.11" and lowest["sentencepiece"] == "0.2.1" and "dask[distributed]" in lowest
    for requirement in (*lock.extra("lab"), *lock.extra("test")):
        assert requirement.name not in lowest or requirement.specifier.contains(lowest[requirement.name])
