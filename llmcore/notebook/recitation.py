"""A text in which the runs that stand in the training text are marked, and where they stand there."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from llmcore.dataset import TokenDataset
from llmcore.measure.memorised import Run, source
from llmcore.notebook.explorers import english
from llmcore.notebook.safe_html import COLORS, html_text
from llmcore.tokenizer import Tokenizer

AROUND = 24  # tokens of the training text shown on each side of a run
MARK = "text-decoration:underline 2px;text-underline-offset:4px;color:#000;padding:1px 2px;border-radius:3px"


def marked(tokenizer: Tokenizer, ids: Sequence[int], runs: Sequence[Run]) -> str:
    """A text as HTML: each run underlined, on a colour, with its number after it.

    Where runs overlap, the longer one has the tokens.

    Args:
        tokenizer: of the text.
        ids: the text.
        runs: of the text, as from `memorised.recited`; they are numbered from 1.
    """
    owners = np.zeros(len(ids), int)
    for number, run in sorted(enumerate(runs, 1), key=lambda each: each[1].end - each[1].start):
        owners[run.start : run.end] = number  # the longest is the last one to be written

    decoder, parts = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    for owner, places in groupby(range(len(ids)), key=lambda place: int(owners[place])):
        text = html_text(decoder.decode(b"".join(tokenizer.id_to_bytes(ids[place]) for place in places)))
        if owner:
            style = f"background:{COLORS[owner % len(COLORS)]};{MARK}"
            text = f'<ins style="{style}">{text}</ins><sup>[{owner}]</sup>'
        parts.append(text)
    return "".join(parts) + html_text(decoder.decode(b"", final=True))


def passages_of(tokenizer: Tokenizer, runs: Sequence[Run], data: TokenDataset) -> str:
    """The runs as a list in HTML. A click on one opens the passage of the training text that holds it.

    Args:
        tokenizer: the one that the data set was made with.
        runs: as for `marked`.
        data: the training split.
    """
    items = []
    for number, run in enumerate(runs, 1):
        size = run.end - run.start
        name, offset = source(data, run.place)
        first = max(run.place - offset, run.place - AROUND)
        before, words, after = (
            html_text(tokenizer.decode(data.read(*span).tolist()).strip("\ufffd"))
            for span in (
                (first, run.place),
                (run.place, run.place + size),
                (run.place + size, run.place + size + AROUND),
            )
        )
        items.append(
            f"<details><summary>[{number}] {size} tokens of {html_text(name)}, from its token {offset:,} on</summary>"
            f'<blockquote style="white-space:pre-wrap">…{before}<ins style="{MARK};background:{COLORS[0]}"><b>{words}'
            f"</b></ins>{after}…</blockquote>{english(tokenizer.decode(data.read(run.place, run.place + size)))}"
            "</details>"
        )
    return "".join(items) or "<p><small>no run of so many tokens stands in the training text</small></p>"


def page(
    tokenizer: Tokenizer, title: str, ids: Sequence[int], runs: Sequence[Run], data: TokenDataset, least: int
) -> str:
    """A text with its runs marked, what the marks mean, the English of some words, and the passages, as HTML."""
    key = f"underlined, with a number: {least} tokens or more that stand in the training text word for word"
    return (
        f'<div style="flex:1 1 24em;max-width:60em"><p><b>{html_text(title)}</b></p>'
        f'<p style="white-space:pre-wrap;line-height:2">{marked(tokenizer, ids, runs)}</p>'
        f"{english(tokenizer.decode(ids))}<p><small>{key}; click on a line for the passage</small></p>"
        f"{passages_of(tokenizer, runs, data)}</div>"
    )
