"""Files and folders are replaced whole or not at all: killed at any moment, or by many at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmcore.files import replacing, replacing_folder, write_atomic

from .helpers import ROOT

# Kills itself at every file operation of an export in turn; after each, what is there is whole, old or new.
KILLED = """
import os, sys
from pathlib import Path
from llmcore.files import replacing, replacing_folder
from tests.kill import kill_at, survives

place, kind = Path(sys.argv[1]), sys.argv[2]
target = place / "out"

def write(text):
    if kind == "file":
        with replacing(target) as new, open(new, "w") as file:
            file.write(text * 2)
    else:
        with replacing_folder(target, {"a", "b"}) as new:
            for name in "ab":
                (new / name).write_text(text)

def read():
    return target.read_text() if kind == "file" else "".join((target / name).read_text() for name in "ab")

write("0")
before, at, ended = "0", 0, False

def write_and_die():
    kill_at(at, {"shutil.rmtree", "tempfile.mkdtemp"})
    write(str(at % 10))

while not ended:
    at += 1
    ended = survives(write_and_die)
    found = read()
    assert found in (before * 2, str(at % 10) * 2), (at, found)
    before = found[0]
assert before == str(at % 10)
write("x")
assert os.listdir(place) == ["out"], os.listdir(place)
print(at)
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_at_any_file_operation_old_or_new_is_whole(kind: str, tmp_path: Path) -> None:
    done = run(KILLED, tmp_path, kind)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5


MANY = """
import sys
from pathlib import Path
from llmcore.files import replacing, replacing_folder

place, text = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    with replacing_folder(place / "folder", {"a", "b"}) as new:
        for name in "ab":
            (new / name).write_text(text)
    with replacing(place / "file") as new:
        new.write_text(text * 1000)
"""


def test_exports_at_once_all_succeed_and_one_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MANY, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    several = [subprocess.Popen([*command, text], **pipes) for text in "xyz"]  # type: ignore[call-overload]
    for one in several:
        assert one.stdout.readline() == "ready\n"
    for one in several:
        one.stdin.write("\n")
        one.stdin.flush()
    for one in several:
        assert one.wait(120) == 0, one.stderr.read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "folder" / "a").read_text() == (tmp_path / "folder" / "b").read_text()
    content = (tmp_path / "file").read_text()
    assert content == content[0] * 1000


def test_threads_of_one_process_write_one_file_whole(tmp_path: Path) -> None:
    failed = []

    def write(letter: str) -> None:
        try:
            for _ in range(40):
                write_atomic(tmp_path / "file", letter * 5000)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    content = (tmp_path / "file").read_text()
    assert content == content[0] * 5000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


DYING = """
import os, signal, sys
from pathlib import Path
from llmcore.files import replacing_folder

with replacing_folder(Path(sys.argv[1]) / "dead", ()) as new:
    (new / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_living_ones_temporary_stays_and_a_dead_ones_goes(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "slow", ()) as slow:
        (slow / "a").write_text("half")
        assert run(DYING, tmp_path).returncode == -9
        assert len(list(tmp_path.iterdir())) == 2
        write_atomic(tmp_path / "other", "done")
        assert len(list(tmp_path.iterdir())) == 2
        (slow / "b").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "slow"]


def test_leftovers_of_the_same_process_id_block_nothing(tmp_path: Path) -> None:
    for name in (f".out.{os.getpid()}.tmp", f".out.{os.getpid()}.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    with replacing_folder(tmp_path / "out", ()) as new:
        (new / "a").touch()
    assert (tmp_path / "out" / "a").exists()


@pytest.mark.parametrize("name", ["x" * 250, "名" * 80, "[a]*?", "with space"])
def test_any_name_can_be_written_and_replaced(name: str, tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_atomic(tmp_path / name, text)
        with replacing_folder(tmp_path / "folder" / name, {"a"}) as new:
            (new / "a").write_text(text)
    assert (tmp_path / name).read_text() == (tmp_path / "folder" / name / "a").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_comes_into_the_folder_meanwhile_is_not_lost(tmp_path: Path) -> None:
    said = pytest.raises(FileExistsError, match=r"holds 'novel\.txt', which is not of this export")
    with said, replacing_folder(tmp_path / "out", {"a"}) as new:
        (new / "a").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "novel.txt").write_text("mine")
    assert (tmp_path / "out" / "novel.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed_and_files_and_folders_not_mixed_up(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    for text in ("one", "two"):
        with replacing_folder(tmp_path / "link", {"a"}) as new:
            (new / "a").write_text(text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "out" / "a").read_text() == "two"
    (tmp_path / "file").touch()
    said = "file is a file; choose another name"
    with pytest.raises(FileExistsError, match=said), replacing_folder(tmp_path / "file", {"a"}):
        raise AssertionError("begun")
    said = "disk is a folder; give the name of a file"
    with pytest.raises(IsADirectoryError, match=said), replacing(tmp_path / "disk"):
        raise AssertionError("begun")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "file", "link"]


def test_new_files_and_folders_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.txt").touch()
    write_atomic(tmp_path / "file", "x")
    with replacing_folder(tmp_path / "folder", ()) as new:
        (new / "a").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain").stat().st_mode
