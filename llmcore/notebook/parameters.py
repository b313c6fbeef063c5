"""Notebook parameters: one table of names, kinds and ranges, checked in the cell after the parameters cell.

papermill passes `3e-4` from a YAML file as a string, `-p flag true` as the word "true" and `-p project 2024` as a
number. It only warns of a name that the notebook does not know. Here such values get the type that is meant. Wrong
values and unknown names end the run in its first seconds.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmcore import config
from llmcore.corpus.sources import CORPORA
from llmcore.corpus.texts import CHOICES
from llmcore.files import resolve
from llmcore.notebook.trackers import TRACKERS

LONGEST_NAME = 200  # bytes of a folder's name; file systems allow 255, and endings such as ".ipynb" are added
WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}


class ParameterError(ValueError):
    """Notebook parameters that cannot work. The message names each of them."""


@dataclass(frozen=True)
class Kind:
    """What a parameter may be: a number in a range, a text, one of some choices, a folder's name, or a path.

    Attributes:
        type: int, float, bool, str or Path.
        low, high: the range of a number, both ends included.
        choices: the texts that are allowed; for a path, words that are allowed besides.
        optional: None is allowed.
        must_exist: the path must exist.
        folder: the path must be a folder, or not exist yet.
        many: several numbers, as a list or as one text with spaces, as on a command line.
        is_name: the text must be able to name a folder on any system.
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
        """The value in its right type.

        Raises:
            ValueError: with a sentence that names the parameter and its value.
        """
        if value is None or (isinstance(value, str) and value.strip().lower() == "none" and self.optional):
            if self.optional:
                return None
            hint = " (papermill's -r takes the word None as text)" if self.is_text else ""
            raise ValueError(f"{name} must be set{hint}")
        # papermill's -p turns "2024" into a number; Python does not write one of thousands of digits
        if self.is_text and (isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 1000)):
            value = str(value)

        if self.type is Path:
            return self._read_path(name, value)
        if self.type is str:
            return self._read_text(name, value)
        if self.many:
            numbers = value.split() if isinstance(value, str) else value
            if not isinstance(numbers, list | tuple) or not numbers:
                raise ValueError(f"{name}={_quoted(value)} must be numbers with spaces between them")
            return [self._read_number(name, number) for number in numbers]
        return self._read_number(name, value)

    @property
    def is_text(self) -> bool:
        """Whether the parameter is a text or a path, so that a number given for it is meant as text."""
        return self.type in (str, Path)

    def _read_text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{name}={_quoted(value)} must be text")
        if self.choices and value not in self.choices:
            raise ValueError(f"{name}={_quoted(value)}: {config.nearest(value[:100], self.choices)}")
        if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{name}={_quoted(value)} holds half of a surrogate pair, not a character; remove it")
        if self.is_name and (reason := _why_not_a_name(value)):
            raise ValueError(f"{name}={_quoted(value)} must be the name of a folder, without a path: {reason}")
        return value

    def _read_path(self, name: str, value: Any) -> Path | str:
        if not isinstance(value, str | os.PathLike) or not os.fspath(value).strip() or "\0" in os.fspath(value):
            raise ValueError(f"{name}={_quoted(value)} must be a path")
        if value in self.choices:
            return value
        given = f"{name}={_quoted(os.fspath(value))}"

        try:
            path = resolve(value)
            os.fsencode(path)
            exists = path.exists()
            nearest_folder = next(folder for folder in (path, *path.parents) if folder.exists())
        except (OSError, RuntimeError, ValueError) as error:  # too long, forbidden, ~nobody, not encodable here
            raise ValueError(f"{given} cannot be used: {getattr(error, 'strerror', None) or error}") from None

        if self.must_exist and not exists and path.name not in CORPORA:
            start = "" if Path(value).is_absolute() else " (relative paths start at the project's folder)"
            raise ValueError(f"{given} does not exist: looked for {_quoted(str(path))}{start}")
        if self.folder and exists and not path.is_dir():
            raise ValueError(f"{given} is a file; it must be a folder")
        if self.folder and not nearest_folder.is_dir():
            raise ValueError(f"{given} cannot be made: {_quoted(str(nearest_folder))} is a file")
        return path

    def _read_number(self, name: str, value: Any) -> int | float | bool:
        if self.type is bool:
            if isinstance(value, str):
                value = {"true": True, "false": False}.get(value.lower(), value)
            if not isinstance(value, bool):
                raise ValueError(f"{name}={_quoted(value)} must be True or False")
            return value

        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or (self.type is int and number % 1 != 0):
            kind = "a whole number" if self.type is int else "a number"
            raise ValueError(f"{name}={_quoted(value)} must be {kind}")
        if not self.low <= number <= self.high:
            raise ValueError(f"{name}={_quoted(value)} must be between {self.low:g} and {self.high:g}")
        return int(number) if self.type is int else number


def _quoted(value: object) -> str:
    """A value as an error message shows it: control characters escaped, and the middle of a long value left out."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python writes
        return "(a very long number)"
    return text if len(text) <= 200 else f"{text[:100]}…{text[-60:]}"


def _why_not_a_name(value: str) -> str | None:
    """Why a text cannot name a folder on this or another system; None if it can."""
    if not value.strip() or value in (".", ".."):
        return "it is empty or means a folder that exists"
    forbidden = sorted({character for character in value if character in '/\\<>:"|?*' or not character.isprintable()})
    if forbidden:
        return f"it holds {', '.join(map(repr, forbidden[:5]))}"
    if len(value.encode()) > LONGEST_NAME:
        return f"it has {len(value.encode())} bytes; at most {LONGEST_NAME} are allowed"
    if value != value.strip() or value.endswith("."):
        return "it begins or ends with a space, or ends with a dot"
    if value.split(".")[0].strip().upper() in WINDOWS_DEVICES:
        return "Windows reserves it for a device"
    return None


PARAMETERS: dict[str, Kind] = {
    "activation_checkpointing": Kind(str, choices=config.CHOICES["activation_checkpointing"], optional=True),
    "backup_dir": Kind(Path, optional=True, must_exist=True, folder=True),
    "batch_size": Kind(int, 1, 1_000_000, optional=True),
    "budgets": Kind(float, 1e6, 1e30, many=True),
    "character_coverage": Kind(float, 0.98, 1.0),
    "checkpoint_dir": Kind(Path, choices=("latest", "best", "auto"), optional=True, must_exist=True),
    "checkpoint_interval": Kind(int, 0, 1e9, optional=True),
    "checkpoint_minutes": Kind(float, 0, 1e6, optional=True),
    "clean": Kind(bool, optional=True),
    "compile": Kind(str, choices=config.CHOICES["compile"]),
    "context_size": Kind(int, 1, 1_048_576, optional=True),
    "data_dir": Kind(Path, must_exist=True),
    "dataset_dir": Kind(Path, choices=("auto",), folder=True),
    "device": Kind(str, choices=("auto", "cpu", "cuda", "mps")),
    "dim": Kind(int, 2, 65_536, optional=True),
    "dims": Kind(int, 2, 65_536, many=True),
    "duplicates": Kind(str, choices=CHOICES["duplicates"], optional=True),
    "encoding": Kind(str, optional=True),
    "epochs": Kind(float, 1e-6, 1000, optional=True),
    "errors": Kind(str, choices=CHOICES["errors"], optional=True),
    "grad_accum_steps": Kind(int, 1, 100_000, optional=True),
    "held_back_dim": Kind(int, 2, 65_536),
    "held_back_epochs": Kind(float, 1e-6, 1000),
    "held_back_runs": Kind(int, 1, 100),
    "init_from": Kind(str, optional=True),
    "init_step": Kind(int, 0, 1e9, optional=True),
    "learning_rate": Kind(float, 1e-8, 10, optional=True),
    "llama2c_run": Kind(Path, optional=True, must_exist=True),
    "max_new_tokens": Kind(int, 0, 1_000_000),
    "max_steps": Kind(int, 1, 1e9, optional=True),
    "min_steps": Kind(int, 1, 1e9),
    "min_p": Kind(float, 0, 1, optional=True),
    "model_prefix": Kind(Path),
    "muon_learning_rate": Kind(float, 1e-8, 10, optional=True),
    "n_heads": Kind(int, 1, 1024, optional=True),
    "n_layers": Kind(int, 1, 1024, optional=True),
    "optimizer": Kind(str, choices=config.CHOICES["optimizer"], optional=True),
    "output_dir": Kind(Path, folder=True),
    "precision": Kind(str, choices=config.CHOICES["precision"]),
    "preset": Kind(str, choices=tuple(config.PRESETS)),
    "project": Kind(str, is_name=True),
    "prompt": Kind(str),
    "repetition_penalty": Kind(float, 0.01, 100),
    "replay_dir": Kind(Path, optional=True, must_exist=True),
    "replay_fraction": Kind(float, 0, 0.95, optional=True),
    "schedule": Kind(str, choices=config.CHOICES["schedule"], optional=True),
    "seed": Kind(int, 0, 2**31 - 1),
    "temperature": Kind(float, 0, 100),
    "test_strings": Kind(int, 1, 1_000_000),
    "thorough": Kind(bool),
    "tokenizer_model_file": Kind(Path, must_exist=True),
    "tokens_per_step": Kind(int, 1, 1e9, optional=True),
    "top_k": Kind(int, 1, 1_000_000, optional=True),
    "top_p": Kind(float, 1e-9, 1, optional=True),
    "tracker": Kind(str, choices=TRACKERS, optional=True),
    "val_fraction": Kind(float, 1e-6, 0.999999, optional=True),
    "vocab_size": Kind(int, 262, 1_000_000),
    "weight_decay": Kind(float, 0, 10, optional=True),
    "workers": Kind(int, 1, 1024),
}
# of these not all can be set: one of them follows from the others
TOO_MANY = [("max_steps", "epochs"), ("tokens_per_step", "batch_size", "grad_accum_steps")]

# given by the model that a run starts from; "auto" starts such a run if there is none to go on with
FROM_MODEL = ("checkpoint_dir", "dim", "n_layers", "n_heads")


def check_parameters(namespace: MutableMapping[str, Any]) -> None:
    """Check a notebook's parameters and put the values, in their right types, back into its namespace.

    Paths become absolute, from the project's root. The names are those that the parameters cell assigns. papermill may
    inject values for these and no others.

    Args:
        namespace: the notebook's `globals()`. IPython keeps the source of all cells that were run in its `In`.

    Raises:
        ParameterError: listing every parameter that is wrong or unknown.
    """
    known, injected = _parameter_names(namespace)
    starts_from_model = str(namespace.get("init_from") or "none").strip().lower() != "none"
    wrong = []
    for name in known:
        if name in PARAMETERS:  # a reader may add parameters of their own
            kind = PARAMETERS[name]
            if name == "tokenizer_model_file" and starts_from_model:  # which brings its own
                kind = replace(kind, must_exist=False)
            try:
                namespace[name] = kind.read(name, namespace[name])
            except ValueError as error:
                wrong.append(str(error))
    wrong += [f"unknown parameter {name}: {config.nearest(name, known)}" for name in injected if name not in known]
    for names in TOO_MANY:
        if set(names) <= set(known) and all(namespace[name] is not None for name in names):
            given = ", ".join(f"{name}={_quoted(namespace[name])}" for name in names)
            wrong.append(f"{given}: one follows from the other{'s' * (len(names) > 2)}; leave one out")
    if starts_from_model:
        set_too = [
            f"{name}={_quoted(namespace[name])}" for name in FROM_MODEL if namespace.get(name) not in (None, "auto")
        ]
        wrong += [f"{each} cannot be set with init_from, which starts a new run from a whole model" for each in set_too]
    if namespace.get("replay_fraction") and not namespace.get("replay_dir"):
        wrong.append("replay_fraction needs replay_dir, a folder of texts as the model knows them")
    if wrong:
        raise ParameterError("; ".join(wrong))


def _parameter_names(namespace: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The names that the parameters cell assigns, and those that papermill's cell assigns after it.

    The parameters cell consists of annotated assignments, `name: type = value`. papermill's cell begins with
    `# Parameters`. In JupyterLab cells are run again and again: the latest run of each counts.

    Raises:
        ParameterError: if the parameters cell was not run.
    """
    injected: list[str] = []
    for cell in reversed(namespace.get("In", [])):
        try:
            body = ast.parse(cell).body
        except SyntaxError:
            continue
        if cell.startswith("# Parameters\n") and not injected:
            targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
            injected = [target.id for target in targets if isinstance(target, ast.Name)]
        elif body and all(isinstance(node, ast.AnnAssign) for node in body):
            targets = [node.target for node in body if isinstance(node, ast.AnnAssign)]
            return [target.id for target in targets if isinstance(target, ast.Name)], injected
    if annotated := [*namespace.get("__annotations__", {})]:  # nbval runs cells without keeping their source
        return annotated, injected
    raise ParameterError("run the cell with the parameters first")
