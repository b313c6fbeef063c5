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
# *What does the model write, how sure is it, and does it recite?* This notebook loads a trained model and lets it
# write. It shows the probabilities behind the words, five ways to choose from them, which of them writes most like the
# author, what the model has learned by heart, and why writing is fast. The novel's words have English beside them.
#
# | in | out | time |
# | --- | --- | --- |
# | a run of notebook 4, and its data set | text and pictures | two minutes on two CPU cores |
#
# Before: [4 · Training](04_scifi_train.ipynb) · Next: [6 · A scaling law](06_scaling.ipynb)
#
# All notebooks: [1](01_tokenize.ipynb) [2](02_dataset.ipynb) [3](03_toyreverse.ipynb) [4](04_scifi_train.ipynb) **5**
# [6](06_scaling.ipynb)

# %% tags=["parameters"]
checkpoint_dir: str = "latest"  # latest or best of output_dir, or a folder: a run or one checkpoint
output_dir: str = "outputs/runs"  # folder of all runs
dataset_dir: str = "auto"  # the text to compare with; auto: the data set of the run, if it is in outputs/datasets
prompt: str = "却说曹操"  # the text to continue
max_new_tokens: int = 160  # length of the continuation
temperature: float = 1.0  # 0 always takes the likeliest token; 1 keeps the model's probabilities
top_k: int = None  # only the k likeliest tokens
top_p: float = 0.95  # only the likeliest tokens that together have this probability
min_p: float = None  # only tokens at least this share as likely as the likeliest
repetition_penalty: float = 1.0  # above 1: avoids tokens of the text so far
llama2c_run: str = None  # path of llama2.c's compiled program, for a bar with its speed
device: str = "auto"  # auto, cpu, cuda, mps
seed: int = 0  # the same seed writes the same text

# %%
from llmcore.notebook.parameters import check_parameters

check_parameters(globals())

# %%
import json
import shlex
import time

import torch
from IPython.display import display

from llmcore.checkpoint import checkpoints, load_checkpoint, loss_in_words
from llmcore.dataset import TokenDataset
from llmcore.decode import ENOUGH_WEIGHTS, prepare
from llmcore.device import pick_device
from llmcore.files import display_path, resolve
from llmcore.formats.gguf import to_gguf
from llmcore.formats.huggingface import from_hf, to_hf
from llmcore.formats.llama2c import check_run, speed_of_run, to_llama2c
from llmcore.generate import generate, next_token_probabilities, prompt_ids, stream, surprise
from llmcore.measure.compare_runs import find_runs, read_events
from llmcore.measure.memorised import (
    begins_to_recall,
    continuations,
    data_of,
    forced_recall,
    held_out_prompts,
    longest,
    recited,
    share,
    source,
)
from llmcore.measure.ngram import NGram
from llmcore.measure.repetition import distinct, longest_loop, nearest, repetition
from llmcore.model import KVCache
from llmcore.notebook import plots, widgets
from llmcore.notebook.drafts import remake
from llmcore.notebook.gloss import beside_english, gloss
from llmcore.notebook.story import open_story
from llmcore.quantize import int8_weights

device = str(pick_device(device))
if llama2c_run:
    check_run(llama2c_run)

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
# - **repetition penalty** makes tokens that the text already has less likely. (It is not in the figure.)
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
# With a low temperature, the model repeats safe phrases, and often it ends in a **loop**: a piece that follows itself
# again and again. With a high one it invents more and makes more mistakes. Both can be counted. Which text do you like
# best?

# %%
for degree in (0.0, 0.5, 0.8, 1.0, 1.3):
    text = generate(model, tok, prompt, min(max_new_tokens, 80), degree, **sampling)
    pairs = tok.encode(text)
    counted = f"{distinct([pairs], 2):.0%} of its pairs of tokens are different, longest loop {longest_loop(pairs)}"
    print(f"--- temperature {degree}: {counted} tokens\n{widgets.visible(widgets.ending(prompt) + text)}")
    print(f"({gloss(text)})\n")

# %% [markdown]
# ## Which setting writes like the author?
# The author has written on after every passage that was held out of training. So has the model, if we give it the same
# passages as prompts. We measure two things of both:
#
# - **Repetition**: how many pairs of tokens are different ones (*distinct-2*).
# - **Quality**: how surprised are counted 4-grams of the training text? They are a judge that knows the language a
#   little, and is not the model itself. Text that is too safe surprises them less than the author does, and nonsense
#   surprises them more. So the aim is not the lowest surprise, but the author's.
#
# The star is the author. Each line changes one parameter. (The repetition penalty is tried at temperature 0.8.)

# %%
data_folder = data_of(checkpoint, dataset_dir)
prompts, author = [], []
if data_folder:
    train, val = (TokenDataset(data_folder, split, 1) for split in ("train", "val"))
    many = 16 if model.config.n_params() < 20e6 or device != "cpu" else 4
    prompts, author = held_out_prompts(val, many)
if not prompts:
    print("left out below, because the run's data set is not in outputs/datasets: what compares with its text")

# %%
tried = {
    "temperature": (0.6, 0.8, 0.9, 1.0, 1.2),
    "top_p": (0.7, 0.8, 0.9, 0.95),
    "min_p": (0.02, 0.05, 0.1, 0.2),
    "repetition_penalty": (1.1, 1.2, 1.3),
}
model_texts = {}
for name, values in tried.items():
    base = {"temperature": 0.8, "seed": seed} if name == "repetition_penalty" else {"seed": seed}
    for value in values if prompts else ():
        setting = {**base, name: value}
        model_texts[name, value] = continuations(model, prompts, len(author[0]), tok.vocab_size, **setting)

# %%
if prompts:
    judge = NGram([train.read(0, 2_000_000)], 4, tok.vocab_size, tok.eos_id)

    def place(texts):
        return float(sum(judge.nats(ids)[:-1].mean() for ids in texts) / len(texts)), distinct(texts, 2)

    star, places = place(author), {way: place(texts) for way, texts in model_texts.items()}
    best_name, best_value = nearest(places, star)
    curves = {name: {f"{value:g}": places[name, value] for value in values} for name, values in tried.items()}
    title = f"{best_name} = {best_value:g} writes most like the author: the same surprise, as few repetitions"
    display(plots.quality_and_repetition(curves, star, title))

# %% [markdown]
# From this figure we took the default of this notebook: `top_p = 0.95` at temperature 1. The points near the star
# differ by chance: with another seed, another of them is the nearest. Some readers like colder text better, since it
# makes fewer mistakes.
#
# The table has the same texts, and the other measures of repetition. *Repeated lines* are lines or sentences that stood
# before in the same text.

# %%
rows = []
for way, texts in {"the author": author, **model_texts}.items() if prompts else ():
    counts = repetition(texts, [tok.decode(ids) for ids in texts])
    row = {"text": way if isinstance(way, str) else f"{way[0]} = {way[1]:g}"}
    row |= {f"distinct-{n}": f"{value:.1%}" for n, value in enumerate(counts.distinct, 1)}
    rows.append({**row, "longest loop": f"{counts.loop} tokens", "repeated lines": f"{counts.lines:.1%}"})
widgets.tables({"Repetition, by the setting": rows})

# %% tags=["nbval-check-output"]
# Checked
if prompts:
    assert all(len(ids) == len(author[0]) for texts in model_texts.values() for ids in texts)
    assert all(0 < value <= 1 for _, value in (*places.values(), star))
    print("the model's texts are as long as the author's, so their repetition can be compared")

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
# ## Does it recite?
# A model that repeats its training text word for word does not write. So we look for the longest **runs**: tokens that
# stand in the training text in the same order. But an author repeats phrases too, such as names with titles, or
# “in the next chapter”. So the same count for held-out text is the **floor**. What is above the floor is recited.
#
# These are the same texts as above, in the setting of this notebook. The search is exact.

# %%
if prompts:
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    settings["repetition_penalty"] = repetition_penalty
    texts = continuations(model, prompts, len(author[0]), tok.vocab_size, **settings)
    sizes, lengths = (5, 8, 16, 32), [len(ids) for ids in author]
    runs, floor = (recited(each, train, min(sizes), eos_id=tok.eos_id) for each in (texts, author))
    shares, floor_shares = ({size: share(each, lengths, size) for size in sizes} for each in (runs, floor))
    words = "no more than" if shares[8] <= floor_shares[8] else "more than"
    title = (
        f"Recited in runs of 8 tokens: {shares[8]:.1%} of the model's text, {words} the floor, {floor_shares[8]:.1%}"
    )
    display(plots.recited_shares({"the model": shares, "held-out text: the floor": floor_shares}, title))

# %%
if prompts:
    for name, each, found in (("the model", texts, runs), ("the author", author, floor)):
        if best := longest(found):
            number, run = best
            words = tok.decode(each[number][run.start : run.end])
            where = f"{run.end - run.start} tokens of {widgets.visible(source(train, run.place).name)}"
            print(f"{name}'s longest run, {where}: {widgets.visible(words)} ({gloss(words)})")

# %% [markdown]
# Of the model's texts and of the author's, this is the one with the most of its tokens in runs. Runs of 5 tokens or
# more are underlined and have a number. Click on a line of the list: it shows the passage of the training text that
# holds the run.

# %%
if prompts:
    pages = {}
    for name, each, found in (("The model", texts, runs), ("The author, held-out text", author, floor)):
        most = max(range(len(each)), key=lambda number: share([found[number]], [lengths[number]], min(sizes)))
        pages[name] = each[most], found[most]
    display(widgets.recited_pages(tok, pages, train, min(sizes)))

# %% [markdown]
# ### Does it know how a passage goes on?
# A model that has learned a text by heart continues it, if it is shown the beginning. We show the model the last 8, 32
# or 128 tokens before a place, and it writes the 16 likeliest tokens. This is done at 200 places of the training text
# and at 200 of the held-out text, where it can only guess. (Carlini et al., 2022, did so with large models. These
# continue more passages to the end, the more they are shown.)

# %%
recalls = {}
if prompts:
    of = {"training text": train, "held-out text": val}
    recalls = {name: forced_recall(model, data, count=200 if many == 16 else 40) for name, data in of.items()}
if all(recalls.values()) and recalls:
    known, guessed = (each[max(each)] for each in recalls.values())
    title = f"Shown {max(recalls['training text'])} tokens, it continues {known.whole:.0%} of its training passages"
    display(plots.recall_by_prompt(recalls, f"{title} to the end, {guessed.whole:.0%} of new ones"))

# %% [markdown]
# ### When did it begin?
# Notebook 4 measured both during training. The training loss falls further than the validation loss as soon as the text
# is read again. This gap says that the model knows its text better than other text. Whether it can also recite is
# another question: the other two panels answer it.

# %%
try:
    events = read_events(checkpoint.path.parent)
except (OSError, ValueError):  # a checkpoint on its own
    events = []
began = begins_to_recall(events)
if not any("recall" in event for event in events):
    title = "This run was not measured while it trained"
elif began is None:
    title = "At its end, the model continues its training text no further than new text, or hardly"
else:
    title = f"From step {began:,} on, the model continues its training text further than new text"
if events:
    display(plots.learned_by_heart(events, title, len(train.tokens) if prompts else None))

# %% tags=["nbval-check-output"]
# Checked
if prompts:
    for text, its_runs in zip((*texts, *author), (*runs, *floor), strict=True):
        assert all(text[start:end] == train.read(at, at + end - start).tolist() for start, end, at in its_runs)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    print("each run stands in the training text, word for word")

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
# A small model fits into the processor's cache, and gains little by that.
#
# A model of a million weights or more is compiled first. This takes about half a minute, once for each shape and each
# number of texts. Without it, the start of some 150 small operations per step takes longer than the reading. llama2.c's
# C program needs no Python: if you have compiled it, give its path as `llama2c_run`.

# %%
small = int8_weights(model) if device == "cpu" else model
writers = {"one text": (model, 1), "sixteen texts": (model, 16)}
if small is not model:
    writers["one text, int8"] = (small, 1)
rates, compiled = {"one text, not compiled": count / sum(cached)}, False
for name, (writer, count) in writers.items():
    if writer.config.n_params() >= ENOUGH_WEIGHTS:
        compiled = prepare(writer, count) or compiled
    started = time.perf_counter()
    generate(writer, tok, [prompt] * count, 64, seed=seed)
    rates[name] = count * 64 / (time.perf_counter() - started)
if llama2c_run:
    rates["one text, llama2.c"] = speed_of_run(llama2c_run, checkpoint)
speedup = rates["sixteen texts"] / rates["one text"]
print("compiled code writes" if compiled else "nothing is compiled here")
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
# ### A server, and a page to write on
# llama.cpp's server opens the GGUF file. It refuses a prompt that is longer than the context. By default it cuts the
# candidates first (`top-k 40`, `min-p 0.05`) and applies the temperature last. The options below are this notebook's.
# Then write on [mikupad](https://github.com/lmg-anon/mikupad), a page in one HTML file: choose the backend *llama.cpp*,
# the server's address and the mode *Completion*. Or open the file with
# [KoboldCpp](https://github.com/LostRuins/koboldcpp), llama.cpp with a story writer built in. We have tried the server
# and its `/completion`. The two pages we know only from their documents.
#
# **Do not chat with this model.** It has learned to continue a text, and nothing else. The server's own page sends chat
# messages. The model does not answer them: it continues them as a novel.

# %%
gguf = shlex.quote(str(display_path(export_dir / "gguf" / "model.gguf")))
options = {"temp": temperature, "top-k": top_k or 0, "top-p": top_p or 1, "min-p": min_p or 0}
options["repeat-penalty"] = repetition_penalty
question = json.dumps({"prompt": widgets.ending(prompt, 40), "n_predict": 80}, ensure_ascii=False)
print(f"llama-server -m {gguf} --port 8080", *(f"--{name} {value}" for name, value in options.items()))
print(f"curl -H 'Content-Type: application/json' http://127.0.0.1:8080/completion -d {shlex.quote(question)}")
print(f"koboldcpp --model {gguf} --contextsize {model.config.max_seq_len}")

# %% [markdown]
# ## A desk
# Write a story together with the model. Type your words, and press *continue*. Ask for several *drafts* and choose one,
# *retry* a passage, change its text, or go back to it and write on from there. *undo* takes back each change. Every
# passage keeps its own settings. ▸ shows where the model's view of the story begins: it has forgotten what stands
# before. What a passage recites is underlined, with a number; click on a line below the story to see its source. With
# *compare with*, another checkpoint writes a draft too.
#
# Rest the mouse on a token of a draft: you see its probability and the other candidates. A token with a probability
# below 10% has a dotted line. All controls can be reached with Tab; Space presses a button, and arrow keys move a
# slider.
#
# The story is saved after each change, in `outputs/stories`, as Markdown that you can read and edit. The file holds the
# settings and the seed of each passage, so that the model can write the same passage again. (Where you cannot press
# buttons, you see only the texts.)

# %%
others = [path for run in find_runs(output_dir) for path in checkpoints(run) if path != checkpoint.path]
sampling |= {"temperature": temperature, "data": train if data_folder else None}
desk = widgets.WritingDesk(checkpoint, prompt, min(max_new_tokens, 80), others, **sampling)
for _ in range(3):
    await desk.start()
desk

# %% tags=["nbval-check-output"]
# Checked
story = open_story(desk.story.file) if desk.story.file else desk.story
assert story.text() == desk.story.text()
for number, passage in enumerate(story.passages):
    assert not story.as_written(number) or remake(story, number, checkpoint) == passage.text
print("read from its file, the story is the same; the model writes each of its passages again, word for word")

# %% [markdown]
# ## What to try next
# - A prompt from another century, or in English: what does the model do with words that it has never seen?
# - `repetition_penalty = 1.2` at `temperature = 0`: does the text still repeat itself?
# - Notebook 4 with `data_dir` a folder of ten of the chapters, and `epochs = 20`: when does it begin to recite?
# - `checkpoint_dir = "best"`, or the folder of an earlier checkpoint: how did the text for this prompt change?
#
# **[Next: 6 · A scaling law](06_scaling.ipynb)**
