"""How good is a model: whole documents in bits per byte, with an interval, and a compressor to lay beside it."""

from __future__ import annotations

import lzma
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from tqdm import tqdm

from llmcore.corpus.texts import read_text
from llmcore.dataset import IGNORED
from llmcore.device import autocast, pick_precision
from llmcore.files import display_path
from llmcore.model import Transformer
from llmcore.tokenizer import Tokenizer

MIN_DOCUMENTS = 5  # documents for an interval: fewer cannot show how much documents differ
RESAMPLES = 10_000  # of the bootstrap
Documents = Mapping[str, str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Score:
    """What one document, or several together, cost.

    Attributes:
        name: of the document.
        bytes: of its text in UTF-8.
        characters: of its text.
        tokens: scored: those of its text, and the end of the document.
        nats: sum of -ln p over these tokens.
    """

    name: str
    bytes: int
    characters: int
    tokens: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 × bytes): compares across tokenizers."""
        return self.nats / math.log(2) / self.bytes

    @property
    def nats_per_token(self) -> float:
        """The loss. It does not compare across tokenizers."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the nats per token. It does not compare across tokenizers."""
        return math.exp(min(self.nats_per_token, 700.0))


@dataclass(frozen=True)
class Evaluation:
    """A model's scores on some documents.

    Attributes:
        documents: one score each, in the order given.
        total: of all documents together, so a long one weighs more.
        interval: 95% confidence interval of the total's bits per byte, see `bootstrap_interval`; None for fewer than
            5 documents.
    """

    documents: tuple[Score, ...]
    total: Score
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, documents: Sequence[Score], seed: int = 0) -> Evaluation:
        """Sum up the scores of one or more documents."""
        total = Score(
            name=f"{len(documents)} document{'s' if len(documents) > 1 else ''}",
            bytes=sum(score.bytes for score in documents),
            characters=sum(score.characters for score in documents),
            tokens=sum(score.tokens for score in documents),
            nats=math.fsum(score.nats for score in documents),
        )
        bits = [score.nats / math.log(2) for score in documents]
        sizes = [score.bytes for score in documents]
        interval = bootstrap_interval(bits, sizes, seed) if len(documents) >= MIN_DOCUMENTS else None
        return cls(tuple(documents), total, interval)

    def __str__(self) -> str:
        found = f"{self.total.bits_per_byte:.3f} bits per byte of {self.total.name}"
        if self.interval is None:
            return f"{found} (too few for an interval)"
        low, high = self.interval
        return f"{found} (95% interval {low:.3f} to {high:.3f})"


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Documents,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Score whole documents with windows of the model's context, each token exactly once.

    A document stands alone: it is read after one eos, as a document in training comes after the eos of the one
    before, and its own eos is scored too, since a text is only told when its end is. The bytes are those of the text
    in UTF-8, as `read_text` gives it: without a byte order mark, a line end being one byte.

    A window begins `stride` tokens after the last and scores only what that one has not. So a token has at least
    context - stride others before it, except at the beginning of its document: a smaller stride costs context /
    stride times the work and gives a lower figure, closer to what the model can do. Say which it was when you quote
    it: Press et al., "Shortformer", arXiv:2012.15832, section 2.

    Args:
        model: on its device, as from `load_checkpoint`.
        tokenizer: the one it was trained with.
        documents: texts by name (as of `TokenDataset.texts`), or a list of texts and of paths to text files.
        stride: tokens between windows, from 1 to the context; None: the context, so that windows do not overlap.
        batch_size: windows at once; changes speed and memory only.
        precision: "auto", "fp32", "bf16" or "fp16", as in training.
        seed: of the interval's resampling.
        progress: show a bar.

    Raises:
        ValueError: before any work, for a stride out of range, no documents, a document without text, or a tokenizer
            with more ids than the model.
        DeviceError: for a precision that the device has not.
    """
    context, device = model.config.max_seq_len, model.tok_embeddings.weight.device
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must be from 1 to the model's context of {context} tokens")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only vocab_size={model.config.vocab_size}"
        )
    precision = pick_precision(precision, device)
    texts = named_texts(documents)
    streams = [torch.tensor([tokenizer.eos_id, *tokenizer.encode(text, eos=True)]) for text in texts.values()]
    rows = [(number, *row) for number, ids in enumerate(streams) for row in windows(len(ids) - 1, context, stride)]
    rows.sort(key=lambda row: row[1] - row[3])  # longest first, so that a batch has little padding
    nats = np.zeros(len(streams))
    bar = tqdm(total=len(rows), unit="window", desc="evaluate", disable=not progress, leave=False)
    model.eval()
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        x = torch.full((len(batch), batch[0][3] - batch[0][1]), tokenizer.eos_id)
        y = torch.full_like(x, IGNORED)
        for line, (number, start, scored, end) in enumerate(batch):
            x[line, : end - start] = streams[number][start:end]
            y[line, scored - start : end - start] = streams[number][scored + 1 : end + 1]
        counted = y != IGNORED
        with torch.no_grad(), autocast(precision, device):
            hidden = model.hidden_states(x.to(device))[counted.to(device)]
            surprise = F.cross_entropy(model.output(hidden).float(), y[counted].to(device), reduction="none")
        owner = np.repeat([row[0] for row in batch], counted.sum(1).numpy())
        nats += np.bincount(owner, surprise.double().cpu().numpy(), len(streams))
        bar.update(len(batch))
    bar.close()
    scores = [
        Score(name, len(text.encode()), len(text), len(ids) - 1, float(sum_of_nats))
        for (name, text), ids, sum_of_nats in zip(texts.items(), streams, nats, strict=True)
    ]
    return Evaluation.of(scores, seed)


def windows(targets: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a document's inputs, one for each target: (first input, first one scored, end)."""
    start = scored = 0
    while scored < targets:
        end = min(start + context, targets)
        yield start, scored, end
        start, scored = start + stride, end


def named_texts(documents: Documents) -> dict[str, str]:
    """Texts by name, files read.

    Raises:
        ValueError: if there are none, one holds no text, two files have one name, or a file is not UTF-8.
    """
    if isinstance(documents, str | os.PathLike):
        raise ValueError("documents must be a list of texts or files, or texts by name: put a single one in a list")
    if isinstance(documents, Mapping):
        texts = dict(documents)
    else:
        texts = {
            f"text {number}" if isinstance(document, str) else display_path(document): document
            if isinstance(document, str)
            else read_text(Path(document))
            for number, document in enumerate(documents, 1)
        }
    if not texts:
        raise ValueError("no documents to evaluate on")
    if len(texts) < len(documents):
        raise ValueError(f"the {len(documents)} documents have only {len(texts)} names: is a file named twice?")
    if empty := [name for name, text in texts.items() if not text]:
        raise ValueError(f"without text, and so without bits per byte: {', '.join(empty[:5])}; leave them out")
    return texts


def bootstrap_interval(amounts: ArrayLike, sizes: ArrayLike, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of sum(amounts) / sum(sizes) over documents drawn at random.

    It says how far off the figure may be for all texts of this kind, not how far another training would be from it.
    The bootstrap draws whole documents, since the tokens of one are alike. Its percentiles are set wider for few
    documents, as Student's t is: the expanded interval of Hesterberg, "What Teachers Should Know about the
    Bootstrap", The American Statistician 69 (2015), arXiv:1411.5279.

    Args:
        amounts: (documents,) as bits.
        sizes: (documents,) as bytes.
        seed: of the drawing.
        level: chance that such an interval holds the true value.

    Raises:
        ValueError: for fewer than 5 documents.
    """
    amounts, sizes = np.asarray(amounts, float), np.asarray(sizes, float)
    n = len(amounts)
    if n < MIN_DOCUMENTS:
        raise ValueError(f"an interval needs {MIN_DOCUMENTS} documents or more, not {n}")
    normal = statistics.NormalDist()
    z, freedom = normal.inv_cdf((1 + level) / 2), n - 1
    # Student's t by the normal's z: Abramowitz and Stegun, 26.7.5
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    tail = normal.cdf(-math.sqrt(n / (n - 1)) * t)
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(10):  # at a time, lest thousands of documents need gigabytes
        times = generator.multinomial(n, np.full(n, 1 / n), RESAMPLES // 10)  # each document is drawn, row by row
        ratios.append(times @ amounts / (times @ sizes))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(one: Evaluation, other: Evaluation, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """How many bits per byte more one model needs than another on the same documents, and its 95% interval.

    Documents that are hard for one are hard for the other, so this tells apart what the two intervals cannot.

    Raises:
        ValueError: if they were evaluated on different documents.
    """
    pairs = list(zip(one.documents, other.documents, strict=False))
    if len(one.documents) != len(other.documents) or any((a.name, a.bytes) != (b.name, b.bytes) for a, b in pairs):
        raise ValueError("the two evaluations are not of the same documents")
    between = Evaluation.of([replace(a, nats=a.nats - b.nats) for a, b in pairs], seed)
    return between.total.bits_per_byte, between.interval


def xz_bits_per_byte(known: str, text: str) -> float:
    """What `xz -9e` needs for a text, in bits per UTF-8 byte, when it has already read the known text.

    That is the growth of the compressed file when the text is appended; with nothing known, its plain size.
    """

    def size(content: str) -> int:
        return len(lzma.compress(content.encode(), preset=9 | lzma.PRESET_EXTREME)) if content else 0

    return 8 * (size(known + text) - size(known)) / len(text.encode())
