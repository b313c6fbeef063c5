"""What a library holds, in rows for tables: kinds of files, scripts, lengths, copies, and what is cleaned away."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

from llmcore.corpus import encodings
from llmcore.corpus.cleaning import line_rows
from llmcore.corpus.containers import ending
from llmcore.corpus.library import Document, Library, Reader
from llmcore.tokenizer import Tokenizer

LOOKED_AT = 4  # blocks of 64 KiB at the beginning of a document, to see its script
# Frequent characters that only one of the two ways to write Chinese has
SIMPLIFIED = set(encodings.SIMPLIFIED) - set(encodings.TRADITIONAL)
TRADITIONAL = set(encodings.TRADITIONAL) - set(encodings.SIMPLIFIED)

Row = dict[str, Any]


def files_by_kind(library: Library) -> list[Row]:
    """Documents by the ending of their file and by encoding, the most frequent first; then the files not read."""
    kinds: dict[tuple[str, str], list[Document]] = {}
    for document in library.documents:
        kinds.setdefault((ending(document.path.name), document.encoding), []).append(document)
    rows: list[Row] = [
        {
            "file": kind,
            "encoding": encoding,
            "documents": len(documents),
            "megabytes": f"{sum(document.bytes for document in documents) / 1e6:.2f}",
            "with broken bytes": sum(document.damaged > 0 for document in documents),
            "broken places": sum(document.damaged for document in documents),
        }
        for (kind, encoding), documents in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    blank = dict.fromkeys(rows[0] if rows else (), "")
    for kind, number in library.unread.items():
        rows.append({**blank, "file": kind or "no ending", "encoding": "not read", "documents": number})
    if library.refused:
        rows.append({**blank, "file": "any", "encoding": "cannot be read", "documents": len(library.refused)})
    return rows


def script_of(text: str) -> str:
    """The script that most of a text is in: simplified or traditional Chinese, Japanese, Latin or another."""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if "\u3040" <= character <= "\u30ff":
            counts["kana"] += count
        elif "\u4e00" <= character <= "\u9fff" or "\u3400" <= character <= "\u4dbf" or character >= "\U00020000":
            counts["Chinese"] += count
            counts["simplified"] += count * (character in SIMPLIFIED)
            counts["traditional"] += count * (character in TRADITIONAL)
        elif character.isalpha():
            counts["Latin" if character < "\u0250" else "other"] += count
    if counts["kana"] * 4 > counts["Chinese"] + counts["Latin"]:
        return "Japanese"
    if counts["Chinese"] * 2 > counts["Latin"] + counts["other"]:
        return "traditional Chinese" if counts["traditional"] > counts["simplified"] else "simplified Chinese"
    return (
        "another script" if counts["other"] > counts["Latin"] else "Latin letters" if counts["Latin"] else "no letters"
    )


def spelled_share(tokenizer: Tokenizer, text: str) -> float:
    """The share of a text's characters that have no piece of their own, and are spelled in bytes by several ids."""
    counts = Counter(text)
    spelled = sum(count for character, count in counts.items() if len(tokenizer.encode(character)) > 1)
    return spelled / max(1, counts.total())


def scripts(library: Library) -> list[Row]:
    """Scripts, by the beginning of each document, with their share of the text."""
    documents, sizes = Counter[str](), Counter[str]()
    with Reader() as reader:
        for document in library.kept:
            script = script_of("".join(itertools.islice(reader.blocks(document), LOOKED_AT)))
            documents[script] += 1
            sizes[script] += document.text_bytes
    total = max(1, sizes.total())
    return [
        {"script": script, "documents": documents[script], "share of the text": f"{size / total:.1%}"}
        for script, size in sizes.most_common()
    ]


def longest_and_shortest(library: Library, count: int = 3) -> list[Row]:
    """The longest and the shortest documents."""
    ordered = sorted(library.kept, key=lambda document: -document.characters)
    chosen = ordered if len(ordered) <= 2 * count else [*ordered[:count], *ordered[-count:]]
    return [{"document": document.name, "characters": f"{document.characters:,}"} for document in chosen]


def copies(library: Library, count: int = 30) -> list[Row]:
    """Documents that are copies of others or of parts of them; first those with most in common."""
    sizes = {document.name: f"{document.characters:,}" for document in library.documents}
    return [
        {
            "copy": copy.name,
            "characters": sizes[copy.name],
            "of": copy.of,
            "its characters": sizes[copy.of],
            "in common": f"{copy.share:.0%}",
            "": "left out" if copy.name in library.copy_of else "kept, on the same side of the split",
        }
        for copy in sorted(library.copies, key=lambda copy: (-copy.share, copy.name))[:count]
    ]


def cleaning(library: Library) -> list[Row]:
    """What each rule leaves out."""
    return [row for row in library.cleaned if row["removed"]]


def recurring(library: Library, count: int = 20) -> list[Row]:
    """The lines that are left out because they recur, the most frequent first."""
    return line_rows(library.recurring[:count])


def left_out(library: Library) -> dict[str, list[Row]]:
    """Everything that is left out, in tables by their captions."""
    return {
        "Left out by cleaning": cleaning(library),
        "Lines that recur": recurring(library),
        "Documents that have half of their sentences or more in common": copies(library),
    }


def advised_vocab_size(library: Library) -> int:
    """The vocabulary of a preset for this much text: 4,000 for half a million characters, twice that for ten times.

    A rule of thumb. A piece that occurs rarely is learnt badly, and each piece is a row in two tables.
    """
    characters = sum(document.characters for document in library.kept)
    doublings = round(math.log10(max(characters, 1) / 500_000))
    return int(4000 * 2.0 ** min(3, max(-2, doublings)))


def summary(manifest: dict[str, Any]) -> str:
    """What a data set was made of, in words."""
    copies_left_out = sum(source["split"] == "copy" for source in manifest["sources"])
    parts = [
        f"{sum(source['split'] in ('train', 'val', 'both') for source in manifest['sources'])} documents",
        f"{copies_left_out} copies left out",
        f"{sum(rule['characters'] for rule in manifest.get('cleaned', [])):,} characters cleaned away",
        f"{sum(source.get('damaged', 0) for source in manifest['sources'])} broken places",
        f"{len(manifest.get('refused', {}))} texts that cannot be read",
        f"{sum(manifest.get('unread', {}).values())} other files",
    ]
    return "; ".join(parts)
