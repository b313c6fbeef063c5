"""A story as a list of passages, of which a person or a model wrote each: changed, undone, saved and opened again.

The file is Markdown that people can read and edit. In front of each passage, a comment holds what made it:

    # The title

    Notes, if there are any.

    <!-- story -->

    <!-- passage {"by": "you"} -->

    却说曹操

    <!-- passage {"by": "scifi-mini/step=001000_loss=4.695", "temperature": 0.8, …, "seed": 7, "tokens": 80, …} -->

    引兵而还，
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmcore.files import check_json, display_path, one_line, to_json, visible, write_atomic
from llmcore.generate import Sampling

YOU = "you"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_WHOLE = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_SETTINGS: dict[str, Any] = {
    **{name: {"type": ["finite number", "null"]} for name in SAMPLING},
    **{name: _WHOLE for name in ("seed", "max_new_tokens", "tokens")},
    "sha256": {"type": "string"},
}
_SCHEMA = {
    "type": "object",
    "required": ["by"],
    "additionalProperties": False,
    "properties": {"by": {"type": "string", "maxLength": 1000}, **_SETTINGS},
    "dependencies": {name: list(_SETTINGS) for name in _SETTINGS},  # all of them, or none
}
_COMMENT = re.compile(r"^<!-- (story|passage|aside)\b(.*)-->.*$", re.MULTILINE)
# what Markdown, HTML or a terminal would act on: anywhere, at the beginning of a line, and spaces that editors remove
_MARKUP = re.compile(
    r"[&<>\[\]\\`*_$#~|\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_LINE_ENDS = re.compile(r"^[-+= ]| $|\A\n|\n\Z", re.MULTILINE)
_NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_REFERENCE = re.compile(r"&(amp|lt|gt|#x[0-9A-Fa-f]{1,5});")


@dataclass(frozen=True)
class Passage:
    """A part of a story, and what is needed to make it again.

    Attributes:
        text: follows the passage before it directly, with no space or line between.
        by: "you", or the checkpoint that wrote it.
        settings: of the model, None for a person's text: temperature, top_k, top_p, min_p, repetition_penalty, seed,
            max_new_tokens (how many it was asked for), tokens (how many it wrote: a person may have stopped it) and
            sha256 (of the story up to the end of this passage, so that a later change is noticed).
    """

    text: str
    by: str = YOU
    settings: Mapping[str, Any] | None = None


@dataclass
class Story:
    """A story and its file. Every method that changes the passages can be undone.

    Attributes:
        title, notes: of the author; notes are not exported.
        passages: in order.
        aside: what was cut or replaced. It stays in the file.
        file: where it was saved last. None: not yet, or it was opened from a file that must stay as it is.
        doubts: what was odd in the file that it was opened from.
    """

    title: str = ""
    notes: str = ""
    passages: tuple[Passage, ...] = ()
    aside: tuple[Passage, ...] = ()
    file: Path | None = None
    doubts: tuple[str, ...] = ()
    _before: list[tuple[tuple[Passage, ...], tuple[Passage, ...]]] = field(default_factory=list, repr=False)
    _on_disk: bytes = field(default=b"", repr=False)

    def text(self, count: int | None = None) -> str:
        """The text of the first `count` passages, or of all."""
        return "".join(passage.text for passage in self.passages[:count])

    def _change(self, passages: tuple[Passage, ...], aside: tuple[Passage, ...] | None = None) -> None:
        self._before.append((self.passages, self.aside))
        self.passages, self.aside = passages, self.aside if aside is None else aside

    def add(self, passage: Passage) -> None:
        """Put a passage at the end."""
        self._change((*self.passages, passage))

    def replace(self, number: int, passage: Passage) -> None:
        """Put a passage in the place of another, counted from 0."""
        self._change((*self.passages[:number], passage, *self.passages[number + 1 :]))

    def edit(self, number: int, text: str) -> None:
        """Change a passage's text, and keep what it says of how it was made. Without text the passage goes."""
        changed = (replace(self.passages[number], text=text),) if text else ()
        self._change((*self.passages[:number], *changed, *self.passages[number + 1 :]))

    def go_back(self, count: int) -> None:
        """Keep the first passages, and set the others aside."""
        self._change(self.passages[:count], (*self.aside, *self.passages[count:]))

    def undo(self) -> bool:
        """Take the last change back; False if there is none."""
        if self._before:
            self.passages, self.aside = self._before.pop()
            return True
        return False

    def as_written(self, number: int) -> bool:
        """Whether a model wrote this passage and neither it nor the text before it was changed since."""
        settings = self.passages[number].settings
        return settings is not None and settings["sha256"] == text_hash(self.text(number + 1))

    # Files

    def as_markdown(self) -> str:
        """The content of the file."""
        notes = f"{_escaped(self.notes)}\n\n" if self.notes else ""
        parts = [f"# {_escaped(one_line(self.title))}\n\n{notes}<!-- story -->\n"]
        kinds = [("passage", each) for each in self.passages] + [("aside", each) for each in self.aside]
        for kind, passage in kinds:
            values = to_json({"by": passage.by, **(passage.settings or {})}).replace(">", "\\u003e")
            parts.append(
                f"\n<!-- {kind} {values} -->{' (set aside)' * (kind == 'aside')}\n\n{_escaped(passage.text)}\n"
            )
        return "".join(parts)

    def save(self, folder: Path) -> Path:
        """Write the file, whole or not at all.

        A file is never replaced that holds something else than this story last wrote or read there: another program or
        another desk has written it. The story then goes to a new file, as a new story does: `folder/<title>.md`, with a
        number where there is such a file.

        Raises:
            OSError: if it cannot be written.
        """
        content = self.as_markdown().encode()
        if self.file is None or not self.file.is_file() or self.file.read_bytes() != self._on_disk:
            self.file, self._on_disk = new_file(folder, self.title, ".md"), b""
        write_atomic(self.file, content)
        self._on_disk = content
        return self.file

    def export(self, folder: Path) -> list[Path]:
        """Title and text as new files, one .txt and one .md whose lines are paragraphs. Without notes and settings.

        Raises:
            OSError: if they cannot be written.
        """
        title, text = one_line(self.title), visible(self.text())
        paragraphs = [f"# {_escaped(title)}", *(_escaped(line) for line in text.split("\n") if line.strip())]
        files = []
        for suffix, content in ((".txt", f"{title}\n\n{text}\n"), (".md", "\n\n".join(paragraphs) + "\n")):
            files.append(new_file(folder, self.title, suffix))
            write_atomic(files[-1], content)
        return files


def text_hash(text: str) -> str:
    """The first half of a text's SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def new_file(folder: Path, title: str, suffix: str) -> Path:
    """A new, empty file, named after a title, with a number where a file has that name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", title)[:40].strip("-") or "story"
    file, number = folder / f"{name}{suffix}", 1
    while True:
        try:
            open(file, "xb").close()
            return file
        except FileExistsError:
            number += 1
            file = folder / f"{name}-{number}{suffix}"


def open_story(file: str | os.PathLike[str]) -> Story:
    """Read a story that was saved, and perhaps edited by hand. Any other text becomes its first passage.

    What cannot be understood is named in `doubts`. Then the file stays as it is: `save` makes a new one.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the file, if it is not UTF-8.
    """
    file = Path(file)
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{display_path(file)} is not a story: {error}; save it as UTF-8") from None

    head, *parts = _COMMENT.split(text)
    if not parts:
        told = (f"{display_path(file)} has no passages that this desk wrote: all of it is the first",) if text else ()
        only = (Passage(text),) if text else ()
        return Story(file.stem, passages=only, file=None if text else file, doubts=told)

    # comments and texts in turn
    kept: dict[str, list[Passage]] = {"passage": [], "aside": []}
    doubts: tuple[str, ...] = ()
    for number, (kind, values, body) in enumerate(zip(parts[::3], parts[1::3], parts[2::3], strict=True)):
        if kind == "story" and not body.strip():
            continue
        by, settings = "unknown", None
        try:
            found = json.loads(values)
            check_json(found, _SCHEMA, "it")
            by, settings = found.pop("by"), found or None
            if settings:
                Sampling(*(settings[name] for name in SAMPLING)).check(settings["max_new_tokens"])
        except (ValueError, RecursionError) as error:
            settings = None
            doubts += (
                f"{display_path(file)}: the comment of passage {number} cannot be used: {one_line(error)[:200]}",
            )
        if "<!--" in body:
            doubts += (f"{display_path(file)}: passage {number} holds a comment, which is taken for text",)
        kept["aside" if kind == "aside" else "passage"].append(Passage(_unescaped(body.strip("\n")), by, settings))

    title, _, notes = head.strip("\n").partition("\n")
    if not title.startswith("#"):
        title, notes = "", head
    return Story(
        _unescaped(title.removeprefix("#").removeprefix(" ")),
        _unescaped(notes.strip("\n")),
        tuple(kept["passage"]),
        tuple(kept["aside"]),
        None if doubts else file,
        doubts,
        _on_disk=content,
    )


def _escaped(text: str) -> str:
    """Text in which nothing acts in Markdown or HTML, or is removed by an editor; `_unescaped` gives the text back."""

    def reference(found: re.Match[str]) -> str:
        return _NAMED.get(found[0]) or f"&#x{ord(found[0]):X};"

    return _LINE_ENDS.sub(reference, _MARKUP.sub(reference, text))


def _unescaped(text: str) -> str:
    back = {"amp": "&", "lt": "<", "gt": ">"}
    return _REFERENCE.sub(lambda found: back.get(found[1]) or chr(int(found[1][2:], 16)), text)
