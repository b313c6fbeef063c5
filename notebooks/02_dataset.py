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
# *What exactly does the model see, and what is a loss?* This notebook turns texts into files of token ids. It holds out
# some documents for validation. Then it shows what one batch asks of the model, and computes by hand how an answer is
# scored.
#
# | in | out | time |
# | --- | --- | --- |
# | `data_dir`; `tokenizer_model_file` from notebook 1 | `dataset_dir`: token files | 10 seconds |
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
import math

import numpy as np
import torch
import torch.nn.functional as F

from llmcore import config
from llmcore.corpus import report
from llmcore.corpus.library import Reader, open_library
from llmcore.corpus.prepare import dataset_folder, held_out_share, prepare_dataset
from llmcore.corpus.sources import open_corpus
from llmcore.dataset import TokenDataset
from llmcore.files import display_path, one_line
from llmcore.measure.planner import TOKENS_PER_PARAMETER, choose_steps, plan
from llmcore.model import Transformer
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

# %%
train = TokenDataset(dataset_dir, "train", context_size)
val = TokenDataset(dataset_dir, "val", context_size)
lengths = np.concatenate([np.diff(train.offsets), np.diff(val.offsets)])
plots.length_histogram(lengths, "tokens", f"{len(lengths)} documents, {lengths.sum():,} tokens")

# %% [markdown]
# ### Which documents are held out
# A hash of its name decides whether a document is held out. This stays as it is when files are added or renamed later,
# so the model never trains on a held-out document. Whole documents are held out, so the model cannot read one half of
# a validation sentence in training. With few documents, the held-out share may be far from `val_fraction`. (A corpus
# of a single document is split by position: its end is held out.)

# %% tags=["nbval-check-output"]
# Checked: the files
for name, split in manifest["splits"].items():
    print(f"{name}: {split['documents']} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes", end=", ")
    print("sha256", split["sha256"][:16])
print(f"held out: {held_out_share(manifest):.1%} of the text; asked for: {manifest['val_fraction']:.1%}")
print("split by", manifest["split_by"], "- stored as", np.dtype(manifest["dtype"]).name)
print(len(val.names), "held out:", " ".join(map(one_line, val.names[:12])))

# %% tags=["nbval-check-output"]
# Checked: the text that comes back
first = next(source for source in manifest["sources"] if source["split"] in ("train", "both"))
with Reader() as reader:  # a block is at most 64 KiB long; a token is at least one byte long
    text = next(reader.blocks(next(text for text in library.kept if text.name == first["path"])))
document = tok.decode(train.read(0, min(int(train.offsets[1]), 1 << 16)).tolist())
length = min(len(text), len(document))
same = sum(a == b for a, b in zip(text[:length], document[:length], strict=True))
print(f"the first document: {same:,} of {length:,} characters decode to its text")
counts = train.count_ids()
whole = sum(source["split"] == "train" for source in manifest["sources"])
print(f"documents that end in the training split: {whole}, eos tokens there: {counts[tok.eos_id]}")

# %% [markdown]
# ## A few tokens do most of the work
# We sort the tokens by how often they occur. The two dotted lines show how few of them make up half of the text, and
# nine tenths of it. Zipf's law says that the count falls as one over the rank: the dashed line. The law fits the middle
# and the right of the figure. At the left, the few most frequent tokens (comma, full stop, 之 "of", 不 "not") occur
# less often than it says. At the right end the curve drops: these pieces occur only a few times, and the model will
# not learn them well.

# %%
rare = (counts < 10).mean()
plots.rank_frequency(counts, f"{rare:.0%} of the vocabulary occurs fewer than ten times")

# %% [markdown]
# ## What the model sees
# The model reads tokens and guesses the next one, at every position at once. Position 0 sees one token, position 1 sees
# two, and so on. So one window of 256 tokens asks 256 questions. In the figure, a row is one question: the filled cells
# are what the model may see, the framed cell is what it must guess.
#
# (The default line begins: "The Long River rolls east, its waves …". The rare character 逝, *passes*, has no piece of
# its own. It is spelled in three bytes, which the model must guess one after the other.)

# %%
opening = train.read(0, 200).tolist()
newline = tok.encode("\n")[0]
start = opening.index(newline) + 1 if newline in opening[:150] else 0
window = [widgets.piece_text(tok, id) for id in opening[start : start + 10]]
plots.staircase(window, f"{len(window) - 1} questions in a window of {len(window)} tokens")

# %% [markdown]
# For the computer, this is two rows of numbers. `x` is what the model reads. `y` is the same text, one token later:
#
# $$y_t = x_{t+1}$$
#
# A batch is some such windows. (In English, the default batch begins: "… Yongcheng. Guo Huai himself led troops by the
# light of the stars to defend Meicheng, and sent a report to Luoyang. Now it is told how the ruler of Wei, Cao Rui …",
# and "… Sun Quan, turned his horse and fought his way in again, and asked his soldiers: 'Where is our lord?' They
# pointed to where the fighting was thickest …")

# %%
x, y = train.batch(step=0, batch_size=4, seed=seed)
for row in range(2):
    print("x:", widgets.visible(tok.decode(x[row, :24].tolist())).replace("\n", "⏎"))
    print("y:", widgets.visible(tok.decode(y[row, :24].clamp(min=0).tolist())).replace("\n", "⏎"), "\n")

# %% [markdown]
# ## Batches without memory
# A batch is a pure function of (step, seed). There is no iterator to save or restore, so a run can continue exactly
# where it stopped. In one epoch the windows tile the whole stream, in a random order. In the next epoch both the order
# and the places where the windows begin are new. The figure shows windows so long that one can see them.

# %%
large = TokenDataset(dataset_dir, "train", max(1, len(train.tokens) // 24))
windows = [(n // large.n_windows, *large.segment(n, seed)) for n in range(2 * large.n_windows)]
plots.reading_order(windows, len(large.tokens), "Two epochs read every place twice, each in its own order")

# %% tags=["nbval-check-output"]
# Checked
again, _ = train.batch(step=0, batch_size=4, seed=seed)
asked = y[:, :-1] >= 0
print("x", tuple(x.shape), x.dtype, "- y", tuple(y.shape), y.dtype)
print(f"y is x, one token later: at {int((x[:, 1:] == y[:, :-1])[asked].sum()):,} of {int(asked.sum()):,} places")
print(f"the same step again: {int((x == again).sum()):,} of {x.numel():,} tokens are the same")
covered = [sum(end - first for epoch, first, end in windows if epoch == e) for e in (0, 1)]
print(f"targets in the stream: {large.n_targets:,}; in the two epochs: {covered[0]:,} and {covered[1]:,}")

# %% [markdown]
# ## From scores to surprise
# The model gives a score to every token of the vocabulary, also called a logit. How good is its guess? Let us follow
# one question by hand, with five tokens. The text says "the river flows …", and the next word is *east*.
#
# **Softmax** turns scores into probabilities. The exponential makes every score positive, and the division makes the
# sum one:
#
# $$p_i = \frac{e^{s_i}}{\sum_j e^{s_j}}$$
#
# **Surprise** is $-\ln p$ of the token that really follows. It is 0 if the model was certain and right, and it grows
# without end as $p$ goes to 0.

# %%
words, right = ["east", "north", "to", "the", "river"], 0
scores = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0])
powers = scores.exp()
p = powers / powers.sum()
by_hand = -p[right].log()
for word, score, power, share in zip(words, scores, powers, p, strict=True):
    print(f"{word:6} score {score:5.1f}   e^score {power:5.2f}   / {powers.sum():.2f} = {share:.3f}")

# %%
plots.surprise(
    words, scores, right, f"The model gives “{words[right]}” {p[right]:.0%}, so its surprise is {by_hand:.2f}"
)

# %% [markdown]
# The **loss** is the mean surprise over all questions of a batch. Its name is cross-entropy, and its unit is the *nat*
# (one nat: a surprise at something with probability $1/e$). torch has it as one function.
#
# $$L = -\frac{1}{n} \sum_{t=1}^{n} \ln p(y_t \mid x_1, \dots, x_t)$$

# %%
torchs = F.cross_entropy(scores[None], torch.tensor([right]))
print(f"by hand {by_hand:.6f} nats, torch's cross_entropy {torchs:.6f} nats")

# %% [markdown]
# ### What a model that knows nothing loses
# It gives each of the $V$ tokens the same score. Then each has probability $1/V$, and the surprise is always
#
# $$-\ln \tfrac{1}{V} = \ln V$$
#
# A new model has small random weights, so its scores are nearly equal. So its first loss must be near $\ln V$. If it is
# much higher, something is wrong. Notebook 4 begins with this loss.

# %%
torch.manual_seed(seed)
untrained = Transformer(config.preset("scifi-mini")[0].replace(vocab_size=tok.vocab_size))
with torch.no_grad():
    first_loss = untrained(x[:, :256], y[:, :256].contiguous())
nothing = math.log(tok.vocab_size)
print(f"ln {tok.vocab_size:,} = {nothing:.2f}; the loss of a new scifi-mini on the batch above: {first_loss:.2f}")

# %% tags=["nbval-check-output"]
# Checked
print(f"by hand and by torch: {abs(by_hand - torchs):.6f} nats apart")
equal = F.cross_entropy(torch.zeros(1, tok.vocab_size), torch.tensor([right]))
print(f"equal scores for {tok.vocab_size:,} tokens: {equal:.4f} nats, ln {tok.vocab_size:,} = {nothing:.4f}")

# %% [markdown]
# ## Three units of one thing
# The same loss is written in three ways.
#
# - **Nats per token**, $L$: what training computes.
# - **Perplexity**, $e^L$: the model is as unsure as if it had to choose among so many equally likely tokens.
# - **Bits per byte**, $\dfrac{L}{\ln 2} \times \dfrac{\text{tokens}}{\text{bytes}}$: a nat is $1/\ln 2 = 1.44$ bits,
#   and the last factor changes "per token" to "per byte of the text".
#
# Only bits per byte may be compared between two tokenizers. If a token is longer, it is harder to guess, but there are
# fewer of them: bits per byte counts both.
#
# As a second model, take one that knows how often each token occurs and looks at nothing else. Its loss is measured on
# the held-out text.

# %%
frequency = (counts + 1) / (counts + 1).sum()  # one more, so that no token is impossible
by_frequency = float(-np.log(frequency[val.read(0, 1 << 20)]).mean())
models = {"knows nothing": nothing, "knows how often\neach token occurs": by_frequency}
for name, loss in models.items():
    bits = loss / math.log(2)
    print(f"{' '.join(name.split())}: {loss:.2f} nats per token")
    print(f"    perplexity: e^{loss:.2f} = {math.exp(loss):,.0f}")
    print(f"    bits per token: {loss:.2f} / {math.log(2):.3f} = {bits:.2f}")
    print(f"    bits per byte: {bits:.2f} / {val.bytes_per_token:.2f} = {bits / val.bytes_per_token:.2f}")

# %%
plots.loss_units(models, val.bytes_per_token, "Where two simple models stand on one ruler with three scales")

# %% [markdown]
# Text without any model has 8 bits per byte. To know only the alphabet of tokens already saves more than half of that:
# the tokenizer has done this. All that the model of notebook 4 learns, it learns to the left of these two lines.

# %% tags=["nbval-check-output"]
# Checked
print(f"held-out text: {val.bytes_per_token:.4f} bytes per token")
for name, loss in models.items():
    print(f"{' '.join(name.split())}: {loss / math.log(2) / val.bytes_per_token:.3f} bits per byte")

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
# Checked
print(f"compute-optimal size for this corpus read once: {len(train.tokens) / TOKENS_PER_PARAMETER:,.0f} parameters")
print(f"{preset} has {cost.parameters:,.0f}")

# %% [markdown]
# ## Try it
# Page through the windows, or go to a document by its name. A line marks where a document begins. A window may hold the
# end of one document and the beginning of the next. Only the `■ end` between them tells the model. Below the tokens
# stands the English of the names and words that this notebook knows.

# %%
widgets.DataExplorer(TokenDataset(dataset_dir, "val", min(context_size, 128)), tok)

# %% [markdown]
# ## What to try next
# - By hand: change one score in `scores`. How does the surprise change if all scores grow by 10?
# - `context_size = 64`: how does the number of windows per epoch change?
# - Add a file to the folder and run again: do the other documents keep their place in the split?
# - Use a folder with a single file. It is split by position, and the notebook says so.
#
# **[Next: 3 · A toy task](03_toyreverse.ipynb)**, or straight to [4 · Training](04_scifi_train.ipynb)
