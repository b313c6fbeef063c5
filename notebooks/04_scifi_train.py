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
# *Can a few million numbers learn to write like a novelist?* This notebook says what a training run will cost,
# takes one training step by hand, and then trains a Llama-like model on the corpus. A short run stops in the middle and
# continues from its checkpoint. Then the model is compared with a good file compressor and with counted 4-grams. The
# last part shows where the memory goes and what the optimizer does.
#
# | in | out | time |
# | --- | --- | --- |
# | `data_dir`; `tokenizer_model_file` from notebook 1 | `<output_dir>/<project>/`, a run | 4 minutes on two CPU cores |
#
# On a GPU, `preset` takes `scifi-10M` or `scifi-40M`; with 16 GB also `scifi-117M`; with 80 GB also `scifi-1.5B` or
# `zhwiki-2.46B`.
#
# Before: [3 · A toy task](03_toyreverse.ipynb) · Next: [5 · Writing](05_generate.ipynb)
#
# All notebooks: [1](01_tokenize.ipynb) [2](02_dataset.ipynb) [3](03_toyreverse.ipynb) **4** [5](05_generate.ipynb)
# [6](06_scaling.ipynb)

# %% tags=["parameters"]
# What most runs set
preset: str = "scifi-mini"  # scifi-mini, scifi-10M, scifi-40M, scifi-117M, scifi-1.5B, zhwiki-2.46B
data_dir: str = "data/sanguo"  # folder of texts
tokenizer_model_file: str = "outputs/tokenizer.model"  # from notebook 1
output_dir: str = "outputs/runs"  # folder of all runs
project: str = "scifi-mini"  # name of the run's folder; a number is added if it exists
checkpoint_dir: str = None  # a checkpoint, a run, latest or best to continue; auto: this project's run, or a new one
init_from: str = None  # a trained model that a new run starts from: see "Start from a trained model" below
epochs: float = None  # how often to read the text; None: as max_steps says
max_steps: int = None  # optimizer steps; None: scifi-mini's own, else four epochs; a resume keeps the run's
prompt: str = "却说曹操"  # samples continue this text
device: str = "auto"  # auto, cpu, cuda, mps
seed: int = 0  # random seed for the initial weights and the order of the data

# The rest: None is the preset's, or what suits the text, the memory or the run that is continued
init_step: int = None  # with checkpoint_dir: the step that the checkpoint must have
checkpoint_interval: int = None  # steps between checkpoints
checkpoint_minutes: float = None  # minutes after which to save in any case; 0: never for that
backup_dir: str = None  # a folder on another drive, where a copy of the run is kept; auto takes it if the run is lost
dataset_dir: str = "auto"  # token files, from notebook 2 or made here; auto: a folder for this corpus and tokenizer
replay_dir: str = None  # with init_from: texts as the model knows them, to measure what it forgets
replay_fraction: float = None  # share of the windows that are read from replay_dir; None: 0
val_fraction: float = None  # share of the documents held out; None: as in an existing data set, else 0.05
errors: str = None  # for a text that cannot be read: strict stops, skip leaves it out; None: as before, else strict
encoding: str = None  # of the files, a name or auto; None: as before, else auto
clean: bool = None  # leave out advertisements and leftovers of web pages; None: as before, else True
duplicates: str = None  # copies of a text: drop leaves them out, keep keeps them; None: as before, else drop
context_size: int = None  # tokens in a window
dim: int = None  # width of the model; n_heads and the width of the MLP follow
n_layers: int = None  # blocks
n_heads: int = None  # heads in a block
tokens_per_step: int = None  # tokens in an optimizer step, which decide what it learns
batch_size: int = None  # windows per forward pass, which decide how much memory it needs; None: what fits
grad_accum_steps: int = None  # forward passes per step; None: as many as tokens_per_step needs
activation_checkpointing: str = None  # none, selective or full; None: what fits
optimizer: str = None  # adamw or muon; each needs a learning_rate of its own
learning_rate: float = None  # peak, of AdamW
muon_learning_rate: float = None  # peak, of Muon's matrices
schedule: str = None  # of the rates: cosine, wsd or plateau
weight_decay: float = None  # on matrices
precision: str = "auto"  # auto, bf16, fp16, fp32
compile: str = "auto"  # auto (if the run is long enough to win the time back), on, off
tracker: str = None  # tensorboard, wandb or None
thorough: bool = True  # measure speed and memory, and evaluate all held-out text; a sweep needs neither

# %%
from llmcore.notebook.parameters import check_parameters

check_parameters(globals())

# %%
import inspect
import math
import time

import torch

from llmcore import config
from llmcore.checkpoint import check_has_state, find_checkpoint, load_checkpoint, read_config
from llmcore.config import ModelConfig
from llmcore.corpus import report
from llmcore.corpus.prepare import dataset_folder, prepare_dataset
from llmcore.corpus.sources import fetch_model, open_corpus
from llmcore.dataset import MixedDataset, TokenDataset
from llmcore.device import autocast, pick_device, pick_precision
from llmcore.files import display_path, resolve
from llmcore.formats.pretrained import check_started_from, open_pretrained
from llmcore.generate import generate
from llmcore.measure.compare_runs import find_runs
from llmcore.measure.disk import check_disk
from llmcore.measure.evaluate import evaluate, paired_difference, xz_bits_per_byte
from llmcore.measure.memorised import Memory
from llmcore.measure.memory import block_activations, check_memory, has_attention_kernel, predict_memory
from llmcore.measure.ngram import evaluate_ngram
from llmcore.measure.planner import choose_batch, choose_steps, measure_memory, plan, text_advice
from llmcore.model import Transformer
from llmcore.notebook import plots, widgets
from llmcore.notebook.gloss import gloss
from llmcore.notebook.run_page import write_index
from llmcore.notebook.trackers import check_tracker, tracker_callback
from llmcore.notebook.widgets import TrainingDashboard
from llmcore.optim import build_optimizers, clip_gradient, learning_rate_at, set_rates, update_or_skip
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
saved_config = read_config(start) if start else {}
if start and init_from:
    check_started_from(saved_config, init_from)
saved, reached = saved_config.get("train", {}), saved_config.get("step", 0)
last_step = max_steps or (None if epochs else saved.get("max_steps"))
if last_step and reached >= last_step and checkpoint_dir != "auto":
    raise ValueError(
        f"max_steps={last_step}, but checkpoint_dir={display_path(start)!r} is already at step {reached}; "
        "raise max_steps, or open the checkpoint in notebook 5"
    )

# %% [markdown]
# ## The parts
# The tokenizer decides the vocabulary size, not the preset. If notebook 2 has not made the token files, they are made
# here.
#
# **Start from a trained model**: `init_from` names a run or checkpoint of yours, a GGUF file, a folder of Hugging Face
# or of Meta, or a name on the Hub. Then the shape and the tokenizer are that model's. A new run begins at step 0 with
# its weights and low learning rates, on any text. (`checkpoint_dir` is for a run that goes on exactly as it was.)

# %%
pretrained = open_pretrained(fetch_model(init_from)) if init_from and not start else None
origin = pretrained.config["init_from"] if pretrained else saved_config.get("init_from")

# %%
if origin:
    tok = pretrained.tokenizer if pretrained else Tokenizer(next(start.glob("tokenizer.*")))
    model_config = pretrained.model.config if pretrained else ModelConfig.from_dict(saved_config["model"])
    own_train = pretrained.config["train"] if pretrained else None
    train_config = config.go_on(model_config, own_train, context_size or saved.get("context_size"))
    window = train_config.context_size
    preset, epochs = None, epochs or (None if max_steps or start else 1)
    print(f"starts from {origin['source']}: {model_config.n_params() / 1e6:,.1f}M parameters, {origin['format']}")
else:
    tok = Tokenizer(tokenizer_model_file)
    model_config, train_config = config.preset(preset)
    window = context_size or model_config.max_seq_len
    shape = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads}
    model_config = model_config.replace(
        vocab_size=tok.vocab_size,
        max_seq_len=window,
        **{name: value for name, value in shape.items() if value is not None},
    )

# %%
folder = open_corpus(data_dir)
dataset_dir = dataset_folder(dataset_dir, folder, tok)
options = {"errors": errors, "encoding": encoding, "clean": clean, "duplicates": duplicates}
manifest = prepare_dataset(folder, tok, dataset_dir, val_fraction, **options)
print(report.summary(manifest))
train_data = TokenDataset(dataset_dir, "train", window)
val_data = TokenDataset(dataset_dir, "val", window)
if origin:
    share = report.spelled_share(tok, "".join(train_data.texts(tok, max_tokens=500_000).values()))
    print(f"its tokenizer has no piece for {share:.2%} of the characters, and spells them in bytes")

# %%
# Texts of the old kind, to measure what is forgotten, and to read some of them against that
old_data, mixed_data = None, train_data
if replay_dir:
    old_folder = open_corpus(replay_dir)
    old_dir = dataset_folder("auto", old_folder, tok)
    print(report.summary(prepare_dataset(old_folder, tok, old_dir)))
    old_data = TokenDataset(old_dir, "val", window)
    if replay_fraction:
        mixed_data = MixedDataset(train_data, TokenDataset(old_dir, "train", window), replay_fraction)

# %% [markdown]
# A preset says how many tokens a step reads, because this decides what a step learns. The step is cut into batches that
# fit into the memory, and their gradients are added up. A run that is continued on a smaller device is cut into smaller
# batches and learns the same.

# %%
given = {
    "optimizer": optimizer,
    "learning_rate": learning_rate,
    "muon_learning_rate": muon_learning_rate,
    "schedule": schedule,
    "weight_decay": weight_decay,
    "checkpoint_interval": checkpoint_interval,
    "checkpoint_minutes": checkpoint_minutes,
}
train_config = train_config.replace(
    compile=compile,
    precision=precision,
    seed=seed,
    sample_prompt=prompt,
    **{name: value for name, value in given.items() if value is not None},
)
train_config = choose_batch(
    preset,
    model_config,
    train_config,
    device,
    tokens_per_step=tokens_per_step,
    batch_size=batch_size,
    grad_accum_steps=grad_accum_steps,
    activation_checkpointing=activation_checkpointing,
    saved=saved,
)
train_config = choose_steps(
    preset,
    model_config,
    train_config,
    round(len(train_data.tokens) / (1 - (replay_fraction or 0))),
    max_steps=max_steps,
    epochs=epochs,
    saved=saved,
)

# %% tags=["nbval-check-output"]
# Checked
assert manifest["tokenizer"] == tok.fingerprint
print("tokenizer", tok.fingerprint[:16], "with", tok.vocab_size, "pieces; the data set was made with it")
print(f"data set: {len(train_data.tokens):,} tokens to train on, {len(val_data.tokens):,} held out")

# %% [markdown]
# ## What it will cost
# We compute the memory from the shapes of all tensors. We measure the speed with a few steps of another model. A run
# that does not fit into memory or onto the disk ends here, and the error names the parameters to lower.

# %%
check_memory(model_config, train_config, device)
run_dir = start.parent if start else free_run_dir(output_dir, project)
if checkpoint_dir == "auto":
    run_dir = resolve(output_dir) / project
if reached < train_config.max_steps:
    check_disk(model_config, train_config, device, run_dir, backup_dir)
cost = plan(model_config, train_config, device, data=train_data if thorough else None)
for name, value in cost.rows().items():
    print(f"{name:32} {value}")

# %% [markdown]
# Hoffmann et al. ("Chinchilla", 2022) asked which model has the lowest loss for a given amount of compute. It is about
# the one that reads twenty tokens per parameter. This holds if there is enough text to read it only once. To read it up
# to four times is nearly as good (Muennighoff et al., 2023). So the larger presets read a text four times, unless
# `epochs` or `max_steps` says otherwise.

# %%
print(f"this run: {cost.parameters / 1e6:.1f}M parameters, {cost.tokens / cost.parameters:.1f} tokens for each")
print(f"it reads the training text {cost.epochs(len(train_data.tokens)):.1f} times")
print(text_advice(cost.parameters, cost.tokens, len(train_data.tokens)))
print(f"the same compute, spent best: {cost.best_size_for_compute / 1e6:.1f}M parameters,", end=" ")
print(f"{cost.best_tokens_for_compute / 1e6:.1f}M tokens")

# %% tags=["nbval-check-output"]
print(f"parameters: {cost.parameters:,}")

# %% [markdown]
# ## One training step, by hand
# Training repeats one step. We take it here by hand, on a model of one block that is thrown away, and watch three
# numbers of one matrix. This is what each line does:
#
# - `set_rates`: the **schedule** sets the learning rate. It rises at first, when gradients are wild, and falls to the
#   end.
# - `batch`: the windows of this step. They follow from the step's number and the seed.
# - `autocast`: matrix products are computed in half the bits. The weights stay in float32.
# - `small(x, y)`: **forward**, from tokens to the **cross-entropy**, the mean surprise at the true next tokens:
#   $-\frac{1}{n}\sum_t \ln p(y_t)$.
# - `backward`: the **gradient** says for each weight how the loss would change. A scaler keeps small gradients of fp16
#   from becoming zero.
# - `clip_gradient`: a gradient longer than 1 is shortened to 1, so that a strange batch cannot ruin the model.
# - `update_or_skip`: the **optimizer** moves the weights against the gradient. If a number is not finite, the step is
#   skipped.

# %%
here, kind = torch.device(device), pick_precision(precision, torch.device(device))
torch.manual_seed(seed)
small = Transformer(model_config.replace(n_layers=1)).to(device)
optimizers = build_optimizers(small, train_config)
scaler = torch.amp.GradScaler(device, enabled=kind == "fp16")
matrix = small.layers[0].feed_forward.w1.weight
before = matrix.detach().clone()

# %%
set_rates(optimizers, learning_rate_at(train_config.warmup_steps, train_config))
x, y = train_data.batch(0, train_config.batch_size, seed)
with autocast(kind, here):
    loss = small(x.to(device), y.to(device))
scaler.scale(loss).backward()
norm = clip_gradient(small, optimizers, scaler, train_config.grad_clip)
gradient = matrix.grad.clone()
update_or_skip(optimizers, scaler, finite=True)

# %%
print(f"loss {loss:.3f}, gradient {norm:.2f} long, computed in {kind}")
for name, numbers in {"before": before, "gradient": gradient, "after": matrix.detach()}.items():
    print(f"{name:9}", "  ".join(f"{number:+.6f}" for number in numbers[0, :3].tolist()))

# %% [markdown]
# A model that knows nothing gives each of the $V$ tokens the same probability. Its loss is $\ln V$. A new model is near
# that. The run below does the same in `Trainer._train_step`. It also adds up the gradients of several batches, and
# counts.

# %% tags=["nbval-check-output"]
# Checked
assert abs(loss.item() - math.log(tok.vocab_size)) < 0.5
assert not torch.equal(before, matrix)
print(f"the first loss is near ln {tok.vocab_size} = {math.log(tok.vocab_size):.2f}")

# %%
print(inspect.getsource(Trainer._train_step))

# %% [markdown]
# ## Half the bits
# A number in float32 has 32 bits. **bfloat16** has 16: the same exponent, so the same range, but only two or three
# correct digits. **float16** has more digits and a small range. A gradient of 1e-8 becomes zero in it, so its loss is
# scaled up before the backward pass. With bfloat16 this is not needed.

# %%
formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
plots.number_formats(formats, "bfloat16 keeps the range of float32, and float16 keeps more digits")

# %%
tiny = torch.tensor(1e-8)
print(f"1e-8 in bfloat16: {tiny.bfloat16().item():.1e}; in float16: {tiny.half().item():.1e}")
for name in ("float32", "bfloat16"):
    a = torch.randn(1024, 1024, device=device).to(formats[name])
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        seconds.append(time.perf_counter() - started)
    print(f"{name}: a 1024 x 1024 matrix takes {a.nbytes / 1e6:.1f} MB, a product {1000 * sorted(seconds)[3]:.1f} ms")

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
    model = None
    if origin and not options.get("resume"):
        model, options["init_from"] = pretrained.model, origin
    model = model or Transformer(model_config)
    fewer = {"texts": 4, "passages": 20} if device == "cpu" and cost.parameters > 2e7 else {}
    by_heart = [Memory(model, train_data, val_data, train_config.max_steps, **fewer)] if thorough else []
    parts = [model, mixed_data, val_data, train_config, run_dir]
    return Trainer(*parts, tokenizer=tok, callbacks=[*by_heart, track], device=device, backup_dir=backup_dir, **options)


trainer = new_trainer(seed, resume=start, init_step=init_step)
is_finished = trainer.step == train_config.max_steps
stops = cost.flops < 1e14 and not is_finished  # the default run takes 3.4e13
half = (trainer.step + train_config.max_steps) // 2
trainer.callbacks.append(lambda event: trainer.request_stop() if stops and event["step"] == half else None)
if is_finished:
    print(f"{display_path(run_dir)} is finished at step {trainer.step:,}: it is shown, not trained")

# %%
run_name = display_path(resolve(origin["source"]).name) if origin else preset
dashboard = TrainingDashboard(f"{run_name}: {cost.parameters / 1e6:.1f}M parameters{', first half' if stops else ''}")
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
    dashboard = TrainingDashboard(f"{run_name}: {cost.parameters / 1e6:.1f}M parameters")
    await dashboard.run(second)

# %% tags=["nbval-check-output"]
# Checked
events = read_metrics(run_dir)
assert resumed_at == trainer.step
assert [event["step"] for event in events] == list(range(1, second.step + 1))
print("every step is in the metrics once; steps skipped for a loss that is not finite:", second.progress.skipped)

# %% [markdown]
# At a step down in the training loss, the model begins to read the corpus once more. It reads the same sentences again
# and begins to memorise them. This does not help with new text, so the gap to the validation loss gets wider. Here the
# text is the limit, not the compute. `weight_decay` reduces the gap.
# [tests/benchmarks](../tests/benchmarks/README.md) says what else was tried.
#
# Does the model recite? Five times in the run, a callback lets it continue held-out passages and counts how much of its
# text stands in the training text in runs of 8 tokens or more. It also lets it continue passages of both texts, and
# counts the tokens before the first wrong one. [Notebook 5](05_generate.ipynb) draws this beside the two losses, and
# shows what is recited.

# %%
for event in events:
    if {"recall", "recited"} <= event.keys():
        recited = f"{event['recited']:.1%} recited (held-out text: {event['recited_floor']:.1%})"
        continued = f"{event['recall']:.2f} tokens continued (held-out text: {event['recall_floor']:.2f})"
        print(f"step {event['step']:,}: {recited}, {continued}")

# %% [markdown]
# ## Samples get better
# The same prompt after more and more steps. First the model writes frequent characters, then words and names, then
# sentences that fit together for a while.

# %%
for event in events:
    if "sample" in event:
        text = widgets.ending(event.get("sample_prompt", prompt)) + event["sample"]
        print(f"--- step {event['step']:,}, loss {event['loss']:.2f}\n{widgets.visible(text)}\n({gloss(text)})\n")

# %% [markdown]
# ## How good is it?
# Nats per token depend on the vocabulary. **Bits per byte** of held-out text do not, so they can be compared:
#
# $$\text{bits per byte} = \frac{\text{nats of all held-out tokens}}{\ln 2 \times \text{bytes of the text in UTF-8}}$$
#
# Validation during training is quick and cuts the text at any place. For a figure that you want to publish, evaluate
# each document separately, from its first token to its end.

# %%
# a large model on a CPU reads a part of the text: a twentieth of what it has read in training
most = min(1_000_000, max(20_000, cost.tokens // 20)) if thorough else 1
whole = len(val_data.tokens) <= max(most, 20_000)
last = second.validate(0 if whole else max(1, most // (train_config.batch_size * window)))
print(f"validation: {last['val_loss']:.3f} nats per token, perplexity {last['val_perplexity']:.1f},", end=" ")
print(f"{last['val_bits_per_byte']:.3f} bits per byte")
each = None if whole or not thorough else max(window, most // len(val_data.names))  # tokens of each document
texts = val_data.texts(tok, max_tokens=most, each=each)
scoring = {"context_size": window, "precision": precision, "progress": False}
ours = evaluate(second.model, tok, texts, **scoring)
print(f"window by window: {ours}")

# %% [markdown]
# At the start of a window, the model sees almost no earlier text. If windows overlap by half, it sees at least half a
# window before each token, except in the first window. This needs twice the compute and gives a slightly lower figure.
# Both figures are right. If you quote one, say how the windows were cut. Below we use windows that do not overlap.

# %%
overlapping = evaluate(second.model, tok, texts, stride=max(1, window // 2), **scoring)
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
    run_name: ours.total.bits_per_byte,
}
best = min(bits, key=bits.get)
title = f"The fewest bits per byte, {bits[best]:.2f}: {best}"
plots.bars(bits, title, "bits per byte of held-out text (less is better)", highlight=run_name)

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
def in_words(interval):
    return "95% interval {:+.3f} to {:+.3f}".format(*interval) if interval else "too few documents for an interval"


difference, interval = paired_difference(ours, counting)
print(f"{run_name} minus 4-grams: {difference:+.3f} bits per byte ({in_words(interval)})")
wins = sum(a.nats < b.nats for a, b in zip(ours.documents, counting.documents, strict=True))
title = f"{run_name} beats 4-grams on {wins} of {len(texts)} held-out documents"
plots.document_scores({run_name: ours, "4-grams": counting}, title)

# %% [markdown]
# ## What it gained, and what it forgot
# A run that starts from a trained model is compared with that model: on held-out documents of the new text, and, where
# `replay_dir` names some, of the old kind. What a model learns may displace what it knew. If `replay_fraction` of the
# windows are of the old kind, it forgets less. (Without `init_from` there is nothing to compare, and this section is
# empty.)

# %%
before_training, held_out = None, {"the new text": texts}
if origin:
    try:
        before_training = open_pretrained(origin["source"], device).model
    except (OSError, ValueError, RuntimeError) as error:
        print(f"the model that this run started from is not there any more, so it cannot be compared: {error}")
    if old_data:
        old_each = max(window, most // len(old_data.names))
        held_out["the old kind of text"] = old_data.texts(tok, max_tokens=most, each=old_each)

# %%
for kind_of_text, documents in held_out.items() if before_training else ():
    at_start = evaluate(before_training, tok, documents, **scoring)
    at_end = ours if documents is texts else evaluate(second.model, tok, documents, **scoring)
    difference, interval = paired_difference(at_end, at_start)
    print(f"{kind_of_text}: {at_start.total.bits_per_byte:.3f} bits per byte before,", end=" ")
    print(f"{at_end.total.bits_per_byte:.3f} after: {difference:+.3f} ({in_words(interval)})")
    title = f"{run_name} on {kind_of_text}: {difference:+.2f} bits per byte"
    plots.document_scores({"after": at_end, "before": at_start}, title)

# %%
for when, model in {"before": before_training, "after": second.model}.items() if before_training else ():
    text = generate(model, tok, prompt, 80, temperature=0.8, top_p=0.95, seed=seed)
    print(f"--- {when}\n{widgets.visible(prompt + text)}\n")
before_training = None  # its memory is free again

# %% [markdown]
# ## Where the memory goes
# A training step holds more than the weights. The optimizer keeps one or two numbers for each weight, and the backward
# pass makes one more, the gradient. **Activations** are the numbers that the forward pass keeps for the backward pass.
# They grow with the batch, and here they need most.

# %%
need = {name: size / 1e6 for name, size in cost.memory.items() if name != "total"}
largest = max(need, key=need.get)
plots.stacked(need, "MB", f"Most of the memory of a step: {largest}, {need[largest] / sum(need.values()):.0%}")

# %% [markdown]
# **Activation checkpointing** keeps fewer activations and computes the others again in the backward pass: memory is
# paid for with time. `selective` keeps what takes long to compute: the results of matrix products and of attention.
# `full` keeps only the input of each block. (With short windows on a CPU, attention is spelled out, and `selective`
# computes it again.)

# %%
bytes_of_a_number, fused = 4 if kind == "fp32" else 2, device == "cuda"
kernel = has_attention_kernel(model_config, window, bytes_of_a_number, fused)
tokens = model_config.n_layers * train_config.batch_size * window
kept = {
    policy: tokens * block_activations(model_config, policy, window, bytes_of_a_number, fused) / 1e6
    for policy in ("none", "selective", "full")
}
title = f"full keeps {kept['full'] / kept['none']:.0%} of what none keeps, and computes the rest again"
plots.kept_and_again(kept, kernel, title)

# %% [markdown]
# The lines are predictions for a step that is not compiled. For each point we measured two such steps in a new process.
# The lines bend where a batch has so many scores that the loss is computed in pieces: then all scores never exist at
# once.
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
less = 1 - predicted["full"][sizes[1]] / predicted["none"][sizes[1]]
title = f"Computing blocks again saves {less:.0%} of the memory at batch {sizes[1]}"
plots.memory_against_batch(predicted, measured, title)

# %%
for policy, points in measured.items():
    for size, peak in points.items():
        expected = predicted[policy][size]
        print(f"{policy}, batch {size}: predicted {expected / 1e6:,.0f} MB, measured {peak / 1e6:,.0f} MB")

# %% [markdown]
# ## What the optimizer does
# A gradient is a matrix with a few strong directions and many weak ones: its **singular values** fall quickly. Plain
# descent would move the weights almost only along the strong ones. **Muon** makes all directions of a matrix about
# equally strong before it moves the weights. **AdamW** divides each number of the gradient by its usual size, which
# helps in a similar way. Muon is used for the matrices of the blocks, AdamW for the rest. These are the step's gradient
# and update from above.

# %%
update = (before - matrix.detach()).float().cpu()
weak = [torch.linalg.svdvals(each.float().cpu()) for each in (gradient, update)]
shares = [float(values.median() / values[0]) for values in weak]
name = {"muon": "Muon", "adamw": "AdamW"}[train_config.optimizer]
title = f"{name} lifts the middle singular value from {shares[0]:.0%} to {shares[1]:.0%} of the largest"
plots.singular_values({"gradient": gradient.float().cpu(), f"update by {name}": update}, title)

# %% [markdown]
# ## The run's folder
# The run's folder holds everything that belongs to the run: tokenizer, configuration, metrics and checkpoints. We load
# the last checkpoint and validate again. The loss is the same.

# %%
checkpoint = load_checkpoint(run_dir, device=device)
print("checkpoint:", display_path(checkpoint.path))
again = Trainer(
    checkpoint.model, mixed_data, val_data, train_config, run_dir, tokenizer=tok, device=device, resume="latest"
)

# %% tags=["nbval-check-output"]
# Checked
assert abs(again.validate(0 if whole else 1)["val_loss"] - (last if whole else second.validate(1))["val_loss"]) < 1e-4
assert checkpoint.tokenizer.fingerprint == tok.fingerprint
print("the loaded model validates the same, and has our tokenizer")

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
# - In English: `data_dir = "data/shakespeare"` in notebooks 1, 2 and 4, `prompt = "HAMLET."`, and another `project`.
# - On a GPU: `preset = "scifi-10M"` or `"scifi-40M"` with a tokenizer of 8,000 pieces and `data_dir = "data/scifi"`, or
#   `"scifi-117M"` with 16,000 pieces.
#
# **[Next: 5 · Writing](05_generate.ipynb)**
