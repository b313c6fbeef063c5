"""The panels that a person can use, and the functions that show text and tables, in one place for the notebooks.

`dashboard.py` watches training, `explorers.py` looks at tokens, data and attention, `writing.py` is a desk for a story.
"""

import os
from collections.abc import Mapping, Sequence

from IPython.display import HTML

from llmcore.dataset import TokenDataset
from llmcore.measure.compare_runs import summarize
from llmcore.measure.memorised import Run
from llmcore.notebook import recitation
from llmcore.notebook.dashboard import TrainingDashboard, is_watched
from llmcore.notebook.explorers import DataExplorer, ReversalExplorer, TokenExplorer
from llmcore.notebook.safe_html import ending, html_text, piece_text, table, visible
from llmcore.notebook.writing import WritingDesk
from llmcore.tokenizer import Tokenizer

__all__ = [
    "DataExplorer",
    "ReversalExplorer",
    "TokenExplorer",
    "TrainingDashboard",
    "WritingDesk",
    "ending",
    "is_watched",
    "piece_text",
    "recited_pages",
    "run_table",
    "tables",
    "visible",
]


def run_table(run_dirs: Sequence[str | os.PathLike[str]]) -> HTML:
    """A table of runs, one row a run: see `compare_runs.summarize`."""
    return HTML(table(summarize(run_dirs), "Runs, one a row"))


def recited_pages(
    tokenizer: Tokenizer, pages: Mapping[str, tuple[Sequence[int], Sequence[Run]]], data: TokenDataset, least: int
) -> HTML:
    """Texts side by side with their runs marked: see `recitation.page`. By title: a text's ids and its runs."""
    columns = (recitation.page(tokenizer, title, ids, runs, data, least) for title, (ids, runs) in pages.items())
    return HTML(f'<div style="display:flex;flex-wrap:wrap;gap:2em">{"".join(columns)}</div>')


def tables(rows: Mapping[str, Sequence[Mapping[str, object]]]) -> HTML:
    """Tables below each other, by their captions. Of one without rows only the caption is shown."""
    return HTML(
        "".join(
            table(each, caption) if each else f"<p>{html_text(caption)}: none</p>" for caption, each in rows.items()
        )
    )
