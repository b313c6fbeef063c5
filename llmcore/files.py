"""Files: where the project is, which texts a folder holds, and writing without half-written results."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Relative paths start here; tests and parallel runs set the variable to keep their files apart.
PROJECT_ROOT = Path(os.environ.get("LLM_WORKBOOK_ROOT") or Path(__file__).parent.parent).resolve()

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
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{shown(file)} cannot be used: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{shown(file)} is not JSON: {error}") from None
    check_json(content, schema or {}, shown(file))
    return content


def check_json(content: Any, schema: Mapping[str, Any], source: str) -> None:
    """Compare JSON values with a JSON Schema (draft 4).

    Raises:
        ValueError: naming the source and the first field that is not as it must be.
    """
    from jsonschema import Draft4Validator  # here, because it takes longer to import than most runs need it

    error = next(
        iter(sorted(Draft4Validator(schema).iter_errors(content), key=lambda error: list(map(str, error.path)))), None
    )
    if error is not None:
        field = ".".join(map(str, error.absolute_path))
        message = error.message if len(error.message) < 200 else f"{error.message[:200]}…"
        raise ValueError(f"{source} cannot be used: {f'{field}: ' if field else ''}{message}")


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
            f"{'; …' if len(refused) > 5 else ''}. Convert them (for example: iconv -f GB18030 -t UTF-8)"
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
                raise ValueError(f"{name} is not UTF-8: byte {bad} is 0x{error.object[error.start]:02x}") from None
            if text:
                yield text
            if not raw:
                return


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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to. On success it is flushed to disk and takes the path's place, else it goes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: to a temporary sibling, flushed to disk, then renamed over the old one."""
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing_folder(folder: Path, known: Container[str]) -> Iterator[Path]:
    """A temporary folder to fill. On success it is flushed to disk and takes the folder's place, else it goes.

    Args:
        folder: need not exist, nor its parents.
        known: names of files that an earlier export may have left there; they go.

    Raises:
        FileExistsError: before anything is written, if the folder holds other files: they would be lost.
    """
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.exists() else []
    if strangers:
        raise FileExistsError(f"{shown(folder)} holds {strangers[0]!r}, which is not of this export; choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            fsync(path)
        if folder.exists():
            os.rename(folder, doomed)
        os.rename(temporary, folder)
        fsync(folder.parent)
        shutil.rmtree(doomed, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
