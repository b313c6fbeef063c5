"""HTML for text that nobody has checked: corpora, prompts and models may hold tags and terminal escapes.

Everything that comes from outside goes through `visible` (for a terminal or a figure) or `escaped` (for HTML).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

from llmcore.files import visible as visible
from llmcore.tokenizer import Tokenizer

SHOWN = 400  # characters of a long text that are worth showing

BOX = (
    "display:inline-block;padding:1px 4px;margin:1px 0;border:1px solid #888;border-radius:4px;color:#000;"
    "text-align:center;vertical-align:top;line-height:1.35"
)
COLORS = ("#cfe4f3", "#fbe6bd", "#c9e9dd", "#f2d9e6")  # pale, so that black text stays readable in any theme


def ending(text: str, most: int = SHOWN) -> str:
    """The end of a text, from where a model goes on, and in words how much stands before: for prompts of any length."""
    return text if len(text) <= most else f"({len(text) - most:,} characters) …{text[-most:]}"


def escaped(text: object) -> str:
    """Text for an HTML page, as content or as an attribute in quotes: no tag, entity or control character acts."""
    return html.escape(visible(str(text)))


def piece_text(tokenizer: Tokenizer, id: int) -> str:
    """A token as a person reads it: "⏎" for a newline, "␣" for spaces, ⟨E4⟩ for a lone byte."""
    if tokenizer.is_byte(id):
        return f"⟨{tokenizer.id_to_bytes(id)[0]:02X}⟩"
    text = visible(tokenizer.id_to_bytes(id).decode())
    return text.replace("\n", "⏎").replace("\t", "␉").replace(" ", "␣") or tokenizer.id_to_piece(id)


def boxes(pieces: Sequence[str], notes: Sequence[str] = (), hints: Sequence[str] = ()) -> str:
    """Pieces as boxes with an edge, in alternating colours; a box with "⏎" ends its line.

    Code hosts drop every style: the spaces between the boxes then part the pieces.

    Args:
        pieces: the texts.
        notes: small print below each.
        hints: what each says when the mouse rests on it.
    """
    made = []
    for number, piece in enumerate(pieces):
        note = f' <small style="display:block">{escaped(notes[number])}</small>' if notes else ""
        hint = f' title="{escaped(hints[number])}"' if hints else ""
        style = f"background:{COLORS[number % len(COLORS)]};{BOX}"
        made.append(f'<span{hint} style="{style}">{escaped(piece)}{note}</span>' + ("<br>" if "⏎" in piece else ""))
    return f"<div>{' '.join(made)}</div>"


def table(rows: Iterable[Mapping[str, object]], caption: str = "") -> str:
    """Rows with the same keys as a table: the keys above, one row each; numbers to the right."""
    rows = list(rows)
    if not rows:
        return "<p>nothing yet</p>"
    head = "".join(f'<th scope="col" style="text-align:left">{escaped(name)}</th>' for name in rows[0])
    body = ""
    for row in rows:
        cells = [(escaped(value), re.match(r"[\d.,]+( |$)", str(value))) for value in row.values()]
        right, left = "text-align:right;white-space:nowrap", "text-align:left"
        body += "<tr>" + "".join(f'<td style="{right if n else left}">{v}</td>' for v, n in cells)
        body += "</tr>"
    title = f"<caption>{escaped(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
