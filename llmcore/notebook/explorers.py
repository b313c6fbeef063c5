"""Explorers: type a text and see its tokens, page through a data set, see where a model's attention goes.

Each is a panel of labelled controls over one `result` in HTML. A person sees the panel. A headless run, a code host and
a notebook opened without its kernel show only the result.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ipywidgets
import numpy as np
import torch

from llmcore.dataset import TokenDataset
from llmcore.files import one_line
from llmcore.model import Transformer
from llmcore.notebook import toy_reverse
from llmcore.notebook.dashboard import output
from llmcore.notebook.gloss import gloss, words_in
from llmcore.notebook.safe_html import boxes, html_text, piece_text
from llmcore.tokenizer import Tokenizer

WIDE = {"width": "95%", "max_width": "1000px"}
MAX_NAMES = 2000  # of documents that the browser gets to choose from
SIMILAR_NAMES = 5  # shown when no document has the name that was typed
LABELLED = {"description_width": "initial"}  # as wide as the label's text; ipywidgets' default cuts it at 80 pixels


def row(*controls: ipywidgets.Widget) -> ipywidgets.Box:
    """Controls side by side. On a narrow page some go to the next line, and none is cut off."""
    return ipywidgets.Box(controls, layout={"flex_flow": "row wrap", "overflow": "visible"})


class Explorer:
    """Controls over a result.

    Attributes:
        result: HTML, updated whenever a control changes.
        panel: the controls and the result.
    """

    def __init__(self, *controls: ipywidgets.Widget) -> None:
        self.result = ipywidgets.HTML()
        self.panel = ipywidgets.VBox([*controls, self.result])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return output(self.panel, self.result.value)


def english(text: str) -> str:
    """A line in HTML with the English of some words of a text; nothing if no word is known."""
    return f"<p><small>In English: {html_text(gloss(text))}</small></p>" if words_in(text) else ""


class TokenExplorer(Explorer):
    """Type a text, and see its tokens in one or more tokenizers.

    Each box is a token: its text, its id, its number of bytes, and how often it occurs, if more than once.

    Args:
        tokenizers: by the name to show.
        text: the text at first.

    Attributes:
        text: the box to type in.
    """

    def __init__(self, tokenizers: Mapping[str, Tokenizer], text: str) -> None:
        self.tokenizers = tokenizers
        self.text = ipywidgets.Textarea(text, description="text", layout={**WIDE, "height": "5em"})
        super().__init__(self.text)
        self.text.observe(self._show, "value")
        self._show()

    def _show(self, _: Any = None) -> None:
        columns = (self._column(name, tokenizer) for name, tokenizer in self.tokenizers.items())
        side_by_side = f'<div style="display:flex;flex-wrap:wrap;gap:2em">{"".join(columns)}</div>'
        self.result.value = side_by_side + english(self.text.value)

    def _column(self, name: str, tokenizer: Tokenizer) -> str:
        text = self.text.value
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            return f"<p>⚠ {html_text(error)}</p>"

        counts = Counter(ids)
        pieces, notes, hints = [], [], []
        for id in ids:
            raw, count = tokenizer.id_to_bytes(id), counts[id]
            pieces.append(piece_text(tokenizer, id))
            notes.append(f"{id} · {len(raw)} B" + (f" · {count}×" if count > 1 else ""))
            hints.append(f"id {id}, bytes {raw.hex(' ').upper()}, {count} in this text")

        size = f"{len(ids)} tokens, {len(counts)} of them different, {len(text)} characters, {len(text.encode())} bytes"
        ratio = f"; {len(text) / len(ids):.2f} characters per token" if ids else ""
        heading = f"<p><b>{html_text(name)}</b>: {size}{ratio}</p>"
        return f'<div style="flex:1 1 20em">{heading}{boxes(pieces, notes, hints)}</div>'


class DataExplorer(Explorer):
    """Page through a data set's windows. A line marks where one document ends and the next begins.

    Args:
        data: one split.
        tokenizer: the one that the data set was made with.

    Attributes:
        window: number of the window, from 0.
        back_button, next_button: go to the window before and after.
        document: a name; the explorer goes to the window in which this document begins.
        notice: if there is no document of this name: similar names.
    """

    def __init__(self, data: TokenDataset, tokenizer: Tokenizer) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.names = [one_line(name) for name in data.names]
        self.window = ipywidgets.BoundedIntText(0, 0, data.n_windows - 1, description="window")
        self.back_button = ipywidgets.Button(description="back", icon="arrow-left", tooltip="the window before")
        self.next_button = ipywidgets.Button(description="next", icon="arrow-right", tooltip="the next window")
        self.document = ipywidgets.Combobox(
            options=self.names[:MAX_NAMES], description="jump to document", ensure_option=False, style=LABELLED
        )
        self.document.placeholder = "the name of a file"
        self.document.layout = {"flex": "1 1 24em", "min_width": "20em", "max_width": "36em"}
        self.notice = ipywidgets.HTML()
        super().__init__(row(self.back_button, self.next_button, self.window, self.document), self.notice)
        self.back_button.on_click(lambda _: self._turn(-1))
        self.next_button.on_click(lambda _: self._turn(1))
        self.window.observe(self._show, "value")
        self.document.observe(self._jump, "value")
        self._show()

    def _turn(self, by: int) -> None:
        self.window.value = min(max(self.window.value + by, 0), self.window.max)

    def _jump(self, change: Any) -> None:
        name = change["new"].strip()
        self.notice.value = ""
        if name in self.names:
            start = int(self.data.offsets[self.names.index(name)])
            self.window.value = min(start // self.data.context_size, self.window.max)
            self._show()
        elif name:
            hint = html_text(self._similar_names(name))
            self.notice.value = f"<p>⚠ no document of this split is called “{html_text(name[:100])}”; {hint}</p>"

    def _similar_names(self, typed: str) -> str:
        similar = [name for name in self.names if typed.casefold() in name.casefold()][:SIMILAR_NAMES]
        if not similar:
            similar = difflib.get_close_matches(typed[:100], self.names[:MAX_NAMES], SIMILAR_NAMES, cutoff=0.3)
        return f"near: {', '.join(similar)}" if similar else f"the first of {len(self.names):,} is {self.names[0]}"

    def _show(self, _: Any = None) -> None:
        first = self.window.value * self.data.context_size
        ids = self.data.read(first, first + self.data.context_size).tolist()
        offsets = self.data.offsets
        document = int(np.searchsorted(offsets, first, side="right")) - 1

        # a heading and a row of boxes for each document that this window holds a part of
        parts, start = [], 0
        while start < len(ids):
            end = min(len(ids), int(offsets[document + 1]) - first)
            begins = offsets[document] >= first
            name = f"document {document + 1} of {len(offsets) - 1}: {html_text(self.names[document])}"
            parts.append(f"<hr><p><b>{name}</b> {'begins' if begins else 'goes on'}</p>")
            eos, part = self.tokenizer.eos_id, ids[start:end]
            pieces = ["■ end" if id == eos else piece_text(self.tokenizer, id) for id in part]
            hints = [f"place {first + start + n}, id {id}" for n, id in enumerate(part)]
            parts.append(boxes(pieces, hints=hints))
            start, document = end, document + 1

        where = f"tokens {first:,} to {first + len(ids) - 1:,} of {len(self.data.tokens):,}"
        of = f"window {self.window.value:,} of {self.data.n_windows:,}, counted from 0"
        heading = f"<p>{self.data.split} split, {of}; {where}</p>"
        self.result.value = heading + "".join(parts) + english(self.tokenizer.decode(ids))


class ReversalExplorer(Explorer):
    """Type a string, and see the model's answer and where each head looks while it writes.

    The attention shown is that over the right answer, as in training. So a mistake of the model does not change it.

    Args:
        model: trained on the toy task.
        text: the string at first.

    Attributes:
        text: the string to reverse.
        place: the sign of the answer to look at, from 1; the one after the last character is the end.
        answer: what the model writes.
    """

    def __init__(self, model: Transformer, text: str) -> None:
        self.model, self.answer = model, ""
        self.text = ipywidgets.Text(text, description="string", layout={"width": "60%"})
        self.place = ipywidgets.IntSlider(1, 1, max(1, len(text)) + 1, description="sign of the answer", style=LABELLED)
        self.place.layout.width = "60%"
        super().__init__(self.text, self.place)
        self.text.observe(self._ask, "value")
        self.place.observe(self._show, "value")
        self._ask()

    @torch.inference_mode()
    def _ask(self, _: Any = None) -> None:
        text = self.text.value
        self.model.eval()
        try:
            [self.answer] = toy_reverse.answers(self.model, [text])
            self._ids = [*toy_reverse.question(text), *toy_reverse.encode(text[::-1])]
        except ValueError as error:
            self._ids = []
            self.result.value = f"<p>⚠ {html_text(error)}</p>"
            return
        self._weights = toy_reverse.attention(self.model, self._ids)
        self.place.max = len(self._ids) - len(text) - 1
        self._show()

    def _show(self, _: Any = None) -> None:
        if not self._ids:
            return
        text, labels = self.text.value, toy_reverse.labels(self._ids)
        row = len(text) + self.place.value  # at this token the model writes the chosen sign of the answer

        # a table with a row a head; the darker a cell, the more of the attention is there
        head = "".join(f'<th style="font-family:monospace">{html_text(sign)}</th>' for sign in labels[: row + 1])
        rows = ""
        for layer, heads in enumerate(self._weights):
            for number, weights in enumerate(heads):
                shares = weights[row, : row + 1].tolist()
                most = shares.index(max(shares))
                cells = "".join(
                    f'<td style="background:rgba(0,114,178,{share:.2f});min-width:1.3em;'
                    f'border:{2 if place == most else 1}px solid {"#D55E00" if place == most else "#ccc"}"></td>'
                    for place, share in enumerate(shares)
                )
                note = f"{shares[most]:.0%} at “{html_text(labels[most])}”, place {most}"
                rows += f'<tr><th scope="row">layer {layer + 1}, head {number + 1}</th>{cells}<td>{note}</td></tr>'

        verdict = "right" if self.answer == text[::-1] else f"wrong: it should be {html_text(text[::-1])}"
        written = html_text(toy_reverse.labels([*self._ids, toy_reverse.EOS])[row + 1])
        self.result.value = (
            f"<p>answer: <code><b>{html_text(self.answer)}</b></code> ({verdict})</p>"
            f"<p>To write sign {self.place.value}, “{written}”, each head looks at (^ begin, | separator; the bluer, "
            f"the more; framed: the most):</p>"
            f"<table><tr><th></th>{head}<th></th></tr>{rows}</table>"
        )
