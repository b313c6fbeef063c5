"""llama2.c's own program, from a source package with a fixed hash, compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

# The C program as of July 2023, which knows no grouped queries (MIT licence)
PACKAGE = "llamac2py==0.1.4 --hash=sha256:87f55b96ba0a9d7430d84578d947bde4ae2c76a54528bee0dbad0dc7fc9aa2ae\n"


def run_c_program(folder: Path, *flags: str) -> Path:
    """Download and compile it into a folder.

    Args:
        folder: for the source and the program.
        flags: of the C compiler.

    Raises:
        OSError: without a compiler or a network, saying so.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler")
    (folder / "requirements.txt").write_text(PACKAGE)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:", "--require-hashes"]
    done = subprocess.run([*pip, "-d", folder, "-r", folder / "requirements.txt"], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"llama2.c's program cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extract("llamac2py-0.1.4/run.c", folder, filter="data")
    source, program = folder / "llamac2py-0.1.4" / "run.c", folder / "run"
    subprocess.run([compiler, *flags, "-o", program, source, "-lm"], check=True, capture_output=True)
    return program
