# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6 · A scaling law of one's own
#
# *Can small runs say how good a larger one will be?* This notebook trains a family of small models by running
# notebook 4 again and again, fits a law to their losses, and lets the law predict a model larger than any it has seen.
# Then it trains that one too, and looks.
#
# | in | out | time |
# | --- | --- | --- |
# | corpus and tokenizer of notebook 1 | runs in `output_dir`, a tested law | 10 to 20 minutes on two CPU cores |
#
# It may be stopped at any time: a rerun takes the finished runs as they are, and goes on with the others.
#
# Before: [5 · Writing](05_generate.ipynb) · First: [1 · From text to tokens](01_tokenize.ipynb)
#
# All notebooks: [1](01_tokenize.ipynb) [2](02_dataset.ipynb) [3](03_toyreverse.ipynb) [4](04_scifi_train.ipynb)
# [5](05_generate.ipynb) **6**

# %% tags=["parameters"]
preset: str = "scifi-mini"  # what all runs have in common but the size
data_dir: str = "data/sanguo"  # folder of .txt files
tokenizer_model_file: str = "outputs/tokenizer.model"  # from notebook 1
dataset_dir: str = "outputs/dataset"  # token files, from notebook 2 or made here
val_fraction: float = None  # share of the documents held out; None: as in the data set there is, else 0.05
errors: str = None  # at a file that is not UTF-8: strict stops, skip leaves it out; None: as before, else strict
output_dir: str = "outputs/scaling"  # the runs go here
dims: str = "12 16 24 32 48 64 96 128"  # widths of the models
budgets: str = "2.5e11 8e11 2.5e12"  # FLOPs that a run may cost
held_back_dim: int = 160  # width of the model to predict
held_back_epochs: float = 4.0  # times that it reads the corpus, and no other run reads it more often
context_size: int = None  # tokens in a window; None: the preset's
batch_size: int = 4  # windows per step
learning_rate: float = 0.05  # AdamW's peak, for all sizes; runs as short as these want a high one
min_steps: int = 100  # runs with fewer steps are left out
workers: int = 2  # runs at a time
device: str = "auto"  # auto, cpu, cuda, mps
seed: int = 0  # of the runs and of the resampling

# %%
from llmcore.notebook.parameters import check_parameters

names = "preset data_dir tokenizer_model_file dataset_dir val_fraction errors output_dir dims budgets held_back_dim"
names += " held_back_epochs context_size batch_size learning_rate min_steps"
check_parameters(globals(), names + " workers device seed")

# %%
import numpy as np

from llmcore import config
from llmcore.corpus.prepare import prepare_dataset
from llmcore.corpus.sources import open_corpus
from llmcore.dataset import TokenDataset
from llmcore.device import pick_device
from llmcore.files import resolve
from llmcore.measure.scaling import MIN_RUNS, fit_scaling
from llmcore.measure.sweep import isoflop_grid, planned_run, run_outcome, run_sweep, scaled_to_width
from llmcore.notebook import plots, widgets
from llmcore.runs import free_run_dir
from llmcore.tokenizer import Tokenizer

device = str(pick_device(device))
_ = free_run_dir(output_dir, "a-run")  # a folder that cannot be written is refused now

# %% [markdown]
# ## What to train
# Compute can be spent on a larger model or on more text. So each budget is spent in several ways: the same FLOPs on
# models of different sizes, the smaller ones reading more (Hoffmann et al., "Chinchilla",
# [arXiv:2203.15556](https://arxiv.org/abs/2203.15556)). Each is a run of its own with a learning rate that falls to
# zero at its end: half-way through a longer run a model is worse than one that was meant to stop there.
#
# One novel is a small world: what is left of the budget would be spent on reading it once more. Up to four times that
# is nearly as good as new text (Muennighoff et al., [arXiv:2305.16264](https://arxiv.org/abs/2305.16264)), so no run
# may read it more often.

# %%
tok = Tokenizer(tokenizer_model_file)
base, _ = config.preset(preset)
base = base.replace(vocab_size=tok.vocab_size, max_seq_len=context_size or base.max_seq_len)
prepare_dataset(open_corpus(data_dir), tok, dataset_dir, val_fraction, errors=errors)
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
# **What counts as N?** All weights, as in Hoffmann's paper, and each once: input and output share one table here.
# Kaplan et al. ([arXiv:2001.08361](https://arxiv.org/abs/2001.08361)) leave the tables out. In a large model that
# hardly matters. In these it is nearly everything:

# %%
for model in (*models, large):
    print(f"dim {model.dim:4}: N = {model.n_params():9,}, without tables {model.n_params(embeddings=False):9,}")

# %% [markdown]
# The output table multiplies for every token that is read: it is part of what a run costs, so it is part of N. At the
# end both counts are fitted.
#
# ## The runs
# The held-back run comes first, since it takes longest; its result is not looked at before the law is fitted.

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
# Along a curve every model has cost the same. On its left, models too small for so much text; on its right, models too
# large to have read enough.

# %%
curves = {b: (N[near], L[near]) for b in budgets if (near := abs(C / b - 1) < 0.02).any()}
best = {b: n for b, (parameters, losses) in curves.items() if (n := isoflop_minimum(parameters, losses))}
words = ", ".join(f"{n / 1e3:,.0f}k" for n in best.values())
grows = len(best) > 1 and list(best.values()) == sorted(best.values())
title = f"{'With more compute the best size grows' if grows else 'Best size'}: {words} parameters"
plots.isoflop_curves(curves, title if best else "The best size is not among those tried")

# %% [markdown]
# ## The law
# $L(N, D) = E + A / N^\alpha + B / D^\beta$, fitted to the log of the loss so that no single run weighs too much
# (Huber's loss). What the runs leave open shows when they are drawn again with replacement, a thousand times.

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
# ## The prediction, and what came of it
# The band should hold nine in ten such runs, if the law is right out there. Two things make it wide: another draw of
# runs gives another law, and a single run lies beside its law.

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
# Where could such a law go wrong? It was made for text that is always new. A model that reads the same novel again can
# learn it by heart: its loss on what it trains on then falls faster than on the held-out chapters. That gap is measured
# too.

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
without = measured - (gap - usual)  # had it learned no more by heart than the others
if where == "inside":
    print("The outcome is where the law said.")
elif where == "above":
    print(f"The outcome is {miss:.3f} nats per token above the band. With the usual gap it would be at {without:.3f}:")
    print("repetition explains it." if without <= high else "repetition alone does not explain it.")
else:
    print(
        f"The outcome is {miss:.3f} nats per token below the band. Repetition is no reason: it can only raise the loss."
    )
    print(f"The run lies {times:.0f} times beyond the runs' compute, where a law fitted to so few hardly knows its E;")
    print(
        f"the other count of N {'holds' if other_low <= measured <= other_high else 'misses'} the outcome in its band."
    )

# %% [markdown]
# ## What to do with a law
# For any budget it names the size and the text that would make most of it. That is how Chinchilla came by its rule of
# about 20 tokens for a parameter. Our small world has its own:

# %%
for flops in (*budgets, outcome["flops"]):
    n, d = law.law.optimum(flops)
    share = np.quantile(law.resampled.optimum(flops)[0], (0.05, 0.95))
    print(
        f"{flops:.1e} FLOPs: {n / 1e3:6,.0f}k parameters (90%: {share[0] / 1e3:,.0f}k to {share[1] / 1e3:,.0f}k), ",
        end="",
    )
    print(f"{d / 1e3:6,.0f}k tokens, {d / n:.1f} for a parameter, {d / epoch:.1f} epochs")

# %% tags=["nbval-check-output"]
n, d = law.law.optimum(np.array(budgets))
print("the larger the budget, the larger the best model:", bool((np.diff(n) > 0).all()))
worse = [(law.law.loss(n * f, d / f) > law.law.loss(n, d)).all() for f in (0.5, 2)]
print("half or twice its size would be worse:", all(worse))

# %% [markdown]
# And what if the tables do not count? Then the same runs seem to say something else about how the best size grows with
# compute. Counting so, at sizes where the tables are most of the model, is much of why Kaplan and Hoffmann came to
# different advice (Pearce and Song, [arXiv:2406.12907](https://arxiv.org/abs/2406.12907)).

# %%
for words, each in (("all weights", law), ("without tables", bare)):
    power = each.law.beta / (each.law.alpha + each.law.beta)
    spread = np.sqrt(np.mean(each.residuals**2))
    print(f"{words:15} alpha {each.law.alpha:.2f}, beta {each.law.beta:.2f}: best N grows with C^{power:.2f}; ", end="")
    print(f"runs lie {spread:.2%} from the law")

# %%
widgets.run_table([resolve(output_dir) / name for name in runs])

# %% [markdown]
# ## What to try next
# - `held_back_epochs = 8` with another `output_dir`: how does repetition show in the gap, and in the prediction?
# - `learning_rate = 0.02`, the preset's, which suits a longer run: which losses rise most? What becomes of E?
# - Another `seed` and `output_dir`: do the intervals of the two laws overlap?
# - On a GPU: `dims = "128 192 256 384 512"`, budgets a thousand times as large, and a library for `data_dir`.
#
# **[Back to 1 · From text to tokens](01_tokenize.ipynb)**
