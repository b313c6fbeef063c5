# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5 · Writing
#
# *What does the model write, and how sure is it?* This notebook loads a trained model and lets it write. It shows the
# probabilities behind the words, five ways to choose from them, and why writing is fast. The novel's words have English
# beside them.
#
# | in | out | time |
# | --- | --- | --- |
# | a run of notebook 4 | text and pictures | half a minute on two CPU cores |
#
# Before: [4 · Training](04_scifi_train.ipynb) · Next: [6 · A scaling law](06_scaling.ipynb)
#
# All notebooks: [1](01_tokenize.ipynb) [2](02_dataset.ipynb) [3](03_toyreverse.ipynb) [4](04_scifi_train.ipynb) **5**
# [6](06_scaling.ipynb)

# %% tags=["parameters"]
checkpoint_dir: str = "latest"  # latest or best of output_dir, or a folder: a run or one checkpoint
output_dir: str = "outputs/runs"  # folder of all runs
prompt: str = "却说曹操"  # the text to continue
max_new_tokens: int = 160  # length of the continuation
temperature: float = 0.8  # 0 always takes the likeliest token; 1 keeps the model's probabilities
top_k: int = None  # only the k likeliest tokens
top_p: float = 0.95  # only the likeliest tokens that together have this probability
min_p: float = None  # only tokens at least this share as likely as the likeliest
repetition_penalty: float = 1.0  # above 1: avoids tokens of the text so far
device: str = "auto"  # auto, cpu, cuda, mps
seed: int = 0  # the same seed writes the same text

# %%
from llmcore.notebook.parameters import check_parameters

check_parameters(globals())

# %%
import time

import torch

from llmcore.checkpoint import checkpoints, load_checkpoint, loss_in_words
from llmcore.decode import ENOUGH_WEIGHTS, prepare
from llmcore.device import pick_device
from llmcore.files import display_path, resolve
from llmcore.formats.gguf import to_gguf
from llmcore.formats.huggingface import from_hf, to_hf
from llmcore.formats.llama2c import to_llama2c
from llmcore.generate import generate, next_token_probabilities, prompt_ids, stream, surprise
from llmcore.measure.compare_runs import find_runs
from llmcore.model import KVCache
from llmcore.notebook import plots, widgets
from llmcore.notebook.gloss import beside_english, gloss
from llmcore.quantize import int8_weights

device = str(pick_device(device))

# %%
checkpoint = load_checkpoint(output_dir, checkpoint_dir or "latest", device=device)
model, tok = checkpoint.model, checkpoint.tokenizer
print(f"{display_path(checkpoint.path)}: step {checkpoint.step:,}, {loss_in_words(checkpoint.config)}")

# %% [markdown]
# ## Word by word
# The model reads the text so far and gives a probability to each token of its vocabulary. One token is drawn by these
# probabilities and added to the text. Then the same again. Each piece of text appears as soon as it is drawn.

# %%
sampling = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed}
print(widgets.visible(widgets.ending(prompt)), end="")
written = ""
for piece in stream(model, tok, prompt, max_new_tokens, temperature, **sampling):
    print(widgets.visible(piece), end="", flush=True)
    written += piece

# %%
print("In English:", gloss(prompt + written))

# %% tags=["nbval-check-output"]
# Checked
few = min(max_new_tokens, 40)
whole = generate(model, tok, prompt, few, temperature, **sampling)
assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
assert "".join(stream(model, tok, prompt, few, temperature, **sampling)) == whole
assert generate(model, tok, prompt, few, temperature, **sampling) == whole
print(f"{model.config.n_params():,} finite parameters; a context of {model.config.max_seq_len} tokens")
print("streamed or not, the same seed writes the same text")

# %% [markdown]
# ## The next token
# The model gives a score $z_i$ to each token $i$: a *logit*. The softmax turns the scores into probabilities:
#
# $$p_i = \frac{e^{z_i}}{\sum_j e^{z_j}}$$
#
# These are the likeliest tokens after the prompt.

# %%
ids = prompt_ids(model, tok, prompt)
with torch.inference_mode():
    logits = model(torch.tensor([ids], device=device))[:, -1]
probabilities = logits.softmax(1)[0]
top = probabilities.topk(12).indices
likely = [beside_english(widgets.piece_text(tok, id)) for id in top.tolist()]
plots.next_tokens(
    likely, probabilities[top].tolist(), f"After “{widgets.ending(prompt, 40)}”, “{likely[0]}” is the likeliest"
)

# %% [markdown]
# ## Five ways to choose
# To draw from all tokens is risky: thousands of unlikely ones add up. There are five common ways to choose.
#
# - **temperature** $T$ divides the scores before the softmax: $p_i \propto e^{z_i / T}$. Below 1, likely tokens become
#   likelier. At 0, the likeliest is always taken.
# - **top-k** keeps the $k$ likeliest tokens, however likely they are.
# - **top-p** keeps the likeliest tokens that together have the probability $p$: few where the model is sure, many where
#   it is not.
# - **min-p** keeps tokens that are at least this share as likely as the likeliest.
#
# Whatever is kept is divided by its sum, so that the probabilities add up to one again. Hatched bars are cut off.

# %%
settings = {
    "the model's own": {},
    "temperature = 0.5": {"temperature": 0.5},
    "temperature = 1.5": {"temperature": 1.5},
    "top_k = 5": {"top_k": 5},
    "top_p = 0.3": {"top_p": 0.3},
    "min_p = 0.2": {"min_p": 0.2},
}
ways = {name: next_token_probabilities(logits, **setting)[0] for name, setting in settings.items()}
left = int((ways["top_p = 0.3"] > 0).sum())
title = f"The same twelve tokens: top_p = 0.3 leaves {left} of {tok.vocab_size:,} here"
plots.ways_to_choose(likely, {name: chances[top].tolist() for name, chances in ways.items()}, title)

# %% tags=["nbval-check-output"]
# Checked
assert all(abs(float(chances.sum()) - 1) < 1e-4 for chances in ways.values())
assert generate(model, tok, prompt, 1, temperature=0) == tok.decode([int(probabilities.argmax())])
kept = probabilities[ways["top_p = 0.3"] > 0]
assert float(kept.sum() - kept.min()) < 0.3 + 1e-6
print(f"{len(ways)} ways, each adds up to one; temperature 0 takes the likeliest token")
print("top-p keeps no more tokens than it must")

# %% [markdown]
# ## Cold and hot
# With a low temperature, the model repeats safe phrases, and often it ends in a loop. With a high one it invents more
# and makes more mistakes. A loop can be counted: most of its strings of four characters have been there before. Which
# text do you like best?

# %%
for degree in (0.0, 0.5, 0.8, 1.0, 1.3):
    text = generate(model, tok, prompt, min(max_new_tokens, 80), degree, **sampling)
    fours = [text[i : i + 4] for i in range(len(text) - 3)]
    new = f"{len(set(fours)) / len(fours):.0%} of its strings of four are new" if fours else "too short to count"
    print(f"--- temperature {degree}: {new}\n{widgets.visible(widgets.ending(prompt) + text)}")
    print(f"({gloss(text)})\n")

# %% [markdown]
# ## Surprise
# How well does the model predict a real paragraph? This one is from chapter 37, which was held out of training. The
# surprise at a token is $-\ln p$, the negative logarithm of its probability. Dark pieces were a surprise. Often this is
# the first character of a name. The second is then easy.
#
# > *Xuande was preparing gifts, to go to Longzhong and visit Zhuge Liang, when someone announced: “At the gate stands a
# > gentleman in a tall hat and a broad belt, of extraordinary bearing, who has come to see you.” Xuande said: “Can this
# > be Kongming?” He put his robes in order and went out to meet him. But it was Sima Hui. Xuande was glad, led him into
# > the inner hall and gave him the seat of honour.*

# %%
paragraph = (
    "却说玄德正安排礼物，欲往隆中谒诸葛亮，忽人报：“门外有一先生，峨冠博带，道貌非常，特来相探。”"
    "玄德曰：“此莫非即孔明否？”遂整衣出迎。视之，乃司马徽也。玄德大喜，请入后堂高坐。"
)
ids = [tok.encode("\n")[-1], *tok.encode(paragraph)]
nats = surprise(model, ids)
shown_pieces = [widgets.piece_text(tok, id) for id in ids[1:]]
mean = sum(nats) / len(nats)
plots.text_pieces(
    shown_pieces, f"A visitor mistaken for Zhuge Liang: {mean:.2f} nats per token on average", nats, "nats"
)

# %% tags=["nbval-check-output"]
# Checked
window = torch.tensor(ids[: model.config.max_seq_len + 1], device=device)
loss = model(window[None, :-1], window[None, 1:]).item()
assert len(nats) == len(ids) - 1
assert abs(sum(nats[: len(window) - 1]) / (len(window) - 1) - loss) < 1e-3
print("one surprise per token; their mean is the loss of training")

# %% [markdown]
# ## Why writing is slow, and the cache
# To choose token $t + 1$, attention needs the keys and values of all $t$ tokens before it. A model without a memory
# reads the whole text again at each step: $1 + 2 + \dots + n = n(n+1)/2$ tokens for a text of $n$. But the keys and
# values of earlier tokens never change, since no token looks at later ones. The **KV cache** keeps them. Then each step
# reads one token, $n$ in all. We write the same text both ways.

# %%
count = min(model.config.max_seq_len, 256)
text_ids = torch.tensor([(ids * count)[:count]], device=device)
room = KVCache(model.config, 1, device, model.tok_embeddings.weight.dtype, count)
again, cached, same = [], [], True
with torch.inference_mode():
    for t in range(count):
        started = time.perf_counter()
        slow = model(text_ids[:, : t + 1])[0, -1].argmax().item()  # .item() waits for the device
        middle = time.perf_counter()
        quick = model.output(model.hidden_states(text_ids[:, t : t + 1], room))[0, -1].argmax().item()
        again.append(middle - started)
        cached.append(time.perf_counter() - middle)
        same = same and slow == quick
plots.cache_work(again, cached, f"With the cache, {count} tokens take {sum(cached) / sum(again):.0%} of the time")

# %% tags=["nbval-check-output"]
# Checked
assert same
print("with and without the cache, the likeliest token is the same at each step")

# %% [markdown]
# ## How fast
# We write one text, then sixteen at once. In both cases the computer reads all weights once for each step, and reading
# them is most of the work. On a CPU we can also round the weights to int8. Then it reads a quarter of the bytes.
#
# A model of a million weights or more is compiled first, which takes about half a minute, once for each shape. Without
# that, the start of some 150 small operations per token takes longer than the reading.

# %%
small = int8_weights(model) if device == "cpu" else model
writers = {"one text": (model, 1), "sixteen texts": (model, 16)}
if small is not model:
    writers["one text, int8"] = (small, 1)
rates, compiled = {}, False
for name, (writer, count) in writers.items():
    if writer.config.n_params() >= ENOUGH_WEIGHTS:
        compiled = prepare(writer, count) or compiled
    started = time.perf_counter()
    generate(writer, tok, [prompt] * count, 64, seed=seed)
    rates[name] = count * 64 / (time.perf_counter() - started)
speedup = rates["sixteen texts"] / rates["one text"]
print("one text is written by compiled code" if compiled else "nothing is compiled here")
plots.bars(rates, f"Sixteen texts at once: {speedup:.1f} times the tokens per second", "tokens per second")

# %%
rounded = surprise(small, ids)
print(f"the paragraph in int8: {sum(rounded) / len(rounded):.3f} nats per token, {mean:.3f} in float32")

# %% tags=["nbval-check-output"]
# Checked
assert abs(sum(rounded) / sum(nats) - 1) < 0.01
print("int8 changes the mean surprise by less than 1%")

# %% [markdown]
# ## Take it elsewhere
# Other programs can use this model. We write a folder for Hugging Face's transformers (vLLM and torchtitan read it
# too), a file for llama2.c's C program, and a file of half the size for llama.cpp.

# %%
export_dir = resolve("outputs/export") / checkpoint.path.parent.name
hf_dir = None
try:
    hf_dir = to_hf(checkpoint, export_dir / "huggingface")
    to_llama2c(checkpoint, export_dir / "llama2c" / "model.bin", adapt=True)
    to_gguf(checkpoint, export_dir / "gguf" / "model.gguf", torch.float16)
except OSError as error:  # a read-only or full disk: the notebook continues without the exports
    print(f"left out, since {display_path(export_dir)} cannot be written: {widgets.visible(str(error))}")
for file in sorted(path for path in export_dir.rglob("*") if path.is_file()):
    print(f"{file.stat().st_size / 1e3:10,.1f} kB  {display_path(file)}")

# %%
import transformers

transformers.utils.logging.disable_progress_bar()
if hf_dir:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf_dir).to(device)
    their_tok = transformers.AutoTokenizer.from_pretrained(hf_dir)
    back = from_hf(hf_dir, device)

# %% tags=["nbval-check-output"]
# Checked
if hf_dir:
    ids_in = window[None, : model.config.max_seq_len]
    with torch.inference_mode():
        assert (theirs(ids_in).logits - model(ids_in)).abs().max() < 1e-4
    assert their_tok(paragraph)["input_ids"] == tok.encode(paragraph)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), back.model.parameters(), strict=True))
    print("transformers gives the same ids, and the same scores within 1e-4; read back, each weight is the same")

# %% [markdown]
# ## Try it
# Type a prompt, change the settings, and stop the text with a button. When the text is finished, rest the mouse on a
# token. You see its probability and the other candidates. A token with a probability below 10% is underlined. With
# *Compare with*, another checkpoint writes beside this one. (Where you cannot press buttons, you see only the text.)

# %%
others = [path for run in find_runs(output_dir) for path in checkpoints(run) if path != checkpoint.path]
panel = widgets.WritingPanel(model, tok, prompt, min(max_new_tokens, 80), others)
await panel.start()
panel

# %% [markdown]
# ## What to try next
# - A prompt from another century, or in English: what does the model do with words that it has never seen?
# - `repetition_penalty = 1.2` at `temperature = 0`: does the text still repeat itself?
# - `checkpoint_dir = "best"`, or the folder of an earlier checkpoint: how did the text for this prompt change?
#
# **[Next: 6 · A scaling law](06_scaling.ipynb)**
