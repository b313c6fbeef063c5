"""HTML for text that nobody has checked: corpora, prompts and models may hold tags and terminal escapes.

Everything that comes from outside goes through `visible` (for a terminal), `html_text` (for HTML),
`run_page.markdown_text` (for Markdown) or `plots.style.figure_text` (for a figure).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

from llmcore.files import visible as visible
from llmcore.tokenizer import Tokenizer

SHOWN = 400  # characters of a long prompt that are shown
SHORT = 16  # characters of a cell of a table that begins with a number and stays on one line

BOX = (
    "display:inline-block;padding:1px 4px;margin:1px 0;border:1px solid #888;border-radius:4px;color:#000;"
    "text-align:center;vertical-align:top;line-height:1.35"
)
# the colour by name: a notebook that is not trusted yet loses "inherit", and a dark theme would write in white
PIECE = "background:none;border:0;padding:0;color:#000;font:inherit;white-space:pre-wrap"
NOTE = "display:block;position:static;font-size:small;line-height:inherit"
COLORS = ("#cfe4f3", "#fbe6bd", "#c9e9dd", "#f2d9e6")  # pale, so that black text stays readable in any theme


def ending(text: str, most: int = SHOWN) -> str:
    """The end of a prompt, where the model goes on. Of a long prompt the beginning is replaced by its length."""
    return text if len(text) <= most else f"({len(text) - most:,} characters) …{text[-most:]}"


def html_text(text: object) -> str:
    """Text for an HTML page, as content or as a quoted attribute. Tags, entities and control characters do not act."""
    return html.escape(visible(str(text)))


def piece_text(tokenizer: Tokenizer, id: int) -> str:
    """A token as a person reads it: "⏎" for a newline, "␣" for spaces, ⟨E4⟩ for bytes that are no character."""
    raw = tokenizer.id_to_bytes(id)
    if tokenizer.is_byte(id) and not (raw.isascii() and raw.decode().isprintable()):
        return f"⟨{raw.hex(' ').upper()}⟩"
    text = visible(raw.decode())
    return text.replace("\n", "⏎").replace("\t", "␉").replace(" ", "␣") or tokenizer.id_to_piece(id)


def boxes(pieces: Sequence[str], notes: Sequence[str] = (), hints: Sequence[str] = ()) -> str:
    """Pieces as boxes with an edge, in alternating colours. A box with "⏎" ends its line.

    Code hosts remove all styles. There a piece is still set apart as code, and what is noted below it stands lower.

    Args:
        pieces: the texts.
        notes: small print below each piece.
        hints: what each piece shows when the mouse rests on it.
    """
    spans = []
    for number, piece in enumerate(pieces):
        note = f' <sub style="{NOTE}">{html_text(notes[number])}</sub>' if notes else ""
        hint = f' title="{html_text(hints[number])}"' if hints else ""
        style = f"background:{COLORS[number % len(COLORS)]};{BOX}"
        text = f'<code style="{PIECE}">{html_text(piece)}</code>'
        spans.append(f'<span{hint} style="{style}">{text}{note}</span>' + ("<br>" if "⏎" in piece else ""))
    return f"<div>{' '.join(spans)}</div>"


def table(rows: Iterable[Mapping[str, object]], caption: str = "") -> str:
    """Rows with the same keys as an HTML table: the keys are its head, numbers are aligned to the right."""
    rows = list(rows)
    if not rows:
        return "<p>nothing yet</p>"
    head = "".join(f'<th scope="col" style="text-align:left">{html_text(name)}</th>' for name in rows[0])
    body = ""
    for row in rows:
        body += "<tr>"
        for value in row.values():
            is_number = re.match(r"[\d.,]+( |$)", str(value))
            style = "text-align:right" if is_number else "text-align:left"
            style += ";white-space:nowrap" if is_number and len(str(value)) < SHORT else ""
            body += f'<td style="{style}">{html_text(value)}</td>'
        body += "</tr>"
    title = f"<caption>{html_text(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
