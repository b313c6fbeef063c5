"""nbval over the notebooks in order, in a project root of their own under build/.

All are run at their default size but the sixth, whose checked facts hold for a few tiny runs too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from papermill.iorw import load_notebook_node, write_ipynb
from papermill.parameterize import parameterize_notebook

from llmcore.corpus.sources import fetch
from llmcore.files import PROJECT_ROOT

ROOT = PROJECT_ROOT / "build" / "nbval"
FEW = {"dims": "8 12 16 24", "budgets": "5e9 1.2e10", "held_back_dim": 32, "held_back_epochs": 0.1, "context_size": 32}
FEW |= {"min_steps": 80}


def main() -> int:
    """Compare every checked cell with its stored output; returns pytest's exit status."""
    shutil.rmtree(ROOT, ignore_errors=True)
    (ROOT / "data").mkdir(parents=True)
    (ROOT / "data" / "sanguo").symlink_to(fetch("sanguo", PROJECT_ROOT / "data"))
    *notebooks, scaling = sorted(str(path) for path in (PROJECT_ROOT / "notebooks").glob("*.ipynb"))
    smaller = ROOT / "06_scaling.ipynb"
    write_ipynb(parameterize_notebook(load_notebook_node(scaling), FEW), str(smaller))
    notebooks.append(str(smaller))
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=1800", "-p", "no:cacheprovider"]
    environment = {**os.environ, "LLM_WORKBOOK_ROOT": str(ROOT), "LLM_WORKBOOK_WATCHED": "0"}
    return subprocess.run([sys.executable, "-m", "pytest", *options, *notebooks], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
