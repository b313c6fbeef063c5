"""Documents that stand in a library twice: exact copies, other editions, cut texts, and parts of collections.

Two texts are compared by the passages that they have in common. A passage is eight letters in a row; white space,
punctuation and line breaks between them are passed over. In scripts that put spaces between words, it is eight words.
One passage in sixteen is looked at: the hash of the passage decides which, so that it is the same one in every document
(Manber 1994, "Finding similar files in a large file system"; Broder 1997, "On the resemblance and containment of
documents"). Passages and not sentences, because a sentence is lost with any of its letters: where 5% of the letters
are changed, two texts have 66% of their passages in common, but fewer than half of their sentences.

Simplified and traditional characters count as different.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmcore.corpus.hash_table import PARTS, HashTable

LETTERS = 8  # of a passage, or words; a power of two
SAMPLED = 16  # one passage in so many is looked at
LEAST_PASSAGES = 16  # sampled; shorter documents, of some 250 letters, are compared exactly
LEAST_SHARE = (
    0.45  # of passages in common: half of a text, less what sampling may miss (2.7 deviations of 750 passages)
)
COMMON = 16  # a passage in more documents than this is common: an advertisement, a licence, or a book in many copies
OWN_SHARE = 1 / 8  # a document with fewer passages that are not common is compared by all its passages

LONGEST_WORD = 64  # letters; a longer word is cut
WORD_BASE, PASSAGE_BASE, MIXER = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0xBF58476D1CE4E5B9  # odd, without a pattern
ALONE, AFTER_GAP = np.uint32(1 << 31), np.uint32(1 << 30)  # marks of a letter: a unit by itself; the first of a word
WITHOUT_SPACES = (  # scripts whose letters count one by one
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0xA4CF),  # Chinese, Japanese, Yi
    (0xF900, 0xFAFF),  # Chinese, for compatibility
    (0x1B000, 0x1B2FF),  # old kana
    (0x20000, 0x3FFFF),  # rare Chinese
)
HELD_PAIRS = 1 << 22  # pairs of documents, 8 bytes each, that wait before they are counted


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
        places = np.flatnonzero(folded != 0)
        if not len(places):
            self._ends_in_gap |= bool(block)
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
    """For each code point the letter or digit that it counts as, with the mark ALONE where it has it; 0 for all others.

    Case, width and accents make no difference: `Ａ` and `á` count as `a`, half-width `ｶ` and `ガ` as `カ`.
    """
    table = np.zeros(0x110000, np.uint32)
    for code, character in enumerate(map(chr, range(len(table)))):
        if character.isalnum():
            lower = character.lower()
            parts = [part for part in unicodedata.normalize("NFKD", lower) if part.isalnum()]
            table[code] = ord(parts[0] if len(parts) == 1 else lower[0])
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
    hashes = np.sort(hashes.take(np.flatnonzero(hashes < np.uint64((1 << 64) // SAMPLED))))
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

    The table is read twice, a part at a time. In memory are one part, and 12 bytes for each pair of documents with a
    passage in common, three times that while they are counted. A part is a random sample of all passages, so pairs with
    far too few of them (4 standard deviations) are dropped on the way.

    Args:
        table: the passages.
        order: the documents to compare, the longest first. Others in the table are left out.
        least: smallest share, above 0, at most 1.
    """
    number = np.array(order, np.int64)
    rank = np.full(number.max(initial=0) + 2, -1)  # the last entry is for all documents with higher numbers
    rank[number] = np.arange(len(number))

    # how many passages has each, and by how many of them is it compared?
    passages, own = np.zeros(len(number), np.int64), np.zeros(len(number), np.int64)
    for _, ranks, holders in _passages_by_part(table, rank):
        passages += np.bincount(ranks, minlength=len(number))
        own += np.bincount(ranks[holders <= COMMON], minlength=len(number))
    has_own = own >= OWN_SHARE * passages
    counted = np.where(has_own, own, passages)
    is_compared = counted >= LEAST_PASSAGES

    # how many do two of them have in common?
    pairs = _PairCounts()
    for part, (hashes, ranks, holders) in enumerate(_passages_by_part(table, rank), start=1):
        shared = np.flatnonzero(holders > 1)
        shared = shared[np.lexsort((ranks[shared], hashes[shared]))]
        ranks, holders, place = ranks[shared], holders[shared], _places(hashes[shared])
        rows = np.flatnonzero(is_compared[ranks] & ((holders <= COMMON) | ~has_own[ranks]))
        for longer in range(COMMON):  # the longest that has the passage, the second, ...
            rows = rows[place[rows] > longer]
            pairs.add(ranks[rows - place[rows] + longer], ranks[rows])
        pairs.drop_below(least * counted * part / PARTS)

    first, second, common = pairs.counts()
    share = common / np.maximum(counted[second], 1)
    enough = share >= least
    found = zip(number[first[enough]].tolist(), number[second[enough]].tolist(), share[enough].tolist(), strict=True)
    return [Overlap(*pair) for pair in found]


def _passages_by_part(
    table: HashTable, rank: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]]:
    """For each part: sorted hashes, the rank of a document that has each, and how many have it. None stands twice."""
    for rows in table.parts():
        rows = rows[rank.take(rows["document"], mode="clip") >= 0]
        is_new = np.ones(len(rows), bool)
        is_new[1:] = rows[1:] != rows[:-1]
        rows = rows[is_new]
        _, holders = np.unique(rows["hash"], return_counts=True)
        yield rows["hash"], rank[rows["document"]], np.repeat(holders, holders)


def _places(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Of each of these sorted hashes, its place among the equal ones, from 0."""
    starts = np.flatnonzero(np.diff(hashes, prepend=~hashes[:1]))
    return np.arange(len(hashes)) - np.repeat(starts, np.diff(starts, append=len(hashes)))


class _PairCounts:
    """How often each pair of documents was added."""

    def __init__(self) -> None:
        self._pairs, self._counts = np.empty(0, np.uint64), np.empty(0, np.uint32)
        self._held: list[NDArray[np.uint64]] = []
        self._held_pairs = 0

    def add(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
        self._held.append((first << 32 | second).astype(np.uint64))
        self._held_pairs += len(first)
        if self._held_pairs >= HELD_PAIRS:
            self._count()

    def drop_below(self, expected: NDArray[np.float64]) -> None:
        """If there are many pairs, drop those that were added far less often than is expected of the second."""
        if len(self._pairs) + self._held_pairs >= HELD_PAIRS:
            _, second, counts = self.counts()
            is_kept = counts >= (expected - 4 * np.sqrt(expected))[second]
            self._pairs, self._counts = self._pairs[is_kept], self._counts[is_kept]

    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]]:
        """Sorted pairs: the first of each, the second, and how often it was added."""
        self._count()
        pairs = self._pairs.astype(np.int64)
        return pairs >> 32, pairs & 0xFFFFFFFF, self._counts

    def _count(self) -> None:
        new, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *self._held]), return_counts=True)
        self._held, self._held_pairs = [], 0
        pairs = np.concatenate([self._pairs, new])
        counts = np.concatenate([self._counts, counts.astype(np.uint32)])
        by_pair = np.argsort(pairs, kind="stable")  # merges two sorted arrays
        pairs, counts = pairs[by_pair], counts[by_pair]
        starts = np.flatnonzero(np.diff(pairs, prepend=~pairs[:1]))
        self._pairs = pairs[starts]
        self._counts = np.add.reduceat(counts, starts, dtype=np.uint32)
