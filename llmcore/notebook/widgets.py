"""The panels that a person can use, and the functions that show text and tables, in one place for the notebooks.

`dashboard.py` watches training, `explorers.py` looks at tokens, data and attention, `writing.py` is a desk for a story.
"""

import os
from collections.abc import Mapping, Sequence

from IPython.display import HTML

from llmcore.measure.compare_runs import summarize
from llmcore.notebook.dashboard import TrainingDashboard, is_watched
from llmcore.notebook.explorers import DataExplorer, ReversalExplorer, TokenExplorer
from llmcore.notebook.safe_html import ending, html_text, piece_text, table, visible
from llmcore.notebook.writing import WritingDesk

__all__ = [
    "DataExplorer",
    "ReversalExplorer",
    "TokenExplorer",
    "TrainingDashboard",
    "WritingDesk",
    "ending",
    "is_watched",
    "piece_text",
    "run_table",
    "tables",
    "visible",
]


def run_table(run_dirs: Sequence[str | os.PathLike[str]]) -> HTML:
    """A table of runs, one row a run: see `compare_runs.summarize`."""
    return HTML(table(summarize(run_dirs), "Runs, one a row"))


def tables(rows: Mapping[str, Sequence[Mapping[str, object]]]) -> HTML:
    """Tables below each other, by their captions. Of one without rows only the caption is shown."""
    return HTML(
        "".join(
            table(each, caption) if each else f"<p>{html_text(caption)}: none</p>" for caption, each in rows.items()
        )
    )
