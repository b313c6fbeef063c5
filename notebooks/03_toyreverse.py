# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3 · A toy task: reversing strings
#
# *Where does attention look?* A transformer of 0.4 million parameters learns to reverse strings of up to 32 letters and
# digits. It learns this small task in a minute or two. Its attention is easy to read: to write the answer, the model
# must look back one place, then three, then five.
#
# | in | out | time |
# | --- | --- | --- |
# | nothing: the strings are random | a run in `output_dir` | under 2 minutes on two CPU cores |
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
import torch

from llmcore import config
from llmcore.device import pick_device
from llmcore.model import Transformer
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
print("x", tuple(x.shape), "- y", tuple(y.shape), "- vocabulary", toy_reverse.VOCAB_SIZE)
print("encode, decode:", toy_reverse.encode("aZ9"), toy_reverse.decode(toy_reverse.encode("aZ9")))

# %%
model_config, train_config = config.preset(preset)
train_config = train_config.replace(seed=seed, max_steps=max_steps or train_config.max_steps)
torch.manual_seed(seed)
model = Transformer(model_config.replace(vocab_size=toy_reverse.VOCAB_SIZE))

# %% tags=["nbval-check-output"]
parameters = sum(p.numel() for p in model.parameters())
print(f"{parameters:,} parameters, at most 0.6 million: {parameters <= 600_000}")

# %%
tokens = train_config.max_steps * x.shape[1] * train_config.batch_size
print(f"{tokens:,} tokens of training, padding included")

# %% [markdown]
# ## Training
# At each validation, the model reverses 300 strings of 32 characters. An answer counts only if all characters and the
# end are right. In JupyterLab, *sample now* lets the half-trained model reverse a string of your own.

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
probe = toy_reverse.random_strings(300, toy_reverse.MAX_LENGTH, seed=seed + 1)
trainer.callbacks.append(toy_reverse.measure_exact_match(model, probe))

# %%
dashboard = widgets.TrainingDashboard(
    "Loss falls first, whole answers come later", metric="exact_match", metric_label="exact match, 32 characters"
)
await dashboard.run(trainer)

# %% [markdown]
# ## Does it really reverse?
# The test strings come from another random stream. There are 62³² strings of 32 characters, about 10⁵⁷. The model
# cannot have seen these.

# %%
model.eval()
texts = toy_reverse.random_strings(test_strings, toy_reverse.MAX_LENGTH, seed=12345)
score = toy_reverse.exact_match(model, texts)
print(f"exact match on {test_strings:,} held-out strings of 32 characters: {score:.2%}")
# %%
[answer] = toy_reverse.answers(model, [prompt])
print(f"{prompt!r} reversed: {answer!r}")

# %% tags=["nbval-check-output"]
batches = [data.batch(step, 64, seed)[0].tolist() for step in range(10)]
trained_on = {toy_reverse.decode(row[1:]).split("·")[0] for batch in batches for row in batch}
print("test strings in the first ten training batches:", len(trained_on & set(texts)))
print("test strings that occur twice:", len(texts) - len(set(texts)))

# %%
lengths = (1, 2, 4, 8, 16, 24, 32)
print(f"{'prompt':34}{'truth':34}{'answer':34}")
for length in lengths:
    [text] = toy_reverse.random_strings(1, length, seed=7)
    [answer] = toy_reverse.answers(model, [text])
    print(f"{text:34}{text[::-1]:34}{answer:34}{'✓' if answer == text[::-1] else '✗'}")

# %% [markdown]
# ## How it does it
# Each square shows one head. The token of a row looks at the tokens of the columns. A dark place gets much attention.
# The model writes its answer in the lower half. Look there for the **anti-diagonal** in layer 2: the longer the answer
# gets, the further left the head looks.
#
# The head may look a few places to the right of the character that it copies. The heads of layer 1 have then moved each
# character by these few places. The two layers share the distance.

# %%
short = prompt[:12]
n = len(short)
ids = [*toy_reverse.question(short), *toy_reverse.encode(short[::-1])]
weights = model.attention_weights(torch.tensor([ids], device=device))[:, 0].cpu()
labels = ["^", *short, "|", *short[::-1]]
plots.attention_maps(weights, labels, "Writing the answer, layer 2 walks back through the string")

# %% [markdown]
# One head has the clearest anti-diagonal. How much of its attention lies there, and how far to the right of the
# character that it copies?

# %%
i = torch.arange(n)  # row n + 1 + i writes character i of the answer, which stands at n - i in the string
on_diagonal = [weights[:, :, (n + 1 + i)[s:], (n - i + s)[s:]].mean(-1) for s in range(min(n, 5))]
share, place = torch.stack(on_diagonal).flatten().max(0)
shift, layer, head = map(int, torch.unravel_index(place, (len(on_diagonal), *weights.shape[:2])))
print(f"layer {layer + 1}, head {head + 1}: {share:.0%} on the anti-diagonal {shift} places to the right")

# %% tags=["nbval-check-output"]
print("attention maps:", tuple(weights.shape))
print("each row adds up to one:", bool((weights.sum(-1) - 1).abs().max() < 1e-4))
print("no token looks at a later one:", bool((weights.triu(1) == 0).all()))

# %% [markdown]
# ## Try it
# Type a string, read the answer, and move the slider along it. For each character of the answer, the table shows how
# much each head looks at each token. (Where you cannot type, the table shows one character of the answer.)

# %%
widgets.ReversalExplorer(model, prompt)

# %% [markdown]
# ## What to try next
# - `max_steps = 200`: which characters of a long string go wrong first?
# - Why do half of the training strings use only a few letters? Set `FEW_SYMBOLS` in
#   `llmcore/notebook/toy_reverse.py` to 32. Which strings with a repeated letter go wrong now?
# - Strings longer than 32: why does the model fail at them?
# - Another seed: does the same head copy?
#
# **[Next: 4 · Training a language model](04_scifi_train.ipynb)**
