# %% [markdown]
# # Three rules, compared
#
# Is ReZero better than its baselines? The answer depends on the learning rate of each rule: with
# one rate for all, the rule that the rate was chosen for wins. So `python -m experiments compare`
# tunes each rule on a grid of its own, and compares the rules afterwards, with several seeds. Here
# it compares three rules in 32 layers on scikit-learn's handwritten digits. You then read its table
# and two of its plots, and compute one number by hand.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/rezero_jax/blob/main/notebooks/three_rules_compared.ipynb)

# %%
# Set-up: in a clone it does nothing; on Colab it clones the project and installs what is missing.
import os
import subprocess
import sys

REPOSITORY = "https://github.com/OWNER/rezero_jax"  # the project's address
if os.path.isfile("../notebooks/colab.py"):
    os.chdir("..")
elif not os.path.isfile("notebooks/colab.py"):
    if not os.path.isdir("project"):
        subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "project"], check=True)
    subprocess.run([sys.executable, "notebooks/colab.py"], cwd="project", check=True)
    os.chdir("project")
sys.path.insert(0, os.getcwd())

# %%
import json
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
# own, each half of the next, and grows while the best rate is at its edge. Rates are tuned on seed
# 100. The reported seeds are 0, 1 and 2, which see the same batches under every rule. `--dry-run`
# would list the runs and their time first.

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
# The first table has the difference of each rule's final test loss from the control's, with a 95 %
# interval. Runs with the same seed saw the same batches, so their difference varies less than
# either loss. The verdict is "not significant" if the interval, widened for the number of
# differences, contains 0. In runs as short as these, times are mostly noise.

# %%
report = (OUT / "report.md").read_text()
Markdown("\n".join(line for line in report.splitlines() if line.startswith(("|", "##"))))

# %% [markdown]
# ## Where each rule trains
#
# The loss at every rate that was tried, on the tuning seed. Look at two things in each panel: how
# low the curve goes, and how wide its valley is. Where a rule has a narrow valley, a comparison at
# a single rate says more about the rate than about the rule. The lowest point has a worse neighbour
# on both sides; otherwise the table would mark the rate with *. A cross is a run that diverged or
# ended above the panel.

# %% tags=["gallery"]
Image(OUT / "rates.png", width=560)

# %% [markdown]
# ## How they get there
#
# The training loss at each rule's best rate: the mean over the seeds, and a band of one standard
# deviation. Grey is the control, ReZero. Guessing costs ln 10 = 2.3 nats. Look at where each line
# starts and how fast it falls.

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
    print(f"{rule} minus rezero: {differences.mean():.3f}, 95 % interval {low:.3f} to {high:.3f}")
print("plain loses in every seed:", bool(np.all(losses["plain"] > losses["rezero"])))

# %% [markdown]
# ## What this shows, and what not
#
# It shows one depth, one small data set and three epochs: which rule learns fastest here, not which
# one is better in the end.
#
# ## Change something
#
# Use `--rules=rezero,rezero_norm,layerscale` or any other of the [residual
# rules](../docs/schemes.md), `--depths=8,32,128`, or more epochs, and run the cells again: the
# command keeps the runs that it already has.
