"""Tests of llmcore and of the notebooks, and the scripts behind `make demo` and `make notebooks`."""

import os
from pathlib import Path

LEAN = Path(__file__).parent / "lean"  # without what only costs time, for the processes that tests start


def first_on_path(folder: Path) -> str:
    """PYTHONPATH with a folder before all that it has."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
