# %% [markdown]
# # From a config to a result
#
# `train.py` turns a config into a run folder, and that folder is the whole record of the run: what
# was run, every number on the way, checkpoints. Here you launch a run, interrupt it and let it go
# on, read its folder, and compare two runs in a plot and a table.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/rezero_jax/blob/main/notebooks/from_a_config_to_a_result.ipynb)

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
# %matplotlib inline
import json
import signal
import tempfile
import time
from pathlib import Path

from IPython.display import Markdown

import rezero_jax
from rezero_jax.analysis.plots import plot_comparison, plot_run
from rezero_jax.analysis.table import table
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.runs.reader import Run

PROJECT = Path(rezero_jax.__file__).parents[1]
assert (PROJECT / "train.py").exists(), "open this notebook in a clone of the project"
RUNS = Path(
    tempfile.mkdtemp()
)  # gone with the machine; your own runs belong in a folder that stays

# %% [markdown]
# ## A config
#
# A config is a Python file of `configs/`. Its arguments follow the colon, and
# any other field can be set as well.

# %%
config = load_config(
    f"{PROJECT}/configs/mlp.py:residual=rezero,depth=32", ["optim.learning_rate=0.02"]
)
print(config.model)
print(config.optim.name, config.optim.learning_rate)

# %% [markdown]
# A mistake is one sentence that says what to do:

# %%
try:
    load_config(f"{PROJECT}/configs/mlp.py", ["optim.learning_rat=0.02"])
except UserError as error:
    print(error)

# %% [markdown]
# ## Launch, and interrupt
#
# In a terminal this is
#
#     python train.py --config=configs/mlp.py:residual=rezero,depth=32 --workdir=runs/rezero
#
# and Ctrl-C. Here the notebook starts the same command and sends it the same signal on the way.
# (It is a process of its own, and the notebook itself leaves the accelerator alone: a TPU
# serves one process at a time.)


# %%
def launch(name, residual="rezero"):
    """Starts `python train.py` in the run folder `name`."""
    command = [
        sys.executable,
        "train.py",
        f"--config=configs/mlp.py:residual={residual},depth=32",
        "--config.eval.every_epochs=5",
        f"--workdir={RUNS / name}",
    ]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=PROJECT, **pipe)


def finish(process):
    """Waits for the process to end, and shows what it said, with short paths."""
    said, _ = process.communicate()
    print(said.replace(str(RUNS), "runs"))
    print("exit status", process.returncode)


process = launch("rezero")
metrics = RUNS / "rezero" / "metrics.jsonl"
while process.poll() is None:
    if metrics.exists() and metrics.read_text().count("\n") > 50:  # a line each 5 steps
        process.send_signal(signal.SIGINT)
        break
    time.sleep(0.02)
finish(process)

# %% [markdown]
# ## Resume
#
# The same command resumes from the newest checkpoint. The batch of step t is a function of
# the seed and t, so nothing is seen twice or left out.

# %%
finish(launch("rezero"))

# %% [markdown]
# Does it end where it would have ended anyway? A run that nobody disturbs:

# %%
finish(launch("undisturbed"))


# %%
def losses(name):
    """Step -> training loss, of every line of metrics.jsonl that has one."""
    lines = map(json.loads, (RUNS / name / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


interrupted, undisturbed = losses("rezero"), losses("undisturbed")
common = sorted(interrupted.keys() & undisturbed.keys())
largest = max(abs(interrupted[step] - undisturbed[step]) for step in common)
print(f"{len(common)} logged losses, largest difference {largest}")

# %% [markdown]
# ## The run folder

# %%
for path in sorted((RUNS / "rezero").iterdir()):
    print(path.name + "/" * path.is_dir())

# %% [markdown]
# `metrics.jsonl` has a line for each logged step; the last one, without its 32 alphas:

# %%
line = json.loads(metrics.read_text().splitlines()[-1])
for key, value in line.items():
    if not key.startswith("alpha/"):
        print(f"{key:<22}{value:.6g}")

# %% [markdown]
# `final.json` is the result in short:

# %%
print((RUNS / "rezero" / "final.json").read_text())

# %% [markdown]
# ## Plot it
#
# `train.py` has drawn this in `curves.png`, and `python -m rezero_jax.analysis.plots runs/rezero`
# draws it again.

# %%
plot_run(Run.read(RUNS / "rezero"))

# %% [markdown]
# ## Compare two runs
#
# The baseline has no trunk to pass on, but normalises every layer: x' = Norm(F(x)). Two runs of a
# fair comparison differ in one field.

# %%
finish(launch("norm", residual="norm"))

# %% tags=["gallery"]
runs = [Run.read(RUNS / name) for name in ("rezero", "norm")]
plot_comparison(runs)

# %% [markdown]
# The mean training loss after some epochs and the epochs until a loss is reached, then the test
# accuracy, in percent. In a terminal:
#
#     python -m rezero_jax.analysis.table runs/rezero runs/norm --epochs 1 5 20 --targets 0.5 0.1

# %%
Markdown(table(runs, after=[1, 5, 20], targets=[0.5, 0.1]))

# %%
Markdown(table(runs, after=[5, 10, 20], targets=[0.9], metric="accuracy"))

# %% [markdown]
# One seed each is an anecdote: start both with `--config.seed=1`, `2`, ... in folders of their own
# and give all of them to the same functions, which average the seeds and show their range.
#
# ## Change something
#
# - Set `optim.learning_rate` or `model.depth` in the commands above, in a new folder, and compare.
# - The other configs: `resnet.py`, `transformer_small.py` and their neighbours in `configs/`.
# - `python -m rezero_jax.analysis runs/rezero` diagnoses the trained network on one page; the
#   notebook `inside_a_deep_transformer` explains what is on it.
