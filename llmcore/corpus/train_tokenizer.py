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

from llmcore.corpus.texts import sample_texts, split_long, text_blocks
from llmcore.files import write_atomic
from llmcore.tokenizer import _SPACE, BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer, TokenizerError

MIN_COVERAGE = 0.98  # SentencePiece accepts no less
TRAINER_THREADS = 16  # recorded in the model, so a fixed number gives the same file on every machine


def sentences(
    files: Iterable[str | os.PathLike[str]], max_sentence_length: int, bar: tqdm[Any] | None = None
) -> Iterator[str]:
    """The lines of text files, longer ones split at sentence ends: SentencePiece skips what is too long for it.

    However long a file or a line is, little of it is in memory. A bar is told of the bytes read.
    """
    for file in files:
        rest = ""  # of a line that the next block goes on with
        for block in text_blocks(Path(file)):
            # Tabs and U+2585 are marks of the trainer's own; it would drop the whole line. It never learns the names of
            # special pieces either, such as "<s>": split off, they do not count as characters that the text needs.
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
    files: Iterable[str | os.PathLike[str]],
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
    """Learn pieces from text files and write `<model_prefix>.model` and `.vocab`.

    The trainer needs about 20 bytes of memory per byte of text it learns from, so of a large corpus it gets a sample.

    Args:
        files: text files, UTF-8.
        model_prefix: path without the ending.
        vocab_size: number of ids, the 4 special and 256 byte pieces included.
        model_type: "bpe" or "unigram".
        character_coverage: share of the text's characters that get a piece, from 0.98 to 1; the rest are spelled
            in bytes.
        max_sentence_length: in bytes; longer lines are split, never dropped.
        input_sentence_size: at most so many lines are sampled.
        input_bytes: of larger texts, so many bytes of lines are sampled, give or take. This bounds memory.
        seed: of that sampling.
        progress: show a bar while the text is read. Learning, which follows, has none.

    Raises:
        TokenizerError: if the vocabulary is too small for the characters, or too large for the text, or for another
            model_type.
    """
    if model_type not in ("bpe", "unigram"):  # "word" would lose spaces
        raise TokenizerError(f"model_type={model_type!r} must be bpe or unigram")
    if not MIN_COVERAGE <= character_coverage <= 1:
        raise TokenizerError(f"character_coverage={character_coverage} must be between {MIN_COVERAGE} and 1")
    paths = [Path(file) for file in files]
    prefix = Path(model_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    size = sum(path.stat().st_size for path in paths)
    share, chance = input_bytes / max(size, 1), random.Random(seed)
    bar = tqdm(total=size, unit="B", unit_scale=True, disable=not progress, leave=False)
    bar.set_description("read" if share >= 1 else f"sample {share:.1%} of the lines")

    def sample() -> Iterator[str]:
        lines = sentences(paths, max_sentence_length, bar)
        yield from lines if share >= 1 else (line for line in lines if chance.random() < share)
        bar.set_description("learn")

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
        raise TokenizerError(_advice(str(error), paths, vocab_size, character_coverage)) from None
    finally:
        bar.close()
    write_atomic(prefix.with_name(prefix.name + ".model"), model.getvalue())
    tokenizer = Tokenizer(prefix.with_name(prefix.name + ".model"))
    rows = (f"{tokenizer.id_to_piece(i)!r}\t{tokenizer._processor.get_score(i):g}\n" for i in range(vocab_size))
    write_atomic(prefix.with_name(prefix.name + ".vocab"), "".join(rows))
    return tokenizer


def _advice(message: str, files: list[Path], vocab_size: int, character_coverage: float) -> str:
    """SentencePiece's complaint in plain words, with numbers that would work."""
    too_large = re.search(r"value <= (\d+)", message)
    if too_large:
        return (
            f"vocab_size={vocab_size} is more than this text supports; "
            f"set vocab_size to {too_large[1]} or less, or add text"
        )
    if "required_chars" in message or "vocab_size" in message.lower():
        counts: Counter[str] = Counter()
        for line in sentences(files, 1 << 20):
            counts.update(line.replace(" ", _SPACE))  # they are one to the trainer
        shares = list(accumulate(count / counts.total() for _, count in counts.most_common()))
        needed = bisect_left(shares, character_coverage) + 1
        fewest = bisect_left(shares, MIN_COVERAGE) + 1
        room = vocab_size - 256 - 4 - 1  # bytes, special ids and the newline
        lower = ""
        if fewest < room:
            coverage = max(MIN_COVERAGE, int(10_000 * shares[room - 2]) / 10_000)
            lower = f", or character_coverage to {coverage:g} or less"
        elif needed > fewest:
            lower = f", or to {fewest + 261} or more with character_coverage={MIN_COVERAGE}"
        return (
            f"vocab_size={vocab_size} is too small: at character_coverage={character_coverage:g} the text needs "
            f"{needed} characters besides 256 bytes and 5 special symbols. "
            f"Set vocab_size to {needed + 261} or more{lower} (rarer characters are then spelled in bytes)"
        )
    if "Input corpus" in message or "empty" in message.lower() or "sentences_" in message:
        return f"the {len(files)} text files hold no text to learn from"
    return message


def compression_by_vocab_size(
    files: Sequence[Path], vocab_sizes: Iterable[int], folder: Path, **options: float | int | str
) -> dict[int, float]:
    """Characters per token of tokenizers of several sizes, trained on and measured over the same files.

    Of a large corpus, ten megabytes are enough. Sizes that this text cannot support are left out.
    """
    texts = sample_texts(files)
    options = {"input_bytes": 10_000_000, **options}
    ratios = {}
    for size in vocab_sizes:
        try:
            tokenizer = train_tokenizer(files, folder / f"vocab-{size}", size, progress=False, **options)  # type: ignore[arg-type]
        except TokenizerError:
            continue
        ratios[size] = sum(map(len, texts)) / sum(len(tokenizer.encode_array(text)) for text in texts)
    return ratios
