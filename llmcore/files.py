"""Files: where the project is, which texts a folder holds, and writing without half-written results."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

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

# What texts in Chinese, and in most others, are full of; to tell encodings apart
FREQUENT = "，。的一是不了人我在有他这這为為们們来來个個说說国國道上大中到就那你要出也得里裡后後会會 \n"
FREQUENT += "abcdefghijklmnopqrstuvwxyz"

# Characters that act instead of showing: an escape (1B) could recolour or clear a terminal, others turn the direction
# of writing around, end a line, or are half a surrogate, which ends a program that prints it.
_ACTING = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_SIGNS = {code: f"⟨{code:02X}⟩" for code in [*_ACTING, *range(0xD800, 0xE000)] if chr(code) not in "\t\n"}

READ_BYTES = 1 << 16  # at a time, of a text; the C library keeps larger pieces of memory for itself


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


def shown(path: str | os.PathLike[str]) -> str:
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
            raise ValueError(f"{shown(file)} is not JSON: {pointer_hint(file) or error}") from None
        check_json(content, schema or {}, shown(file))
        return content
    except RecursionError:  # also what a message about such content would raise
        raise ValueError(f"{shown(file)} cannot be used: it is nested too deeply") from None


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


def find_texts(folder: Path) -> list[Path]:
    """All `.txt` files below a folder, recursively, in sorted order; each folder is entered once.

    Raises:
        FileNotFoundError: if the folder is missing or holds no text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir={str(folder)!r} is not a folder; give one that holds .txt files")
    found, seen = [], set()
    for parent, names, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent)
        if here in seen:  # a symbolic link back up: do not walk in circles
            names.clear()
            continue
        seen.add(here)
        found += [Path(parent, name) for name in files if name.lower().endswith(".txt")]
    if not found:
        raise FileNotFoundError(f"no file matches *.txt in data_dir={str(folder)!r} or its folders")
    return sorted(found)


@dataclass(frozen=True)
class TextFile:
    """What is known of a text file after reading it once.

    Attributes:
        path: where it is.
        name: its `text_name`.
        sha256: of its raw bytes, in hexadecimal.
        bytes: raw size.
        characters, text_bytes: of its text as `read_text` gives it, the latter in UTF-8.
    """

    path: Path
    name: str
    sha256: str
    bytes: int
    characters: int
    text_bytes: int


def survey_texts(folder: Path, errors: str = "strict", progress: bool = False) -> tuple[list[TextFile], dict[str, str]]:
    """The texts of a folder that can be read, and why others cannot. Every file is read once, in constant memory.

    Args:
        folder: searched as by `find_texts`.
        errors: "strict" to refuse them all for one that cannot be read, "skip" to leave such files out.
        progress: show a bar.

    Returns:
        The readable files, and the reason for each other one, by its `text_name`.

    Raises:
        FileNotFoundError: if the folder is missing or holds no text.
        ValueError: for a file that cannot be read and errors="strict", or if no file can be read.
    """
    if errors not in ("strict", "skip"):
        raise ValueError(f"errors={errors!r} must be strict or skip")
    files = find_texts(folder)
    size = sum(file.stat().st_size for file in files if file.is_file())

    def survey(file: Path) -> TextFile | str:
        try:
            if not file.is_file():  # a pipe would wait for ever
                raise ValueError("it is no regular file")
            digest, characters, text_bytes = hashlib.sha256(), 0, 0
            for block in text_blocks(file, digest):
                characters += len(block)
                text_bytes += len(block.encode())
            return TextFile(
                file, text_name(file, folder), digest.hexdigest(), file.stat().st_size, characters, text_bytes
            )
        except (OSError, ValueError) as error:
            return getattr(error, "strerror", None) or str(error)

    readable, refused = [], {}
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="check", disable=not progress, leave=False)
    with bar, ThreadPoolExecutor() as pool:
        for file, found in zip(files, pool.map(survey, files), strict=True):
            if isinstance(found, str):
                refused[text_name(file, folder)] = found
            else:
                readable.append(found)
                bar.update(found.bytes)
    if refused and (errors == "strict" or not readable):
        some = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        raise ValueError(
            f"{len(refused)} of {len(refused) + len(readable)} files in data_dir={str(folder)!r} cannot be read: {some}"
            f"{'; …' if len(refused) > 5 else ''}. Mend them"
            f"{' or leave them out with errors=skip' if readable else ''}"
        )
    return readable, refused


def readable_texts(folder: Path, errors: str = "strict") -> tuple[list[Path], dict[str, str]]:
    """The paths of the texts that can be read, and why others cannot: see `survey_texts`."""
    texts, refused = survey_texts(folder, errors)
    return [text.path for text in texts], refused


def text_name(file: Path, folder: Path) -> str:
    """A file's path inside its folder; bytes that are no UTF-8 show as escapes."""
    return os.fsencode(file.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


def text_blocks(path: Path, digest: Any = None) -> Iterator[str]:
    """A text file's content, 64 KiB at a time: UTF-8, a byte order mark dropped, CRLF and CR turned into newlines.

    Args:
        path: the file.
        digest: of hashlib; takes in the raw bytes on the way.

    Raises:
        ValueError: if the file is not UTF-8, naming it and the first bad byte.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    place = 0
    with open(path, "rb") as file:
        while True:
            raw = file.read(READ_BYTES)
            if digest is not None:
                digest.update(raw)
            start, place = place, place + len(raw)
            try:
                text = decoder.decode(raw if start else raw.removeprefix(codecs.BOM_UTF8), final=not raw)
            except UnicodeDecodeError as error:  # its object may begin with what the block before has left over
                bad = place - len(error.object) + error.start
                name = os.fsencode(path).decode("utf-8", "backslashreplace")
                raise ValueError(
                    f"{name} is not UTF-8: byte {bad} is 0x{error.object[error.start]:02x}. {_looks_like(path, bad)}"
                ) from None
            if text:
                yield text
            if not raw:
                return


def _looks_like(path: Path, bad: int) -> str:
    """A sentence on the encoding that a file may be in, which at byte `bad` is not UTF-8, and on what to do."""
    place = bad - bad % READ_BYTES
    with open(path, "rb") as file:
        mark = file.read(4)
        file.seek(place)
        sample, rest = file.read(READ_BYTES), file.read(1)
    if place and 0 not in sample:  # not from the middle of a character
        sample = sample.partition(b"\n")[2] or sample

    def text_in(encoding: str) -> str:
        """The sample's text; nothing if more than 1% of it is wrong."""
        text = codecs.getincrementaldecoder(encoding)("replace").decode(sample, final=not rest)
        return text if 100 * text.count("\ufffd") <= len(text) else ""

    def score(text: str) -> float:
        return sum(map(text.count, FREQUENT)) / len(text)

    # by its first bytes, or since most of it is good UTF-8
    if mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return _convert("UTF-32")
    if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return _convert("UTF-16")
    if any(character > "\x7f" for character in text_in("utf-8").replace("\ufffd", "")):
        return "The text around it is UTF-8, so some bytes are damaged: iconv -c -f UTF-8 -t UTF-8 drops them"

    # much of what is Big5 could be GB18030, and the other way round: the right one has more of the frequent characters
    found = {name: text for name in ("GB18030", "Big5", "UTF-16LE", "UTF-16BE") if (text := text_in(name))}
    found = {name: text for name, text in found.items() if name[:3] != "UTF" or score(text) > 0.05}
    if 0 in sample:
        found = {name: text for name, text in found.items() if name[:3] == "UTF"}
    if found:
        return _convert(max(found, key=lambda name: score(found[name])))
    return (
        f"{'It looks like no text' if 0 in sample else 'Its encoding is not known'}: convert it to UTF-8, or remove it"
    )


def _convert(encoding: str) -> str:
    return f"It looks like {encoding}: convert it with iconv -f {encoding} -t UTF-8"


def read_text(path: Path) -> str:
    """A text file's content as one string; see `text_blocks`."""
    return "".join(text_blocks(Path(path)))


def sample_texts(files: Sequence[Path], max_bytes: int = 10_000_000) -> list[str]:
    """Texts to look at: all, or of a larger corpus the beginnings of evenly chosen files, of about so many bytes."""
    size = sum(file.stat().st_size for file in files)
    chosen = files[:: max(1, -(-size // max_bytes))]
    blocks = 1 + max_bytes // len(chosen) // READ_BYTES if size > max_bytes else None
    return ["".join(itertools.islice(text_blocks(file), blocks)) for file in chosen]


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
        raise IsADirectoryError(f"{shown(path)} is a folder; give the name of a file")
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
        raise FileExistsError(f"{shown(folder)} is a file; choose another name for the folder")
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.exists() else []
    if strangers:
        raise FileExistsError(f"{shown(folder)} holds {strangers[0]!r}, which is not of this export; choose another")


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


def split_long(line: str, max_bytes: int) -> Iterator[str]:
    """Cut a line into pieces of at most `max_bytes` UTF-8 bytes (4 or more) that add up to the line.

    Cuts fall after sentence ends (. ? ! 。 ？ ！) where there is one, else between two characters. A piece depends on
    no more of the line than the first `max_bytes` that are left, so a line may also come in parts.
    """
    start = 0
    while (len(line) - start) * 4 > max_bytes:
        # no character is longer than four bytes, none shorter than one
        rest = line[start : start + max_bytes + 1].encode()
        if len(rest) <= max_bytes:
            break
        piece = rest[:max_bytes].decode(errors="ignore")  # without half a character at its end
        cut = max(map(piece.rfind, ".?!。？！")) + 1 or len(piece)
        yield piece[:cut]
        start += cut
    yield line[start:]


def cut_text(blocks: Iterable[str], inner_pairs: set[str], size: int) -> Iterator[str]:
    """The same text in pieces of `size` to 2 * `size` characters (the last may be shorter).

    Each ends at the first place where the two characters around are no inner pair, or after `size` if there is none.
    """
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > 2 * size:
            places = range(start + size, start + 2 * size)
            cut = next((place for place in places if rest[place - 1 : place + 1] not in inner_pairs), places[0])
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest
