"""Learning a vocabulary of pieces from text files, with SentencePiece."""

from __future__ import annotations

import io
import os
import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import sentencepiece
from tqdm import tqdm

from llmcore.corpus.library import Document, Reader, sample_texts, text_size
from llmcore.corpus.texts import split_long
from llmcore.files import write_atomic
from llmcore.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer, TokenizerError

MIN_COVERAGE = 0.98  # the least that SentencePiece accepts
TRAINER_THREADS = 16  # recorded in the model: with a fixed number, every machine writes the same file
SPACE_MARK = "▁"  # U+2581: the trainer sees it in place of a space
FIXED_PIECES = 256 + 4 + 1  # bytes, special ids and the newline


def sentences(
    texts: Iterable[Document | Path], max_sentence_length: int, bar: tqdm[Any] | None = None
) -> Iterator[str]:
    """The lines of texts. Longer lines are split at sentence ends, because SentencePiece skips them.

    Only a small part of a text or line is in memory at a time.

    Args:
        texts: documents of a library, or files.
        max_sentence_length: of a line, in UTF-8 bytes.
        bar: progress in bytes.
    """
    with Reader() as reader:
        for text in texts:
            rest = ""  # the unfinished line at the end of a block
            for block in reader.blocks(text):
                # The trainer uses tabs and U+2585 itself, and would drop the whole line. It does not learn the names of
                # special pieces, such as "<s>", either: removed, their characters do not count as needed.
                *lines, rest = re.split(r"[\n\t\u2585\0]|<(?:pad|unk|/?s|0x[0-9A-F]{2})>", rest + block)
                for line in lines:
                    if line:
                        yield from split_long(line, max_sentence_length)
                *pieces, rest = split_long(rest, max_sentence_length)
                yield from pieces

                if bar is not None:
                    bar.update(len(block.encode()))
            if rest:
                yield rest


def train_tokenizer(
    texts: Iterable[Document | Path],
    model_prefix: str | os.PathLike[str],
    vocab_size: int = 8000,
    *,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    max_sentence_length: int = 4192,
    input_sentence_size: int = 2_000_000,
    input_bytes: int = 100_000_000,
    seed: int = 0,
    progress: bool = True,
) -> Tokenizer:
    """Learn pieces from texts and write `<model_prefix>.model` and `.vocab`.

    The trainer needs about 20 bytes of memory per byte of text, so from a large corpus it learns from a sample.

    Args:
        texts: documents of a library, or files.
        model_prefix: path without the ending.
        vocab_size: number of ids, including 4 special and 256 byte pieces.
        model_type: "bpe" or "unigram".
        character_coverage: share of the text's characters that get a piece, from 0.98 to 1. The rest are spelled
            in bytes.
        max_sentence_length: in bytes. Longer lines are split, never dropped.
        input_sentence_size: the largest number of lines that are sampled.
        input_bytes: the largest size of the sample, roughly. This bounds memory.
        seed: of the sampling.
        progress: show a bar while the text is read. Learning, which follows, has none.

    Raises:
        TokenizerError: if the vocabulary is too small for the characters, or too large for the text, or for another
            model_type.
    """
    if model_type not in ("bpe", "unigram"):  # "word" would lose spaces
        raise TokenizerError(f"model_type={model_type!r} must be bpe or unigram")
    if not MIN_COVERAGE <= character_coverage <= 1:
        raise TokenizerError(f"character_coverage={character_coverage} must be between {MIN_COVERAGE} and 1")
    texts = list(texts)
    model_file = Path(f"{Path(model_prefix)}.model")
    model_file.parent.mkdir(parents=True, exist_ok=True)

    # a random sample of the lines
    size = sum(map(text_size, texts))
    share, random_numbers = input_bytes / max(size, 1), random.Random(seed)
    bar = tqdm(total=size, unit="B", unit_scale=True, disable=not progress, leave=False)
    bar.set_description("read" if share >= 1 else f"sample {share:.1%} of the lines")

    def sample() -> Iterator[str]:
        lines = sentences(texts, max_sentence_length, bar)
        yield from lines if share >= 1 else (line for line in lines if random_numbers.random() < share)
        bar.set_description("learn")

    # learn, without any change of the text
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            max_sentence_length=max_sentence_length,
            input_sentence_size=input_sentence_size,
            shuffle_input_sentence=True,
            num_threads=TRAINER_THREADS,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_advice(str(error), texts, vocab_size, character_coverage)) from None
    finally:
        bar.close()

    # the model, and its pieces with their scores for people to read
    write_atomic(model_file, model.getvalue())
    tokenizer = Tokenizer(model_file)
    scores = [piece.score for piece in tokenizer.model_proto().pieces]
    rows = (f"{tokenizer.id_to_piece(id)!r}\t{score:g}\n" for id, score in enumerate(scores))
    write_atomic(model_file.with_suffix(".vocab"), "".join(rows))
    return tokenizer


def _advice(message: str, texts: list[Document | Path], vocab_size: int, character_coverage: float) -> str:
    """SentencePiece's complaint in plain words, with numbers that would work."""
    too_large = re.search(r"value <= (\d+)", message)
    if too_large:
        return (
            f"vocab_size={vocab_size} is more than this text supports; "
            f"set vocab_size to {too_large[1]} or less, or add text"
        )
    if "required_chars" in message or "vocab_size" in message.lower():
        return _advice_to_enlarge(texts, vocab_size, character_coverage)
    if "Input corpus" in message or "empty" in message.lower() or "sentences_" in message:
        return f"the {len(texts)} texts are empty: nothing to learn from"
    return message


def _advice_to_enlarge(texts: list[Document | Path], vocab_size: int, character_coverage: float) -> str:
    """What to do about a vocabulary that is too small for the characters of the text."""
    counts: Counter[str] = Counter()
    for line in sentences(texts, 1 << 20):
        counts.update(line.replace(" ", SPACE_MARK))  # the trainer counts the two as the same character
    shares = list(accumulate(count / counts.total() for _, count in counts.most_common()))
    needed = bisect_left(shares, character_coverage) + 1
    fewest = bisect_left(shares, MIN_COVERAGE) + 1

    # another way out is to cover fewer characters
    room = vocab_size - FIXED_PIECES
    alternative = ""
    if fewest < room:
        coverage = max(MIN_COVERAGE, int(10_000 * shares[room - 2]) / 10_000)
        alternative = f", or character_coverage to {coverage:g} or less"
    elif needed > fewest:
        alternative = f", or to {fewest + FIXED_PIECES} or more with character_coverage={MIN_COVERAGE}"
    return (
        f"vocab_size={vocab_size} is too small: at character_coverage={character_coverage:g} the text needs "
        f"{needed} characters besides 256 bytes and 5 special symbols. "
        f"Set vocab_size to {needed + FIXED_PIECES} or more{alternative} (rarer characters are then spelled in bytes)"
    )


def compression_by_vocab_size(
    texts: Sequence[Document | Path], vocab_sizes: Iterable[int], folder: Path, **options: float | int | str
) -> dict[int, float]:
    """Characters per token of tokenizers of several sizes, trained and measured on the same texts.

    From a large corpus, ten megabytes are sampled. Sizes that this text does not support are left out.

    Args:
        texts: documents of a library, or files.
        vocab_sizes: to try.
        folder: where the tokenizers go.
        options: of `train_tokenizer`.
    """
    sample = sample_texts(texts)
    options = {"input_bytes": 10_000_000, **options}
    ratios = {}
    for size in vocab_sizes:
        try:
            tokenizer = train_tokenizer(texts, folder / f"vocab-{size}", size, progress=False, **options)  # type: ignore[arg-type]
        except TokenizerError:
            continue
        ratios[size] = sum(map(len, sample)) / sum(len(tokenizer.encode_array(text)) for text in sample)
    return ratios
