# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2 · From tokens to batches
#
# *What exactly does the model see?* This notebook turns texts into files of token ids. It holds out some documents for
# validation. Then it shows one batch, token by token.
#
# | in | out | time |
# | --- | --- | --- |
# | `data_dir`; `tokenizer_model_file` from notebook 1 | `dataset_dir`: token files | 5 seconds |
#
# Before: [1 · From text to tokens](01_tokenize.ipynb) · Next: [3 · A toy task](03_toyreverse.ipynb)
#
# All notebooks: [1](01_tokenize.ipynb) **2** [3](03_toyreverse.ipynb) [4](04_scifi_train.ipynb) [5](05_generate.ipynb)
# [6](06_scaling.ipynb)

# %% tags=["parameters"]
data_dir: str = "data/sanguo"  # folder of texts
tokenizer_model_file: str = "outputs/tokenizer.model"  # from notebook 1
dataset_dir: str = "auto"  # where the token files go; auto: a folder for this corpus and tokenizer
val_fraction: float = 0.05  # share of the documents held out
errors: str = "strict"  # for a text that cannot be read: strict stops, skip leaves it out
encoding: str = "auto"  # of the files; auto finds out that of each, a name such as gb18030 is taken for all
clean: bool = True  # leave out advertisements, control characters and leftovers of web pages
duplicates: str = "drop"  # copies of a text: drop leaves them out, keep keeps them on one side of the split
context_size: int = 256  # tokens in a window
preset: str = "scifi-mini"  # its training plan is compared with this corpus
seed: int = 0  # random seed for the order of the windows

# %%
from llmcore.notebook.parameters import check_parameters

check_parameters(globals())

# %%
import numpy as np

from llmcore import config
from llmcore.corpus import report
from llmcore.corpus.library import Reader, open_library
from llmcore.corpus.prepare import dataset_folder, held_out_share, prepare_dataset
from llmcore.corpus.sources import open_corpus
from llmcore.dataset import TokenDataset
from llmcore.files import display_path, one_line
from llmcore.measure.planner import TOKENS_PER_PARAMETER, choose_steps, plan
from llmcore.notebook import plots, widgets
from llmcore.tokenizer import Tokenizer

# %%
tok = Tokenizer(tokenizer_model_file)
library = open_library(
    open_corpus(data_dir), errors=errors, encoding=encoding, clean=clean, duplicates=duplicates, progress=True
)

# %% [markdown]
# ## What is left out
# Before anything is written, see what will not be in the token files: lines that recur in many documents and look like
# a web site's own, leftovers of web pages, and copies. The files themselves are never changed. If you see an author's
# line here, set `clean=False`.

# %%
widgets.tables(report.left_out(library))

# %% [markdown]
# ## Text to token files
# Each document is encoded, and one eos token marks its end. All documents stand one after another in a file of 16-bit
# numbers. Training reads this file as a memory map, so a corpus may be larger than memory.
#
# The manifest holds the hash of every source file and of the tokenizer. If nothing has changed, a second run does
# nothing. If the corpus has changed, only new documents are encoded. A preparation that was killed continues where it
# stopped.

# %%
dataset_dir = dataset_folder(dataset_dir, library.folder, tok)
manifest = prepare_dataset(library, tok, dataset_dir, val_fraction)
print(f"token files are in {display_path(dataset_dir)}")
print(report.summary(manifest))

# %% tags=["nbval-check-output"]
for name, split in manifest["splits"].items():
    print(f"{name}: {split['documents']} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes")
print(f"held out: {held_out_share(manifest):.1%} of the text; asked for: {manifest['val_fraction']:.1%}")
print("split by", manifest["split_by"], "- stored as", np.dtype(manifest["dtype"]).name)

# %% tags=["nbval-check-output"]
for name, split in manifest["splits"].items():
    print(name, "sha256", split["sha256"][:16])

# %%
train = TokenDataset(dataset_dir, "train", context_size)
val = TokenDataset(dataset_dir, "val", context_size)
lengths = np.concatenate([np.diff(train.offsets), np.diff(val.offsets)])
plots.length_histogram(lengths, "tokens", f"{len(lengths)} documents, {lengths.sum():,} tokens")

# %% [markdown]
# ## Which documents are held out
# A hash of its name decides whether a document is held out. This stays as it is when files are added or renamed later,
# so the model never trains on a held-out document. Whole documents are held out, so the model cannot read one half of
# a validation sentence in training. With few documents, the held-out share may be far from `val_fraction`. (A corpus
# of a single document is split by position: its end is held out.)

# %% tags=["nbval-check-output"]
held_out = val.names
print(len(held_out), "held out:", " ".join(map(one_line, held_out[:12])))

# %% tags=["nbval-check-output"]
first = next(source for source in manifest["sources"] if source["split"] in ("train", "both"))
with Reader() as reader:  # a block is at most 64 KiB long; a token is at least one byte long
    text = next(reader.blocks(next(text for text in library.kept if text.name == first["path"])))
document = tok.decode(train.read(0, min(int(train.offsets[1]), 1 << 16)).tolist())
length = min(len(text), len(document))
print("the first document decodes to its text:", document[:length] == text[:length])
counts = train.count_ids()
whole = sum(source["split"] == "train" for source in manifest["sources"])
print("each document that ends here ends with eos:", counts[tok.eos_id] == whole)

# %% [markdown]
# ## A few tokens do most of the work
# We sort the tokens by how often they occur. On logarithmic axes they form a line (Zipf's law). The drop at the right
# is made of pieces that occur only a few times. The model will not learn them well.

# %%
rare = (counts < 10).mean()
plots.rank_frequency(counts, f"{rare:.0%} of the vocabulary occurs fewer than ten times")

# %% [markdown]
# ## One batch, side by side
# The model reads `x` and must predict `y` at each place. `y` is the same text, one token later. A batch is a pure
# function of (step, seed). There is no iterator to save or restore, so a run can continue exactly where it stopped.

# %%
x, y = train.batch(step=0, batch_size=4, seed=seed)
for row in range(2):
    print("x:", widgets.visible(tok.decode(x[row, :24].tolist())).replace("\n", "⏎"))
    print("y:", widgets.visible(tok.decode(y[row, :24].clamp(min=0).tolist())).replace("\n", "⏎"), "\n")

# %% tags=["nbval-check-output"]
again, _ = train.batch(step=0, batch_size=4, seed=seed)
print("x", tuple(x.shape), x.dtype, "- y", tuple(y.shape), y.dtype)
print("y is x, one token later:", bool((x[:, 1:] == y[:, :-1])[y[:, :-1] >= 0].all()))
print("the same step gives the same batch:", bool((x == again).all()))

# %% [markdown]
# ## Is this enough text?
# Hoffmann et al. ("Chinchilla", 2022) asked how to use a given amount of compute. Their answer: train on about twenty
# tokens per parameter. One novel is too short even for a small model, so training reads it several times.

# %%
model_config, train_config = config.preset(preset)
train_config = choose_steps(preset, model_config, train_config, len(train.tokens))
cost = plan(model_config.replace(vocab_size=tok.vocab_size), train_config)
rows = {
    "tokens in the training split": len(train.tokens),
    f"tokens {preset} reads": cost.tokens,
    f"compute-optimal for {preset}": cost.best_tokens_for_size,
}
plots.bars(rows, f"{preset} reads the corpus {cost.epochs(len(train.tokens)):.1f} times", "tokens")

# %% tags=["nbval-check-output"]
print(f"compute-optimal size for this corpus read once: {len(train.tokens) / TOKENS_PER_PARAMETER:,.0f} parameters")
print(f"{preset} has {cost.parameters:,.0f}")

# %% [markdown]
# ## Try it
# Page through the windows, or go to a document by its name. A line marks where a document begins. A window may hold the
# end of one document and the beginning of the next. Only the `■ end` between them tells the model.

# %%
widgets.DataExplorer(TokenDataset(dataset_dir, "val", min(context_size, 128)), tok)

# %% [markdown]
# ## What to try next
# - `context_size = 64`: how does the number of windows per epoch change?
# - Add a file to the folder and run again: do the other documents keep their place in the split?
# - Use a folder with a single file. It is split by position, and the notebook says so.
#
# **[Next: 3 · A toy task](03_toyreverse.ipynb)**, or straight to [4 · Training](04_scifi_train.ipynb)
