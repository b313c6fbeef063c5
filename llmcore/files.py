"""Files: where the project is, text that is safe to print, JSON that is checked, and writing whole or not at all."""

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
import sys
import tempfile
import warnings
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

# Relative paths start here; tests and parallel runs set the variable to keep their files apart. Where the package was
# installed without the project (`pip install .`), they start in the working folder, not among the installed packages.
_CHECKOUT = Path(__file__).parent.parent
PROJECT_ROOT = Path(
    os.environ.get("LLM_WORKBOOK_ROOT") or (_CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else Path.cwd())
).resolve()


def resolve(path: str | os.PathLike[str]) -> Path:
    """A path as an absolute one: a relative path starts at the project's root, whatever the working folder.

    JupyterLab and nbval run a notebook in its own folder, papermill in the caller's: this makes them agree.
    """
    path = Path(path).expanduser()
    return path if path.is_absolute() else PROJECT_ROOT / path


# Characters that act instead of showing: an escape (1B) could recolour or clear a terminal, others turn the direction
# of writing around, end a line, or are half a surrogate, which ends a program that prints it.
_ACTING = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_SIGNS = {code: f"⟨{code:02X}⟩" for code in [*_ACTING, *range(0xD800, 0xE000)]}
_SIGNS_IN_LINES = {code: sign for code, sign in _SIGNS.items() if chr(code) not in "\t\n"}


def visible(text: str) -> str:
    """Text in which characters that act show as numbers instead, as ⟨1B⟩; newlines and tabs stay."""
    return text.translate(_SIGNS_IN_LINES)


def one_line(text: object) -> str:
    """A name as one line of visible text: a file's name may hold newlines and bytes that are no characters."""
    return str(text).translate(_SIGNS)


def display_path(path: str | os.PathLike[str]) -> str:
    """A path as a notebook should print it: relative to the project where it lies inside, on one line, visible."""
    path = Path(path)
    return one_line(path.relative_to(PROJECT_ROOT) if path.is_relative_to(PROJECT_ROOT) else path)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pointer_hint(file: Path) -> str:
    """What to do about a file of which only Git LFS's pointer is there; "" for any other file."""
    with open(file, "rb") as opened:
        is_pointer = opened.read(40).startswith(b"version https://git-lfs.github.com/spec/")
    return "it is only a Git LFS pointer to the real file; fetch that with: git lfs pull" if is_pointer else ""


def is_disk_full(error: OSError) -> bool:
    """Whether an operation failed for want of room, of the disk or of what a user may fill of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


# JSON


def read_json(file: Path, schema: Mapping[str, Any] | None = None) -> Any:
    """The content of a JSON file, checked before it is used.

    Args:
        file: UTF-8.
        schema: what the content must look like, see `check_json`. None: any JSON.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the file, and the field that is not as it must be.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{display_path(file)} cannot be used: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{display_path(file)} is not JSON: {pointer_hint(file) or error}") from None
    check_json(content, schema or {}, display_path(file))
    return content


def check_json(content: Any, schema: Mapping[str, Any], source: str) -> None:
    """Compare JSON values with a JSON Schema (draft 4, where 1.0 is not an integer).

    Python's JSON may hold NaN and Infinity, and a schema takes both for a "number" within any range. So two types are
    added: "finite number", and "number or Infinity", which excludes NaN and -Infinity.

    Raises:
        ValueError: naming the source and the first field that is not as it must be.
    """
    try:
        errors = sorted(_validator()(schema).iter_errors(content), key=lambda error: list(map(str, error.path)))
    except RecursionError:  # what can be parsed may still be too deep for a message about it
        raise ValueError(f"{source} cannot be used: it is nested too deeply") from None
    if errors:
        field = ".".join(map(str, errors[0].absolute_path))
        message = errors[0].message if len(errors[0].message) < 200 else f"{errors[0].message[:200]}…"
        raise ValueError(f"{source} cannot be used: {f'{field}: ' if field else ''}{message}")


@functools.cache
def _validator() -> Any:
    """jsonschema's validator with two more types of numbers."""
    # Jupyter brings a grammar of web addresses, which jsonschema would compile for a second at its import
    grammar = "rfc3987_syntax"
    hidden = sys.modules.setdefault(grammar, None) is None  # type: ignore[arg-type]
    try:
        from jsonschema import Draft4Validator, validators  # here, because most runs do without
    finally:
        if hidden:
            del sys.modules[grammar]

    def finite(checker: Any, value: Any) -> bool:
        return checker.is_type(value, "number") and (isinstance(value, int) or math.isfinite(value))

    kinds = {"finite number": finite, "number or Infinity": lambda checker, x: finite(checker, x) or x == math.inf}
    return validators.extend(Draft4Validator, type_checker=Draft4Validator.TYPE_CHECKER.redefine_many(kinds))


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON text with its letters as they are, or with escapes where UTF-8 cannot hold them (half a surrogate, say).

    A value of a type that JSON does not have becomes its text.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False, default=str)
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return json.dumps(content, indent=indent, default=str)


# Locks, and files written whole or not at all

# how a mounted drive or a network disk refuses an operation that it does not have
_REFUSED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOLCK)
_warned: set[str] = set()


def warn_once(kind: str, message: str) -> None:
    """Warn, unless this process has warned of the same kind of thing before."""
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(message, stacklevel=3)


def lock(file: IO[Any] | int, wait: bool) -> bool:
    """Lock an open file or folder until it is closed, or the process ends.

    Returns:
        False where there are no locks: on Windows, and on a drive that refuses them, which a warning says once.

    Raises:
        BlockingIOError: if another process holds the lock, and `wait` is false.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        reason = f"a folder in use cannot be locked on this drive ({error.strerror})"
        warn_once("flock", f"{reason}: take care that only one run at a time works in it")
        return False
    return True


def lock_folder(folder: Path, wait: bool) -> int | None:
    """An open descriptor of a folder that is locked for this process; None if it cannot be locked. See `lock`."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if lock(descriptor, wait):
            return descriptor
    os.close(descriptor)
    return None


def fsync(path: Path) -> None:
    """Make sure that a file or folder has reached the disk. A drive that refuses that is a warning, once."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        reason = f"{display_path(path)}: its drive does not say when a file has reached it ({error.strerror})"
        warn_once("fsync", f"{reason}: after a power cut, the newest files there may be damaged")
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new, empty folder that is deleted at the end. First, those that killed processes have left there are deleted.

    Each of these folders is locked while its process lives, so those of other living processes stay.
    """
    for leftover in Path(parent).glob(".llmcore-*.tmp"):
        if (descriptor := lock_folder(leftover, wait=False)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(descriptor)

    # another process may take the new folder for a leftover before it is locked
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".llmcore-", suffix=".tmp", dir=parent))
        descriptor = lock_folder(folder, wait=True)
        if folder.exists():
            break
        if descriptor is not None:
            os.close(descriptor)

    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to. On success it is flushed to disk and takes the path's place, else it is deleted.

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
    """Write a whole file or nothing, see `replacing`. Text is written as UTF-8."""
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing_folder(folder: Path, known: Container[str]) -> Iterator[Path]:
    """A temporary folder to fill. On success it is flushed to disk and takes the folder's place, else it is deleted.

    If several processes do this at once, each folder is written whole, and the last one stays.

    Args:
        folder: need not exist, nor its parents.
        known: names of files that an earlier export may have left there; they are replaced.

    Raises:
        FileExistsError: if the folder holds other files, which would be lost, or is a file. It is left as it was.
    """
    folder = Path(os.path.realpath(folder))  # where a link points to
    _check_replaceable(folder, known)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        yield new
        for path in (*new.rglob("*"), new):
            fsync(path)
        _check_replaceable(folder, known)  # other files may have come meanwhile
        _rename_over(new, folder)
        fsync(folder.parent)


def _check_replaceable(folder: Path, known: Container[str]) -> None:
    """Raise FileExistsError where a folder's replacement would lose something."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{display_path(folder)} is a file; choose another name for the folder")
    for name in sorted(path.name for path in folder.iterdir()):
        if name not in known:
            raise FileExistsError(f"{display_path(folder)} holds {name!r}, which is not of this export; choose another")


def _rename_over(new: Path, folder: Path) -> None:
    """Move a folder to the place of another, which is then beside it under the name `old`, `new`, or deleted.

    The two change places in one step where the system can do that, so that a kill at any moment leaves one of them.
    """
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
        set_aside = new.with_name("old")
        shutil.rmtree(set_aside, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another export has just done the same
            os.rename(folder, set_aside)


# The Hub's token, here because both `corpus` and `formats` talk to the Hub


def hub_token(token: str | None = None) -> str | None:
    """The token that a call to the Hub will send, without the white space around it; None if nothing is set up.

    Args:
        token: None: what `hf auth login` or HF_TOKEN has set up, which the Hub's library finds by itself.

    Raises:
        ValueError: for a token that no request can carry; the message does not show it.
    """
    import huggingface_hub  # here, because only what talks to the Hub needs it

    name = "the argument token" if token is not None else "the token of HF_TOKEN or `hf auth login`"
    try:
        secret = huggingface_hub.get_token() if token is None else token
        secret = secret.strip() if secret is not None else None
        odd = None
    except Exception as error:  # a file that is no text; bytes or a number as the argument
        odd = type(error).__name__
    if odd:  # only here: not even the context of our error shows the other, which holds the token
        raise ValueError(f"{name} cannot be read as text ({odd})")
    if secret is not None and not (isinstance(secret, str) and re.fullmatch(r"[A-Za-z0-9._~+/=-]+", secret)):
        raise ValueError(
            f"{name} is empty or holds a character that no token has (allowed are letters, digits and ._~+/=-); "
            "copy it again from huggingface.co/settings/tokens"
        )
    return secret


def hub_failure(error: Exception, secret: str | None) -> str:
    """What went wrong, in the library's words, without the token, which it may have put into them."""
    reason = f"{type(error).__name__}: {error}"
    return reason.replace(secret, "[token]") if secret else reason
