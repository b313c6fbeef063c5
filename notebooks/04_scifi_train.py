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
# *Can a few million numbers learn to write like a novelist?* This notebook first says what a training run will cost.
# Then it trains a Llama-like model on the corpus. A short run stops in the middle and continues from the checkpoint. At
# the end it compares the model with a good file compressor and with counted 4-grams.
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
data_dir: str = "data/sanguo"  # folder of texts
tokenizer_model_file: str = "outputs/tokenizer.model"  # from notebook 1
dataset_dir: str = "auto"  # token files, from notebook 2 or made here; auto: a folder for this corpus and tokenizer
val_fraction: float = None  # share of the documents held out; None: as in an existing data set, else 0.05
errors: str = None  # for a text that cannot be read: strict stops, skip leaves it out; None: as before, else strict
encoding: str = None  # of the files, a name or auto; None: as before, else auto
clean: bool = None  # leave out advertisements and leftovers of web pages; None: as before, else True
duplicates: str = None  # copies of a text: drop leaves them out, keep keeps them; None: as before, else drop
output_dir: str = "outputs/runs"  # folder of all runs
project: str = "scifi-mini"  # name of the run's folder; a number is added if it exists
checkpoint_dir: str = None  # continue from a checkpoint, a run, latest or best; auto: from this project's run, or start
init_step: int = None  # with checkpoint_dir: the step that the checkpoint must have
checkpoint_interval: int = None  # steps between checkpoints; None: the preset's
checkpoint_minutes: float = None  # minutes after which to save in any case, 0: never for that; None: the preset's
backup_dir: str = None  # a folder on another drive, where a copy of the run is kept; auto takes it if the run is lost
context_size: int = None  # tokens in a window; None: the preset's
dim: int = None  # width of the model; None: the preset's
n_layers: int = None  # blocks; None: the preset's
n_heads: int = None  # heads in a block; None: the preset's
max_steps: int = None  # optimizer steps; None: the preset's
batch_size: int = None  # windows per step; None: the preset's
grad_accum_steps: int = None  # batches added up in a step, to save memory; None: the preset's
learning_rate: float = None  # peak; None: the preset's
weight_decay: float = None  # on matrices; None: the preset's
activation_checkpointing: str = None  # none, selective or full; None: the preset's
prompt: str = "却说曹操"  # samples continue this text
device: str = "auto"  # auto, cpu, cuda, mps
precision: str = "auto"  # auto, bf16, fp16, fp32
tracker: str = None  # tensorboard, wandb or None
thorough: bool = True  # measure speed and memory, and evaluate all held-out text; a sweep needs neither
seed: int = 0  # random seed for the initial weights and the order of the data

# %%
from llmcore.notebook.parameters import check_parameters

check_parameters(globals())

# %%
import time

import torch

from llmcore import config
from llmcore.checkpoint import check_has_state, find_checkpoint, load_checkpoint, read_config
from llmcore.corpus import report
from llmcore.corpus.prepare import dataset_folder, prepare_dataset
from llmcore.corpus.sources import open_corpus
from llmcore.dataset import TokenDataset
from llmcore.device import pick_device
from llmcore.files import display_path, resolve
from llmcore.measure.compare_runs import find_runs
from llmcore.measure.disk import check_disk
from llmcore.measure.evaluate import evaluate, paired_difference, xz_bits_per_byte
from llmcore.measure.memory import check_memory, predict_memory
from llmcore.measure.ngram import evaluate_ngram
from llmcore.measure.planner import measure_memory, plan
from llmcore.model import Transformer
from llmcore.notebook import plots, widgets
from llmcore.notebook.run_page import write_index
from llmcore.notebook.trackers import check_tracker, tracker_callback
from llmcore.notebook.widgets import TrainingDashboard
from llmcore.runs import check_writable, free_run_dir, read_metrics
from llmcore.tokenizer import Tokenizer
from llmcore.train import Trainer
from llmcore.trainer_state import auto_start

device = str(pick_device(device))
check_writable(output_dir)
check_tracker(tracker)
began = time.perf_counter()
if checkpoint_dir == "auto":
    start = auto_start(resolve(output_dir) / project, backup_dir)
else:
    start = find_checkpoint(output_dir, checkpoint_dir) if checkpoint_dir else None
if start:
    check_has_state(start)
    print(f"goes on from {display_path(start)}, all of whose files were checked in {time.perf_counter() - began:.1f} s")
reached = read_config(start)["step"] if start else 0
last_step = max_steps or config.preset(preset)[1].max_steps
if reached >= last_step and checkpoint_dir != "auto":
    raise ValueError(
        f"max_steps={last_step}, but checkpoint_dir={display_path(start)!r} is already at step {reached}; "
        "raise max_steps, or open the checkpoint in notebook 5"
    )

# %% [markdown]
# ## The parts
# The tokenizer decides the vocabulary size, not the preset. If notebook 2 has not made the token files, they are made
# here.

# %%
tok = Tokenizer(tokenizer_model_file)
model_config, train_config = config.preset(preset)
window = context_size or model_config.max_seq_len
model_config = model_config.replace(
    vocab_size=tok.vocab_size,
    max_seq_len=window,
    dim=dim or model_config.dim,
    n_layers=n_layers or model_config.n_layers,
    n_heads=n_heads or model_config.n_heads,
)

# %%
folder = open_corpus(data_dir)
dataset_dir = dataset_folder(dataset_dir, folder, tok)
options = {"errors": errors, "encoding": encoding, "clean": clean, "duplicates": duplicates}
manifest = prepare_dataset(folder, tok, dataset_dir, val_fraction, **options)
print(report.summary(manifest))
train_data = TokenDataset(dataset_dir, "train", window)
val_data = TokenDataset(dataset_dir, "val", window)

# %%
train_config = train_config.replace(
    max_steps=last_step,
    warmup_steps=min(train_config.warmup_steps, last_step // 10),  # a short run has a short warm-up
    batch_size=batch_size or train_config.batch_size,
    grad_accum_steps=grad_accum_steps or train_config.grad_accum_steps,
    learning_rate=learning_rate or train_config.learning_rate,
    weight_decay=train_config.weight_decay if weight_decay is None else weight_decay,
    activation_checkpointing=activation_checkpointing or train_config.activation_checkpointing,
    checkpoint_interval=train_config.checkpoint_interval if checkpoint_interval is None else checkpoint_interval,
    checkpoint_minutes=train_config.checkpoint_minutes if checkpoint_minutes is None else checkpoint_minutes,
    precision=precision,
    seed=seed,
    sample_prompt=prompt,
)

# %% tags=["nbval-check-output"]
print("tokenizer", tok.fingerprint[:16], "with", tok.vocab_size, "pieces")
print(f"data set: {len(train_data.tokens):,} tokens to train on, {len(val_data.tokens):,} held out")
print(f"made with this tokenizer: {manifest['tokenizer'] == tok.fingerprint}")

# %% [markdown]
# ## What it will cost
# We compute the memory from the shapes of all tensors. We measure the speed with a few steps of another model. A run
# that does not fit into memory or onto the disk ends here, and the error names the parameters to lower.

# %%
check_memory(model_config, train_config, device)
run_dir = start.parent if start else free_run_dir(output_dir, project)
if checkpoint_dir == "auto":
    run_dir = resolve(output_dir) / project
if reached < last_step:
    check_disk(model_config, train_config, device, run_dir, backup_dir)
cost = plan(model_config, train_config, device, data=train_data if thorough else None)
for name, value in cost.rows().items():
    print(f"{name:32} {value}")

# %% tags=["nbval-check-output"]
print(f"parameters: {cost.parameters:,}")

# %% [markdown]
# Hoffmann et al. ("Chinchilla", 2022) asked which model has the lowest loss for a given amount of compute. It is about
# the one that reads twenty tokens per parameter. This holds if there is enough text to read it only once.

# %%
print(f"this run: {cost.parameters / 1e6:.1f}M parameters, {cost.tokens / cost.parameters:.1f} tokens for each")
print(f"it reads the training text {cost.epochs(len(train_data.tokens)):.1f} times")
print(f"the same compute, spent best: {cost.best_size_for_compute / 1e6:.1f}M parameters,", end=" ")
print(f"{cost.best_tokens_for_compute / 1e6:.1f}M tokens")

# %% [markdown]
# Activations need most of the memory. These are the numbers that the forward pass keeps for the backward pass.
# **Activation checkpointing** keeps fewer of them and computes the others again. `selective` keeps the results of
# matrix products and attention. `full` keeps only the input of each block.
#
# The lines are predictions for a step that is not compiled. For each point we measured two such steps in a new process.
# A run on a CPU needs a little more: to be faster, it does not give freed memory back to the system.

# %%
not_compiled = train_config.replace(compile="off", grad_accum_steps=1)
sizes = [train_config.batch_size, 2 * train_config.batch_size]
predicted = {"none": {}, "selective": {}, "full": {}}
for policy in predicted:
    for size in (1, *sizes):
        settings = not_compiled.replace(activation_checkpointing=policy, batch_size=size)
        predicted[policy][size] = predict_memory(model_config, settings, device)["total"]

# %%
measured = {}
if thorough and cost.parameters < 20e6:  # with a larger model this would take too long
    for policy, size in (("none", sizes[0]), ("full", sizes[0]), ("full", sizes[1])):
        settings = not_compiled.replace(activation_checkpointing=policy, batch_size=size)
        measured.setdefault(policy, {})[size] = measure_memory(model_config, settings, device)["peak_bytes"]
saved = 1 - predicted["full"][sizes[1]] / predicted["none"][sizes[1]]
title = f"Computing blocks again saves {saved:.0%} of the memory at batch {sizes[1]}"
plots.memory_against_batch(predicted, measured, title)

# %%
for policy, points in measured.items():
    for size, peak in points.items():
        expected = predicted[policy][size]
        print(f"{policy}, batch {size}: predicted {expected / 1e6:,.0f} MB, measured {peak / 1e6:,.0f} MB")

# %% [markdown]
# ## Training
# In JupyterLab the curve is live. Buttons pause, resume, stop and save the run, and sample a prompt of your own. You
# may close the tab: the run continues. A headless run prints a line at each validation and keeps the last picture.
#
# We want to show what happens when a run is interrupted. So a callback requests a stop in the middle, if the run is as
# short as the default one. A longer run is trained to its end here. A finished run is only shown.

# %%
track = tracker_callback(tracker, project, run_dir, model_config.to_dict() | train_config.to_dict())


def new_trainer(weights_seed, **options):
    torch.manual_seed(weights_seed)
    parts = [Transformer(model_config), train_data, val_data, train_config, run_dir]
    return Trainer(*parts, tokenizer=tok, callbacks=[track], device=device, backup_dir=backup_dir, **options)


trainer = new_trainer(seed, resume=start, init_step=init_step)
is_finished = trainer.step == train_config.max_steps
stops = cost.flops < 1e14 and not is_finished  # the default run takes 3.4e13
half = (trainer.step + train_config.max_steps) // 2
trainer.callbacks.append(lambda event: trainer.request_stop() if stops and event["step"] == half else None)
if is_finished:
    print(f"{display_path(run_dir)} is finished at step {trainer.step:,}: it is shown, not trained")

# %%
dashboard = TrainingDashboard(f"{preset}: {cost.parameters / 1e6:.1f}M parameters{', first half' if stops else ''}")
await dashboard.run(trainer)
first_half = trainer.result()
print(f"step {first_half.step}, stopped early: {first_half.stopped_early}, saved as {first_half.checkpoint.name}")

# %% [markdown]
# ## Stopped and resumed
# If the run stopped early, it finished its step and wrote a checkpoint. Now we make a new model with other random
# weights. From the checkpoint it gets everything: weights, optimizer moments, schedule, random state, and the place in
# the data.

# %%
second = new_trainer(seed + 1, resume="latest") if first_half.stopped_early else trainer
resumed_at = second.step

# %%
if first_half.stopped_early:
    dashboard = TrainingDashboard(f"{preset}: {cost.parameters / 1e6:.1f}M parameters")
    await dashboard.run(second)

# %% tags=["nbval-check-output"]
events = read_metrics(run_dir)
print("continued from the step where it stopped:", resumed_at == trainer.step)
print("every step is in the metrics once:", [e["step"] for e in events] == list(range(1, second.step + 1)))
print("steps skipped for a loss that is not finite:", second.progress.skipped)

# %% [markdown]
# At a step down in the training loss, the model begins to read the corpus once more. It reads the same sentences again
# and begins to memorise them. This does not help with new text, so the gap to the validation loss gets wider. Here the
# text is the limit, not the compute. `weight_decay` reduces the gap.
# [tests/benchmarks](../tests/benchmarks/README.md) says what else was tried.

# %% [markdown]
# ## Samples get better
# The same prompt after more and more steps. First the model writes frequent characters, then words and names, then
# sentences that fit together for a while.

# %%
for event in events:
    if "sample" in event:
        text = widgets.visible(widgets.ending(event.get("sample_prompt", prompt)) + event["sample"])
        print(f"--- step {event['step']:,}, loss {event['loss']:.2f}\n{text}\n")

# %% [markdown]
# ## How good is it?
# Nats per token depend on the vocabulary. **Bits per byte** of held-out text do not, so they can be compared:
#
# $$\text{bits per byte} = \frac{\text{nats of all held-out tokens}}{\ln 2 \times \text{bytes of the text in UTF-8}}$$
#
# Validation during training is quick and cuts the text at any place. For a figure that you want to publish, evaluate
# each document separately, from its first token to its end.

# %%
last = second.validate()
print(f"validation: {last['val_loss']:.3f} nats per token, perplexity {last['val_perplexity']:.1f},", end=" ")
print(f"{last['val_bits_per_byte']:.3f} bits per byte")
texts = val_data.texts(tok, max_tokens=1_000_000 if thorough else 1)
ours = evaluate(second.model, tok, texts, precision=precision, progress=False)
print(f"window by window: {ours}")

# %% [markdown]
# At the start of a window, the model sees almost no earlier text. If windows overlap by half, it sees at least half a
# window before each token, except in the first window. This needs twice the compute and gives a slightly lower figure.
# Both figures are right. If you quote one, say how the windows were cut. Below we use windows that do not overlap.

# %%
overlapping = evaluate(second.model, tok, texts, stride=max(1, window // 2), precision=precision, progress=False)
print(f"overlapping by half: {overlapping}")

# %% [markdown]
# Can simpler methods do as well? `xz` is a file compressor. It reads the training text first, and we count only the
# bytes that the held-out text adds. A **4-gram** model (Kneser-Ney, for decades the best of its kind) counts the same
# tokens. It knows only which token follows which three.

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

# %%
for name, value in bits.items():
    print(f"{name:28} {value:.3f} bits per byte")

# %% [markdown]
# Documents often differ more than models do. Then the intervals overlap. But a document that is hard for one model is
# hard for the other too. So we compare the models document by document, which is much more certain.
#
# The interval holds for more text of this kind. It says nothing about other books or another training run. (Both
# models use the same tokenizer, which was made from the whole corpus.)

# %%
difference, interval = paired_difference(ours, counting)
bounds = "95% interval {:+.3f} to {:+.3f}".format(*interval) if interval else "too few documents for an interval"
print(f"{preset} minus 4-grams: {difference:+.3f} bits per byte ({bounds})")
wins = sum(a.nats < b.nats for a, b in zip(ours.documents, counting.documents, strict=True))
title = f"{preset} beats 4-grams on {wins} of {len(texts)} held-out documents"
plots.document_scores({preset: ours, "4-grams": counting}, title)

# %% [markdown]
# ## The run's folder
# The run's folder holds everything that belongs to the run: tokenizer, configuration, metrics and checkpoints. We load
# the last checkpoint and validate again. The loss is the same.

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
# This table shows every run in `output_dir` and what it cost: steps, tokens, time, compute. After a sweep with
# papermill (the README has a command for three learning rates) this cell compares the runs. A file keeps the same list,
# with links to a page about each run.

# %%
runs = find_runs(output_dir)
print("list of runs:", display_path(write_index(output_dir)))
widgets.run_table(runs)

# %%
plots.compare_runs(runs)

# %% [markdown]
# ## What to try next
# - `learning_rate = 1e-2` or `4e-2`, with another `project`: which curve ends lower?
# - `max_steps = 300` for a first look, or twice the preset's: when does the validation loss rise again?
# - For a night: `checkpoint_dir = "auto"`. Then *Run All* goes on with this run after any interruption.
# - On a GPU: `preset = "scifi-117M"` with a tokenizer of 16,000 pieces and `data_dir = "data/scifi"`.
#
# **[Next: 5 · Writing](05_generate.ipynb)**
