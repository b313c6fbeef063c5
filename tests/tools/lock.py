"""`make lock`: the exact versions of pyproject.toml's extras, as pip resolves them, in two files.

With the word `lowest`, it prints the lowest version that pyproject.toml allows of each package: for `make test-oldest`.

requirements.lock has what the notebooks need (the extra `lab`), requirements-test.lock what the tests add. What the
files pin already stays as it is: remove a line, or both files, to take the newest version.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SMALL, FULL = ROOT / "requirements.lock", ROOT / "requirements-test.lock"
SMALL_HEAD = "# Made by `make lock`: what the notebooks need, in the versions that the tests ran with, torch first.\n"
FULL_HEAD = "# Made by `make lock`: what the tests add.\n-r requirements.lock\n"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def dependencies() -> list[Requirement]:
    """What pyproject.toml's package needs by itself."""
    return [Requirement(line) for line in PROJECT["dependencies"]]


def extra(name: str) -> list[Requirement]:
    """What the package needs with one of its extras; an extra may name others."""
    found = dependencies()
    for requirement in map(Requirement, PROJECT["optional-dependencies"][name]):
        inner = [r for of in sorted(requirement.extras) for r in extra(of)] if requirement.name == "llmcore" else []
        found += inner or [requirement]
    return found


def lowest() -> list[str]:
    """A pin a line: of all that the notebooks and the tests need, the lowest version that pyproject.toml allows."""

    def with_extras(requirement: Requirement) -> str:
        return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""

    bounds = {
        requirement.name: f"{requirement.name}{with_extras(requirement)}=={specifier.version}"
        for requirement in (*extra("lab"), *extra("test"))
        for specifier in requirement.specifier
        if specifier.operator == ">=" and (requirement.marker is None or requirement.marker.evaluate())
    }
    return list(bounds.values())


def read_lock(path: Path) -> list[Requirement]:
    """The pins of one lock file, in its order."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]


def resolve(extras: str, constraints: Path) -> dict[str, str]:
    """Package to version, as pip would install llmcore with these extras into an empty environment."""
    report = constraints.with_suffix(".json")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    subprocess.run([*command, "--report", report, "--constraint", constraints, f"{ROOT}[{extras}]"], check=True)
    found = {entry["metadata"]["name"]: entry["metadata"] for entry in json.loads(report.read_text())["install"]}
    # setuptools belongs to the environment, the libraries of CUDA to the build of torch
    left_out = ("llmcore", "setuptools", "triton", "nvidia-", "cuda-")
    return {
        name: item["version"].split("+")[0]
        for name, item in found.items()
        if not canonicalize_name(name).startswith(left_out)
    }


def main() -> None:
    """Resolve both sets, the larger one with the pins of the smaller one, and write the two files."""
    markers = {canonicalize_name(r.name): f" ; {r.marker}" for r in extra("test") if r.marker}
    kept = [f"{pin.name}{pin.specifier}" for pin in (*read_lock(SMALL), *read_lock(FULL))]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
        small = resolve("lab", constraints)
        constraints.write_text("\n".join([*kept, *(f"{n}=={v}" for n, v in small.items())]) + "\n", encoding="utf-8")
        both = resolve("lab,test", constraints)

    def lines(versions: dict[str, str]) -> str:
        """One pin a line, in the order of the alphabet, but torch first."""
        names = sorted(versions, key=lambda name: (name != "torch", canonicalize_name(name)))
        return "".join(f"{name}=={versions[name]}{markers.get(canonicalize_name(name), '')}\n" for name in names)

    SMALL.write_text(SMALL_HEAD + lines(small), encoding="utf-8")
    FULL.write_text(FULL_HEAD + lines({n: v for n, v in both.items() if n not in small}), encoding="utf-8")
    print(f"{SMALL.name}: {len(small)} packages; {FULL.name}: {len(both) - len(small)} more")


if __name__ == "__main__":
    print("\n".join(lowest())) if sys.argv[1:] == ["lowest"] else main()
