"""Files: where the project is, which texts a folder holds, and writing without half-written results."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: what killed processes leave stays there
    fcntl = None  # type: ignore[assignment]

# Relative paths start here; tests and parallel runs set the variable to keep their files apart. Where the package was
# installed without the project (`pip install .`), they start in the working folder, not among the installed packages.
_beside = Path(__file__).parent.parent
PROJECT_ROOT = Path(
    os.environ.get("LLM_WORKBOOK_ROOT") or (_beside if (_beside / "pyproject.toml").is_file() else Path.cwd())
).resolve()

# Characters that act instead of showing: an escape (1B) could recolour or clear a terminal, others turn the direction
# of writing around, end a line, or are half a surrogate, which ends a program that prints it.
_ACTING = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_SIGNS = {code: f"⟨{code:02X}⟩" for code in [*_ACTING, *range(0xD800, 0xE000)] if chr(code) not in "\t\n"}


def resolve(path: str | os.PathLike[str]) -> Path:
    """A relative path is meant from the project's root, whatever the working folder.

    JupyterLab and nbval run a notebook in its own folder, papermill in the caller's: this makes them agree.
    """
    path = Path(path).expanduser()
    return path if path.is_absolute() else PROJECT_ROOT / path


def visible(text: str) -> str:
    """Text in which characters that act show as numbers instead, as ⟨1B⟩; newlines and tabs stay."""
    return text.translate(_SIGNS)


def one_line(text: object) -> str:
    """A name as one line of visible text: a file's name may hold newlines and bytes that are no characters."""
    return visible(str(text)).replace("\n", "⟨0A⟩").replace("\t", "⟨09⟩")


def display_path(path: str | os.PathLike[str]) -> str:
    """A path as a notebook should print it: relative to the project where it lies inside, on one line, visible."""
    path = Path(path)
    return one_line(path.relative_to(PROJECT_ROOT) if path.is_relative_to(PROJECT_ROOT) else path)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(file: Path, schema: Mapping[str, Any] | None = None) -> Any:
    """The content of a JSON file, checked before anybody uses it.

    Args:
        file: UTF-8.
        schema: what it must look like: a JSON Schema (draft 4, where 1.0 is no integer). None: any JSON.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the file, and the field that is not as it must be.
    """
    try:
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{display_path(file)} is not JSON: {pointer_hint(file) or error}") from None
        check_json(content, schema or {}, display_path(file))
        return content
    except RecursionError:  # also what a message about such content would raise
        raise ValueError(f"{display_path(file)} cannot be used: it is nested too deeply") from None


def pointer_hint(file: Path) -> str:
    """What to do about a file of which only Git LFS's pointer is there; "" for any other file."""
    with open(file, "rb") as opened:
        is_pointer = opened.read(40).startswith(b"version https://git-lfs.github.com/spec/")
    return "it is only a Git LFS pointer to the real file; fetch that with: git lfs pull" if is_pointer else ""


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON text with its letters as they are, and escapes instead where UTF-8 cannot hold it: half a surrogate, say.

    What JSON does not know becomes its text.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False, default=str)
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return json.dumps(content, indent=indent, default=str)


def check_json(content: Any, schema: Mapping[str, Any], source: str) -> None:
    """Compare JSON values with a JSON Schema (draft 4).

    Python's JSON may hold NaN and Infinity, and to a schema both are of type "number" within any range. Two types are
    added for that: "finite number", and "number or Infinity", which is not NaN nor -Infinity.

    Raises:
        ValueError: naming the source and the first field that is not as it must be.
    """
    errors = sorted(_validator()(schema).iter_errors(content), key=lambda error: list(map(str, error.path)))
    error = next(iter(errors), None)
    if error is not None:
        field = ".".join(map(str, error.absolute_path))
        message = error.message if len(error.message) < 200 else f"{error.message[:200]}…"
        raise ValueError(f"{source} cannot be used: {f'{field}: ' if field else ''}{message}")


@functools.cache
def _validator() -> Any:
    """jsonschema's validator with our two types of numbers."""
    from jsonschema import Draft4Validator, validators  # here, because it takes longer to import than most runs need it

    def finite(checker: Any, value: Any) -> bool:
        return checker.is_type(value, "number") and (isinstance(value, int) or math.isfinite(value))

    types = Draft4Validator.TYPE_CHECKER.redefine_many(
        {
            "finite number": finite,
            "number or Infinity": lambda checker, value: finite(checker, value) or value == math.inf,
        }
    )
    return validators.extend(Draft4Validator, type_checker=types)


def fsync(path: Path) -> None:
    """Make sure that a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path, wait: bool) -> int | None:
    """Lock a folder for this process. The system gives the lock back when the descriptor closes, or the process ends.

    Returns:
        The open descriptor; None where another process holds the lock, or nothing can be locked here.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return None
    try:
        if fcntl is None:
            raise OSError
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return descriptor
    except OSError:
        os.close(descriptor)
        return None


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new, empty folder that is gone at the end. What killed processes have left beside it goes first.

    Each of these folders is locked while its process lives, so those of others are left alone.
    """
    for leftover in Path(parent).glob(".llmcore-*.tmp"):
        lock = lock_folder(leftover, wait=False)
        if lock is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".llmcore-", suffix=".tmp", dir=parent))
        lock = lock_folder(folder, wait=True)
        if folder.exists():  # else another process took it for a leftover before it was locked
            break
        if lock is not None:
            os.close(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to. On success it is flushed to disk and takes the path's place, else it goes.

    Raises:
        IsADirectoryError: before anything is written, if the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{display_path(path)} is a folder; give the name of a file")
    with temporary_folder(path.parent) as folder:
        yield folder / "new"
        fsync(folder / "new")
        os.replace(folder / "new", path)
        fsync(path.parent)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: to a temporary one beside it, flushed to disk, then renamed over the old one."""
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing_folder(folder: Path, known: Container[str]) -> Iterator[Path]:
    """A temporary folder to fill. On success it is flushed to disk and takes the folder's place, else it goes.

    Of several at once, each is written whole; the last one stays.

    Args:
        folder: need not exist, nor its parents.
        known: names of files that an earlier export may have left there; they go.

    Raises:
        FileExistsError: before anything is written, if the folder holds other files: they would be lost.
    """
    folder = Path(os.path.realpath(folder))  # where a link points to
    _refuse_strangers(folder, known)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent) as place:
        new = place / "new"
        new.mkdir()
        yield new
        for path in (*new.rglob("*"), new):
            fsync(path)
        _refuse_strangers(folder, known)  # they may have come meanwhile
        _rename_over(new, folder)
        fsync(folder.parent)


def _refuse_strangers(folder: Path, known: Container[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{display_path(folder)} is a file; choose another name for the folder")
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.exists() else []
    if strangers:
        raise FileExistsError(
            f"{display_path(folder)} holds {strangers[0]!r}, which is not of this export; choose another"
        )


def _rename_over(new: Path, folder: Path) -> None:
    """Give a folder its place. What was there is beside `new` or in its place afterwards.

    The two change places at once where the system can do that; a process killed at any moment leaves one of them.
    """
    old = new.with_name("old")
    while True:
        try:
            os.rename(new, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        libc, names = ctypes.CDLL(None), (os.fsencode(new), os.fsencode(folder))
        if hasattr(libc, "renameat2") and libc.renameat2(-100, names[0], -100, names[1], 2) == 0:  # Linux
            return
        if hasattr(libc, "renamex_np") and libc.renamex_np(*names, 2) == 0:  # macOS
            return
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another export has just done the same
            os.rename(folder, old)


def hub_token(token: str | None = None) -> str | None:
    """The token that a call to the Hub will send, without the white space around it.

    Args:
        token: None: what `hf auth login` or HF_TOKEN has set up, which the Hub's library finds by itself.

    Returns:
        None if nothing is set up.

    Raises:
        ValueError: for a token that no request can carry; the message does not show it.
    """
    import huggingface_hub  # here, because only what talks to the Hub needs it

    whose = "the argument token" if token is not None else "the token of HF_TOKEN or `hf auth login`"
    try:
        secret = huggingface_hub.get_token() if token is None else token
        secret = secret.strip() if secret is not None else None
    except Exception as error:  # a file that is no text; bytes or a number as the argument
        raise ValueError(f"{whose} cannot be read as text ({type(error).__name__})") from None
    if secret is None:
        return None
    if not isinstance(secret, str) or not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", secret):
        raise ValueError(
            f"{whose} is empty or holds a character that no token has (allowed are letters, digits and ._~+/=-); "
            "copy it again from huggingface.co/settings/tokens"
        )
    return secret


def hub_failure(error: Exception, secret: str | None) -> str:
    """What went wrong, in the library's words, without the token, which it may have put into them."""
    reason = f"{type(error).__name__}: {error}"
    return reason.replace(secret, "[token]") if secret else reason
