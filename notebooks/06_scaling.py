# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6 · A scaling law
#
# *Can small runs tell how good a larger run will be?* This notebook runs notebook 4 many times, with small models of
# different sizes. It fits a law to their losses. The law predicts the loss of a larger model. We train that model too
# and check the prediction.
#
# | in | out | time |
# | --- | --- | --- |
# | corpus and tokenizer of notebook 1 | runs in `output_dir`, a tested law | 10 to 20 minutes on two CPU cores |
#
# You may stop it at any time. When you run it again, it keeps the finished runs and continues with the others.
#
# Before: [5 · Writing](05_generate.ipynb) · First: [1 · From text to tokens](01_tokenize.ipynb)
#
# All notebooks: [1](01_tokenize.ipynb) [2](02_dataset.ipynb) [3](03_toyreverse.ipynb) [4](04_scifi_train.ipynb)
# [5](05_generate.ipynb) **6**

# %% tags=["parameters"]
preset: str = "scifi-mini"  # all runs use its settings, except the size
data_dir: str = "data/sanguo"  # folder of texts
tokenizer_model_file: str = "outputs/tokenizer.model"  # from notebook 1
dataset_dir: str = "auto"  # token files, from notebook 2 or made here; auto: a folder for this corpus and tokenizer
val_fraction: float = None  # share of the documents held out; None: as in an existing data set, else 0.05
errors: str = None  # for a text that cannot be read: strict stops, skip leaves it out; None: as before, else strict
encoding: str = None  # of the files, a name or auto; None: as before, else auto
clean: bool = None  # leave out advertisements and leftovers of web pages; None: as before, else True
duplicates: str = None  # copies of a text: drop leaves them out, keep keeps them; None: as before, else drop
output_dir: str = "outputs/scaling"  # folder of the runs
dims: str = "12 16 24 32 48 64 96 128"  # widths of the models
budgets: str = "2.5e11 8e11 2.5e12"  # compute of a run, in FLOPs
held_back_dim: int = 160  # width of the model to predict
held_back_epochs: float = 4.0  # how often this model reads the corpus; no other run reads it more often
context_size: int = None  # tokens in a window; None: the preset's
batch_size: int = 4  # windows per step
learning_rate: float = 0.05  # AdamW's peak, for all sizes; such short runs need a high one
min_steps: int = 100  # runs with fewer steps are left out
workers: int = 2  # runs at a time
device: str = "auto"  # auto, cpu, cuda, mps
seed: int = 0  # random seed for the runs and the resampling

# %%
from llmcore.notebook.parameters import check_parameters

check_parameters(globals())

# %%
import numpy as np

from llmcore import config
from llmcore.corpus import report
from llmcore.corpus.prepare import dataset_folder, prepare_dataset
from llmcore.corpus.sources import open_corpus
from llmcore.dataset import TokenDataset
from llmcore.device import pick_device
from llmcore.files import resolve
from llmcore.measure.scaling import MIN_RUNS, fit_scaling, isoflop_minimum
from llmcore.measure.sweep import isoflop_grid, planned_run, run_outcome, run_sweep, scaled_to_width
from llmcore.notebook import plots, widgets
from llmcore.runs import check_writable
from llmcore.tokenizer import Tokenizer

device = str(pick_device(device))
check_writable(output_dir)

# %% [markdown]
# ## What to train
# We can spend compute on a larger model or on more text. So we spend each budget in several ways: models of different
# sizes get the same FLOPs, and a smaller model reads more text (Hoffmann et al., "Chinchilla",
# [arXiv:2203.15556](https://arxiv.org/abs/2203.15556)). Each is a separate run, and its learning rate falls to zero at
# its end. We cannot take the middle of a longer run instead: its learning rate is still high, so its loss is worse.
#
# One novel is a short text. Small models read it several times. Up to four times, this is nearly as good as new text
# (Muennighoff et al., [arXiv:2305.16264](https://arxiv.org/abs/2305.16264)). So no run reads it more often.

# %%
tok = Tokenizer(tokenizer_model_file)
base, _ = config.preset(preset)
base = base.replace(vocab_size=tok.vocab_size, max_seq_len=context_size or base.max_seq_len)
folder = open_corpus(data_dir)
dataset_dir = dataset_folder(dataset_dir, folder, tok)
options = {"errors": errors, "encoding": encoding, "clean": clean, "duplicates": duplicates}
print(report.summary(prepare_dataset(folder, tok, dataset_dir, val_fraction, **options)))
epoch = len(TokenDataset(dataset_dir, "train", base.max_seq_len).tokens)

# %%
models = [scaled_to_width(base, dim) for dim in dims]
fewest_tokens = min_steps * batch_size * base.max_seq_len
grid = isoflop_grid(models, budgets, batch_size, fewest_tokens, held_back_epochs * epoch)
large = scaled_to_width(base, held_back_dim)
held_back = planned_run(large, held_back_epochs * epoch, batch_size)
if len(grid) < MIN_RUNS or large.n_params() <= max(model.n_params() for model in models):
    raise ValueError(
        f"{len(grid)} runs of dims={dims} fit budgets={budgets}; give {MIN_RUNS} or more below held_back_dim"
    )

# %% tags=["nbval-check-output"]
print(f"one epoch: {epoch:,} tokens")
print("enough runs for a law:", len(grid) >= MIN_RUNS)
print("the held-back model is larger than all others:", all(large.n_params() > m.n_params() for m in models))

# %% [markdown]
# **What counts as N?** We count all weights, as Hoffmann does. Input and output share one table here, so we count it
# once. Kaplan et al. ([arXiv:2001.08361](https://arxiv.org/abs/2001.08361)) leave the tables out. In a large model the
# difference is small. In these small models the tables are the largest part:

# %%
for model in (*models, large):
    print(f"dim {model.dim:4}: N = {model.n_params():9,}, without tables {model.n_params(embeddings=False):9,}")

# %% [markdown]
# Every token is multiplied with the output table. This is part of the cost of a run, so the table is part of N. At the
# end we fit a law with each count.
#
# ## The runs
# The held-back run takes longest, so it comes first. We do not look at its result before the law is fitted.

# %%
common = {"preset": preset, "seed": seed, "device": device, "context_size": base.max_seq_len, "weight_decay": 0.1}
common |= {"learning_rate": learning_rate} if learning_rate else {}
common |= {"data_dir": str(data_dir), "dataset_dir": str(dataset_dir)}
common |= {"tokenizer_model_file": str(tokenizer_model_file), "thorough": False}
runs = {name: {**common, **run} for name, run in {"held-back": held_back, **grid}.items()}
done = {}
for run_dir in run_sweep(runs, output_dir, workers):
    done[run_dir.name] = run_outcome(run_dir)
    print(f"{len(done):2} of {len(runs)}: {run_dir.name}")

# %%
outcome = done["held-back"]
fitted = [done[name] for name in grid]
N, D, C, L = (np.array([run[key] for run in fitted]) for key in ("parameters", "tokens", "flops", "loss"))

# %% tags=["nbval-check-output"]
print("every run was trained to its end:", len(done) == len(runs) and bool(np.isfinite(L).all()))
print("no run cost more than 2% off its budget:", all(min(abs(c / b - 1) for b in budgets) < 0.02 for c in C))
beyond = N.max() < outcome["parameters"] and D.max() < outcome["tokens"]
print("the held-back one has more parameters and more tokens than any other:", bool(beyond))

# %% [markdown]
# ## Equal compute
# All models of a curve cost the same compute. The models on the left are too small for their text. The models on the
# right are too large: they have not read enough text.

# %%
curves = {b: (N[near], L[near]) for b in budgets if (near := abs(C / b - 1) < 0.02).any()}
minima = {b: isoflop_minimum(parameters, losses) for b, (parameters, losses) in curves.items()}
best = {b: n for b, n in minima.items() if n}
words = ", ".join(f"{n / 1e3:,.0f}k" for n in best.values())
grows = len(best) > 1 and list(best.values()) == sorted(best.values())
title = f"{'With more compute the best size grows' if grows else 'Best size'}: {words} parameters"
plots.isoflop_curves(curves, title if best else "The best size is not among those tried")

# %% [markdown]
# ## The law
# $$L(N, D) = E + \frac{A}{N^\alpha} + \frac{B}{D^\beta}$$
#
# We fit it to the logarithm of the loss. With Huber's loss, no single run has too much weight. How certain are the
# numbers? We draw the runs again with replacement, a thousand times, and fit each draw.

# %%
law = fit_scaling(N, D, L, seed=seed)
for name in ("E", "alpha", "beta"):
    low, high = law.interval(name)
    print(f"{name:6}{float(getattr(law.law, name)):6.2f}   90% between {low:.2f} and {high:.2f}")
print(f"runs lie {np.sqrt(np.mean(law.residuals**2)):.2%} from it (root mean square)")

# %% tags=["nbval-check-output"]
numbers = {name: float(getattr(law.law, name)) for name in ("E", "A", "B", "alpha", "beta")}
print("the law's numbers are finite and above 0:", all(np.isfinite(v) and v > 0 for v in numbers.values()))
again = fit_scaling(N[::-1], D[::-1], L[::-1], resamples=1, seed=seed).law
print("the order of the runs does not matter:", np.allclose(again.loss(N, D), law.law.loss(N, D), rtol=1e-4))

# %% [markdown]
# ## The prediction and the result
# If the law is right for larger models, the band holds nine of ten such runs. Two things make the band wide: another
# draw of runs gives another law, and a single run does not lie exactly on its law.

# %%
predicted, low, high = law.predict(outcome["parameters"], outcome["tokens"], seed=seed)
measured = outcome["loss"]
off = measured / predicted - 1
times = outcome["flops"] / C.max()
print(f"{outcome['parameters']:,} parameters, {outcome['tokens']:,} tokens, {times:.1f} times any fitted run's FLOPs")
print(f"predicted: {predicted:.3f} nats per token, 90% between {low:.3f} and {high:.3f}")
print(f"measured:  {measured:.3f}, {abs(off):.1%} {'above' if off > 0 else 'below'} the prediction")

# %%
where = "inside" if low <= measured <= high else "above" if measured > high else "below"
title = f"A run of {times:.0f} times the compute ends {where} the predicted band"
point = {"flops": outcome["flops"], "measured": measured, "predicted": predicted, "low": low, "high": high}
plots.scaling_fit(L, law.law.loss(N, D), C, title, point)

# %% [markdown]
# Why could such a law fail? It assumes that all text is new. A model that reads the same novel again can memorise it.
# Then the loss on the training text falls faster than the loss on the held-out chapters. We measure this gap too.

# %%
gaps = {name: run["loss"] - run["train_loss"] for name, run in done.items()}
gap, usual = gaps.pop("held-back"), float(np.median(list(gaps.values())))
print(f"gap between held-out and training text: {gap:.3f} nats per token here, {usual:.3f} in the median of the others")
print(f"read {outcome['tokens'] / epoch:.1f} times; the others {D.min() / epoch:.1f} to {D.max() / epoch:.1f} times")
bare = fit_scaling([run["without_tables"] for run in fitted], D, L, seed=seed)
other, other_low, other_high = bare.predict(outcome["without_tables"], outcome["tokens"], seed=seed)
print(f"N counted without tables, the same runs predict {other:.3f}, between {other_low:.3f} and {other_high:.3f}")

# %%
miss = max(low - measured, measured - high)
usual_gap_loss = measured - (gap - usual)  # the loss, if this run had memorised no more than the others
if where == "inside":
    print("The result is inside the band.")
elif where == "above":
    print(f"The result is {miss:.3f} nats per token above the band; with the usual gap: {usual_gap_loss:.3f}.")
    print("Repetition explains this." if usual_gap_loss <= high else "Repetition alone does not explain this.")
else:
    print(f"The result is {miss:.3f} nats per token below the band. Repetition is not the reason: it raises the loss.")
    print(f"The run has {times:.0f} times the compute of any fitted run. So few runs do not determine E well.")
    place = "inside" if other_low <= measured <= other_high else "outside"
    print(f"With the other count of N, the result is {place} the band.")

# %% [markdown]
# ## How to use a law
# For any budget, the law gives the best size and the best amount of text. This is how Chinchilla found its rule of
# about 20 tokens per parameter. Our small runs give other figures:

# %%
for flops in (*budgets, outcome["flops"]):
    n, d = law.law.optimum(flops)
    low_size, high_size = np.quantile(law.resampled.optimum(flops)[0], (0.05, 0.95))
    sizes = f"{n / 1e3:6,.0f}k parameters (90%: {low_size / 1e3:,.0f}k to {high_size / 1e3:,.0f}k)"
    print(f"{flops:.1e} FLOPs: {sizes}, {d / 1e3:6,.0f}k tokens, {d / n:.1f} per parameter, {d / epoch:.1f} epochs")

# %% tags=["nbval-check-output"]
n, d = law.law.optimum(np.array(budgets))
print("the larger the budget, the larger the best model:", bool((np.diff(n) > 0).all()))
worse = [(law.law.loss(n * f, d / f) > law.law.loss(n, d)).all() for f in (0.5, 2)]
print("half or twice its size would be worse:", all(worse))

# %% [markdown]
# What if N leaves the tables out? Then the same runs give another answer: the best size grows differently with compute.
# Kaplan counted this way, with models that were mostly tables. This is a main reason why Kaplan and Hoffmann gave
# different advice (Pearce and Song, [arXiv:2406.12907](https://arxiv.org/abs/2406.12907)).

# %%
for count, fit in (("all weights", law), ("without tables", bare)):
    power = fit.law.beta / (fit.law.alpha + fit.law.beta)
    spread = np.sqrt(np.mean(fit.residuals**2))
    print(f"{count:15} alpha {fit.law.alpha:.2f}, beta {fit.law.beta:.2f}: best N grows with C^{power:.2f}; ", end="")
    print(f"runs lie {spread:.2%} from the law")

# %%
widgets.run_table([resolve(output_dir) / name for name in runs])

# %% [markdown]
# ## What to try next
# - `held_back_epochs = 8` with another `output_dir`: how does repetition show in the gap, and in the prediction?
# - `learning_rate = 0.02`, the preset's, which is better for longer runs: which losses rise most? How does E change?
# - Another `seed` and `output_dir`: do the intervals of the two laws overlap?
# - On a GPU: `dims = "128 192 256 384 512"`, budgets a thousand times as large, and a library for `data_dir`.
#
# **[Back to 1 · From text to tokens](01_tokenize.ipynb)**
