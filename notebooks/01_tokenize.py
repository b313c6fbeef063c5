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
# *What is a token, and how many should there be?* A language model reads numbers, not letters. This notebook looks
# through a folder of texts. With SentencePiece it learns a vocabulary of frequent pieces from them, and it saves them
# as a tokenizer.
#
# | in | out | time |
# | --- | --- | --- |
# | `data_dir`: a folder of texts | `<model_prefix>.model` and `.vocab` | 10 seconds for one novel |
#
# The default text is 三国演义 (*Romance of the Three Kingdoms*), **one** classical novel of 120 chapters. It is enough
# to see that everything works and that the model learns. It does not replace four thousand modern novels. To use
# those, set `data_dir` to `data/scifi` (downloaded from the Hugging Face Hub) or to a folder of your own.
#
# Next: [2 · From tokens to batches](02_dataset.ipynb)
#
# All notebooks: **1** [2](02_dataset.ipynb) [3](03_toyreverse.ipynb) [4](04_scifi_train.ipynb) [5](05_generate.ipynb)
# [6](06_scaling.ipynb)

# %% tags=["parameters"]
data_dir: str = "data/sanguo"  # folder of texts (txt, zip, epub, jsonl), or data/sanguo, data/scifi, data/zhwiki
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
from pathlib import Path

from llmcore.corpus import report
from llmcore.corpus.library import open_library
from llmcore.corpus.sources import open_corpus
from llmcore.corpus.train_tokenizer import compression_by_vocab_size, train_tokenizer
from llmcore.files import display_path, one_line
from llmcore.measure.planner import preset_advice
from llmcore.notebook import plots, widgets
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

# %% tags=["nbval-check-output"]
print(f"{len(library.documents)} documents, {len(library.copy_of)} of them left out as copies,", end=" ")
print(f"{len(library.refused)} more cannot be read; {len(library.recurring)} lines recur")

# %% [markdown]
# Let us look at the text itself. If it is larger than ten megabytes, this notebook looks at parts of it, chosen evenly.

# %%
texts = library.sample()
characters = sum(map(len, texts))
print(widgets.visible(texts[0][:220]))

# %% tags=["nbval-check-output"]
print(f"in the {len(texts)} documents looked at: {characters:,} characters,", end=" ")
print(f"{sum(len(t.encode()) for t in texts):,} bytes of UTF-8")
print(f"{len(set(''.join(texts))):,} different characters")

# %%
plots.length_histogram([len(t) for t in texts], "characters", f"{len(texts)} documents, {characters:,} characters")

# %% [markdown]
# ## Learning the pieces
# Byte-pair encoding starts with single characters. It merges the two most frequent neighbours into a new piece, and
# repeats this until the vocabulary is full. A rare character gets no piece. The tokenizer writes it as UTF-8 bytes, so
# no text is unknown. If the vocabulary is too small for the characters, the error message says what to change. The
# tokenizer learns from a sample of up to 100 megabytes of lines.

# %%
tok = train_tokenizer(library.kept, model_prefix, vocab_size, character_coverage=character_coverage, seed=seed)
print(f"wrote {display_path(model_prefix)}.model and .vocab")

# %% tags=["nbval-check-output"]
print("pieces:", tok.vocab_size)
print("pad, unk, bos, eos:", tok.pad_id, tok.unk_id, tok.bos_id, tok.eos_id)
print("id of the newline:", tok.encode("\n"))

# %% [markdown]
# ## What it learned
# Most pieces of a small Chinese vocabulary are single characters. The longer ones are names, titles, and phrases that
# every chapter repeats.

# %%
pieces = [widgets.piece_text(tok, id) for id in range(tok.vocab_size) if not tok.is_byte(id) and id > 3]
plots.piece_lengths(Counter(map(len, pieces)), f"The length of {len(pieces):,} pieces, single bytes left out")

# %%
longest = sorted(pieces, key=len, reverse=True)[:48]
plots.text_pieces(longest, f"The longest of {len(pieces):,} pieces have up to {len(longest[0])} characters")

# %% [markdown]
# How long is a token, and how often does the tokenizer write a character in bytes?

# %% tags=["nbval-check-output"]
ids = [id for document in tok.encode_batch(texts) for id in document]
byte_tokens = sum(map(tok.is_byte, ids))
print(f"{len(ids):,} tokens, {characters / len(ids):.3f} characters per token")
print(f"tokens that are single bytes: {byte_tokens / len(ids):.2%}")
print(f"unknown tokens: {ids.count(tok.unk_id)}")

# %% [markdown]
# ## How large should the vocabulary be?
# With more pieces, the same text has fewer tokens. The model then sees more text in its window and needs less compute
# for it. But each piece is a row in two large tables, and a rare piece is hard to learn. So a small corpus needs a
# small vocabulary. (We measure on the training text. There a large vocabulary looks a little better than it is.)

# %%
sizes = [int(vocab_size * factor) for factor in (0.7, 1, 1.5, 2, 3, 4)]
with tempfile.TemporaryDirectory() as scratch:
    ratios = compression_by_vocab_size(library.kept, sizes, Path(scratch), character_coverage=character_coverage)
    largest = Tokenizer(Path(scratch, f"vocab-{max(ratios)}.model")) if ratios else tok

# %%
ratios = ratios or {tok.vocab_size: characters / len(ids)}  # a very small text allows no other size
small, large = min(ratios), max(ratios)
saved = 1 - ratios[small] / ratios[large]
title = f"{large / small:.1f} times the pieces, {saved:.0%} fewer tokens"
plots.compression(list(ratios), list(ratios.values()), title, chosen=vocab_size)

# %% [markdown]
# ## What this much text can feed
# About twenty tokens per parameter is the best use of compute (Hoffmann et al., "Chinchilla", 2022). Reading a text up
# to four times is nearly as good as new text (Muennighoff et al., 2023). So with this text a model can grow to about a
# fifth of its tokens. A larger one still learns, but it learns the text by heart.

# %%
tokens = round(sum(document.characters for document in library.kept) * len(ids) / characters)
widgets.tables({f"{tokens:,} tokens": preset_advice(tokens)})

# %% tags=["nbval-check-output"]
print(f"a vocabulary that suits so much text: about {report.advised_vocab_size(library):,}")

# %% [markdown]
# ## Nothing is lost
# By default, SentencePiece turns ， into a comma, drops newlines and merges spaces. Here this is switched off. Every
# text comes back exactly as it was: every document, and any text that you type.

# %% tags=["nbval-check-output"]
same = [tok.decode(tok.encode(text)) == text for text in texts]
print(f"documents that come back unchanged: {sum(same)} of {len(same)}")
strange = ["ｆｕｌｌ－ｗｉｄｔｈ，，。", "  two  spaces\tand a tab\n\n", "🐉龘 <s> ▁ \x00", "\u3000ideographic space"]
print("strange strings too:", all(tok.decode(tok.encode(text)) == text for text in strange))

# %% [markdown]
# ## A sentence in pieces
# Each box is one token. ⟨E4⟩ is one byte of a rare character, ␣ is a space, ⏎ is a newline.

# %%
lines = [line for text in texts for line in text.split("\n") if line]
sentence = lines[6 % len(lines)][:120]
shown_pieces = [widgets.piece_text(tok, id) for id in tok.encode(sentence)]
plots.text_pieces(shown_pieces, f"{len(sentence)} characters become {len(shown_pieces)} tokens")

# %% [markdown]
# ## Try it
# Type into the box. Both tokenizers cut your text at once. Below each piece you see its id, its bytes and, if it occurs
# more than once, how often. Try a name that the novel often uses, a name that it never uses, and an emoji. (Where you
# cannot type, for example on a code host, you see only the result.)

# %%
tokenizers = {f"{tokenizer.vocab_size:,} pieces": tokenizer for tokenizer in (tok, largest)}
widgets.TokenExplorer(tokenizers, sentence[:60])

# %% [markdown]
# ## What to try next
# - `vocab_size = 8000`: which names become one piece now?
# - `character_coverage = 0.98`: there are more merges and more bytes. Are there more characters per token?
# - Your own texts: `data_dir = "data/mine"`. Mixed languages make good pictures.
#
# **[Next: 2 · A data set](02_dataset.ipynb)**
