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
# good file compressor.
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
learning_rate: float = None  # peak; None: the preset's
prompt: str = "却说曹操"  # what samples continue
device: str = "auto"  # auto, cpu, cuda, mps
precision: str = "auto"  # auto, bf16, fp16, fp32
tracker: str = None  # tensorboard, wandb or None
seed: int = 0  # of the initial weights and the order of the data

# %%
from llmcore.parameters import check_parameters

names = "preset data_dir tokenizer_model_file dataset_dir output_dir project checkpoint_dir init_step context_size dim"
names += " n_layers n_heads max_steps batch_size learning_rate prompt device precision tracker seed"
check_parameters(globals(), names)

# %%
import torch

from llmcore import config, corpus, plots, widgets
from llmcore.checkpoint import find_checkpoint, load_checkpoint
from llmcore.dataset import TokenDataset, prepare_dataset
from llmcore.device import pick_device
from llmcore.evaluate import xz_bits_per_byte
from llmcore.files import read_text, readable_texts, shown, text_name
from llmcore.model import Transformer
from llmcore.planner import measure_speed, training_cost
from llmcore.runs import find_runs, new_run_dir, read_metrics
from llmcore.summary import write_index
from llmcore.tokenizer import Tokenizer
from llmcore.trackers import tracker_callback
from llmcore.train import Trainer
from llmcore.widgets import TrainingDashboard

device = str(pick_device(device))
start = find_checkpoint(output_dir, checkpoint_dir) if checkpoint_dir else None
_ = new_run_dir(output_dir, project)  # a folder that cannot be written is refused now, not after the probe,
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
manifest = prepare_dataset(corpus.open_corpus(data_dir), tok, dataset_dir)
train_data = TokenDataset(dataset_dir, "train", window)
val_data = TokenDataset(dataset_dir, "val", window)

# %%
chosen = {"max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate}
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
# Counted from the shapes, and timed with a few steps of a throw-away model.

# %%
cost = training_cost(model_config, train_config)
speed = measure_speed(model_config, train_config, train_data, device)
seconds = speed["start_seconds"] + cost["tokens"] / speed["tokens_per_second"]
print(f"memory: {cost['state_bytes'] / 1e6:,.0f} MB of weights, gradients and optimizer state,")
print(f"        about {cost['activation_bytes'] / 1e6:,.0f} MB of activations")
print(f"speed:  {speed['tokens_per_second']:,.0f} tokens per second on {device}")
print(f"time:   about {seconds / 60:.1f} minutes, validation and samples not counted")

# %% tags=["nbval-check-output"]
print(f"parameters: {cost['parameters']:,}")
print(f"tokens to train on: {cost['tokens']:,} ({cost['tokens'] / len(train_data.tokens):.1f} epochs)")
print(f"compute: {cost['flops']:.2e} FLOPs")

# %% [markdown]
# ## Training, first half
# The curve is live in JupyterLab, with buttons to pause, resume, stop, save and sample a prompt of your own; a headless
# run prints a line at each validation and keeps the last picture. The tab may be closed: the run goes on. To show what
# happens when a run is interrupted, a callback presses stop in the middle.

# %%
torch.manual_seed(seed)
run_dir = start.parent if start else new_run_dir(output_dir, project)
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
trainer.callbacks.append(lambda event: trainer.stop() if event["step"] == half else None)

# %%
dashboard = TrainingDashboard(f"{preset}: {cost['parameters'] / 1e6:.1f}M parameters, first half")
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
dashboard = TrainingDashboard(f"{preset}: {cost['parameters'] / 1e6:.1f}M parameters")
await dashboard.run(second)

# %% tags=["nbval-check-output"]
events = read_metrics(run_dir)
print("went on from the step it stopped at:", resumed_at == trainer.step)
print("every step is in the metrics once:", [e["step"] for e in events] == list(range(1, second.step + 1)))
print("steps skipped for a loss that is not finite:", second.skipped)

# %% [markdown]
# ## Samples as they improve
# The same prompt after more and more steps: first frequent characters, then words and names, then sentences that hang
# together for a while.

# %%
for event in events:
    if "sample" in event:
        text = widgets.visible(event.get("sample_prompt", prompt) + event["sample"])
        print(f"--- step {event['step']:,}, loss {event['loss']:.2f}\n{text}\n")

# %% [markdown]
# ## How good is it?
# Nats per token cannot be compared between vocabularies; **bits per byte** of held-out text can, and with a file
# compressor too. `xz` reads the training chapters first, then is charged only for the held-out ones.

# %%
held_out = {source["path"] for source in manifest["sources"] if source["split"] == "val"}
folder = corpus.open_corpus(data_dir)
files, _ = readable_texts(folder, "skip")
seen = "".join(read_text(file) for file in files if text_name(file, folder) not in held_out)
unseen = "".join(read_text(file) for file in files if text_name(file, folder) in held_out)

# %%
last = second.validate()
print(f"validation: {last['val_loss']:.3f} nats per token, perplexity {last['val_perplexity']:.1f}")
bits = {
    "xz on the whole corpus": xz_bits_per_byte("", seen + unseen),
    "xz on the held-out text, training text known": xz_bits_per_byte(seen, unseen or seen),
    f"{preset}, held-out text": last["val_bits_per_byte"],
}
known = bits["xz on the held-out text, training text known"]
title = f"{preset} needs {last['val_bits_per_byte']:.2f} bits per byte, a file compressor {known:.2f}"
plots.bars(bits, title, "bits per byte of text (less is better)", highlight=f"{preset}, held-out text")

# %% tags=["nbval-check-output"]
print(f"better than xz: {last['val_bits_per_byte'] < known}")
print(f"at most 2.15 bits per byte on held-out chapters: {last['val_bits_per_byte'] <= 2.15}")

# %% [markdown]
# ## What it left behind
# The run's folder is self-contained: tokenizer, configuration, metrics and checkpoints travel together. Loading the
# last checkpoint and validating again gives the very same loss.

# %%
checkpoint = load_checkpoint(run_dir, device=device)
print("checkpoint:", shown(checkpoint.path))
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
print("list of runs:", shown(write_index(output_dir)))
widgets.run_table(runs)

# %%
plots.compare_runs(runs)

# %% [markdown]
# ## What to try next
# - `learning_rate = 1e-3` or `4e-3`, with another `project`: which curve ends lower?
# - `max_steps = 300` for a first look, or twice the preset's: when does the validation loss turn?
# - On a GPU: `preset = "scifi-117M"` with a tokenizer of 16,000 pieces and `data_dir = "data/scifi"`.
#
# **[Next: 5 · Writing](05_generate.ipynb)**
