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
# *What is a token, and how many should there be?* A language model reads numbers, not letters. This notebook reads a
# folder of texts. With SentencePiece it learns a vocabulary of frequent pieces, and it saves them as a tokenizer.
#
# | in | out | time |
# | --- | --- | --- |
# | `data_dir`: a folder of `.txt` files | `<model_prefix>.model` and `.vocab` | 10 seconds for one novel |
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
data_dir: str = "data/sanguo"  # folder of .txt files, or data/sanguo, data/scifi, data/zhwiki
model_prefix: str = "outputs/tokenizer"  # the tokenizer becomes <model_prefix>.model
vocab_size: int = 4000  # number of pieces, 256 single bytes and 4 special ones included
character_coverage: float = 0.99  # share of characters that get a piece; rarer ones are spelled in bytes
errors: str = "strict"  # for a file that is not UTF-8: strict stops, skip leaves it out
seed: int = 0  # random seed; it chooses the lines of very large corpora

# %%
from llmcore.notebook.parameters import check_parameters

check_parameters(globals())

# %%
import tempfile
from collections import Counter
from pathlib import Path

from llmcore.corpus.sources import open_corpus
from llmcore.corpus.texts import readable_texts, sample_texts
from llmcore.corpus.train_tokenizer import compression_by_vocab_size, train_tokenizer
from llmcore.files import display_path, one_line
from llmcore.notebook import plots, widgets
from llmcore.tokenizer import Tokenizer

# %% [markdown]
# ## The text
# One file is one document. Here it is a chapter. If the corpus is larger than ten megabytes, this notebook looks at
# parts of it, chosen evenly. The tokenizer learns from a sample of up to 100 megabytes of lines.

# %%
folder = open_corpus(data_dir)
files, refused = readable_texts(folder, errors)
texts = sample_texts(files)
print(*(f"left out: {one_line(f'{name}: {reason}')}\n" for name, reason in refused.items()), sep="", end="")
characters = sum(map(len, texts))
print(widgets.visible(texts[0][:220]))

# %% tags=["nbval-check-output"]
print(f"{len(files)} files; in the {len(texts)} looked at: {characters:,} characters,", end=" ")
print(f"{sum(len(t.encode()) for t in texts):,} bytes of UTF-8")
print(f"{len(set(''.join(texts))):,} different characters")

# %%
plots.length_histogram([len(t) for t in texts], "characters", f"{len(texts)} documents, {characters:,} characters")

# %% [markdown]
# ## Learning the pieces
# Byte-pair encoding starts with single characters. It merges the two most frequent neighbours into a new piece, and
# repeats this until the vocabulary is full. A rare character gets no piece. The tokenizer writes it as UTF-8 bytes, so
# no text is unknown. If the vocabulary is too small for the characters, the error message says what to change.

# %%
tok = train_tokenizer(files, model_prefix, vocab_size, character_coverage=character_coverage, seed=seed)
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
    ratios = compression_by_vocab_size(files, sizes, Path(scratch), character_coverage=character_coverage)
    largest = Tokenizer(Path(scratch, f"vocab-{max(ratios)}.model")) if ratios else tok

# %%
ratios = ratios or {tok.vocab_size: characters / len(ids)}  # a very small text allows no other size
small, large = min(ratios), max(ratios)
saved = 1 - ratios[small] / ratios[large]
title = f"{large / small:.1f} times the pieces, {saved:.0%} fewer tokens"
plots.compression(list(ratios), list(ratios.values()), title, chosen=vocab_size)

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
