# %% [markdown]
# # Three rules, compared
#
# Is ReZero better than its rivals? That depends on the learning rate each of them is given: at one
# rate for all, the rule wins for which the rate was chosen. So `python -m experiments compare`
# tunes each rule on a grid of its own, and only then holds them against each other, with several
# seeds. Here it compares three rules in 32 layers on scikit-learn's handwritten digits; you then
# read its table and its two plots, and compute one number by hand.
#
# In Colab, first run `!git clone --depth=1 ADDRESS project`, `%cd project` and
# `!python notebooks/colab.py` with the address of the project's repository.

# %%
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from IPython.display import Image, Markdown

import rezero_jax
from rezero_jax.analysis.statistics import Estimate

PROJECT = Path(rezero_jax.__file__).parents[1]
assert (PROJECT / "experiments").exists(), "open this notebook in a clone of the project"
FOLDER = Path(tempfile.mkdtemp())  # gone with the machine; your own runs belong elsewhere

# %% [markdown]
# ## One command
#
# The first rule is the control. For every rule the grid begins with three rates around the config's
# own, each half of the next, and grows while the best one lies at its edge. Rates are tuned on a
# seed of their own, 100; what is reported are seeds 0, 1 and 2, which see the same batches under
# every rule. `--dry-run` would list the runs and their time first.

# %%
command = [
    "compare",
    "--config=configs/mlp.py:epochs=3",
    "--rules=rezero,pre_norm,plain",
    "--depths=32",
    "--seeds=3",
    "--jobs=2",
    "--out=three_rules",
]
subprocess.run(
    [sys.executable, "-m", "experiments", *command],
    cwd=FOLDER,
    env=os.environ | {"PYTHONPATH": str(PROJECT)},
    check=True,
    capture_output=True,
)
OUT = FOLDER / "three_rules"
print("runs:", sum(path.is_dir() for path in (OUT / "runs").iterdir()))

# %% [markdown]
# ## The table
#
# The final test loss is a mean over three seeds, with its 95 % interval. What decides is the column
# after it: pairs of runs with the same seed saw the same batches, so their difference varies less
# than either of them. A verdict asks that the interval of the difference leave out 0, widened for
# the number of differences in the table. FLOPs and time are those of an update, over the control's;
# in runs as short as these, times are mostly noise.

# %%
report = (OUT / "report.md").read_text()
Markdown("\n".join(line for line in report.splitlines() if line.startswith(("|", "##"))))

# %% [markdown]
# ## Where each rule trains
#
# The loss at every rate that was tried, on the tuning seed. Read two things off each curve: how low
# it goes, and how wide its valley is. A wide valley forgives a rate that was not tuned; where a
# rule has a narrow one, a comparison at any single rate tells more about the rate than about the
# rule. The lowest point must have a worse neighbour on both sides, or the rule was not tuned: it
# would be marked with * in the table. A cross on top is a run that diverged.

# %%
Image(OUT / "rates.png", width=560)

# %% [markdown]
# ## How they get there
#
# The training loss at each rule's best rate (in the legend): the mean over the seeds, and a band of
# one deviation. Where bands overlap all along, no claim about speed can stand on three seeds.
# Guessing costs ln 10 = 2.3 nats. ReZero starts near it, since its blocks are the identity at
# first; pre-norm starts far above, since 32 branches add up before the head; and the plain net
# hardly leaves it.

# %%
Image(OUT / "curves.png", width=560)

# %% [markdown]
# ## By hand
#
# `comparison.json` holds every number. The difference between plain and ReZero, seed by seed:

# %%
records = json.loads((OUT / "comparison.json").read_text())["records"]
losses = {}
for rule, _, _, metric, seed, value, _ in records:
    if metric == "test loss" and seed < 100:  # seeds from 100 on tuned the rates
        losses.setdefault(rule, []).append(value)
losses = {rule: np.array(values, float) for rule, values in losses.items()}
for rule in ("pre_norm", "plain"):
    differences = losses[rule] - losses["rezero"]
    low, high = Estimate.of(differences).interval()
    print(f"{rule} less rezero: {differences.mean():.3f}, 95 % interval {low:.3f} to {high:.3f}")
print("plain loses in every seed:", bool(np.all(losses["plain"] > losses["rezero"])))

# %% [markdown]
# ## What this shows, and what not
#
# It shows one depth, one small data set and three epochs: who learns fastest here, not who is
# better in the end. More depths (`--depths=8,32,128`), longer runs, more seeds and your own config
# take the same command; [the schemes](../docs/schemes.md) are all that `--rules` may name.
