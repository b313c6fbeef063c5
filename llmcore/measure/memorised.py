"""What a model has learned by heart: the runs of a text that stand word for word in the training tokens.

A run lies within one document: the end of a document, eos, matches nothing. Every run of `least` tokens or more is
found, over any number of training tokens in constant memory:

1. A sliding window over the training tokens, of `least` tokens, has a hash. Where the hash is none of the texts'
   windows', no run begins. A hash is only a reason to look: what is found does not depend on it.
2. Where one may begin, the training tokens are looked up among all endings of the texts, sorted (a suffix array: Manber
   and Myers, SIAM J. Comput. 22 (1993)). The two neighbours there have the most tokens in common with them.
3. Two sorted neighbours share their beginnings, so each hands its run on to the next, as far as they are the same.

So the time grows with the places where a run may begin, not with the pairs of such places: some ten microseconds each,
even in a text of one token, or in training text that has one line a million times.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmcore.checkpoint import Checkpoint, has_finite_weights
from llmcore.dataset import DatasetError, TokenDataset, verify_dataset
from llmcore.files import display_path, resolve
from llmcore.generate import generate_ids
from llmcore.measure.repetition import distinct
from llmcore.model import Transformer

LEAST = 8  # tokens of a run
BLOCK = 1 << 20  # training tokens read at a time
LOOKED_UP = 1 << 14  # places looked up at a time
STRIDE = 16  # tokens compared at a time
SHORT_RUN = 50  # steps: a shorter run has not learned much before its end
BATCH = 50  # texts written at once
MULTIPLIER = 0x9E3779B1  # of the windows' hash: odd, with bits all over
PLACE_BITS = 40  # of a number that holds a run's length above, and its place below
LAST_PLACE = (1 << PLACE_BITS) - 1
LONGEST_TEXT = 1 << 22  # tokens of all texts together
NO_TOKEN, TEXT_END = -2, -1  # after the last training token; after each text, and in place of eos
Ints = NDArray[np.int64]


class Run(NamedTuple):
    """Tokens of a text that stand in the training tokens word for word.

    Attributes:
        start: in the text, the first token.
        end: in the text, after the last token.
        place: in the training tokens, where the same tokens begin; one of the places, if there are several.
    """

    start: int
    end: int
    place: int


class Source(NamedTuple):
    """Where a run stands in the data set: its document's name, and the tokens of the document before it."""

    name: str
    offset: int


def recited(
    texts: Sequence[Sequence[int]],
    data: TokenDataset | ArrayLike,
    least: int = LEAST,
    *,
    eos_id: int | None = None,
) -> list[list[Run]]:
    """The runs of each text that stand in the training tokens, each as long as it can be.

    A plain text is given as `tokenizer.encode(text)`. If it begins or ends within one of the training text's tokens,
    its first or last tokens may be others than there. Then the run begins a few tokens later, or ends earlier.

    Args:
        texts: ids of each text.
        data: a data set's split, whose tokens are checked as they are read; or ids, (tokens,).
        least: tokens of the shortest run that counts, 1 or more.
        eos_id: ends a document. No run holds it.

    Returns:
        For each text its runs in order. They may overlap, but none lies within another.

    Raises:
        ValueError: for `least` out of range, or texts of more than four million tokens.
        DatasetError: if the data set is damaged.
    """
    if least < 1:
        raise ValueError(f"least={least} must be 1 or more")
    query = np.concatenate([np.empty(0, np.int64), *(np.array([*text, TEXT_END], np.int64) for text in texts)])
    if len(query) > LONGEST_TEXT:
        raise ValueError(f"the texts have {len(query):,} tokens, more than {LONGEST_TEXT:,}: look at fewer at a time")
    if not len(query):
        return [[] for _ in texts]
    query[query == eos_id] = TEXT_END

    # the longest run at each ending of the texts that a neighbour in the order has: its length, and its place
    order, shared = sorted_endings(query)
    found = np.zeros(len(order), np.int64)
    tokens = data.tokens if isinstance(data, TokenDataset) else np.asarray(data)
    read = data.read if isinstance(data, TokenDataset) else lambda start, end: tokens[start:end]
    for places in _candidates(query, read, len(tokens), least):
        rank, before, after = _look_up(query, order, tokens, places)
        for neighbour, same in ((rank - 1, before), (rank, after)):
            worth = same >= least
            np.maximum.at(found, neighbour[worth], same[worth] << PLACE_BITS | (LAST_PLACE - places[worth]))
    best = np.zeros_like(found)
    best[order] = _handed_on(found.tolist(), shared.tolist())

    # by text: a run that ends no later than the one that began before it lies within that one
    runs, first = [], 0
    for text in texts:
        here = best[first : first + len(text)]
        starts = np.arange(len(text))
        ends = starts + np.where(here >> PLACE_BITS >= least, here >> PLACE_BITS, 0)
        new = (ends > starts) & (ends > np.concatenate([[0], ends[:-1]]))
        columns = starts[new].tolist(), ends[new].tolist(), (LAST_PLACE - (here[new] & LAST_PLACE)).tolist()
        runs.append([Run(*run) for run in zip(*columns, strict=True)])
        first += len(text) + 1
    return runs


def window_hashes(tokens: NDArray[Any], size: int) -> NDArray[np.uint32]:
    """A hash of each window of so many tokens, (tokens - size + 1,): a polynomial modulo 2^32.

    Windows of twice the size are put together from two, as in taking a power by squaring.
    """
    single = tokens.astype(np.uint32) * np.uint32(MULTIPLIER)
    hashes, length = single, 1
    for bit in f"{size:b}"[1:]:
        hashes = hashes[: max(0, len(hashes) - length)] * np.uint32(pow(MULTIPLIER, length, 1 << 32)) + hashes[length:]
        length *= 2
        if bit == "1":
            hashes = hashes[:-1] * np.uint32(MULTIPLIER) + single[length:]
            length += 1
    return hashes


def _candidates(query: Ints, read: Callable[[int, int], NDArray[Any]], length: int, least: int) -> Iterator[Ints]:
    """The places among `length` training tokens whose window has the hash of one of the texts', a few at a time."""
    wanted = np.unique(window_hashes(query, least))
    if not len(wanted):
        return
    shift = np.uint32(32 - min(24, max(12, 6 + len(wanted).bit_length())))
    likely = np.zeros(1 << (32 - int(shift)), bool)  # by a hash's upper bits: rejects most windows in little time
    likely[wanted >> shift] = True

    for start in range(0, length - least + 1, BLOCK):
        end = min(length, start + BLOCK + least - 1)
        hashes = window_hashes(read(start, end), least)
        places = np.flatnonzero(likely[hashes >> shift])
        known = wanted[np.searchsorted(wanted, hashes[places]).clip(max=len(wanted) - 1)]
        places = places[known == hashes[places]] + start
        for first in range(0, len(places), LOOKED_UP):
            yield places[first : first + LOOKED_UP]


def sorted_endings(tokens: Ints) -> tuple[Ints, Ints]:
    """Where each ending of the tokens begins, in sorted order, and how many tokens each shares with the next one.

    By doubling: the rank of 2n tokens follows from the ranks of the two halves.

    Returns:
        (tokens,) and (tokens - 1,).
    """
    count, length = len(tokens), 1
    ranks = [np.unique(tokens, return_inverse=True)[1].astype(np.int64)]
    while int(ranks[-1].max()) < count - 1:
        following = np.zeros(count, np.int64)  # 0: the tokens end before
        following[: max(0, count - length)] = ranks[-1][length:] + 1
        ranks.append(np.unique(ranks[-1] * (count + 1) + following, return_inverse=True)[1].astype(np.int64))
        length *= 2
    order = np.argsort(ranks[-1])

    # windows of the same rank are the same: the longest first, then what is left
    shared = np.zeros(count - 1, np.int64)
    for rank in reversed(ranks[:-1]):
        length //= 2
        one, other = order[:-1] + shared, order[1:] + shared
        inside = np.maximum(one, other) < count
        shared += length * (inside & (rank[one.clip(max=count - 1)] == rank[other.clip(max=count - 1)]))
    return order, shared


def _look_up(query: Ints, order: Ints, tokens: NDArray[Any], places: Ints) -> tuple[Ints, Ints, Ints]:
    """Where the training tokens from each place on would stand among the sorted endings of the texts.

    Returns:
        The rank of the next ending there, and how many tokens they share with the ending before it, and with it.
    """
    low, high = np.zeros(len(places), np.int64), np.full(len(places), len(order))
    before, after = np.zeros_like(low), np.zeros_like(low)  # shared with the endings before `low`, and at `high`
    while len(open_ := np.flatnonzero(low < high)):
        middle = (low[open_] + high[open_]) // 2
        starts, there = order[middle], places[open_]
        same = _same(query, starts, tokens, there, np.minimum(before[open_], after[open_]))
        is_less = query[starts + same] < _at(tokens, there + same)
        below, above = open_[is_less], open_[~is_less]
        low[below], before[below] = middle[is_less] + 1, same[is_less]
        high[above], after[above] = middle[~is_less], same[~is_less]
    return low, before, after


def _same(query: Ints, starts: Ints, tokens: NDArray[Any], places: Ints, known: Ints) -> Ints:
    """How many tokens are the same from each start in the texts and from each place; so many are known to be."""
    same, open_, ahead = known.copy(), np.arange(len(starts)), np.arange(STRIDE)
    while len(open_):
        at = same[open_, None] + ahead
        theirs = query[(starts[open_, None] + at).clip(max=len(query) - 1)]
        equal = theirs == _at(tokens, places[open_, None] + at)
        more = np.where(equal.all(1), STRIDE, equal.argmin(1))
        same[open_] += more
        open_ = open_[more == STRIDE]
    return same


def _at(tokens: NDArray[Any], places: Ints) -> Ints:
    """The training tokens at some places, `NO_TOKEN` behind the last one."""
    return np.where(places < len(tokens), tokens[places.clip(max=len(tokens) - 1)].astype(np.int64), NO_TOKEN)


def _handed_on(found: list[int], shared: list[int]) -> list[int]:
    """What was found at each ending or, if that is longer, at others, as far as they begin with the same tokens."""

    def shorter(run: int, most: int) -> int:
        return min(run >> PLACE_BITS, most) << PLACE_BITS | run & LAST_PLACE

    for rank in range(1, len(found)):
        found[rank] = max(found[rank], shorter(found[rank - 1], shared[rank - 1]))
    for rank in range(len(found) - 1, 0, -1):
        found[rank - 1] = max(found[rank - 1], shorter(found[rank], shared[rank - 1]))
    return found


def share(runs: Iterable[Sequence[Run]], lengths: Iterable[int], least: int = LEAST) -> float:
    """The share of the texts' tokens that lie in runs of at least so many tokens; 0 without tokens.

    Args:
        runs: of each text, as from `recited` for as many tokens or fewer.
        lengths: tokens of each text.
        least: tokens of a run.
    """
    covered = 0
    for each in runs:
        reached = 0
        for run in each:
            if run.end - run.start >= least:
                covered += run.end - max(run.start, reached)
                reached = run.end
    return covered / max(1, sum(lengths))


def longest(runs: Iterable[Sequence[Run]]) -> tuple[int, Run] | None:
    """The number of the text with the longest run, and the run; None if there is no run."""
    every = [(number, run) for number, each in enumerate(runs) for run in each]
    return max(every, key=lambda each: each[1].end - each[1].start, default=None)


def data_of(checkpoint: Checkpoint, dataset_dir: str | os.PathLike[str] = "auto") -> Path | None:
    """The folder of the data set that a checkpoint was trained on; with "auto" it is looked for in `outputs/datasets`.

    Returns:
        The folder; None if there is none whose two splits have the hashes in the checkpoint's configuration.

    Raises:
        DatasetError: if a given folder holds no data set, or one that was made with another tokenizer.
    """
    if str(dataset_dir) != "auto":
        folder = resolve(dataset_dir)
        if checkpoint.tokenizer and checkpoint.tokenizer.fingerprint != verify_dataset(folder, ()).get("tokenizer"):
            raise DatasetError(
                f"dataset_dir={display_path(folder)} was made with another tokenizer than the checkpoint"
            )
        return folder
    for file in sorted(resolve("outputs/datasets").glob("*/meta.json")):
        try:
            splits = verify_dataset(file.parent, tokens=False)["splits"]
        except DatasetError:  # it cannot be that one
            continue
        if {name: counts["sha256"] for name, counts in splits.items()} == checkpoint.config.get("data"):
            return file.parent
    return None


def source(data: TokenDataset, place: int) -> Source:
    """The document that holds a place of the training tokens.

    Raises:
        DatasetError: if the manifest does not say the documents' names.
    """
    document = int(np.searchsorted(data.offsets, place, side="right")) - 1
    return Source(data.names[document], place - int(data.offsets[document]))


# What a model writes from memory


class Recall(NamedTuple):
    """How far a model continues passages word for word.

    Attributes:
        whole: the share of passages of which all tokens are continued.
        tokens: the mean number of tokens before the first wrong one.
        error: standard error of that mean.
    """

    whole: float
    tokens: float
    error: float


def passages(data: TokenDataset, count: int, length: int) -> list[list[int]]:
    """Passages of so many tokens, spread evenly over the split, none across the end of a document.

    Where all documents are shorter, the passages are as long as the longest one. A short split has them overlap.
    """
    sizes = np.diff(data.offsets) - 1  # without eos
    length = min(length, int(sizes.max(initial=0)))
    rooms = np.maximum(0, sizes - length + 1) if length > 0 else np.zeros_like(sizes)  # where a passage may begin
    ends = np.cumsum(rooms)
    total = int(rooms.sum())
    numbers = np.unique(np.linspace(0, total - 1, count).round().astype(int)) if total else np.empty(0, int)
    documents = np.searchsorted(ends, numbers, side="right")
    starts = data.offsets[documents] + numbers - (ends - rooms)[documents]
    return [data.read(start, start + length).tolist() for start in starts.tolist()]


def continuations(
    model: Transformer, prompts: Sequence[Sequence[int]], count: int, vocab_size: int, **sampling: Any
) -> list[list[int]]:
    """So many tokens after each prompt, in batches: a text that ends itself goes on with the next one, as in training.

    Raises:
        ValueError: for a parameter of `Sampling` out of range.
    """
    model.eval()
    texts: list[list[int]] = []
    for first in range(0, len(prompts), BATCH):
        steps = generate_ids(model, prompts[first : first + BATCH], count, vocab_size=vocab_size, **sampling)
        texts += map(list, zip(*steps, strict=True))
    return texts


def forced_recall(
    model: Transformer, data: TokenDataset, sizes: Sequence[int] = (8, 32, 128), count: int = 200, follow: int = 16
) -> dict[int, Recall]:
    """Whether a model goes on as the text does, by the number of tokens it is shown.

    The same tokens of each passage are asked for, with more and more of the tokens before them, and the likeliest token
    is always taken: Carlini et al., "Quantifying Memorization", arXiv:2202.07646, section 3. Held-out text shows how
    far one gets by guessing.

    Args:
        model: the language model.
        data: the split to take passages from, see `passages`.
        sizes: tokens of the prompt. Those that do not fit into the context or the documents are left out.
        count: passages.
        follow: tokens to continue.

    Returns:
        A result for each size.
    """
    context = model.config.max_seq_len
    sizes = sorted(size for size in sizes if size + follow <= context)
    if not sizes:
        return {}
    texts = passages(data, count, sizes[-1] + follow)
    results = {}
    for size in sizes:
        if not texts or size + follow > len(texts[0]):
            break
        prompts = [text[-follow - size : -follow] for text in texts]
        answers = np.array(continuations(model, prompts, follow, data.vocab_size, temperature=0))
        right = np.logical_and.accumulate(answers == [text[-follow:] for text in texts], axis=1).sum(1)
        error = float(right.std(ddof=1)) / math.sqrt(len(right)) if len(right) > 1 else math.inf
        results[size] = Recall(float((right == follow).mean()), float(right.mean()), error)
    return results


class Memory:
    """A callback of the trainer that measures what a run knows by heart: five times, in a very short run at its end.

    It adds to the event:

        recited         share of what the model writes after held-out prompts that stands in the training text in runs
                        of `LEAST` tokens or more
        recited_floor   the same of the held-out text that follows these prompts
        distinct, distinct_floor    the share of different pairs of tokens in the same two
        recall, recall_floor        of 8 tokens, how many are continued word for word after 16 (or as many as fit into
                        the context), on training text and on held-out text
        recall_error    standard error of the difference of these two

    Args:
        model: the one that is trained.
        train, val: its data.
        max_steps: of the run.
        texts: how many the model writes, of up to 128 tokens each.
        passages: how many of each split it continues.
    """

    def __init__(
        self,
        model: Transformer,
        train: TokenDataset,
        val: TokenDataset,
        max_steps: int,
        *,
        texts: int = 16,
        passages: int = 400,
    ) -> None:
        self.model, self.train, self.val = model, train, val
        self.max_steps, self.texts, self.passages = max_steps, texts, passages

    def __call__(self, event: dict[str, Any]) -> None:
        """Measure, if the event's step is a fifth of the run or a multiple of it, or the last."""
        interval = self.max_steps // 5 if self.max_steps >= SHORT_RUN else self.max_steps
        due = event["step"] % interval == 0 or event["step"] == self.max_steps
        if due and has_finite_weights(self.model):
            event |= self.measure()

    def measure(self) -> dict[str, float]:
        """What is added to an event; nothing of what the data is too short for."""
        found: dict[str, float] = {}
        prompts, held_out = held_out_prompts(self.val, self.texts)
        if prompts:
            model_texts = continuations(
                self.model, prompts, len(held_out[0]), self.val.vocab_size, temperature=0.8, top_p=0.95, seed=0
            )
            lengths = [len(text) for text in held_out]
            eos_id = int(self.train.tokens[-1])
            for ending, texts in (("", model_texts), ("_floor", held_out)):
                found["recited" + ending] = share(recited(texts, self.train, eos_id=eos_id), lengths)
                found["distinct" + ending] = distinct(texts, 2)
        size = max(1, min(16, self.model.config.max_seq_len - 8))
        both = (self.train, self.val)
        known, guessed = (forced_recall(self.model, data, [size], self.passages, follow=8) for data in both)
        if known and guessed:
            found |= {"recall": known[size].tokens, "recall_floor": guessed[size].tokens}
            found["recall_error"] = math.hypot(known[size].error, guessed[size].error)
        return found


def held_out_prompts(val: TokenDataset, count: int, prompt: int = 32, follow: int = 128) -> tuple[list[list[int]], ...]:
    """Held-out passages in two parts: prompts for a model, and what the author goes on with.

    In documents too short for that, both parts are shorter.
    """
    texts = passages(val, count, prompt + follow)
    cut = min(prompt, len(texts[0]) // 2) if texts else 0
    return ([text[:cut] for text in texts], [text[cut:] for text in texts]) if cut else ([], [])


def begins_to_recall(events: Iterable[Mapping[str, Any]]) -> int | None:
    """The first measured step from which on training text is continued further than held-out text, beyond chance.

    That is by more than two standard errors in this and all later measurements. None if it is not so at the end.
    """
    first = None
    for event in events:
        if "recall" in event:
            if event["recall"] - event["recall_floor"] <= 2 * event["recall_error"]:
                first = None
            elif first is None:
                first = int(event["step"])
    return first
