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
# different sizes. It fits a law to their losses. It measures how wrong such a law is beyond its runs. Then the law
# predicts the loss of a larger model, with a band. We train that model three times and check the prediction.
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
dims: str = "12 16 24 32 48 64 80 96"  # widths of the models
budgets: str = "4e11 8e11 1.6e12 3.2e12"  # compute of a run, in FLOPs; three or more
held_back_dim: int = 128  # width of the model to predict
held_back_epochs: float = 3.0  # how often this model reads the corpus; no other run reads it more often
held_back_runs: int = 3  # runs of this model, each with another seed
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
from llmcore.measure.scaling import (
    MIN_RUNS,
    ScalingError,
    fit_scaling,
    isoflop_minimum,
    leave_out_budgets,
    needed_widening,
)
from llmcore.measure.sweep import SweepProgress, isoflop_grid, planned_run, run_outcome, run_sweep, scaled_to_width
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
budgets = sorted(set(budgets))
models = [scaled_to_width(base, dim) for dim in dims]
fewest_tokens = min_steps * batch_size * base.max_seq_len
grid = isoflop_grid(models, budgets, batch_size, fewest_tokens, held_back_epochs * epoch)
smaller = isoflop_grid(models, budgets[:-1], batch_size, fewest_tokens, held_back_epochs * epoch)
large = scaled_to_width(base, held_back_dim)
held_back = planned_run(large, held_back_epochs * epoch, batch_size)
if len(budgets) < 3 or len(smaller) < MIN_RUNS or large.n_params() <= max(model.n_params() for model in models):
    raise ValueError(
        f"{len(smaller)} runs of dims={dims} fit budgets={budgets} without the largest; give three budgets or more, "
        f"{MIN_RUNS} such runs or more, and dims below held_back_dim"
    )

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

# %% [markdown]
# **Checked:**

# %% tags=["nbval-check-output"]
print(f"the training text has {epoch:,} tokens")
print(sum(model.n_params() >= large.n_params() for model in models), "models are as large as the held-back one")

# %% [markdown]
# ## The runs
# The runs of the smallest budget come first, then those of the large model, which take longest. We do not look at the
# results of the large model before the law is fitted. While runs are in progress, the last line shows their training
# losses and the time left.

# %%
common = {"preset": preset, "device": device, "context_size": base.max_seq_len, "weight_decay": 0.1}
common |= {"learning_rate": learning_rate} if learning_rate else {}
common |= {"data_dir": str(data_dir), "dataset_dir": str(dataset_dir)}
common |= {"tokenizer_model_file": str(tokenizer_model_file), "thorough": False}
large_runs = {f"held-back-{seed + i}": {**held_back, "seed": seed + i} for i in range(held_back_runs)}
first = isoflop_grid(models, budgets[:1], batch_size, fewest_tokens, held_back_epochs * epoch)
runs = {name: {**common, "seed": seed, **run} for name, run in (first | large_runs | grid).items()}
flops_per_token = {model.dim: model.flops_per_token() for model in (*models, large)}
progress = SweepProgress(runs, {name: flops_per_token[run["dim"]] for name, run in runs.items()}, output_dir)


def show(line, end=""):
    """Write over the line that shows the progress."""
    print(f"\r{line:150}", end=end, flush=True)


done = {}
for run_dir in run_sweep(runs, output_dir, workers, tick=lambda: show(progress.line())):
    done[run_dir.name] = run = run_outcome(run_dir)
    loss = "not looked at yet" if run_dir.name in large_runs else f"{run['loss']:.3f} nats per token"
    show(
        f"{len(done):2} of {len(runs)}: {run_dir.name:12} {run['seconds'] / 60:4.1f} minutes, loss {loss}".rstrip(),
        "\n",
    )

# %%
outcomes = [done[name] for name in large_runs]
held = outcomes[0]
fitted = [done[name] for name in grid]
N, D, C, L = (np.array([run[key] for run in fitted]) for key in ("parameters", "tokens", "flops", "loss"))
budget = np.array([min(budgets, key=lambda b: abs(np.log(b / c))) for c in C])  # of each run
for b in budgets:
    minutes = [run["seconds"] / 60 for run, own in zip(fitted, budget, strict=True) if own == b]
    print(f"{b:.1e} FLOPs: {len(minutes)} runs of {min(minutes):.1f} to {max(minutes):.1f} minutes")
minutes = [run["seconds"] / 60 for run in outcomes]
times = held["flops"] / C.max()
print(f"held back, {held['flops']:.1e} FLOPs: {len(minutes)} runs of {min(minutes):.1f} to {max(minutes):.1f} minutes")

# %% [markdown]
# **Checked:**

# %% tags=["nbval-check-output"]
print(len(runs) - len(done) + int((~np.isfinite(L)).sum()), "runs did not reach their end")
print(int((abs(C / budget - 1) >= 0.02).sum()), "runs are 2% or more off their budget")
larger = sum(run["parameters"] >= held["parameters"] or run["tokens"] > held["tokens"] for run in fitted)
print(larger, "fitted runs have the size of the held-back ones or more text")

# %% [markdown]
# ## One budget, several ways to spend it
# Each point is a run, and all cost the same compute. Go from left to right: the model becomes larger, and there is
# compute for fewer tokens. On the left the model is too small for its text. On the right it has not read enough text.
# Between them is the best size for this budget. We find it with a parabola in $\log N$.

# %%
curves = {b: (N[budget == b], L[budget == b]) for b in budgets}
minima = {b: isoflop_minimum(parameters, losses) for b, (parameters, losses) in curves.items()}
best = {b: n for b, n in minima.items() if n}
one = next(iter(best), budgets[0])
read = [f"reads {tokens / epoch:.1f}×" for tokens in D[budget == one]]
title = (
    f"{one:.1e} FLOPs are spent best on {best[one] / 1e3:,.0f}k parameters" if best else "No best size between these"
)
plots.isoflop_curves({one: curves[one]}, title, notes={one: read})

# %% [markdown]
# "reads 1.5×" means that this run reads the text one and a half times. Now the same for all budgets. For the larger
# ones, small models would read the text too often. So some points on the left are missing, and the curve may have no
# lowest point.

# %%
words = ", ".join(f"{n / 1e3:,.0f}k" for n in best.values())
grows = len(best) > 1 and list(best.values()) == sorted(best.values())
title = f"{'With more compute the best size grows' if grows else 'Best size'}: {words} parameters"
plots.isoflop_curves(curves, title if best else "The best size is not among those tried")

# %% [markdown]
# ## The law
# $$L(N, D) = E + \frac{A}{N^\alpha} + \frac{B}{D^\beta}$$
#
# Read it as three parts of the loss. $E$ remains for any model. $A/N^\alpha$ is there because the model is small.
# $B/D^\beta$ is there because it has read little.
#
# We fit the law to the logarithm of the loss, as Besiroglu et al. advise
# ([arXiv:2404.10102](https://arxiv.org/abs/2404.10102)). Huber's loss gives no single run too much weight. We start
# from several points, keep the best end, and add the costs of the runs up. How certain are the numbers? We draw the
# runs again with replacement, a thousand times, and fit each draw.

# %%
law = fit_scaling(N, D, L, seed=seed)
for name in ("E", "alpha", "beta"):
    low, high = law.interval(name)
    print(f"{name:6}{float(getattr(law.law, name)):6.2f}   90% between {low:.2f} and {high:.2f}")
print(f"runs lie {np.sqrt(np.mean(law.residuals**2)):.2%} from it (root mean square)")
small_n, small_d, big = N.min(), D[N.argmin()], (N.max(), D[N.argmax()])
for size, text in ((small_n, small_d), big):
    terms = law.law.E, law.law.A / size**law.law.alpha, law.law.B / text**law.law.beta
    print(
        f"{size:9,} parameters, {text:9,} tokens: {terms[0]:.2f} + {terms[1]:.2f} + {terms[2]:.2f} = {sum(terms):.2f}"
    )

# %% [markdown]
# **Checked:**

# %% tags=["nbval-check-output"]
numbers = [float(getattr(law.law, name)) for name in ("E", "A", "B", "alpha", "beta")]
print(sum(np.isfinite(number) and number > 0 for number in numbers), "numbers, all finite and above 0")
again = fit_scaling(N[::-1], D[::-1], L[::-1], resamples=1, seed=seed).law
print(
    f"in the opposite order the runs give the same losses to {abs(again.loss(N, D) / law.law.loss(N, D) - 1).max():.1%}"
)

# %% [markdown]
# ## How wrong is such a law beyond its runs?
# Another draw of runs gives another law, and a single run does not lie exactly on its law. From these two we get a
# band. But the band does not know whether the law has the right form. We cannot see that inside the runs: the five
# numbers adapt to them.
#
# So we test predictions on runs that we have. We leave out the largest budget, fit the others, and predict
# what we left out. Then we leave out the two largest. "2× beyond" in the figure means: this run costs twice the compute
# of the largest budget that was fitted. We chose this method before we looked at the held-back runs.

# %%
left = leave_out_budgets(N, D, L, budget, seed=seed)
rows = {}
for run in left:
    name = f"{N[run.run] / 1e3:,.0f}k, {budget[run.run]:.1e} FLOPs, {np.exp(run.distance):.0f}× beyond"
    rows[name] = (run.predicted, run.low, run.high), [run.measured]
inside = sum(run.low <= run.measured <= run.high for run in left)
below = sum(run.measured < run.predicted for run in left)
print(f"{inside} of {len(left)} runs are inside the band; {below} of {len(left)} end below the prediction")
plots.prediction_bands(rows, f"{inside} of {len(left)} left-out runs are inside the law's own band")

# %% [markdown]
# A law that is fitted to its runs has about the right value and slope there. What it first gets wrong is the curvature.
# Such an error grows with the square of the distance. Let a run cost $r$ times the compute of the largest budget that
# was fitted. We widen its band at both ends by $a\,(\ln r)^2$, in log loss. We choose the smallest $a$ for which all
# left-out runs are inside.

# %%
distance = float(np.log(held["flops"] / max(budgets)))
extra = needed_widening(left, distance)
print(f"a = {needed_widening(left, 1.0):.2%}; at {times:.1f} times the compute each end moves by {extra:.1%}")

# %% [markdown]
# **Checked:**

# %% tags=["nbval-check-output"]
slack = [1.000001 * needed_widening(left, run.distance) for run in left]
held_in = [
    run.low * np.exp(-more) <= run.measured <= run.high * np.exp(more) for run, more in zip(left, slack, strict=True)
]
print(len(left) - sum(held_in), "left-out runs are outside their widened band")

# %% [markdown]
# ## The prediction and the result
# Now we look at the held-back runs. They differ in the seed: other initial weights and another order of the text. The
# law knows nothing of the seed, so it makes one prediction for all.

# %%
narrow = law.predict(held["parameters"], held["tokens"], seed=seed)
predicted, low, high = law.predict(held["parameters"], held["tokens"], seed=seed, widening=extra)
measured = np.array([run["loss"] for run in outcomes])
inside = int(((low <= measured) & (measured <= high)).sum())
print(f"{held['parameters']:,} parameters, {held['tokens']:,} tokens, {times:.1f} times any fitted run's FLOPs")
print(f"predicted: {predicted:.3f} nats per token, widened band {low:.3f} to {high:.3f}", end=" ")
print(f"(before: {narrow[1]:.3f} to {narrow[2]:.3f})")
for name, loss in zip(large_runs, measured, strict=True):
    miss = max(low - loss, loss - high)
    place = "inside" if miss <= 0 else f"{miss:.3f} {'below' if loss < low else 'above'} the band"
    print(f"{name}: {loss:.3f}, {loss / predicted - 1:+.1%} from the prediction, {place}")

# %%
title = f"{inside} of {len(measured)} runs of {times:.1f} times the compute end inside the widened band"
rows = {"the law's own band": (narrow, measured), "widened": ((predicted, low, high), measured)}
plots.prediction_bands(rows, title)

# %%
point = {"flops": held["flops"], "predicted": predicted, "low": low, "high": high}
plots.scaling_fit(L, law.law.loss(N, D), C, title, point, measured)

# %% [markdown]
# ## What a law may say, and what not
# It may say: a model of this size, trained in the same way on so much of the same text, ends about here. It may say how
# to spend a budget that is not much larger than those of its runs.
#
# It may not say what loss is possible at all. Look at $E$ as we add larger budgets:

# %%
for largest in budgets[1:]:
    near = budget <= largest
    try:
        fit = law if near.all() else fit_scaling(N[near], D[near], L[near], seed=seed)
    except ScalingError:
        continue
    e_low, e_high = fit.interval("E")
    print(f"runs up to {largest:.1e} FLOPs: E = {float(fit.law.E):.2f}, 90% between {e_low:.2f} and {e_high:.2f}")

# %% [markdown]
# E is far away from all runs, so it is the least certain number. The prediction needs only the sum of the three parts,
# and this sum is much better known.
#
# The band knows three things: the draw of the runs, the distance of single runs from the law, and how wrong the law was
# at the budgets that we left out. So the widened band is no promise of nine in ten: the runs that we left out are few,
# and all of them tell of one law. Nor does it know what is new in the larger run: more blocks, another best learning
# rate, or memorising. A model that reads the same novel again can memorise it. Then the loss on the training text falls
# faster than the loss on the held-out chapters. We measure this gap, and the spread between seeds:

# %%
gaps = [run["loss"] - run["train_loss"] for run in outcomes]
usual = float(np.median([run["loss"] - run["train_loss"] for run in fitted]))
print(f"gap between held-out and training text: {np.median(gaps):.3f} nats per token here,", end=" ")
print(f"{usual:.3f} in the median of the others")
print(f"read {held['tokens'] / epoch:.1f} times; the others {D.min() / epoch:.1f} to {D.max() / epoch:.1f} times")
print(f"largest difference between seeds: {np.ptp(measured):.3f} nats per token; half the band: {(high - low) / 2:.3f}")

# %% [markdown]
# ## How to use a law
# For any budget, the law gives the best size and the best amount of text. This is how Chinchilla found its rule of
# about 20 tokens per parameter. Our small runs give other figures:

# %%
for flops in (*budgets, held["flops"]):
    n, d = law.law.optimum(flops)
    low_size, high_size = np.quantile(law.resampled.optimum(flops)[0], (0.05, 0.95))
    sizes = f"{n / 1e3:6,.0f}k parameters (90%: {low_size / 1e3:,.0f}k to {high_size / 1e3:,.0f}k)"
    print(f"{flops:.1e} FLOPs: {sizes}, {d / 1e3:6,.0f}k tokens, {d / n:.1f} per parameter, {d / epoch:.1f} epochs")

# %% [markdown]
# What if N leaves the tables out? Then the same runs give another answer: the best size grows differently with compute.
# Kaplan counted this way, with models that were mostly tables. This is a main reason why Kaplan and Hoffmann gave
# different advice (Pearce and Song, [arXiv:2406.12907](https://arxiv.org/abs/2406.12907)).

# %%
bare = fit_scaling([run["without_tables"] for run in fitted], D, L, seed=seed)
for count, fit, size in (("all weights", law, "parameters"), ("without tables", bare, "without_tables")):
    power = fit.law.beta / (fit.law.alpha + fit.law.beta)
    spread = np.sqrt(np.mean(fit.residuals**2))
    print(f"{count:15} alpha {fit.law.alpha:.2f}, beta {fit.law.beta:.2f}: best N grows with C^{power:.2f}; ", end="")
    print(f"runs lie {spread:.2%} from the law; it predicts {fit.predict(held[size], held['tokens'])[0]:.3f}")

# %% [markdown]
# **Checked:**

# %% tags=["nbval-check-output"]
n, d = law.law.optimum(np.array(budgets))
print(int((np.diff(n) <= 0).sum()), "times the best model is smaller for a larger budget")
worse = [law.law.loss(n * f, d / f) > law.law.loss(n, d) for f in (0.5, 2)]
print(int((~np.array(worse)).sum()), "times half or twice the best size is better")

# %%
widgets.run_table([resolve(output_dir) / name for name in runs])

# %% [markdown]
# ## What to try next
# - `held_back_epochs = 6` with another `output_dir`: how does repetition show in the gap, and in the prediction?
# - `learning_rate = 0.02`, the preset's, which is better for longer runs: which losses rise most? How does E change?
# - Another `seed` and `output_dir`: do the intervals of the two laws overlap?
# - On a GPU: `dims = "128 192 256 384 512"`, budgets a thousand times as large, and a library for `data_dir`.
#
# **[Back to 1 · From text to tokens](01_tokenize.ipynb)**
