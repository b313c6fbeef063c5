"""Notebook parameters: one table of names, kinds and ranges, checked in the cell after they are set.

papermill passes `3e-4` from a YAML file as a string, `-p flag true` as the word, `-p project 2024` as a number, and
only warns of a name that the notebook does not know. Here what is clearly meant is taken, and wrong values and unknown
names end the run in its first seconds.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore.config import PRESETS, nearest
from llmcore.corpus.sources import CORPORA
from llmcore.files import resolve
from llmcore.notebook.trackers import TRACKERS

LONGEST_NAME = 200  # bytes of a folder's name; 255 is the most, and endings are added
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}


class ParameterError(ValueError):
    """Notebook parameters that cannot work; the message names each one."""


@dataclass(frozen=True)
class Kind:
    """What a parameter may be: a number in a range, a text, one of some choices, a folder's name, or a path.

    Many numbers are a list, or words in one text, as a command line has them. A path may have to exist, or may not be
    a file because it is a folder, made where it is missing. A name is one part of a path, on any system.
    """

    type: type
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    optional: bool = False
    must_exist: bool = False
    folder: bool = False
    many: bool = False
    is_name: bool = False

    def read(self, name: str, value: Any) -> Any:
        """The value in its right type. Raises ValueError with a sentence about it."""
        if value is None or (isinstance(value, str) and value.strip().lower() == "none" and self.optional):
            if self.optional:
                return None
            raise ValueError(f"{name} must be set" + (" (papermill's -r takes the word None as text)" * self.is_text))
        if self.is_text and (isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 1000)):
            value = str(value)  # papermill's -p makes numbers of such words
        if self.type is Path:
            return self._read_path(name, value)
        if self.type is str:
            return self._read_text(name, value)
        if self.many:
            several = value.split() if isinstance(value, str) else value
            if not isinstance(several, list | tuple) or not several:
                raise ValueError(f"{name}={_said(value)} must be numbers with spaces between them")
            return [self._read_number(name, each) for each in several]
        return self._read_number(name, value)

    @property
    def is_text(self) -> bool:
        """Whether a number can only be meant as the word that it was."""
        return self.type in (str, Path)

    def _read_text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{name}={_said(value)} must be text")
        if self.choices and value not in self.choices:
            raise ValueError(f"{name}={_said(value)}: {nearest(value[:100], self.choices)}")
        if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{name}={_said(value)} holds half a surrogate, which is no character; leave it out")
        if self.is_name and (reason := _no_name(value)):
            raise ValueError(f"{name}={_said(value)} must be the name of a folder, without a path: {reason}")
        return value

    def _read_path(self, name: str, value: Any) -> Path | str:
        if not isinstance(value, str | os.PathLike) or not os.fspath(value).strip() or "\0" in os.fspath(value):
            raise ValueError(f"{name}={_said(value)} must be a path")
        if value in self.choices:
            return value
        said = _said(os.fspath(value))
        try:
            os.fsencode(path := resolve(value))
            there, last = path.exists(), next(folder for folder in (path, *path.parents) if folder.exists())
        except (OSError, RuntimeError, ValueError) as error:  # too long, forbidden, ~nobody, no text of this system
            raise ValueError(f"{name}={said} cannot be used: {getattr(error, 'strerror', None) or error}") from None
        if self.must_exist and not there and path.name not in CORPORA:
            start = "" if Path(value).is_absolute() else " (relative paths start at the project's folder)"
            raise ValueError(f"{name}={said} does not exist: looked for {_said(str(path))}{start}")
        if self.folder and there and not path.is_dir():
            raise ValueError(f"{name}={said} is a file; it must be a folder")
        if self.folder and not last.is_dir():
            raise ValueError(f"{name}={said} cannot be made: {_said(str(last))} is a file")
        return path

    def _read_number(self, name: str, value: Any) -> int | float | bool:
        if self.type is bool:
            words = {"true": True, "false": False}
            value = words.get(value.lower(), value) if isinstance(value, str) else value
            if not isinstance(value, bool):
                raise ValueError(f"{name}={_said(value)} must be True or False")
            return value
        kind = "a whole number" if self.type is int else "a number"
        try:
            number = float(value)
            wrong = isinstance(value, bool) or not math.isfinite(number) or (self.type is int and number % 1 != 0)
        except (TypeError, ValueError, OverflowError):
            wrong = True
        if wrong:
            raise ValueError(f"{name}={_said(value)} must be {kind}")
        if not self.low <= number <= self.high:
            raise ValueError(f"{name}={_said(value)} must be between {self.low:g} and {self.high:g}")
        return int(number) if self.type is int else number


def _said(value: object) -> str:
    """A value as an error shows it: no character of it acts, and not all of a long one."""
    try:
        words = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "(a very long number)"
    return words if len(words) <= 200 else f"{words[:100]}…{words[-60:]}"


def _no_name(value: str) -> str | None:
    """Why a text cannot name a folder here or on another system; None if it can."""
    if not value.strip() or value in (".", ".."):
        return "it is none"
    if odd := sorted({character for character in value if character in '/\\<>:"|?*' or not character.isprintable()}):
        return f"it holds {', '.join(map(repr, odd[:5]))}"
    if len(value.encode()) > LONGEST_NAME:
        return f"it has {len(value.encode())} bytes, and {LONGEST_NAME} are the most"
    if value != value.strip() or value.endswith("."):
        return "it begins or ends with a space, or ends with a dot"
    if value.split(".")[0].strip().upper() in RESERVED:
        return "Windows keeps it for a device"
    return None


PARAMETERS: dict[str, Kind] = {
    "activation_checkpointing": Kind(str, choices=("none", "selective", "full"), optional=True),
    "batch_size": Kind(int, 1, 1_000_000, optional=True),
    "budgets": Kind(float, 1e6, 1e30, many=True),
    "character_coverage": Kind(float, 0.98, 1.0),
    "checkpoint_dir": Kind(Path, choices=("latest", "best"), optional=True, must_exist=True),
    "context_size": Kind(int, 1, 1_048_576, optional=True),
    "data_dir": Kind(Path, must_exist=True),
    "dataset_dir": Kind(Path, folder=True),
    "device": Kind(str, choices=("auto", "cpu", "cuda", "mps")),
    "dim": Kind(int, 2, 65_536, optional=True),
    "dims": Kind(int, 2, 65_536, many=True),
    "errors": Kind(str, choices=("strict", "skip"), optional=True),
    "grad_accum_steps": Kind(int, 1, 100_000, optional=True),
    "held_back_dim": Kind(int, 2, 65_536),
    "held_back_epochs": Kind(float, 1e-6, 1000),
    "init_step": Kind(int, 0, 1e9, optional=True),
    "learning_rate": Kind(float, 1e-8, 10, optional=True),
    "max_new_tokens": Kind(int, 0, 1_000_000),
    "max_steps": Kind(int, 1, 1e9, optional=True),
    "min_steps": Kind(int, 1, 1e9),
    "min_p": Kind(float, 0, 1, optional=True),
    "model_prefix": Kind(Path),
    "n_heads": Kind(int, 1, 1024, optional=True),
    "n_layers": Kind(int, 1, 1024, optional=True),
    "output_dir": Kind(Path, folder=True),
    "precision": Kind(str, choices=("auto", "bf16", "fp16", "fp32")),
    "preset": Kind(str, choices=tuple(PRESETS)),
    "project": Kind(str, is_name=True),
    "prompt": Kind(str),
    "repetition_penalty": Kind(float, 0.01, 100),
    "seed": Kind(int, 0, 2**31 - 1),
    "temperature": Kind(float, 0, 100),
    "test_strings": Kind(int, 1, 1_000_000),
    "thorough": Kind(bool),
    "tokenizer_model_file": Kind(Path, must_exist=True),
    "top_k": Kind(int, 1, 1_000_000, optional=True),
    "top_p": Kind(float, 1e-9, 1, optional=True),
    "tracker": Kind(str, choices=TRACKERS, optional=True),
    "val_fraction": Kind(float, 1e-6, 0.999999, optional=True),
    "vocab_size": Kind(int, 262, 1_000_000),
    "weight_decay": Kind(float, 0, 10, optional=True),
    "workers": Kind(int, 1, 1024),
}


def check_parameters(namespace: MutableMapping[str, Any], names: str) -> None:
    """Check a notebook's parameters and put the values, in their right types, back into its namespace.

    Paths become absolute, from the project's root. Parameters that papermill injected must be among the names.

    Args:
        namespace: the notebook's `globals()`.
        names: its parameters, separated by spaces.

    Raises:
        ParameterError: listing every parameter that is wrong or unknown.
    """
    wrong = []
    known = names.split()
    for name in known:
        try:
            namespace[name] = PARAMETERS[name].read(name, namespace[name])
        except ValueError as error:
            wrong.append(str(error))
    wrong += [f"unknown parameter {name}: {nearest(name, known)}" for name in _injected(namespace) if name not in known]
    if wrong:
        raise ParameterError("; ".join(wrong))


def _injected(namespace: MutableMapping[str, Any]) -> list[str]:
    """Names set in the cell that papermill injects, which begins with `# Parameters`."""
    cells = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
    assigned = (node for cell in cells for node in ast.parse(cell).body if isinstance(node, ast.Assign))
    return [target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)]
