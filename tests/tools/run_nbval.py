"""nbval over the notebooks in order, in a project root of their own under build/.

Those that train are run with small parameters: their checked facts hold at any size.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from papermill.iorw import load_notebook_node, write_ipynb
from papermill.parameterize import parameterize_notebook

from llmcore.corpus.sources import fetch
from llmcore.files import PROJECT_ROOT
from tests import LEAN, first_on_path
from tests.tools.render import NOTEBOOKS

ROOT = PROJECT_ROOT / "build" / "nbval"
SMALL: dict[str, dict[str, Any]] = {
    "03_toyreverse": {"max_steps": 30, "test_strings": 200},
    "04_scifi_train": {"max_steps": 40, "thorough": False},  # notebook 5 opens this run
    "06_scaling": {
        "dims": "8 12 16 24",
        "budgets": "4e9 7e9 1.2e10",
        "held_back_dim": 32,
        "held_back_epochs": 0.1,
        "held_back_runs": 2,
        "context_size": 32,
        "min_steps": 80,
    },
}


def at_its_size(notebook: Path) -> Path:
    """A copy of the notebook with its small parameters, or the notebook itself if it has none."""
    if notebook.stem not in SMALL:
        return notebook
    copy = ROOT / notebook.name
    write_ipynb(parameterize_notebook(load_notebook_node(str(notebook)), SMALL[notebook.stem]), str(copy))
    return copy


def main() -> int:
    """Compare every checked cell with its stored output; returns pytest's exit status.

    Words on the command line are beginnings of notebooks' names, 01 02 say; without any, all are run.
    """
    shutil.rmtree(ROOT, ignore_errors=True)
    (ROOT / "data").mkdir(parents=True)
    (ROOT / "data" / "sanguo").symlink_to(fetch("sanguo", PROJECT_ROOT / "data"))
    notebooks = sorted(NOTEBOOKS.glob("*.ipynb"))
    wanted = [path for path in notebooks if path.stem.startswith(tuple(sys.argv[1:]))] or notebooks
    copies = [str(at_its_size(path)) for path in wanted]
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=1800", "-p", "no:cacheprovider"]
    # each process that notebook 6 starts, starts a second earlier
    environment = {**os.environ, "PYTHONPATH": first_on_path(LEAN)}
    environment |= {"LLM_WORKBOOK_ROOT": str(ROOT), "LLM_WORKBOOK_WATCHED": "0"}
    return subprocess.run([sys.executable, "-m", "pytest", *options, *copies], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
