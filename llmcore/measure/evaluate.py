"""How good a model is: bits per byte on whole documents, with a confidence interval, and a compressor to compare."""

from __future__ import annotations

import lzma
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from llmcore.corpus.texts import read_text
from llmcore.dataset import IGNORED
from llmcore.device import autocast, pick_precision
from llmcore.files import display_path
from llmcore.model import LOSS_CHUNK, Transformer
from llmcore.tokenizer import Tokenizer

MIN_DOCUMENTS = 5  # for an interval: fewer do not show how much documents differ
RESAMPLES = 10_000  # of the bootstrap
Documents = Mapping[str, str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Score:
    """A model's score on a document, or on several together.

    Attributes:
        name: of the document.
        bytes: of its text in UTF-8.
        characters: of its text.
        tokens: the tokens of its text and the end of the document.
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
        documents: a score for each document, in the order given.
        total: of all documents together, so a long document weighs more.
        interval: 95% confidence interval of the total's bits per byte, see `bootstrap_interval`; None for fewer than
            5 documents.
    """

    documents: tuple[Score, ...]
    total: Score
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, documents: Sequence[Score], seed: int = 0) -> Evaluation:
        """Add up the scores of one or more documents."""
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
        score = f"{self.total.bits_per_byte:.3f} bits per byte of {self.total.name}"
        if self.interval is None:
            return f"{score} (too few for an interval)"
        low, high = self.interval
        return f"{score} (95% interval {low:.3f} to {high:.3f})"


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Documents,
    *,
    context_size: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Score whole documents with windows of the model's context, or shorter ones, each token exactly once.

    A document is read after an eos, as in training, where the eos of another document comes before. Its own eos is
    scored too: the model must also predict where a text ends. The bytes are those of the text in UTF-8, as `read_text`
    gives it: without a byte order mark, and a line end is one byte.

    Each window begins `stride` tokens after the one before, and scores only the tokens that no earlier window has
    scored. So a token has at least context - stride others before it, except at the beginning of its document. A
    smaller stride costs context / stride times the work and gives a lower result, which is closer to what the model can
    do: Press et al., "Shortformer", arXiv:2012.15832, section 2. Always give the stride with the result.

    Args:
        model: on its device, as from `load_checkpoint`.
        tokenizer: the one it was trained with.
        documents: texts by name (as of `TokenDataset.texts`), or a list of texts and of paths to text files.
        context_size: tokens in a window; None: the longest that the model sees.
        stride: tokens between the beginnings of windows, 1 to the context; None: the context, without overlap.
        batch_size: windows at once; changes speed and memory only.
        precision: "auto", "fp32", "bf16" or "fp16", as in training.
        seed: of the interval's resampling.
        progress: show a bar.

    Raises:
        ValueError: before any work, for a stride or context_size out of range, no documents, a document without text,
            or a tokenizer with more ids than the model.
        DeviceError: for a precision that the device does not have.
    """
    longest = model.config.max_seq_len
    context = longest if context_size is None else context_size
    if not 1 <= context <= longest:
        raise ValueError(f"context_size={context} must be from 1 to the model's context of {longest} tokens")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must be from 1 to the context of {context} tokens")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only vocab_size={model.config.vocab_size}"
        )
    precision = pick_precision(precision, model.tok_embeddings.weight.device)

    # cut every document into windows; the longest come first, so that a batch has little padding
    texts = named_texts(documents)
    streams = [torch.tensor([tokenizer.eos_id, *tokenizer.encode(text, eos=True)]) for text in texts.values()]
    spans = [
        Span(document, *window)
        for document, stream in enumerate(streams)
        for window in windows(len(stream) - 1, context, stride)
    ]
    spans.sort(key=lambda span: span.start - span.end)

    # add up the nats of each document
    nats = np.zeros(len(streams))
    bar = tqdm(total=len(spans), unit="window", desc="evaluate", disable=not progress, leave=False)
    model.eval()
    for first in range(0, len(spans), batch_size):
        batch = spans[first : first + batch_size]
        x, y = _batch(batch, streams, padding=tokenizer.eos_id)
        owners = np.repeat([span.document for span in batch], (y != IGNORED).sum(1).numpy())
        nats += np.bincount(owners, _surprise(model, x, y, precision), len(streams))
        bar.update(len(batch))
    bar.close()

    scores = [
        Score(name, len(text.encode()), len(text), len(stream) - 1, float(document_nats))
        for (name, text), stream, document_nats in zip(texts.items(), streams, nats, strict=True)
    ]
    return Evaluation.of(scores, seed)


class Span(NamedTuple):
    """A window over a document's inputs: from `start` to `end`. Its targets from `scored` on count."""

    document: int
    start: int
    scored: int
    end: int


def windows(targets: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a document's inputs, one input for each target: (first input, first one scored, end)."""
    start = scored = 0
    while scored < targets:
        end = min(start + context, targets)
        yield start, scored, end
        start, scored = start + stride, end


def _batch(batch: Sequence[Span], streams: Sequence[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """x and y, int64 (windows, time), the first window being the longest. y is `IGNORED` where nothing is scored."""
    x = torch.full((len(batch), batch[0].end - batch[0].start), padding)
    y = torch.full_like(x, IGNORED)
    for row, (document, start, scored, end) in enumerate(batch):
        x[row, : end - start] = streams[document][start:end]
        y[row, scored - start : end - start] = streams[document][scored + 1 : end + 1]
    return x, y


@torch.no_grad()
def _surprise(model: Transformer, x: Tensor, y: Tensor, precision: str) -> NDArray[np.float64]:
    """-ln p of every target that is not `IGNORED`, row by row, (targets,)."""
    device, counted = model.tok_embeddings.weight.device, y != IGNORED
    with autocast(precision, device):
        hidden = model.hidden_states(x.to(device))[counted.to(device)]
        surprise = [  # in parts: with a large vocabulary, all logits at once would take gigabytes
            F.cross_entropy(model.output(rows).float(), targets.to(device), reduction="none")
            for rows, targets in zip(hidden.split(LOSS_CHUNK), y[counted].split(LOSS_CHUNK), strict=True)
        ]
    return torch.cat(surprise).double().cpu().numpy()


def named_texts(documents: Documents) -> dict[str, str]:
    """Texts by name. Files are read.

    Raises:
        ValueError: if there are none, one holds no text, two files have one name, or a file is not UTF-8.
    """
    if isinstance(documents, str | os.PathLike):
        raise ValueError("documents must be a list of texts or files, or texts by name: put a single one in a list")
    if isinstance(documents, Mapping):
        texts = dict(documents)
    else:
        texts = {}
        for number, document in enumerate(documents, 1):
            if isinstance(document, str):
                texts[f"text {number}"] = document
            else:
                texts[display_path(document)] = read_text(Path(document))
    if not texts:
        raise ValueError("no documents to evaluate on")
    if len(texts) < len(documents):
        raise ValueError(f"the {len(documents)} documents have only {len(texts)} names: is a file named twice?")
    if empty := [name for name, text in texts.items() if not text]:
        raise ValueError(f"without text, and so without bits per byte: {', '.join(empty[:5])}; leave them out")
    return texts


def bootstrap_interval(amounts: ArrayLike, sizes: ArrayLike, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of sum(amounts) / sum(sizes) over documents drawn at random.

    The interval is for all texts of this kind. It does not say how much another training run would differ.
    The bootstrap draws whole documents, since the tokens of a document are not independent. For few documents its
    percentiles are wider, as Student's t is: the expanded interval of Hesterberg, "What Teachers Should Know about the
    Bootstrap", The American Statistician 69 (2015), arXiv:1411.5279.

    Args:
        amounts: (documents,) such as bits.
        sizes: (documents,) such as bytes.
        seed: of the bootstrap.
        level: probability that such an interval contains the true value.

    Raises:
        ValueError: for fewer than 5 documents.
    """
    amounts, sizes = np.asarray(amounts, float), np.asarray(sizes, float)
    n = len(amounts)
    if n < MIN_DOCUMENTS:
        raise ValueError(f"an interval needs {MIN_DOCUMENTS} documents or more, not {n}")

    # Student's t, from the normal's z by Abramowitz and Stegun, 26.7.5
    normal = statistics.NormalDist()
    z, freedom = normal.inv_cdf((1 + level) / 2), n - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    tail = normal.cdf(-math.sqrt(n / (n - 1)) * t)

    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(10):  # in ten parts: with thousands of documents the whole table would need gigabytes
        times = generator.multinomial(n, np.full(n, 1 / n), RESAMPLES // 10)  # how often each document is drawn
        ratios.append(times @ amounts / (times @ sizes))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(first: Evaluation, second: Evaluation, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """How many bits per byte more the first model needs than the second on the same documents, with a 95% interval.

    A document that is hard for one model is hard for the other too. So this interval is narrower than those of the two
    models, and shows smaller differences.

    Raises:
        ValueError: if they were evaluated on different documents.
    """
    keys = [[(score.name, score.bytes) for score in evaluation.documents] for evaluation in (first, second)]
    if keys[0] != keys[1]:
        raise ValueError("the two evaluations are not of the same documents")
    pairs = zip(first.documents, second.documents, strict=True)
    difference = Evaluation.of([replace(a, nats=a.nats - b.nats) for a, b in pairs], seed)
    return difference.total.bits_per_byte, difference.interval


def xz_bits_per_byte(known: str, text: str) -> float:
    """How many bits per UTF-8 byte `xz -9e` needs for a text after it has compressed the known text.

    This is the growth of the compressed file when the text is appended to the known text, which may be empty.
    """

    def size(content: str) -> int:
        return len(lzma.compress(content.encode(), preset=9 | lzma.PRESET_EXTREME)) if content else 0

    return 8 * (size(known + text) - size(known)) / len(text.encode())
