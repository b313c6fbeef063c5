# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1 · From text to tokens
#
# *What is a token, and how many should there be?* A language model reads numbers, not letters. A tokenizer cuts a text
# into pieces and gives each piece a number. This notebook looks through a folder of texts, cuts one line in several
# ways, does byte-pair encoding by hand, and then learns a vocabulary of pieces from the whole folder.
#
# | in | out | time |
# | --- | --- | --- |
# | `data_dir`: a folder of texts | `<model_prefix>.model` and `.vocab` | 20 seconds for one novel |
#
# The default text is 三国演义 (*Romance of the Three Kingdoms*), **one** classical novel of 120 chapters. It is enough
# to see that everything works and that the model learns. It does not replace four thousand modern novels. To use
# those, set `data_dir` to `data/scifi` (downloaded from the Hugging Face Hub) or to a folder of your own. You need no
# Chinese: what matters has its English beside it.
#
# Next: [2 · From tokens to batches](02_dataset.ipynb)
#
# All notebooks: **1** [2](02_dataset.ipynb) [3](03_toyreverse.ipynb) [4](04_scifi_train.ipynb) [5](05_generate.ipynb)
# [6](06_scaling.ipynb)

# %% tags=["parameters"]
data_dir: str = "data/sanguo"  # folder of texts (txt, zip, epub, jsonl), or data/shakespeare, data/scifi, data/zhwiki
model_prefix: str = "outputs/tokenizer"  # the tokenizer becomes <model_prefix>.model
vocab_size: int = 4000  # number of pieces, 256 single bytes and 4 special ones included
character_coverage: float = 0.99  # share of characters that get a piece; rarer ones are spelled in bytes
errors: str = "strict"  # for a text that cannot be read: strict stops, skip leaves it out
encoding: str = "auto"  # of the files; auto finds out that of each, a name such as gb18030 is taken for all
clean: bool = True  # leave out advertisements, control characters and leftovers of web pages
duplicates: str = "drop"  # copies of a text: drop leaves them out, keep keeps them
seed: int = 0  # random seed; it chooses the lines of very large corpora

# %%
from llmcore.notebook.parameters import check_parameters

check_parameters(globals())

# %%
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import sentencepiece

from llmcore import config
from llmcore.corpus import report
from llmcore.corpus.library import open_library
from llmcore.corpus.sources import open_corpus
from llmcore.corpus.train_tokenizer import compression_by_vocab_size, train_tokenizer
from llmcore.files import display_path, one_line
from llmcore.measure.planner import preset_advice
from llmcore.notebook import plots, widgets
from llmcore.notebook.gloss import ENGLISH
from llmcore.tokenizer import Tokenizer

# %% [markdown]
# ## What the folder holds
# Texts from the web come in several encodings, some of them twice, with advertisements between the lines. So we read
# the whole folder once before we use it. Here one file is one document: a chapter. In a zip or jsonl file each text is
# a document.

# %%
library = open_library(
    open_corpus(data_dir), errors=errors, encoding=encoding, clean=clean, duplicates=duplicates, progress=True
)
print(*(f"left out: {one_line(f'{name}: {reason}')}\n" for name, reason in library.refused.items()), sep="", end="")
widgets.tables(
    {
        "What the folder holds": report.files_by_kind(library),
        "Scripts": report.scripts(library),
        "The longest and the shortest documents": report.longest_and_shortest(library),
    }
)

# %% [markdown]
# Some text is left out. Advertisements recur in many books, so they would be what the model learns best. A book that
# stands there twice would be read twice as often, and one copy could be held out while the model learns the other.
# The files stay as they are. `clean=False` and `duplicates="keep"` leave nothing out.

# %%
widgets.tables(report.left_out(library))

# %% [markdown]
# Let us look at the text itself. If it is larger than ten megabytes, this notebook looks at parts of it, chosen evenly.
#
# *In English, the default text begins:* "Chapter 1. Three heroes swear brotherhood in the peach garden; they win their
# first victory over the Yellow Turbans. — The Long River rolls east, and its waves have washed all heroes away. Right
# and wrong, victory and defeat: a turn of the head, and they are nothing. The green hills are still there. How often
# has the evening sun been red? … It is said that the realm, long divided, must unite, and long united, must divide."

# %%
texts = library.sample()
characters = sum(map(len, texts))
print(widgets.visible(texts[0][:220]))

# %%
plots.length_histogram([len(t) for t in texts], "characters", f"{len(texts)} documents, {characters:,} characters")

# %% tags=["nbval-check-output"]
# Checked
print(f"{len(library.documents)} documents, {len(library.copy_of)} of them left out as copies,", end=" ")
print(f"{len(library.refused)} more cannot be read; {len(library.recurring)} lines recur")
print(f"in the {len(texts)} documents looked at: {characters:,} characters,", end=" ")
print(f"{sum(len(t.encode()) for t in texts):,} bytes of UTF-8")
print(f"{len(set(''.join(texts))):,} different characters")

# %% [markdown]
# ## Characters, bytes, or words?
# A model can only read a list of numbers. How do we cut a text, so that each part has a number?
#
# - **Characters.** There may be thousands, and a new text may hold one that we have never seen.
# - **Bytes.** There are only 256, and they spell every text. But the rows become long: three bytes for a Chinese
#   character.
# - **Words.** The rows are short. But the list of words has no end, and Chinese writes no spaces between words.
#
# Here is one line of the text in all three. (The default line: "The Long River rolls east, its waves have washed all
# heroes away.")

# %%
lines = [line for text in texts for line in text.split("\n") if line]
line = next((line for line in lines[1:] if len(line) >= 12), lines[0])[:15]
cuts = {"characters": list(line), "bytes": [f"{byte:02X}" for byte in line.encode()], "words": line.split()}
rows = [(f"{name}: {len(parts)}", parts, ()) for name, parts in cuts.items()]
plots.box_rows(rows, "One line cut into characters, bytes, and at its spaces")

# %% [markdown]
# ## Byte-pair encoding by hand
# Byte-pair encoding (Sennrich et al., 2016) finds a middle way. It starts with single characters. Then it repeats one
# step: count all pairs of neighbours, and make the most frequent pair into one piece.
#
# $$(a, b)^\ast = \arg\max_{(a,\,b)} \mathrm{count}(a\,b), \qquad a\,b \to ab$$
#
# So frequent words become one piece, and rare ones stay in several. The whole method is in the two cells below.

# %%
phrase = "the father gathers feathers"


def merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


# %%
pieces, steps = list(phrase), []
for _ in range(6):
    pairs = Counter(pairwise(pieces)).most_common(3)  # the winner comes first
    pieces = merge(pieces, pairs[0][0])
    steps.append((pairs, pieces))
plots.merge_steps(list(phrase), steps, f"Six merges turn {len(phrase)} letters into {len(pieces)} pieces")

# %% [markdown]
# Read it row by row. In a row of pairs, the orange one occurs most often. (Of equal ones the first wins.) Below it, the
# pair has become one box wherever it stands. After four merges `ather` is one piece: the part that *father*, *gathers*
# and *feathers* share. Nobody told the method where a word ends.

# %% [markdown]
# ## Learning the pieces of the whole text
# SentencePiece does the same with the whole folder, until the vocabulary is full. A rare character gets no piece. The
# tokenizer writes it as UTF-8 bytes, so no text is unknown. If the vocabulary is too small for the characters, the
# error message says what to change. The tokenizer learns from a sample of up to 100 megabytes of lines.

# %%
tok = train_tokenizer(library.kept, model_prefix, vocab_size, character_coverage=character_coverage, seed=seed)
print(f"wrote {display_path(model_prefix)}.model and .vocab")

# %% [markdown]
# ## What it learned
# These were its first merges, in order. (In the default text, most are names. A person often has two: 玄德 Xuande is
# 刘备 Liu Bei.)

# %%
learned = [widgets.piece_text(tok, id) for id in range(tok.vocab_size) if not tok.is_byte(id) and id > 3]
merged = [piece for piece in learned if len(piece) > 1]
notes = [ENGLISH.get(piece, "") for piece in merged[:24]]
plots.text_pieces(merged[:24], "What the tokenizer merged first", notes=notes if any(notes) else ())

# %%
longest = sorted(learned, key=len, reverse=True)[:24]
notes = [ENGLISH.get(piece, "") for piece in longest]
title = f"The longest of {len(learned):,} pieces have up to {len(longest[0])} characters"
plots.text_pieces(longest, title, notes=notes if any(notes) else ())

# %% [markdown]
# Most pieces of a small Chinese vocabulary are single characters. The longer ones are names, titles, and phrases that
# every chapter repeats.

# %%
plots.piece_lengths(Counter(map(len, learned)), f"The length of {len(learned):,} pieces, single bytes left out")

# %% [markdown]
# Now the same texts as before: our line, and the phrase that we merged by hand. A tokenizer knows only what it was
# trained on. The default text holds no English word, so its tokenizer spells the phrase letter by letter, each letter
# as one byte.

# %%
line_ids, phrase_ids = tok.encode(line), tok.encode(phrase)
rows = [
    (f"the line: {len(line_ids)} tokens", [widgets.piece_text(tok, id) for id in line_ids], ()),
    (f"the phrase: {len(phrase_ids)} tokens", [widgets.piece_text(tok, id) for id in phrase_ids], ()),
    (f"by hand: {len(pieces)} pieces", [piece.replace(" ", "␣") for piece in pieces], ()),
]
plots.box_rows(rows, "The trained tokenizer, and our six merges")

# %% tags=["nbval-check-output"]
# Checked
print("pieces:", tok.vocab_size)
print("pad, unk, bos, eos:", tok.pad_id, tok.unk_id, tok.bos_id, tok.eos_id)
print("id of the newline:", tok.encode("\n"))
print(f"by hand: {len(phrase)} letters, {len(pieces)} pieces, joined again: {''.join(pieces)}")

# %% [markdown]
# ## What a token costs
# A token is the unit of work. The model does all its arithmetic once for each token that it reads or writes: about two
# operations for each parameter to write, six to learn. It also sees only a fixed number of tokens, its window. So if a
# token holds more characters, the same text costs less, and the window reaches further back.
#
# $$\text{operations to write a text} \approx 2 \times \text{parameters} \times \text{tokens}$$

# %%
ids = [id for document in tok.encode_batch(texts) for id in document]
per_token = characters / len(ids)
model_config, _ = config.preset("scifi-mini")
print(f"scifi-mini has {model_config.n_params():,} parameters: {2 * model_config.n_params():,} operations a token")
print(
    f"its window of {model_config.max_seq_len} tokens holds about {model_config.max_seq_len * per_token:.0f} characters"
)

# %% tags=["nbval-check-output"]
# Checked
byte_tokens = sum(map(tok.is_byte, ids))
print(f"{len(ids):,} tokens, {per_token:.3f} characters per token")
print(f"tokens that are single bytes: {byte_tokens / len(ids):.2%}")
print(f"unknown tokens: {ids.count(tok.unk_id)}")

# %% [markdown]
# ## How large should the vocabulary be?
# With more pieces, the same text has fewer tokens. But each piece is a row in the model's table, one number for each of
# its `dim` places, and a rare piece is hard to learn. So a small corpus needs a small vocabulary. Left below: what a
# larger vocabulary saves. Right: what it costs in a model of scifi-mini's width. (We measure on the training text.
# There a large vocabulary looks a little better than it is.)

# %%
sizes = [int(vocab_size * factor) for factor in (0.7, 1, 1.5, 2, 3, 4)]
with tempfile.TemporaryDirectory() as scratch:
    ratios = compression_by_vocab_size(library.kept, sizes, Path(scratch), character_coverage=character_coverage)
    largest = Tokenizer(Path(scratch, f"vocab-{max(ratios)}.model")) if ratios else tok

# %%
ratios = ratios or {tok.vocab_size: per_token}  # a very small text allows no other size
small, large = min(ratios), max(ratios)
saved = 1 - ratios[small] / ratios[large]
title = f"{large / small:.1f} times the pieces, {saved:.0%} fewer tokens"
plots.compression(list(ratios), list(ratios.values()), title, chosen=vocab_size, dim=model_config.dim)

# %% [markdown]
# ## What this much text can feed
# About twenty tokens per parameter is the best use of compute (Hoffmann et al., "Chinchilla", 2022). Reading a text up
# to four times is nearly as good as new text (Muennighoff et al., 2023). So with this text a model can grow to about a
# fifth of its tokens. A larger one still learns, but it learns the text by heart.

# %%
tokens = round(sum(document.characters for document in library.kept) / per_token)
widgets.tables({f"{tokens:,} tokens": preset_advice(tokens)})

# %% tags=["nbval-check-output"]
# Checked
print(f"a vocabulary that suits so much text: about {report.advised_vocab_size(library):,}")

# %% [markdown]
# ## Nothing is lost
# A tokenizer should give back exactly what it was given. Many settings do not. SentencePiece's defaults turn the
# full-width ， into a comma, drop newlines and merge spaces. Without byte pieces, a rare character becomes "unknown".
# Here all of that is switched off. In the table, ⏎ is a newline, ␣ a space, ⁇ an unknown character.

# %%
strange = ["ｆｕｌｌ－ｗｉｄｔｈ，，。", "  two  spaces\tand a tab\n\n", "🐉龘 <s> ▁ \x00", "\u3000ideographic space"]
normalizer = sentencepiece.SentencePieceNormalizer(
    rule_name="nmt_nfkc", add_dummy_prefix=False, remove_extra_whitespaces=True
)


def seen(text: str) -> str:
    return widgets.visible(text).replace("\n", "⏎").replace(" ", "␣")


def without_bytes(text: str) -> str:
    return "".join("⁇" if any(map(tok.is_byte, tok.encode(character))) else character for character in text)


# %%
rows = [
    {
        "text": seen(text),
        "SentencePiece's defaults": seen(normalizer.normalize(text).replace("▁", " ")),
        "without byte pieces": seen(without_bytes(text)),
        "here": seen(tok.decode(tok.encode(text))),
    }
    for text in strange
]
widgets.tables({"What comes back of four strange strings": rows})

# %% tags=["nbval-check-output"]
# Checked
same = [tok.decode(tok.encode(text)) == text for text in texts]
print(f"documents that come back unchanged: {sum(same)} of {len(same)}")
same = [tok.decode(tok.encode(text)) == text for text in strange]
print(f"strange strings that come back unchanged: {sum(same)} of {len(same)}")

# %% [markdown]
# ## Try it
# Type into the box. Both tokenizers cut your text at once. Below each piece you see its id, its bytes and, if it occurs
# more than once, how often. ⟨E4⟩ is one byte of a rare character, ␣ is a space, ⏎ is a newline. Try a name that the
# novel often uses, a name that it never uses, and an emoji. (Where you cannot type, for example on a code host, you see
# only the result.)
#
# *In English, the sentence from the default text:* "In the second year of Jianning, on the fifteenth of the fourth
# month, the emperor came to the Wende Hall. As he was about to sit, a fierce wind rose at the hall's corner, and
# a great green snake came flying down from the beam and coiled upon the chair."

# %%
sentence = lines[6 % len(lines)]
tokenizers = {f"{tokenizer.vocab_size:,} pieces": tokenizer for tokenizer in (tok, largest)}
widgets.TokenExplorer(tokenizers, sentence[:48])

# %% [markdown]
# ## What to try next
# - `phrase`: put in a sentence of your own. Which piece appears first, and does a merge ever reach across a space?
# - `vocab_size = 8000`: which names become one piece now?
# - `character_coverage = 0.98`: there are more merges and more bytes. Are there more characters per token?
# - Your own texts: `data_dir = "data/mine"`. Mixed languages make good pictures.
#
# **[Next: 2 · From tokens to batches](02_dataset.ipynb)**
