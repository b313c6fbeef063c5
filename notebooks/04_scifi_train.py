# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4 · Training a language model
#
# *Can a few million numbers learn to write like a novelist?* This notebook trains a Llama-like model on the corpus,
# says beforehand what it will cost, stops in the middle, goes on from the checkpoint, and compares the result with a
# good file compressor and with counted 4-grams.
#
# | in | out | time |
# | --- | --- | --- |
# | `data_dir`; `tokenizer_model_file` from notebook 1 | `<output_dir>/<project>/`, a run | 4 minutes on two CPU cores |
#
# On one 80 GB GPU, `preset` takes `scifi-117M`, `scifi-1.5B` or `zhwiki-2.46B`.
#
# Before: [3 · A toy task](03_toyreverse.ipynb) · Next: [5 · Writing](05_generate.ipynb)
#
# All notebooks: [1](01_tokenize.ipynb) [2](02_dataset.ipynb) [3](03_toyreverse.ipynb) **4** [5](05_generate.ipynb)
# [6](06_scaling.ipynb)

# %% tags=["parameters"]
preset: str = "scifi-mini"  # scifi-mini, scifi-117M, scifi-1.5B, zhwiki-2.46B
data_dir: str = "data/sanguo"  # folder of .txt files
tokenizer_model_file: str = "outputs/tokenizer.model"  # from notebook 1
dataset_dir: str = "outputs/dataset"  # token files, from notebook 2 or made here
val_fraction: float = None  # share of the documents held out; None: as in the data set there is, else 0.05
errors: str = None  # at a file that is not UTF-8: strict stops, skip leaves it out; None: as before, else strict
output_dir: str = "outputs/runs"  # runs go here
project: str = "scifi-mini"  # name of the run's folder; a number is added if it exists
checkpoint_dir: str = None  # go on from: a checkpoint, a run, latest or best
init_step: int = None  # with checkpoint_dir: the step it must be at
context_size: int = None  # tokens in a window; None: the preset's
dim: int = None  # width of the model; None: the preset's
n_layers: int = None  # its blocks; None: the preset's
n_heads: int = None  # heads in a block; None: the preset's
max_steps: int = None  # optimizer steps; None: the preset's
batch_size: int = None  # windows per step; None: the preset's
grad_accum_steps: int = None  # batches added up in a step, to save memory; None: the preset's
learning_rate: float = None  # peak; None: the preset's
weight_decay: float = None  # on matrices; None: the preset's
activation_checkpointing: str = None  # none, selective or full; None: the preset's
prompt: str = "却说曹操"  # what samples continue
device: str = "auto"  # auto, cpu, cuda, mps
precision: str = "auto"  # auto, bf16, fp16, fp32
tracker: str = None  # tensorboard, wandb or None
thorough: bool = True  # measure speed and memory first, evaluate all held-out text; runs of a sweep need neither
seed: int = 0  # of the initial weights and the order of the data

# %%
from llmcore.notebook.parameters import check_parameters

names = "preset data_dir tokenizer_model_file dataset_dir val_fraction errors output_dir project checkpoint_dir"
names += " init_step context_size dim n_layers n_heads max_steps batch_size grad_accum_steps learning_rate weight_decay"
check_parameters(globals(), names + " activation_checkpointing prompt device precision tracker thorough seed")

# %%
import torch

from llmcore import config
from llmcore.checkpoint import find_checkpoint, load_checkpoint, read_config
from llmcore.corpus.prepare import prepare_dataset
from llmcore.corpus.sources import open_corpus
from llmcore.dataset import TokenDataset
from llmcore.device import pick_device
from llmcore.files import display_path
from llmcore.measure.compare_runs import find_runs
from llmcore.measure.evaluate import evaluate, paired_difference, xz_bits_per_byte
from llmcore.measure.memory import check_memory, predict_memory
from llmcore.measure.ngram import evaluate_ngram
from llmcore.measure.planner import measure_memory, plan
from llmcore.model import Transformer
from llmcore.notebook import plots, widgets
from llmcore.notebook.run_page import write_index
from llmcore.notebook.trackers import tracker_callback
from llmcore.notebook.widgets import TrainingDashboard
from llmcore.runs import free_run_dir, read_metrics
from llmcore.tokenizer import Tokenizer
from llmcore.train import Trainer

device = str(pick_device(device))
start = find_checkpoint(output_dir, checkpoint_dir) if checkpoint_dir else None
last_step = max_steps or config.preset(preset)[1].max_steps
if start and (reached := read_config(start)["step"]) >= last_step:
    raise ValueError(
        f"max_steps={last_step}, but checkpoint_dir={display_path(start)!r} is at step {reached} already: nothing is "
        "left to train; raise max_steps, or open the checkpoint in notebook 5"
    )
_ = free_run_dir(output_dir, project)  # a folder that cannot be written is refused now, not after the probe,
_ = tracker_callback(tracker, project, output_dir)  # as is a tracker that is not installed

# %% [markdown]
# ## The parts
# The vocabulary size is the tokenizer's, whatever the preset says; the token files are made if notebook 2 has not.

# %%
tok = Tokenizer(tokenizer_model_file)
model_config, train_config = config.preset(preset)
window = context_size or model_config.max_seq_len
shape = {name: value for name in ("dim", "n_layers", "n_heads") if (value := globals()[name]) is not None}
model_config = model_config.replace(vocab_size=tok.vocab_size, max_seq_len=window, **shape)
manifest = prepare_dataset(open_corpus(data_dir), tok, dataset_dir, val_fraction, errors=errors)
train_data = TokenDataset(dataset_dir, "train", window)
val_data = TokenDataset(dataset_dir, "val", window)

# %%
chosen = {"max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate}
chosen |= {
    "grad_accum_steps": grad_accum_steps,
    "weight_decay": weight_decay,
    "activation_checkpointing": activation_checkpointing,
}
chosen = {name: value for name, value in chosen.items() if value is not None}
warmup_steps = min(train_config.warmup_steps, chosen.get("max_steps", train_config.max_steps) // 10)
chosen["warmup_steps"] = warmup_steps  # a short run warms up for a tenth of its steps, no more
train_config = train_config.replace(precision=precision, seed=seed, sample_prompt=prompt, **chosen)

# %% tags=["nbval-check-output"]
print("tokenizer", tok.fingerprint[:16], "with", tok.vocab_size, "pieces")
print(f"data set: {len(train_data.tokens):,} tokens to train on, {len(val_data.tokens):,} held out")
print(f"made with this tokenizer: {manifest['tokenizer'] == tok.fingerprint}")

# %% [markdown]
# ## What it will cost
# Memory is counted from the shapes, tensor by tensor; the speed is timed with a few steps of a throw-away model. A run
# that cannot fit is refused here, with the parameters to lower.

# %%
check_memory(model_config, train_config, device)
cost = plan(model_config, train_config, device, data=train_data if thorough else None)
for what, how_much in cost.rows().items():
    print(f"{what:32} {how_much}")

# %% tags=["nbval-check-output"]
print(f"parameters: {cost.parameters:,}")
print(f"tokens to train on: {cost.tokens:,} ({cost.epochs(len(train_data.tokens)):.1f} epochs)")
print(f"compute: {cost.flops:.2e} FLOPs")

# %% [markdown]
# Hoffmann et al. ("Chinchilla", 2022) asked which model ends lowest for a given amount of compute: about the one that
# reads twenty tokens per parameter. That is the best use of compute when there is text enough to be read only once.

# %% tags=["nbval-check-output"]
print(f"this run: {cost.parameters / 1e6:.1f}M parameters, {cost.tokens / cost.parameters:.1f} tokens for each")
print(f"the same compute, spent best: {cost.best_size_for_compute / 1e6:.1f}M parameters,", end=" ")
print(f"{cost.best_tokens_for_compute / 1e6:.1f}M tokens")

# %% [markdown]
# Most of the memory goes to activations: what the forward pass keeps for the backward pass. **Activation
# checkpointing** keeps less and computes it again: `selective` all but matrix products and attention, `full` whole
# blocks. The lines are predicted for a step that is not compiled; each point is two such steps in a fresh process.
# A run on a CPU takes somewhat more: for speed it keeps freed memory at hand.

# %%
plain, policies = train_config.replace(compile="off", grad_accum_steps=1), ("none", "selective", "full")
sizes = [train_config.batch_size, 2 * train_config.batch_size]
tried = {p: [plain.replace(activation_checkpointing=p, batch_size=s) for s in (1, *sizes)] for p in policies}
predicted = {
    p: {c.batch_size: predict_memory(model_config, c, device)["total"] for c in configs} for p, configs in tried.items()
}

# %%
measured = {}
if thorough and cost.parameters < 20e6:  # a larger model would take longer than this picture is worth
    for p, size in (("none", sizes[0]), ("full", sizes[0]), ("full", sizes[1])):
        peak = measure_memory(model_config, plain.replace(activation_checkpointing=p, batch_size=size), device)
        measured.setdefault(p, {})[size] = peak["peak_bytes"]
saved = 1 - predicted["full"][sizes[1]] / predicted["none"][sizes[1]]
title = f"Computing blocks again saves {saved:.0%} of the memory at batch {sizes[1]}"
plots.memory_against_batch(predicted, measured, title)

# %%
for p, points in measured.items():
    for size, peak in points.items():
        print(f"{p}, batch {size}: predicted {predicted[p][size] / 1e6:,.0f} MB, measured {peak / 1e6:,.0f} MB")

# %% [markdown]
# ## Training, first half
# The curve is live in JupyterLab, with buttons to pause, resume, stop, save and sample a prompt of your own; a headless
# run prints a line at each validation and keeps the last picture. The tab may be closed: the run goes on. To show what
# happens when a run is interrupted, a callback presses stop in the middle.

# %%
torch.manual_seed(seed)
run_dir = start.parent if start else free_run_dir(output_dir, project)
track = tracker_callback(tracker, project, run_dir, model_config.to_dict() | train_config.to_dict())
trainer = Trainer(
    Transformer(model_config),
    train_data,
    val_data,
    train_config,
    run_dir,
    tokenizer=tok,
    callbacks=[track],
    device=device,
    resume=start,
    init_step=init_step,
)
half = (trainer.step + train_config.max_steps) // 2
trainer.callbacks.append(lambda event: trainer.request_stop() if event["step"] == half else None)

# %%
dashboard = TrainingDashboard(f"{preset}: {cost.parameters / 1e6:.1f}M parameters, first half")
await dashboard.run(trainer)
result = trainer.result()
print(f"step {result.step}, stopped early: {result.stopped_early}, saved as {result.checkpoint.name}")

# %% [markdown]
# ## Stopped, and on again
# The run ended early but in order: the step was finished and a checkpoint written. A new model with other random
# weights takes it over: weights, optimizer moments, schedule, random state, and the place in the data.

# %%
torch.manual_seed(seed + 1)
second = Trainer(
    Transformer(model_config),
    train_data,
    val_data,
    train_config,
    run_dir,
    tokenizer=tok,
    callbacks=[track],
    device=device,
    resume="latest",
)
resumed_at = second.step

# %%
dashboard = TrainingDashboard(f"{preset}: {cost.parameters / 1e6:.1f}M parameters")
await dashboard.run(second)

# %% tags=["nbval-check-output"]
events = read_metrics(run_dir)
print("went on from the step it stopped at:", resumed_at == trainer.step)
print("every step is in the metrics once:", [e["step"] for e in events] == list(range(1, second.step + 1)))
print("steps skipped for a loss that is not finite:", second.skipped)

# %% [markdown]
# A stair down in the training loss is the start of another reading of the corpus: the model meets sentences again, and
# begins to know them by heart. That helps with nothing new, as the widening gap to validation shows: here text is
# scarcer than compute. `weight_decay` holds it back; what else was tried is in
# [tests/benchmarks](../tests/benchmarks/README.md).

# %% [markdown]
# ## Samples as they improve
# The same prompt after more and more steps: first frequent characters, then words and names, then sentences that hang
# together for a while.

# %%
for event in events:
    if "sample" in event:
        text = widgets.visible(widgets.ending(event.get("sample_prompt", prompt)) + event["sample"])
        print(f"--- step {event['step']:,}, loss {event['loss']:.2f}\n{text}\n")

# %% [markdown]
# ## How good is it?
# Nats per token cannot be compared between vocabularies; **bits per byte** of held-out text can. Validation during
# training is quick, and cuts the text anywhere. A figure to quote takes each document by itself, from its first token
# to its end.

# %%
last = second.validate()
print(f"validation: {last['val_loss']:.3f} nats per token, perplexity {last['val_perplexity']:.1f}")
texts = val_data.texts(tok, max_tokens=1_000_000 if thorough else 1)
ours = evaluate(second.model, tok, texts, precision=precision, progress=False)
print(f"window by window: {ours}")

# %% [markdown]
# The first tokens of a window are guessed from almost nothing. Where windows overlap by half, each token past the
# document's first window has at least half a window before it: twice the work, a somewhat lower figure. Both are
# right; whoever quotes one says which. Here it is the first.

# %%
overlapping = evaluate(second.model, tok, texts, stride=max(1, window // 2), precision=precision, progress=False)
print(f"overlapping by half: {overlapping}")

# %% [markdown]
# How little could one know and do as well? `xz` reads the training text first, then is charged only for the held-out
# one. So does a model that counts **4-grams** of the same tokens (Kneser-Ney, the best of its kind for decades): it
# knows which token follows which three, and nothing else.

# %%
known = list(train_data.texts(tok, max_tokens=5_000_000 if thorough else 1).values())
counting = evaluate_ngram(known, texts, tok, order=4)
bits = {
    "xz, training text known": xz_bits_per_byte("".join(known), "".join(texts.values())),
    "4-grams of the same tokens": counting.total.bits_per_byte,
    preset: ours.total.bits_per_byte,
}
best = min(bits, key=bits.get)
title = f"The fewest bits per byte, {bits[best]:.2f}: {best}"
plots.bars(bits, title, "bits per byte of held-out text (less is better)", highlight=preset)

# %% [markdown]
# Documents often differ more than models do, and then the intervals overlap. But what is hard for one model is hard for
# the other, and their difference, document by document, is far surer. All this is about more text of the same kind (and
# the tokenizer, which both share, was made from the whole corpus); of other books, or of another training run, it says
# nothing.

# %%
difference, interval = paired_difference(ours, counting)
bounds = "95% interval {:+.3f} to {:+.3f}".format(*interval) if interval else "too few documents for an interval"
print(f"{preset} less 4-grams: {difference:+.3f} bits per byte ({bounds})")
wins = sum(a.nats < b.nats for a, b in zip(ours.documents, counting.documents, strict=True))
title = f"{preset} beats 4-grams on {wins} of {len(texts)} held-out documents"
plots.document_scores({preset: ours, "4-grams": counting}, title)

# %% tags=["nbval-check-output"]
print(f"better than xz: {ours.total.bits_per_byte < bits['xz, training text known']}")
print(f"better than 4-grams: {ours.total.bits_per_byte < counting.total.bits_per_byte}")
print(f"at most 1.95 bits per byte on held-out chapters: {last['val_bits_per_byte'] <= 1.95}")

# %% [markdown]
# ## What it left behind
# The run's folder is self-contained: tokenizer, configuration, metrics and checkpoints travel together. Loading the
# last checkpoint and validating again gives the very same loss.

# %%
checkpoint = load_checkpoint(run_dir, device=device)
print("checkpoint:", display_path(checkpoint.path))
again = Trainer(
    checkpoint.model, train_data, val_data, train_config, run_dir, tokenizer=tok, device=device, resume="latest"
)

# %% tags=["nbval-check-output"]
print("the loaded model validates the same:", abs(again.validate()["val_loss"] - last["val_loss"]) < 1e-4)
print("its tokenizer is ours:", checkpoint.tokenizer.fingerprint == tok.fingerprint)

# %% [markdown]
# ## Runs side by side
# Every run in `output_dir`, this one included, by what it cost: steps, tokens, time, compute. After a sweep with
# papermill (three learning rates, say: the README has the command) this cell is the comparison. The same list, with
# links to a page about each run, is kept in a file.

# %%
runs = find_runs(output_dir)
print("list of runs:", display_path(write_index(output_dir)))
widgets.run_table(runs)

# %%
plots.compare_runs(runs)

# %% [markdown]
# ## What to try next
# - `learning_rate = 1e-2` or `4e-2`, with another `project`: which curve ends lower?
# - `max_steps = 300` for a first look, or twice the preset's: when does the validation loss turn?
# - On a GPU: `preset = "scifi-117M"` with a tokenizer of 16,000 pieces and `data_dir = "data/scifi"`.
#
# **[Next: 5 · Writing](05_generate.ipynb)**
