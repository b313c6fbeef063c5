"""Cleaning: lines that web sites put into the texts of a library, and marks and markup left over from the web.

A library is cleaned in two passes. The first one, `LineCounter`, notes in a table which lines stand where. From the
table, `recurring_hashes` and `recurring_lines` find the web sites' own lines. The second pass, `Cleaner`, gives a text
without them. Files are never changed.

The danger is to remove what an author wrote: "“是。”", "第一章", the refrain of a poem. So a line is removed only if

- it has signs of a web site (an address, "手机用户请浏览", "All rights reserved"), and stands at least 3 times; or
- it is long, is neither verse nor speech, and stands in many documents: at least 5, and 1% of all.

Lines are compared by their letters alone. White space, punctuation and numerals do not count, so a line with another
page number or date in it is still the same line. A line longer than `LONGEST` is always kept.
"""

from __future__ import annotations

import functools
import hashlib
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.entities import name2codepoint
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcore.corpus.hash_table import HashTable
from llmcore.corpus.web_signs import FIRST_WIDE, WIDE_WEIGHT, has_web_signs, is_verse_or_speech, places_of_signs

LONGEST = 400  # characters of a line that may recur
OFTEN = 3  # times that a line with signs of a web site must stand in a library
MANY = 5  # documents, and 1% of all, in which another line must stand
LONG = 64  # weight of such a line: 16 Chinese characters, or 64 letters of an alphabet
MOST_LINES = 20_000  # recurring lines; the most frequent are found

RULES = (
    "recurring lines",
    "control characters",
    "zero-width characters",
    "HTML entities",
    "HTML tags",
    "runs of blank lines",
)


# Marks and markup, rules 2 to 5

MARKUP = 600  # characters; no tag is longer
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ZERO_WIDTH = re.compile("[\u200b\u2060\ufeff\xad]")  # joiners stay: emoji and Indic scripts need them
_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2060\ufeff<&]")

_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|([A-Za-z][A-Za-z0-9]{1,9}));")
_NAMES = {*name2codepoint, "apos"}
_TAG_NAMES = (
    "a|abbr|address|article|aside|b|big|blockquote|body|br|button|center|cite|code|dd|del|div|dl|dt|em|font|footer|"
    "form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|label|li|link|main|meta|nav|nobr|ol|option|p|pre|s|script|"
    "section|select|small|span|strike|strong|style|sub|sup|table|tbody|td|tfoot|th|thead|title|tr|tt|u|ul"
)
_ATTRIBUTES = r"[ \t]{1,9}[a-z][\w:-]{0,30}[ \t]?=[^<>\n]{0,500}"
_TAG = re.compile(rf"</?(?:{_TAG_NAMES})(?:{_ATTRIBUTES})?[ \t]{{0,9}}/?>", re.IGNORECASE)
_ENDS_LINE = re.compile(r"<(?:/?br|hr|/(?:p|div|h[1-6]|li|tr|dd|dt|blockquote|title))\b", re.IGNORECASE)
_COMPLETE = re.compile(rf"&#?[0-9A-Za-z]{{1,10}};|<[^<>&;\n]{{1,{MARKUP}}}>")  # perhaps markup, with no other inside
_CLOSING = re.compile("([;>])")


def _note(counts: Counter[str], rule: str, number: int, characters: int) -> None:
    counts[rule] += number
    counts[f"{rule}, characters"] += characters


def _resolved(markup: str, counts: Counter[str]) -> str | None:
    """What stands for an entity or a tag, which is counted; None if it is neither."""
    if markup[0] == "<":
        if not _TAG.fullmatch(markup):
            return None
        rule, text = "HTML tags", "\n" if _ENDS_LINE.match(markup) else ""
    else:
        entity = _ENTITY.fullmatch(markup)
        if not entity or (entity[1] and entity[1] not in _NAMES) or "\ufffd" in (text := html.unescape(markup)):
            return None
        rule, text = "HTML entities", "" if text not in "<&" and _UNWANTED.match(text) else text.replace("\xa0", " ")
    _note(counts, rule, 1, len(markup) - len(text))
    return text


def _resolve_last(text: str, counts: Counter[str]) -> str | None:
    """The text with the entity or the tag at its end resolved; None if there is none."""
    start = text.rfind("&" if text.endswith(";") else "<", max(0, len(text) - MARKUP))
    if start < 0 or (end := _resolved(text[start:], counts)) is None:
        return None
    return text[:start] + end


class _Markup:
    """Takes marks and markup out of a text that comes in blocks.

    Entities and tags are resolved where they end, from the first to the last, also those that come to be this way:
    "&amp;lt;" becomes "<". So nothing is left for a second time.
    """

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._open = ""  # what may be the beginning of an entity or a tag, not yet given out

    def add(self, text: str) -> str:
        text = self._open + text
        self._open = ""
        if not _UNWANTED.search(text):
            return text
        for rule, marks in (("control characters", _CONTROL), ("zero-width characters", _ZERO_WIDTH)):
            text, number = marks.subn("", text)
            _note(self._counts, rule, number, number)

        # what is complete, then what has come to be markup by that, or is markup in markup
        text = _COMPLETE.sub(self._resolve, text)
        if "<" not in text and "&" not in text:
            return text

        # pieces end with ; or > and are joined to what has begun before
        done, last = [], ""
        pieces = _CLOSING.split(text)
        for piece, closing in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            last += piece + closing
            while last.endswith((";", ">")) and (shorter := _resolve_last(last, self._counts)) is not None:
                last = shorter

            # from the first < or & on, the rest of a line may still become markup
            start = max(last.rfind("\n") + 1, len(last) - MARKUP)
            begins = [place for sign in "<&" if (place := last.find(sign, start)) >= 0]
            done.append(last[: min(begins, default=len(last))])
            last = last[len(done[-1]) :]
        self._open = last
        return "".join(done)

    def _resolve(self, match: re.Match[str]) -> str:
        text = _resolved(match[0], self._counts)
        return match[0] if text is None else text

    def close(self) -> str:
        return self._open


# Lines

_PIECE = 1 << 15  # characters that are looked at together
_WHITE, _OTHER, _LETTER, _WIDE = range(4)
_NUMERALS = "〇零一二三四五六七八九十百千万萬两兩"

_BASE = 0x9E37_79B9_7F4A_7C15
_POWERS = np.cumprod(np.full(_PIECE + LONGEST + MARKUP + 1, _BASE, np.uint64))
_INVERSES = np.cumprod(np.full(len(_POWERS), pow(_BASE, -1, 1 << 64), np.uint64))


@functools.cache
def _classes() -> NDArray[np.uint8]:
    """For each character of the basic plane: white space, a letter, a wide letter (Chinese, kana, hangul), or other."""
    classes = np.full(1 << 16, _OTHER, np.uint8)
    for code in range(1 << 16):
        if chr(code).isspace():
            classes[code] = _WHITE
        elif unicodedata.category(chr(code))[0] in "LM":
            classes[code] = _WIDE if code >= FIRST_WIDE else _LETTER
    classes[[ord(numeral) for numeral in _NUMERALS]] = _OTHER
    classes[-1] = _WIDE  # stands for all characters beyond the plane
    return classes


class _Lines:
    """Some lines of a text, at least one.

    Attributes:
        text: the lines; all but perhaps the last one end with a newline.
        codes: uint16, of its characters; 0xFFFF for those beyond the basic plane.
        starts, ends: where a line begins, and where its newline ends.
        hashes: uint64, of a line's letters; the lowest bit is 1.
        weights: of its letters, 0 for a line longer than `LONGEST`.
        blank: whether it has nothing but white space.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        self.codes = np.minimum(codes, 0xFFFF).astype(np.uint16)
        self.ends = np.flatnonzero(self.codes == 10) + 1
        is_open = not text.endswith("\n")
        if is_open:
            self.ends = np.append(self.ends, len(text))
        self.starts = np.concatenate([[0], self.ends[:-1]])
        lengths = self.ends - self.starts - 1
        lengths[-1] += is_open
        short = lengths <= LONGEST

        # letters and white space
        classes = _classes().take(self.codes)

        def per_line(marked: NDArray[np.bool_]) -> NDArray[np.int64]:
            """How many marked characters a line has."""
            return np.add.reduceat(marked, self.starts, dtype=np.int64)

        is_letter = classes >= _LETTER
        letters = per_line(is_letter)
        self.weights = (letters + (WIDE_WEIGHT - 1) * per_line(classes == _WIDE)) * short
        self.blank = (per_line(classes != _WHITE) == 0) & short

        # the sum of code × base^place over a line's letters, divided by the base's power where the line begins
        kept = codes.compress(is_letter).astype(np.uint64)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(kept * _POWERS[: len(kept)])])
        after = np.cumsum(letters)
        before = after - letters
        hashes = (sums[after] - sums[before]) * _INVERSES[before]
        for shift, factor in ((30, 0xBF58_476D_1CE4_E5B9), (27, 0x94D0_49BB_1331_11EB)):  # mix, as splitmix64 does
            hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
        self.hashes = (hashes ^ (hashes >> np.uint64(31))) | np.uint64(1)

    def line(self, number: int) -> str:
        return self.text[self.starts[number] : self.ends[number]]

    def among(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which lines have one of some sorted hashes."""
        if not len(hashes):
            return np.zeros(len(self.hashes), np.bool_)
        places = np.minimum(np.searchsorted(hashes, self.hashes), len(hashes) - 1)
        return (hashes[places] == self.hashes) & (self.weights > 0)

    def with_web_signs(self) -> NDArray[np.int64]:
        """The numbers of the lines that have signs of a web site."""
        lines = np.unique(np.searchsorted(self.ends, places_of_signs(self.text, self.codes), "right"))
        lines = lines[self.weights[lines] > 0]
        return np.array([number for number in lines if has_web_signs(self.line(number))], np.int64)


def _odd(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes of letters alone, sorted: the lowest bit, which says whether a line has signs of a web site, becomes 1."""
    return np.unique(hashes | np.uint64(1))


class _Passage:
    """One text on its way through all rules. It comes in blocks, which may be cut anywhere.

    Args:
        recurring: the sorted hashes of the lines to remove.
        counts: what is removed is added to it.
        look: called with the lines after rules 2 to 5, before any is removed. It may not see lines that are too long.
    """

    def __init__(
        self, recurring: NDArray[np.uint64], counts: Counter[str], look: Callable[[_Lines], None] = lambda lines: None
    ) -> None:
        self._recurring, self._counts, self._look = recurring, counts, look
        self._markup = _Markup(counts)
        self._rest = ""  # the line that has not ended yet
        self._inside_long = False  # its beginning has been given out, because it is too long
        self._after_blank = False

    def add(self, block: str) -> str:
        """The next text that is clean."""
        pieces = range(0, len(block), _PIECE)
        return "".join(self._add_lines(self._markup.add(block[start : start + _PIECE])) for start in pieces)

    def close(self) -> str:
        """The rest, after the last block."""
        text = self._add_lines(self._markup.close())
        rest, self._rest = self._rest, ""
        return text + self._clean_lines(rest)

    def _add_lines(self, text: str) -> str:
        long = ""
        if self._inside_long:
            end = text.find("\n") + 1
            if not end:
                return text
            long, text = text[:end], text[end:]
            self._inside_long = False

        text = self._rest + text
        end = text.rfind("\n") + 1
        clean = long + self._clean_lines(text[:end])
        self._rest = text[end:]
        if len(self._rest) > LONGEST:
            clean += self._rest
            self._rest, self._inside_long, self._after_blank = "", True, False
        return clean

    def _clean_lines(self, text: str) -> str:
        if not text:
            return ""
        lines = _Lines(text)
        self._look(lines)
        kept = ~lines.among(self._recurring)
        self._note("recurring lines", lines, ~kept)

        # of blank lines in a row, the first is kept
        blank = lines.blank[kept]
        second = blank & np.concatenate([[self._after_blank], blank[:-1]])[: len(blank)]
        if len(blank):
            self._after_blank = bool(blank[-1])
        if len(second) == len(kept) and not second.any():
            return text
        removed = np.zeros(len(kept), np.bool_)
        removed[np.flatnonzero(kept)[second]] = True
        self._note("runs of blank lines", lines, removed)

        # the lines between two edges are all kept, or all removed
        kept &= ~removed
        edges = np.flatnonzero(np.diff(kept, prepend=False, append=False))
        places = np.append(lines.starts, len(text))[edges].tolist()
        return "".join(text[start:end] for start, end in zip(places[::2], places[1::2], strict=True))

    def _note(self, rule: str, lines: _Lines, removed: NDArray[np.bool_]) -> None:
        if number := int(removed.sum()):
            _note(self._counts, rule, number, int((lines.ends - lines.starts)[removed].sum()))


# Finding what recurs

_NONE = np.empty(0, np.uint64)
CANDIDATE = np.dtype([("hash", "<u8"), ("documents", "<u4"), ("occurrences", "<u4"), ("document", "<u4")])


class LineCounter:
    """Notes in a table which lines a document has that may be a web site's.

    The text is looked at after rules 2 to 5, as the cleaner will see it. Lines with signs of a web site get an odd
    hash, long lines without signs an even one; other lines are not noted. Each document needs a counter of its own;
    several threads may fill one table.

    Args:
        table: gets the hashes.
        document: the document's number.

    Attributes:
        counts: what all rules but the first would remove from the document; see `rule_rows`.
    """

    def __init__(self, table: HashTable, document: int) -> None:
        self.counts: Counter[str] = Counter()
        self._table, self._document = table, document
        self._passage = _Passage(_NONE, self.counts, self._look)

    def add(self, block: str) -> None:
        """Read on in the document."""
        self._passage.add(block)

    def close(self) -> None:
        """Say that the document is complete."""
        self._passage.close()

    def _look(self, lines: _Lines) -> None:
        with_signs = lines.with_web_signs()
        is_long = lines.weights >= LONG
        is_long[with_signs] = False
        hashes = np.concatenate([lines.hashes[with_signs], lines.hashes[is_long] & ~np.uint64(1)])
        if len(hashes):
            self._table.add(self._document, hashes)


def recurring_hashes(table: HashTable, group_of: Sequence[int]) -> NDArray[Any]:
    """The hashes that occur often enough to be a web site's line: at most `MOST_LINES`, the most frequent first.

    A part of the table is in memory at a time. Copies of one book must not make all its lines recurrent: they count as
    one document, which has a line as often as the copy in which it stands most often.

    Args:
        table: filled by `LineCounter`.
        group_of: for each document the number of its group of copies.

    Returns:
        An array with the fields of `CANDIDATE`: the hash, the number of documents and of occurrences, and the first
        document that has it.
    """
    groups = np.asarray(group_of, np.int64)
    many = max(MANY, -(-len(np.unique(groups)) // 100))
    best = np.empty(0, CANDIDATE)
    for rows in table.parts():
        best = np.concatenate([best, _recurring_in(rows, groups, many)])
        order = np.lexsort((best["hash"], -best["occurrences"].astype(np.int64)))
        best = best[order[:MOST_LINES]]
    return best


def _recurring_in(rows: NDArray[Any], groups: NDArray[np.int64], many: int) -> NDArray[Any]:
    """The candidates among rows that are sorted by hash and document."""

    def starts(*keys: NDArray[Any]) -> NDArray[np.int64]:
        """Where a key differs from the one before."""
        if not len(keys[0]):
            return np.empty(0, np.int64)
        new = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
        return np.concatenate([[0], np.flatnonzero(new) + 1])

    # most hashes occur once or twice: leave them out at once
    first = starts(rows["hash"])
    sizes = np.diff(first, append=len(rows))
    rows = rows[np.repeat(sizes >= min(OFTEN, many), sizes)]
    if not len(rows):
        return np.empty(0, CANDIDATE)

    # how often a hash occurs in a document; the greatest number in a group; the sum over all groups
    first = starts(rows["hash"], rows["document"])
    times = np.diff(first, append=len(rows))
    hashes, documents = rows["hash"][first], rows["document"][first]
    group = groups[documents]
    order = np.lexsort((group, hashes))
    hashes, documents, group, times = hashes[order], documents[order], group[order], times[order]
    first = starts(hashes, group)
    hashes, times = hashes[first], np.maximum.reduceat(times, first)
    documents = np.minimum.reduceat(documents, first)
    first = starts(hashes)

    found = np.empty(len(first), CANDIDATE)
    found["hash"], found["document"] = hashes[first], np.minimum.reduceat(documents, first)
    found["documents"] = np.diff(first, append=len(hashes))
    found["occurrences"] = np.add.reduceat(times, first)
    has_signs = found["hash"] % 2 == 1
    return found[np.where(has_signs, found["occurrences"] >= OFTEN, found["documents"] >= many)]


@dataclass(frozen=True)
class RecurringLine:
    """A line that a web site has put into texts.

    Attributes:
        text: the line, without white space around it, as it stands where it was found first.
        documents: in how many it stands; copies of one book count as one.
        occurrences: how often it stands there.
        hash: of its letters, for `Cleaner`.
        has_signs: whether it has signs of a web site; else it stands in many documents.
    """

    text: str
    documents: int
    occurrences: int
    hash: int
    has_signs: bool


def recurring_lines(candidates: NDArray[Any], read: Callable[[int], Iterable[str]]) -> list[RecurringLine]:
    """Look up the texts of what recurs, and leave out verse and speech without signs of a web site.

    Args:
        candidates: from `recurring_hashes`.
        read: gives a document's blocks again. Documents are read one after the other, each up to its last candidate.

    Returns:
        The lines, the most frequent first. A candidate that no longer stands where it stood is left out.
    """
    texts: dict[int, str] = {}
    for document in np.unique(candidates["document"]).tolist():
        texts |= _texts_of(candidates["hash"][candidates["document"] == document], read(document))

    found = []
    for candidate in candidates:
        text, has_signs = texts.get(int(candidate["hash"])), bool(candidate["hash"] % 2)
        if text is not None and (has_signs or not is_verse_or_speech(text)):
            counts = int(candidate["documents"]), int(candidate["occurrences"])
            found.append(RecurringLine(text, *counts, int(candidate["hash"]), has_signs))
    return found


def _texts_of(hashes: NDArray[np.uint64], blocks: Iterable[str]) -> dict[int, str]:
    """The lines of a document that have some hashes, by hash."""
    texts: dict[int, str] = {}
    wanted, odd = set(hashes.tolist()), _odd(hashes)

    def look(lines: _Lines) -> None:
        found = lines.among(odd)
        if not found.any():
            return
        with_signs = set(lines.with_web_signs().tolist())
        for number in np.flatnonzero(found).tolist():
            key = int(lines.hashes[number]) - (number not in with_signs)
            if key in wanted:
                texts.setdefault(key, lines.line(number).strip())

    passage = _Passage(_NONE, Counter(), look)
    for block in blocks:
        passage.add(block)
        if len(texts) == len(wanted):
            return texts
    passage.close()
    return texts


# Cleaning


class Cleaner:
    """Gives texts without what the six `RULES` remove; what is kept stays as it was.

    Args:
        hashes: of the lines to remove, from `RecurringLine`.

    Attributes:
        fingerprint: a SHA-256 of the rules and the lines, in hexadecimal.
    """

    def __init__(self, hashes: Iterable[int] = ()) -> None:
        self._hashes = _odd(np.array(list(hashes), np.uint64))
        rules = (1, LONGEST, RULES, _UNWANTED.pattern, _ENTITY.pattern, _TAG.pattern, _ENDS_LINE.pattern)
        self.fingerprint = hashlib.sha256(repr(rules).encode() + self._hashes.astype("<u8").tobytes()).hexdigest()

    def clean(self, blocks: Iterable[str], counts: Counter[str] | None = None) -> Iterator[str]:
        """A text, as clean blocks. It takes constant memory, and does not depend on where the blocks are cut.

        - Lines that recur are removed. Their numerals, punctuation and white space do not matter.
        - Control characters are removed, but newlines and tabs stay.
        - Zero-width characters are removed, but the two joiners stay.
        - HTML entities become what they mean; a non-breaking space becomes a space.
        - HTML tags with a known name are removed; one that ends a line, such as <br> or </p>, becomes a newline.
        - Of blank lines in a row, the first stays.

        A clean text stays as it is.

        Args:
            blocks: the text.
            counts: gets what was removed; see `rule_rows`.
        """
        passage = _Passage(self._hashes, Counter() if counts is None else counts)
        for block in blocks:
            if text := passage.add(block):
                yield text
        if text := passage.close():
            yield text


# Tables


def rule_rows(counts: Counter[str]) -> list[dict[str, Any]]:
    """What each rule removed, as rows for a table or a manifest.

    The characters are those by which the text became shorter: of "<br>", which becomes a newline, three.
    """
    return [{"rule": rule, "removed": counts[rule], "characters": counts[f"{rule}, characters"]} for rule in RULES]


def line_rows(lines: Iterable[RecurringLine]) -> list[dict[str, Any]]:
    """The recurring lines, as rows for a table. Their texts come from files and are not safe as HTML."""
    why = {True: "signs of a web site", False: "in many documents"}
    return [
        {"line": line.text, "documents": line.documents, "times": line.occurrences, "why": why[line.has_signs]}
        for line in lines
    ]
