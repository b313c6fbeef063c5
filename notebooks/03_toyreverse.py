# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3 · A toy task, and the machine that solves it
#
# *What is a transformer, and where does attention look?* Here you see the whole model: its parts and their shapes, then
# attention by hand, positions, norms, and the source. Then a model of 0.4 million parameters learns to reverse strings
# of up to 32 letters and digits, in a minute or two. Its attention is easy to read: to write the answer, the model must
# look back one place, then three, then five.
#
# | in | out | time |
# | --- | --- | --- |
# | nothing: the strings are random | a run in `output_dir` | 2 to 3 minutes on two CPU cores |
#
# Before: [2 · From tokens to batches](02_dataset.ipynb) · Next: [4 · Training a language model](04_scifi_train.ipynb)
#
# All notebooks: [1](01_tokenize.ipynb) [2](02_dataset.ipynb) **3** [4](04_scifi_train.ipynb) [5](05_generate.ipynb)
# [6](06_scaling.ipynb)

# %% tags=["parameters"]
preset: str = "toy-reverse"  # shape of the model and settings of its training
output_dir: str = "outputs/toyreverse"  # folder of the run
max_steps: int = None  # optimizer steps; None: the preset's
test_strings: int = 10_000  # strings of 32 characters to test on
prompt: str = "HelloWorld42"  # a string to reverse
device: str = "auto"  # auto, cpu, cuda, mps
seed: int = 0  # random seed for the initial weights and the training strings

# %%
from llmcore.notebook.parameters import check_parameters

check_parameters(globals())

# %%
import inspect
import math

import torch

from llmcore import config
from llmcore import model as machine
from llmcore.device import pick_device
from llmcore.model import Attention, Block, FeedForward, Transformer, apply_rope
from llmcore.notebook import plots, toy_reverse, widgets
from llmcore.runs import free_run_dir
from llmcore.train import Trainer

toy_reverse.check_prompt(prompt)
device = str(pick_device(device))

# %% [markdown]
# ## The task as a language model sees it
# Each character is one token. The model reads `begin, string, separator, reversed string, end` (`^ … | … ■`). Training
# asks for each next token, but only after the separator. The string before it is random, so the model cannot learn it.

# %%
data = toy_reverse.ReverseData()
x, y = data.batch(step=0, batch_size=64, seed=seed)
row = int(((y >= 0).sum(1) - 10).abs().argmin())
print("reads:", " ".join(toy_reverse.labels(x[row].tolist())[:30]))
print("says: ", " ".join(toy_reverse.labels(y[row].tolist())[:30]))

# %% tags=["nbval-check-output"]
# Checked
print("x", tuple(x.shape), "- y", tuple(y.shape), "- vocabulary", toy_reverse.VOCAB_SIZE)
print("encode, decode:", toy_reverse.encode("aZ9"), toy_reverse.decode(toy_reverse.encode("aZ9")))

# %% [markdown]
# ## The machine at a glance
# A transformer turns each token into a row of `dim` numbers, and works on these rows. In the figure, read the blue line
# from left to right. It is the **residual stream**: one row for each token of each string in the batch. A **block**
# reads the stream twice and adds to it twice. *Attention* moves information from token to token. The *feed-forward*
# part works on each token alone. At the end, each row becomes a score for each token of the vocabulary.
#
# The shapes are those of the model below, for the batch above: (strings, tokens, numbers).

# %%
model_config, train_config = config.preset(preset)
train_config = train_config.replace(seed=seed, max_steps=max_steps or train_config.max_steps)
torch.manual_seed(seed)
model = Transformer(model_config.replace(vocab_size=toy_reverse.VOCAB_SIZE))
plots.block_diagram(model, x, "From tokens to scores: every part adds to one stream")

# %% tags=["nbval-check-output"]
# Checked
names = {"table": "tok_embeddings", "attention": "attention.w", "feed-forward": "feed_forward.", "norms": "norm"}
sizes = {part: sum(p.numel() for name, p in model.named_parameters() if key in name) for part, key in names.items()}
print(
    f"{sum(p.numel() for p in model.parameters()):,} parameters: " + ", ".join(f"{k} {n:,}" for k, n in sizes.items())
)

# %% [markdown]
# ## Attention by hand
# How can one token use what another one holds? Each token makes three short rows of numbers from its row of the stream:
#
# - a **query** $q$: what it looks for,
# - a **key** $k$: what it offers to be found by,
# - a **value** $v$: what it gives to those that find it.
#
# A token compares its query with all keys. The better they match, the more of that token's value it takes:
#
# $$\text{attention}(Q, K, V) = \text{softmax}\!\left(\frac{Q K^\top}{\sqrt{d}} + \text{mask}\right) V$$
#
# Let us do it with five tokens and one head of $d = 4$ numbers. The numbers are random; only the steps matter.

# %%
signs, d = ["^", "a", "b", "|", "b"], 4
torch.manual_seed(7)
small = Attention(config.ModelConfig(vocab_size=8, dim=d, n_layers=1, n_heads=1, hidden_dim=d, max_seq_len=8), layer=0)
for weight in small.parameters():
    torch.nn.init.normal_(weight, std=0.7)
stream = torch.randn(len(signs), d)  # a row for each token

# %%
with torch.no_grad():
    q, k, v = small.wq(stream), small.wk(stream), small.wv(stream)
    scores = q @ k.T  # row: who looks, column: who is looked at
    scaled = scores / math.sqrt(d)
    future = torch.ones(len(signs), len(signs), dtype=torch.bool).triu(1)
    masked = scaled.masked_fill(future, -math.inf)
    weights = masked.softmax(dim=-1)
    taken = weights @ v

# %%
steps = {"1. q·k": scores, "2. divided by √d": scaled, "3. masked": masked, "4. softmax": weights, "5. times v": taken}
plots.attention_steps(steps, signs, "Five tokens through attention, one head of four numbers")

# %% [markdown]
# 1. **q·k**: every query with every key. A large number is a good match.
# 2. **divided by √d**: the same picture, smaller numbers. The next section says why.
# 3. **masked**: a token must not see later ones, or it would copy the answer. Their scores become −∞.
# 4. **softmax**: each row becomes shares that add up to one, as in notebook 2. $e^{-\infty} = 0$ hides the future. The
#    first token can only look at itself.
# 5. **times v**: each row is a mixture of the values above it, by those shares.
#
# The library does the same, with a last matrix $W_O$ behind it, for all heads and strings at once. We give it our five
# tokens, without turning them (that is RoPE, below):

# %%
cos, sin = torch.ones(len(signs), d // 2), torch.zeros(len(signs), d // 2)
with torch.no_grad():
    librarys = small(stream[None], cos, sin)[0]
    by_hand = small.wo(taken)
print(f"largest difference to Attention.forward: {(librarys - by_hand).abs().max():.1e}")

# %% tags=["nbval-check-output"]
# Checked
agree = int(((librarys - by_hand).abs() < 1e-6).sum())
print(f"{agree} of {by_hand.numel()} numbers are those of Attention.forward, to 0.000001")
print(f"each of {len(weights)} rows adds up to one: {weights.sum(-1).round(decimals=4).tolist()}")

# %% [markdown]
# ### Why the root of d?
# The product $q \cdot k$ is a sum of $d$ terms. If the terms are random with spread 1, the sum has spread $\sqrt{d}$.
#
# $$\text{std}\Big(\sum_{i=1}^{d} q_i k_i\Big) = \sqrt{d}$$
#
# With wide heads the scores become large, and softmax then gives nearly everything to one key. It can hardly learn from
# there: a small change of the scores changes nothing. Divided by $\sqrt{d}$, the spread is 1 for every width.

# %%
torch.manual_seed(1)
products = {n: torch.randn(256, n) @ torch.randn(16, n).T for n in (4, 32, 256)}
for n, product in products.items():
    spread, root = product.std(), math.sqrt(n)
    print(f"d = {n:3}: spread of q·k {spread:5.2f}, √d {root:5.2f}, divided {spread / root:.2f}")
plots.score_spread(products, "Without the root, softmax on wide heads looks at a single key")

# %% [markdown]
# ## Where am I? RoPE
# Attention as above does not know the order of the tokens: mix them, and the sums stay the same. *Rotary position
# embedding* (Su et al., 2021) turns each query and key by an angle that grows with its position. Two numbers
# $(x_0, x_1)$ of a head are one arrow:
#
# $$\begin{pmatrix} x_0' \\ x_1' \end{pmatrix} =
# \begin{pmatrix} \cos t\theta & -\sin t\theta \\ \sin t\theta & \cos t\theta \end{pmatrix}
# \begin{pmatrix} x_0 \\ x_1 \end{pmatrix}, \qquad \theta_i = \Theta^{-2i/d}$$
#
# Here $t$ is the position. The first pairs turn fast and tell neighbours apart. The last pairs turn slowly and tell
# near from far. If the query and the key both move by ten positions, both turn by the same angle. So their product
# stays: only the distance counts. The right panel shows one query and one key of the toy model's width at all
# distances.

# %%
cos, sin = model.rope_cos, model.rope_sin
q, k = torch.randn(2, 1, 1, 1, model_config.head_dim)


def score(at_query: int, at_key: int) -> float:
    turned = apply_rope(q, cos[[at_query]], sin[[at_query]]), apply_rope(k, cos[[at_key]], sin[[at_key]])
    return float((turned[0] * turned[1]).sum())


# %%
back = torch.arange(41)
curves = {f"query at position {t}": (back, [score(t, t - int(n)) for n in back]) for t in (40, 50)}
slow = cos.shape[1] // 2
plots.rope(cos, sin, (0, slow), curves, "A pair turns with its position, and the score knows only the distance")

# %% tags=["nbval-check-output"]
# Checked
pairs = zip(*(scores for _, scores in curves.values()), strict=True)
same = sum(abs(a - b) < 1e-4 for a, b in pairs)
print(f"query at 40 and query at 50: the same score, to 0.0001, at {same} of {len(back)} distances")

# %% [markdown]
# ## RMSNorm and SwiGLU
# Each part reads the stream through **RMSNorm**. The stream grows as blocks add to it. The norm divides each token's
# row by its root mean square, so that a part always reads numbers of the same size ($g$ is learned):
#
# $$\text{RMSNorm}(x) = \frac{x}{\sqrt{\frac{1}{n}\sum_i x_i^2 + \varepsilon}} \odot g$$
#
# The **feed-forward** part is SwiGLU. It makes two longer rows from the token's row. One of them, bent by the curve
# below, is a gate: it says how much of the other passes.
#
# $$\text{SwiGLU}(x) = W_2 \big(\text{silu}(W_1 x) \odot W_3 x\big), \qquad \text{silu}(a) = \frac{a}{1 + e^{-a}}$$

# %%
with torch.no_grad():
    before = model.tok_embeddings(x)[row, 1]  # the stream at one token
    after = model.layers[0].attention_norm(before)
    by_hand = before / (before.square().mean() + model_config.norm_eps).sqrt()
plots.norm_and_gate(before, after, "Left: one token's numbers before and after RMSNorm. Right: the gate of SwiGLU")

# %%
part, token = model.layers[0].feed_forward, after
with torch.no_grad():
    a, b = part.w1(token), part.w3(token)
    gated = part.w2(a / (1 + (-a).exp()) * b)
    librarys = part(token)

# %% tags=["nbval-check-output"]
# Checked
print(f"RMSNorm by hand: {int(((by_hand - after).abs() < 1e-5).sum())} of {len(after)} numbers are the library's")
print(f"SwiGLU by hand: {int(((gated - librarys).abs() < 1e-6).sum())} of {len(gated)} numbers are the library's")

# %% [markdown]
# ## The source
# You know all the words now. This is the code that trains in every notebook, printed from `llmcore/model.py`. `cache`
# and `mask` are for writing: notebook 5 uses them. `qk_norm` is for pretrained models such as Qwen3, which have a
# norm of queries and keys. Ours have none.

# %%
print(inspect.getsource(Attention.project))
print(inspect.getsource(Attention.forward))
print(inspect.getsource(machine.attend))

# %%
print(inspect.getsource(FeedForward))
print(inspect.getsource(Block))

# %% [markdown]
# ## Training
# At each validation, the model reverses 300 strings of 32 characters. An answer counts only if all characters and the
# end are right. In JupyterLab, *sample now* lets the half-trained model reverse a string of your own. We also keep what
# the attention looks like at each validation.

# %%
trainer = Trainer(
    model,
    data,
    toy_reverse.ReverseData(),
    train_config.replace(sample_prompt=prompt),
    free_run_dir(output_dir, "toy-reverse"),
    device=device,
    sampler=lambda text: " → " + toy_reverse.answers(model, [text])[0],
)
short = prompt[:12]
probe = toy_reverse.Probe(model, toy_reverse.random_strings(300, toy_reverse.MAX_LENGTH, seed=seed + 1), short)
trainer.callbacks.append(probe)
tokens = train_config.max_steps * x.shape[1] * train_config.batch_size
print(f"{tokens:,} tokens of training, padding included")

# %%
dashboard = widgets.TrainingDashboard(
    "Loss falls first, whole answers come later", metric="exact_match", metric_label="exact match, 32 characters"
)
await dashboard.run(trainer)

# %% [markdown]
# Which characters does it learn first? The first character of the answer stands one place back, the last one 63 places.

# %%
probe.look(trainer.step)  # once more, in case training was stopped between two validations
seen = list(probe.by_place)
moments = [seen[0], seen[len(seen) // 4], seen[len(seen) // 2], seen[-1]]
title = "Right characters at each place of the answer, as training goes on"
plots.accuracy_by_place({f"step {step:,}": probe.by_place[step] for step in moments}, title)

# %% [markdown]
# ## Does it really reverse?
# The test strings come from another random stream. There are 62³² strings of 32 characters, about 10⁵⁷. The model
# cannot have seen these.

# %%
model.eval()
texts = toy_reverse.random_strings(test_strings, toy_reverse.MAX_LENGTH, seed=12345)
score = toy_reverse.exact_match(model, texts)
print(f"exact match on {test_strings:,} held-out strings of 32 characters: {score:.2%}")

# %% [markdown]
# Random strings are easy: they seldom have a character twice. A model that looks for *the character after the one I
# just wrote* gets them right, and fails on `abcabc`. So we also test short strings of few different characters.

# %%
counts = {(12, 3): test_strings} | dict.fromkeys([(12, 2), (20, 3), (32, 3), (32, 1)], max(1, test_strings // 5))
for (length, few), count in counts.items():
    repetitive = toy_reverse.repetitive_strings(count, length, few, seed=12345)
    print(f"{length} characters, {few} different: {toy_reverse.exact_match(model, repetitive):.2%} of {count:,}")

# %%
tries = [prompt, "abcabcXYZ999", *(toy_reverse.random_strings(1, n, seed=7)[0] for n in (1, 2, 4, 8, 16, 24, 32))]
print(f"{'prompt':34}{'truth':34}{'answer':34}")
for text, answer in zip(tries, toy_reverse.answers(model, tries), strict=True):
    print(f"{text:34}{text[::-1]:34}{answer:34}{'✓' if answer == text[::-1] else '✗'}")

# %% tags=["nbval-check-output"]
# Checked
batches = [data.batch(step, 64, seed)[0].tolist() for step in range(10)]
trained_on = {toy_reverse.decode(row[1:]).split("·")[0] for batch in batches for row in batch}
print("test strings in the first ten training batches:", len(trained_on & set(texts)))
print("test strings that occur twice:", len(texts) - len(set(texts)))

# %% [markdown]
# ## How it does it
# Each square shows one head. The token of a row looks at the tokens of the columns. A dark place gets much attention.
# The model writes its answer in the lower half. Look there for the **anti-diagonal** in layer 2: the longer the answer
# gets, the further left the head looks.
#
# The head may look a few places to the right of the character that it copies. The heads of layer 1 have then moved each
# character by these few places. The two layers share the distance.

# %%
n, weights = len(short), toy_reverse.attention(model, probe.ids)
signs = toy_reverse.labels(probe.ids)
plots.attention_maps(weights, signs, "Writing the answer, layer 2 walks back through the string")

# %% [markdown]
# One head has the clearest anti-diagonal. How much of its attention lies there, and how far to the right of the
# character that it copies?

# %%
i = torch.arange(n)  # row n + 1 + i writes character i of the answer, which stands at n - i in the string
on_diagonal = [weights[:, :, (n + 1 + i)[s:], (n - i + s)[s:]].mean(-1) for s in range(min(n, 5))]
share, place = torch.stack(on_diagonal).flatten().max(0)
shift, layer, head = map(int, torch.unravel_index(place, (len(on_diagonal), *weights.shape[:2])))
print(f"layer {layer + 1}, head {head + 1}: {share:.0%} on the anti-diagonal {shift} places to the right")

# %% [markdown]
# This is the head, large. In each row below `|`, the model is about to write one character. The red frames mark the
# place of that character in the string, or the place so far to its right. The orange frame is the column of `|`. There
# a head looks that has nothing else to look for: softmax must give its shares to some token.

# %%
title = f"Layer {layer + 1}, head {head + 1}: {share:.0%} of the attention lies in the red frames"
plots.attention_head(weights[layer, head], signs, shift, title)

# %% [markdown]
# The same head while it learned. At first it looks everywhere. Then the anti-diagonal appears, and it becomes sharp.

# %%
stages = {f"step {step:,}": probe.weights[step][layer, head] for step in (moments[0], moments[1], moments[-1])}
plots.attention_moments(stages, signs, "The anti-diagonal appears during training")

# %% tags=["nbval-check-output"]
# Checked
print("attention maps:", tuple(weights.shape))
rows = (weights.sum(-1) - 1).abs() < 1e-4
print(f"rows that add up to one: {int(rows.sum())} of {rows.numel()}")
print(f"largest weight on a later token: {float(weights.triu(1).max()):.1f}")

# %% [markdown]
# ## Try it
# Type a string, read the answer, and move the slider along it. For each character of the answer, the table shows how
# much each head looks at each token. (Where you cannot type, the table shows one character of the answer.)

# %%
widgets.ReversalExplorer(model, prompt)

# %% [markdown]
# ## What to try next
# - Attention by hand: leave out the mask. What changes in the first row of the result?
# - `max_steps = 200`: which characters of a long string go wrong first?
# - Half of the training strings use only a few letters. Set `FEW_SYMBOLS` in `llmcore/notebook/toy_reverse.py` to
#   `(32,)`. Which strings with a repeated letter go wrong now?
# - Strings longer than 32: why does the model fail at them?
# - Another seed: does the same head copy?
#
# **[Next: 4 · Training a language model](04_scifi_train.ipynb)**
