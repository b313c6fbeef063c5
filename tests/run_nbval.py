"""nbval over the five notebooks at their default size, in order, in a project root of their own under build/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from llmcore.corpus import fetch
from llmcore.files import PROJECT_ROOT

ROOT = PROJECT_ROOT / "build" / "nbval"


def main() -> int:
    """Compare every checked cell with its stored output; returns pytest's exit status."""
    shutil.rmtree(ROOT, ignore_errors=True)
    (ROOT / "data").mkdir(parents=True)
    (ROOT / "data" / "sanguo").symlink_to(fetch("sanguo", PROJECT_ROOT / "data"))
    notebooks = sorted(str(path) for path in (PROJECT_ROOT / "notebooks").glob("*.ipynb"))
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=1800", "-p", "no:cacheprovider"]
    environment = {**os.environ, "LLM_WORKBOOK_ROOT": str(ROOT), "LLM_WORKBOOK_WATCHED": "0"}
    return subprocess.run([sys.executable, "-m", "pytest", *options, *notebooks], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
