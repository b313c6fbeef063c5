"""Explorers: type a text and see its tokens, page through a data set, watch attention at work.

Each is a panel of labelled controls over one `result` in HTML. A person gets the panel; a headless run, a code host or
a notebook opened without its kernel gets the result alone.
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
from llmcore.notebook.safe_html import boxes, escaped, piece_text
from llmcore.tokenizer import Tokenizer

WIDE = {"width": "95%", "max_width": "1000px"}
NEAR = 5  # names to show when none is right
LABELLED = {"description_width": "initial"}  # a label as wide as its words, not cut to the default 80 pixels


def row(*controls: ipywidgets.Widget) -> ipywidgets.Box:
    """Controls side by side; those for which a narrow page has no room go to the next line, none is cut off."""
    return ipywidgets.Box(controls, layout={"flex_flow": "row wrap", "overflow": "visible"})


class Explorer:
    """Controls over a result.

    Attributes:
        result: HTML, brought up to date whenever a control changes.
        panel: the controls and the result.
    """

    def __init__(self, *controls: ipywidgets.Widget) -> None:
        self.result = ipywidgets.HTML()
        self.panel = ipywidgets.VBox([*controls, self.result])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return output(self.panel, self.result.value)


class TokenExplorer(Explorer):
    """Type a text, see the pieces one or more tokenizers make of it.

    Each box is a token: its text, its id, its bytes, and how often it occurs in the text if more than once.

    Args:
        tokenizers: by the name to show.
        text: to begin with.

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
        self.result.value = f'<div style="display:flex;flex-wrap:wrap;gap:2em">{"".join(columns)}</div>'

    def _column(self, name: str, tokenizer: Tokenizer) -> str:
        text = self.text.value
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            return f"<p>⚠ {escaped(error)}</p>"
        counts, pieces = Counter(ids), [piece_text(tokenizer, id) for id in ids]
        notes, hints = [], []
        for id in ids:
            raw, often = tokenizer.id_to_bytes(id), counts[id]
            notes.append(f"{id} · {len(raw)} B" + (f" · {often}×" if often > 1 else ""))
            hints.append(f"id {id}, bytes {raw.hex(' ').upper()}, {often} in this text")
        size = f"{len(ids)} tokens, {len(counts)} of them different, {len(text)} characters, {len(text.encode())} bytes"
        ratio = f"; {len(text) / len(ids):.2f} characters per token" if ids else ""
        heading = f"<p><b>{escaped(name)}</b>: {size}{ratio}</p>"
        return f'<div style="flex:1 1 20em">{heading}{boxes(pieces, notes, hints)}</div>'


class DataExplorer(Explorer):
    """Page through a data set's windows, with a rule wherever one document ends and the next begins.

    Args:
        data: one split.
        tokenizer: that it was made with.

    Attributes:
        window: number of the window, from 0.
        back, on: buttons to the windows beside it.
        document: jumps to the window in which a document begins,
        notice: or says that there is none of this name, and which are near.
    """

    def __init__(self, data: TokenDataset, tokenizer: Tokenizer) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.names = [one_line(name) for name in data.names]
        self.window = ipywidgets.BoundedIntText(0, 0, data.n_windows - 1, description="window")
        self.back = ipywidgets.Button(description="back", icon="arrow-left", tooltip="the window before")
        self.on = ipywidgets.Button(description="on", icon="arrow-right", tooltip="the next window")
        self.document = ipywidgets.Combobox(
            options=self.names[:2000], description="jump to document", ensure_option=False, style=LABELLED
        )
        self.document.placeholder = "the name of a file"
        self.document.layout = {"flex": "1 1 24em", "min_width": "20em", "max_width": "36em"}
        self.notice = ipywidgets.HTML()
        super().__init__(row(self.back, self.on, self.window, self.document), self.notice)
        self.back.on_click(lambda _: self._turn(-1))
        self.on.on_click(lambda _: self._turn(1))
        self.window.observe(self._show, "value")
        self.document.observe(self._jump, "value")
        self._show()

    def _turn(self, by: int) -> None:
        self.window.value = min(max(self.window.value + by, 0), self.window.max)

    def _jump(self, change: Any) -> None:
        wanted = change["new"].strip()
        self.notice.value = ""
        if wanted in self.names:
            start = int(self.data.offsets[self.names.index(wanted)])
            self.window.value = min(start // self.data.context_size, self.window.max)
            self._show()
        elif wanted:
            inside = [name for name in self.names if wanted.casefold() in name.casefold()][:NEAR]
            near = inside or difflib.get_close_matches(wanted[:100], self.names[:2000], NEAR, cutoff=0.3)
            hint = f"near: {', '.join(near)}" if near else f"the first of {len(self.names):,} is {self.names[0]}"
            self.notice.value = (
                f"<p>⚠ no document of this split is called “{escaped(wanted[:100])}”; {escaped(hint)}</p>"
            )

    def _show(self, _: Any = None) -> None:
        first = self.window.value * self.data.context_size
        ids = self.data.read(first, first + self.data.context_size).tolist()
        offsets = self.data.offsets
        document = int(np.searchsorted(offsets, first, side="right")) - 1
        parts, start = [], 0
        while start < len(ids):
            end = min(len(ids), int(offsets[document + 1]) - first)
            begins = offsets[document] >= first
            name = f"document {document + 1} of {len(offsets) - 1}: {escaped(self.names[document])}"
            parts.append(f"<hr><p><b>{name}</b> {'begins' if begins else 'goes on'}</p>")
            eos, part = self.tokenizer.eos_id, ids[start:end]
            pieces = ["■ end" if id == eos else piece_text(self.tokenizer, id) for id in part]
            hints = [f"place {first + start + n}, id {id}" for n, id in enumerate(part)]
            parts.append(boxes(pieces, hints=hints))
            start, document = end, document + 1
        where = f"tokens {first:,} to {first + len(ids) - 1:,} of {len(self.data.tokens):,}"
        of = f"window {self.window.value:,} of {self.data.n_windows:,}, counted from 0"
        self.result.value = f"<p>{self.data.split} split, {of}; {where}</p>" + "".join(parts)


class ReversalExplorer(Explorer):
    """Type a string, see the model's answer, and where each head looks while it writes.

    Attention is that of reading the right answer, as in training: a mistake does not send the heads astray.

    Args:
        model: trained on the toy task.
        text: to begin with.

    Attributes:
        text: the string to reverse.
        place: which sign is to be written, from 1; the one after the last character is the end.
        answer: the model's own.
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
            self.result.value = f"<p>⚠ {escaped(error)}</p>"
            return
        device = self.model.tok_embeddings.weight.device
        self._weights = self.model.attention_weights(torch.tensor([self._ids], device=device))[:, 0].float().cpu()
        self.place.max = len(self._ids) - len(text) - 1
        self._show()

    def _show(self, _: Any = None) -> None:
        if not self._ids:
            return
        text, labels = self.text.value, toy_reverse.show(self._ids)
        row = len(text) + self.place.value  # the token from which this sign of the answer is read off
        right = self.answer == text[::-1]
        verdict = "right" if right else f"wrong: it should be {escaped(text[::-1])}"
        head = "".join(f'<th style="font-family:monospace">{escaped(sign)}</th>' for sign in labels[: row + 1])
        rows = ""
        for layer, heads in enumerate(self._weights):
            for number, weights in enumerate(heads):
                looks = weights[row, : row + 1]
                most = int(looks.argmax())
                cells = "".join(
                    f'<td style="background:rgba(0,114,178,{float(w):.2f});min-width:1.3em;'
                    f'border:{2 if n == most else 1}px solid {"#D55E00" if n == most else "#ccc"}"></td>'
                    for n, w in enumerate(looks)
                )
                words = f"{float(looks[most]):.0%} at “{escaped(labels[most])}”, place {most}"
                rows += f'<tr><th scope="row">layer {layer + 1}, head {number + 1}</th>{cells}<td>{words}</td></tr>'
        written = toy_reverse.show([*self._ids, toy_reverse.EOS])[row + 1]
        self.result.value = (
            f"<p>answer: <code><b>{escaped(self.answer)}</b></code> ({verdict})</p>"
            f"<p>To write sign {self.place.value}, “{escaped(written)}”, each head looks at (^ begin, | separator; the "
            f"bluer, the more; framed: the most):</p>"
            f"<table><tr><th></th>{head}<th></th></tr>{rows}</table>"
        )
