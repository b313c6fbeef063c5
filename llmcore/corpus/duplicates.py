"""Documents that stand in a library twice: exact copies, other editions, cut texts, and parts of collections.

Two texts are compared by the passages that they have in common. A passage is eight letters in a row; white space,
punctuation and line breaks between them are passed over. In scripts that put spaces between words, it is eight words.
One passage in sixteen is looked at: the hash of the passage decides which, so that it is the same one in every document
(Manber 1994, "Finding similar files in a large file system"; Broder 1997, "On the resemblance and containment of
documents"). Passages and not sentences, because a sentence is lost with any of its letters: where 5% of the letters
are changed, two texts have 61% of their passages in common, but only 37% of their sentences.

What is not found: simplified and traditional characters count as different. So do a translation and its original. Of
more than 16 editions of one book, those are not found that each have more than 1/8 of their passages for themselves.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmcore.corpus.hash_table import HashTable

LETTERS = 8  # of a passage, or words; a power of two
SAMPLED = 16  # one passage in so many is looked at
LEAST_PASSAGES = 16  # sampled; shorter documents, of some 250 letters, are compared exactly
LEAST_SHARE = 0.45  # of passages in common: half of a text, less what a sample of 750 may miss
COMMON = 16  # a passage in more documents than this is common: an advertisement, a licence, or a book in many copies
OWN_SHARE = 1 / 8  # a document with fewer passages that are not common is compared by all its passages

LONGEST_WORD = 64  # letters; a longer word is cut
WORD_BASE, PASSAGE_BASE, MIXER = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0xBF58476D1CE4E5B9  # odd, without a pattern
ALONE, AFTER_GAP = np.uint32(1 << 31), np.uint32(1 << 30)  # marks of a letter: a unit by itself; the first of a word
INSIDE = np.uint32(1)  # a sign inside a word that is passed over
WITHOUT_SPACES = (  # scripts whose letters count one by one
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0xA4CF),  # Chinese, Japanese, Yi
    (0xF900, 0xFAFF),  # Chinese, for compatibility
    (0x1B000, 0x1B2FF),  # old kana
    (0x20000, 0x3FFFF),  # rare Chinese
)
MEETINGS = 1 << 24  # of two documents in a passage, that are counted in one turn, 8 bytes each


# Passages of a text


class PassageReader:
    """Reads one document, a block of text after the other, and adds its passages to a table.

    Where a block ends makes no difference. At most eight words of at most 64 letters are kept between two blocks.
    """

    def __init__(self, table: HashTable, document: int) -> None:
        self._table, self._document = table, document
        self._rest = np.empty(0, np.uint32)  # the last eight units; the next block may go on with the last
        self._ends_in_gap = True
        self._letters = 0

    def read(self, block: str) -> None:
        """Add the passages that end in this block."""
        codes = np.frombuffer(block.encode("utf-32-le", "surrogatepass"), np.uint32)
        folded = _letters().take(codes)
        if (folded == INSIDE).any():
            folded = folded[folded != INSIDE]
        places = np.flatnonzero(folded != 0)
        if not len(places):
            self._ends_in_gap |= len(folded) > 0
            return

        self._letters += len(places)
        letters = folded.take(places)
        is_after_gap = np.diff(places, prepend=-1) > 1
        is_after_gap[0] |= self._ends_in_gap
        letters |= np.where(is_after_gap, AFTER_GAP, np.uint32(0))
        self._ends_in_gap = not folded[-1]

        letters = np.concatenate([self._rest, letters])
        units, starts = _units(letters)
        self._table.add(self._document, _sampled_passages(units[:-1]))
        self._rest = letters[starts[-LETTERS:][0] :].copy()

    def finish(self) -> int:
        """Add the last passage. Returns how many letters and digits the document has. Read nothing after this."""
        if len(self._rest):
            self._table.add(self._document, _sampled_passages(_units(self._rest)[0]))
        return self._letters


@functools.cache
def _letters() -> NDArray[np.uint32]:
    """For each code point the letter or digit that it counts as, with the mark ALONE where it has it; else 0.

    Case, width and accents make no difference: `Ａ` and `á` count as `a`, half-width `ｶ` and `ガ` as `カ`. Accents that
    are code points of their own, and signs without width, are INSIDE: they do not end a word.
    """
    table = np.zeros(0x110000, np.uint32)
    for code in (*range(0x40000), *range(0xE0000, 0xE0200)):  # no letter and no accent stands elsewhere
        character = chr(code)
        if character.isalnum():
            lower = character.lower()
            parts = [part for part in unicodedata.normalize("NFKD", lower) if part.isalnum()]
            table[code] = ord(parts[0] if len(parts) == 1 else lower[0]) if parts else INSIDE
        elif unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"):
            table[code] = INSIDE
    for first, last in WITHOUT_SPACES:
        table[(table >= first) & (table <= last)] |= ALONE
    return table


def _units(letters: NDArray[np.uint32]) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
    """A number for each word or letter that stands alone, and where it starts. There is at least one letter."""
    is_alone = letters >= ALONE
    is_start = is_alone | ((letters & AFTER_GAP) > 0)
    is_start[1:] |= is_alone[:-1]
    is_start[0] = True
    numbers = (letters & ~AFTER_GAP).astype(np.uint64)
    starts = np.flatnonzero(is_start)
    if len(starts) == len(letters):
        return numbers, starts

    places = np.arange(len(letters)) - np.repeat(starts, np.diff(starts, append=len(letters)))  # inside its word
    places %= LONGEST_WORD
    starts = np.flatnonzero(places == 0)
    return np.add.reduceat(numbers * _powers()[places], starts), starts


@functools.cache
def _powers() -> NDArray[np.uint64]:
    return np.array([pow(WORD_BASE, place, 1 << 64) for place in range(LONGEST_WORD)], np.uint64)


def _sampled_passages(units: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The different hashes of all passages that are looked at: polynomials modulo 2^64, mixed.

    Source of the mixer: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    hashes, width = units, 1
    while width < LETTERS:  # a passage is two halves
        power = np.uint64(pow(PASSAGE_BASE, width, 1 << 64))
        hashes = hashes[:-width] * power + hashes[width:]
        width *= 2
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(MIXER)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(PASSAGE_BASE)
    hashes = np.sort(hashes.take(np.flatnonzero(hashes <= np.uint64((1 << 64) // SAMPLED - 1))))
    return hashes[np.diff(hashes, prepend=~hashes[:1]) != 0]


# Copies


@dataclass(frozen=True)
class Overlap:
    """Two documents with much in common.

    Attributes:
        first: number of the longer one.
        second: number of the shorter one.
        share: of the shorter one's passages, those that the longer one has too, 0 to 1.
    """

    first: int
    second: int
    share: float


@dataclass(frozen=True)
class Copies:
    """Which documents are copies. The lists have an entry for each document.

    Attributes:
        copy_of: number of the longer, kept document that holds its text or most of it; None if it is kept itself.
        shares: of its passages, those in that document, 0 to 1; 1.0 for an exact copy; 0.0 if it is kept.
        groups: the same number for documents that are joined by overlaps, directly or through others: the number of the
            longest of them.
        overlaps: the pairs that are not exact copies, the longest documents first.
    """

    copy_of: list[int | None]
    shares: list[float]
    groups: list[int]
    overlaps: list[Overlap]


def find_copies(
    table: HashTable,
    letters: Sequence[int],
    names: Sequence[str],
    hashes: Sequence[str],
    least: float = LEAST_SHARE,
) -> Copies:
    """Which documents are copies of others or of parts of them, and which belong into the same split.

    The longest document is kept. A shorter one is a copy if at least a share `least` of its passages is in one document
    that is kept. So a document is never left out for the sake of another one that is left out too.

    Args:
        table: the passages of all documents. Documents are numbered from 0.
        letters: how many each document has, see `PassageReader.finish`.
        names: of two documents of the same length, the one with the shorter name is kept: `a.txt`, not `a(1).txt`.
        hashes: of their texts. Documents with the same hash are exact copies.
        least: above 0, at most 1.
    """
    leaders: dict[str, int] = {}  # the first of all exact copies stands for all of them
    for number in sorted(range(len(names)), key=lambda number: (-letters[number], len(names[number]), names[number])):
        leaders.setdefault(hashes[number], number)
    order = list(leaders.values())
    overlaps = find_overlaps(table, order, least)

    # the longest first, each is kept or a copy of one that is kept
    longer: dict[int, list[Overlap]] = {number: [] for number in order}
    for overlap in overlaps:
        longer[overlap.second].append(overlap)
    kept: dict[int, tuple[int, float]] = {}
    for number in order:
        found = [overlap for overlap in longer[number] if kept[overlap.first][0] == overlap.first]
        best = max(found, key=lambda overlap: overlap.share, default=Overlap(number, number, 1.0))
        kept[number] = best.first, best.share

    groups = _joined(order, overlaps)
    standing = [(number, *kept[leaders[text]], groups[leaders[text]]) for number, text in enumerate(hashes)]
    return Copies(
        copy_of=[first if first != number else None for number, first, _, _ in standing],
        shares=[share if first != number else 0.0 for number, first, share, _ in standing],
        groups=[group for _, _, _, group in standing],
        overlaps=overlaps,
    )


def _joined(order: Sequence[int], overlaps: Sequence[Overlap]) -> dict[int, int]:
    """For each document the first, in this order, of all that are joined to it by overlaps."""
    rank = {number: place for place, number in enumerate(order)}
    parent = {number: number for number in order}

    def first_of(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]  # a shorter way for the next call
        return number

    for overlap in overlaps:
        first, other = sorted((first_of(overlap.first), first_of(overlap.second)), key=rank.__getitem__)
        parent[other] = first
    return {number: first_of(number) for number in order}


def find_overlaps(table: HashTable, order: Sequence[int], least: float = LEAST_SHARE) -> list[Overlap]:
    """All pairs of documents with at least this share of passages in common, in the given order.

    A passage in more than 16 documents is common. It does not count: an advertisement makes no two books alike. Only a
    document with hardly a passage of its own (under 1/8) is compared by all its passages: it is a book in many copies,
    or in many collections. Each of its passages is then looked for in the 16 longest documents that have it.

    In memory are one part of the table, and up to 16 million times that two documents have a passage in common: some
    350 MB at most, and a few hundred bytes for each document and each pair found. Where there are more, the table is
    read again for the next documents.

    Args:
        table: the passages.
        order: the documents to compare, the longest first. Others in the table are left out.
        least: smallest share, above 0, at most 1.
    """
    number = np.array(order, np.int64)
    rank = np.full(number.max(initial=0) + 2, -1, np.int64)  # the last entry is for all documents with higher numbers
    rank[number] = np.arange(len(number))

    # how many passages has each document, how many are its own, and how often do others have them?
    passages, own, met, own_met = np.zeros((4, len(number)))
    for ranks, holders, _ in _passages_by_part(table, rank):
        others = np.minimum(holders - 1, COMMON)
        is_own = holders <= COMMON
        passages += np.bincount(ranks, minlength=len(number))
        met += np.bincount(ranks, others, minlength=len(number))
        own += np.bincount(ranks[is_own], minlength=len(number))
        own_met += np.bincount(ranks[is_own], others[is_own], minlength=len(number))
    has_own = own >= OWN_SHARE * passages
    counted = np.where(has_own, own, passages)
    is_compared = counted >= LEAST_PASSAGES

    # compare them, in several turns if there is much to count
    turns = np.cumsum(np.where(has_own, own_met, met) * is_compared) // MEETINGS
    found: list[tuple[int, int, float]] = []
    for turn in np.unique(turns):
        first, second, common = _count_common(table, rank, is_compared & (turns == turn), has_own)
        share = common / counted[second]
        enough = share >= least
        found += zip(first[enough].tolist(), second[enough].tolist(), share[enough].tolist(), strict=True)
    return [Overlap(order[first], order[second], share) for first, second, share in sorted(found)]


def _count_common(
    table: HashTable, rank: NDArray[np.int64], is_compared: NDArray[np.bool_], has_own: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of a document and a shorter one that is compared, by rank, and how many passages both have."""
    meetings = [np.empty(0, np.int64)]
    for ranks, holders, places in _passages_by_part(table, rank):
        rows = np.flatnonzero((places > 0) & is_compared[ranks] & ((holders <= COMMON) | ~has_own[ranks]))
        for longer in range(COMMON):  # the longest document with the passage, the second, ...
            rows = rows[places[rows] > longer]
            meetings.append(ranks[rows - places[rows] + longer] << 32 | ranks[rows])
    pairs = np.concatenate(meetings)
    del meetings
    pairs.sort()  # in place: np.unique would need twice the memory
    is_new = np.ones(len(pairs), bool)
    is_new[1:] = pairs[1:] != pairs[:-1]
    starts = np.flatnonzero(is_new)
    common = np.diff(starts, append=len(pairs))
    pairs = pairs[starts]
    return pairs >> 32, pairs & 0xFFFFFFFF, common


def _passages_by_part(
    table: HashTable, rank: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """For each part, sorted by passage: a document's rank, how many have the passage, and its place among these."""
    for rows in table.parts():
        rows = rows[rank.take(rows["document"], mode="clip") >= 0]
        hashes = rows["hash"]
        passage = np.cumsum(np.diff(hashes, prepend=hashes[:1]) != 0, dtype=np.int64)
        keys = np.sort(passage << 32 | rank[rows["document"]])
        keys = keys[np.diff(keys, prepend=-1) != 0]  # each document once
        holders = np.bincount(keys >> 32)
        starts = np.cumsum(holders) - holders
        yield keys & 0xFFFFFFFF, np.repeat(holders, holders), np.arange(len(keys)) - np.repeat(starts, holders)
