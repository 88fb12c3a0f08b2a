# %% [markdown]
# # Inside a deep Transformer
#
# What does depth do to a Transformer before it has learned anything, and what does training make of
# ReZero's gates? Here you look at the singular values of whole stacks, at signals and gradients
# layer by layer, then train a small language model on the sources of Python's standard library, and
# look again.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/rezero_jax/blob/main/notebooks/inside_a_deep_transformer.ipynb)

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
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import rcParams

from rezero_jax import Alpha, Encoder, Transformer
from rezero_jax.analysis.diagnosis import diagnose
from rezero_jax.analysis.figures import (
    plot_diagnosis,
    plot_gates,
    plot_propagation,
    plot_spectra,
)
from rezero_jax.analysis.gates import Gates
from rezero_jax.analysis.propagation import propagate
from rezero_jax.analysis.singular_values import singular_values
from rezero_jax.data.text_files import stdlib_text

rcParams["figure.dpi"] = 80  # small pictures
print(f"jax {jax.__version__} on {jax.devices()[0].platform}")

# %% [markdown]
# ## Singular values at the start
#
# The Jacobian of a stack, $J = \partial x_L / \partial x_0$, says how a small change of its input
# arrives at its output. Its singular values are the factors by which directions are stretched;
# where they vanish, neither signal nor gradient passes. With 4 positions of width 16 J is
# 64 x 64, small enough to decompose exactly (paper, section 5 and Figure 4; sizes as in the
# authors' notebook).


# %%
def spectrum(residual, depth, alpha=0.0, nets=4):
    """The singular values of `nets` encoders at initialisation, each for one random input."""

    @jax.jit
    def make(key):
        rule = {"residual": residual, "alpha_init": alpha}
        return Encoder(16, depth, heads=4, feedforward=64, **rule, rngs=nnx.Rngs(key))

    keys = jax.random.split(jax.random.key(0), nets)
    return np.concatenate(
        [singular_values(make(key), jax.random.normal(key, (1, 4, 16))) for key in keys]
    )


plot_spectra({f"post-norm, {depth} layers": spectrum("post_norm", depth) for depth in (4, 12, 64)})

# %% [markdown]
# Post-norm, Norm(x + F(x)), is the original Transformer. Its values sink as layers are added: few
# directions of the input still reach the output. (Below about $10^{-7}$ of the largest is the
# rounding of float32. Some values are there at any depth: a norm takes out mean and length.)
#
# Pre-norm, x + F(Norm(x)), keeps them up but spreads them, and ReZero, x + alpha F(x), starts with
# every one at exactly 1:

# %%
at_start = spectrum("rezero", 64)
print(f"ReZero, 64 layers: smallest {at_start.min()}, largest {at_start.max()}")

# %% [markdown]
# That is a thin histogram, so the picture shows ReZero with its gates opened a little, to 0.1.

# %%
plot_spectra(
    {
        "post-norm, 64 layers": spectrum("post_norm", 64),
        "pre-norm, 64 layers": spectrum("pre_norm", 64),
        "ReZero with alpha = 0.1, 64 layers": spectrum("rezero", 64, alpha=0.1),
    }
)

# %% [markdown]
# ## Signals and gradients by depth
#
# `propagate` follows a batch through any model with a `Stack` and its loss back again. The batch is
# Python source as bytes.

# %% tags=["gallery"]
LENGTH = 64
text = jnp.asarray(stdlib_text("train"))
held_out = jnp.asarray(stdlib_text("validation"))


def windows(key, count, text=text):
    """`count` random pieces of LENGTH + 1 bytes, (count, LENGTH + 1), int32."""
    starts = jax.random.randint(key, (count, 1), 0, len(text) - LENGTH - 1)
    return text[starts + jnp.arange(LENGTH + 1)[None]].astype(jnp.int32)


def next_byte(model, batch):
    """The mean cross entropy (nats) of each example's next bytes, (count,)."""
    return model.losses(batch[:, :-1], batch[:, 1:]).mean(axis=1)


def language_model(residual, depth):
    """A byte-level Transformer of width 64."""
    norm = residual == "pre_norm"  # which ends in one, as usual
    sizes = {"width": 64, "depth": depth, "heads": 4, "max_len": LENGTH}
    options = {"residual": residual, "positions": "rotary", "final_norm": norm}
    return Transformer(256, **sizes, **options, rngs=nnx.Rngs(0))


batch = windows(jax.random.key(0), 8)
RULES = {"post_norm": "post-norm", "pre_norm": "pre-norm", "rezero": "ReZero"}
plot_propagation(
    {
        name: propagate(language_model(residual, depth=32), batch, next_byte)
        for residual, name in RULES.items()
    }
)

# %% [markdown]
# The lower left is the angle between two different examples: where it closes (cosine 1) the network
# forgets which input it had. ReZero passes everything on as it came, in both directions; its layers
# add nothing yet, so the lower right, on its log scale, has no line for it.
#
# ## Train a small one
#
# 12 ReZero layers, some hundred updates: no warm-up, no normalisation. Every gate is noted on the
# way.

# %%
STEPS, AT_ONCE = 400, 10
model = language_model("rezero", depth=12)
graph, params = nnx.split(model)
optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.cosine_decay_schedule(0.005, STEPS), b2=0.99),
)


def step(carry, number):
    """One update on a batch that is a function of its number alone."""
    params, state = carry
    batch = windows(jax.random.fold_in(jax.random.key(1), number), 16)
    loss, gradients = jax.value_and_grad(
        lambda params: next_byte(nnx.merge(graph, params), batch).mean()
    )(params)
    updates, state = optimizer.update(gradients, state)
    return (optax.apply_updates(params, updates), state), loss


@jax.jit
def evaluate(params):
    """Bits per byte of text that is not trained on."""
    batch = windows(jax.random.key(2), 64, held_out)
    return next_byte(nnx.merge(graph, params), batch).mean() / jnp.log(2)


advance = jax.jit(lambda carry, numbers: jax.lax.scan(step, carry, numbers))
carry, alphas = (params, optimizer.init(params)), []
started = time.perf_counter()
for first in range(0, STEPS, AT_ONCE):
    carry, losses = advance(carry, jnp.arange(first, first + AT_ONCE))
    alphas.append(np.concatenate(jax.tree.leaves(nnx.filter_state(carry[0], Alpha))))
    if (done := first + AT_ONCE) % 100 == 0:
        print(f"step {done}: {evaluate(carry[0]):.3f} bits per byte")
nnx.update(model, carry[0])
print(f"{time.perf_counter() - started:.0f} s")

# %% [markdown]
# ## The gates, layer by layer

# %%
gates = Gates(np.arange(AT_ONCE, STEPS + 1, AT_ONCE), np.array(alphas))
print("alpha of each layer:", np.round(gates.alphas[-1], 2))
print(f"mean |alpha| {gates.mean_abs[-1]:.3f}, 1 / layers {1 / 12:.3f}")
plot_gates(gates)

# %% [markdown]
# ## Diagnose it
#
# One page on the trained network; of a run folder `python -m rezero_jax.analysis` prints the same.

# %%
diagnosis = diagnose(model, batch, next_byte)
print(diagnosis)

# %% tags=["gallery"]
plot_diagnosis(diagnosis)

# %% [markdown]
# Runs of `train.py` keep all of this: see the notebook `from_a_config_to_a_result`.
#
# ## Let it write
#
# Byte by byte; after so little training, the look of Python rather than Python.

# %%
prompts = ["def main(", "class ", "import "]
written = model.generate(
    [list(prompt.encode()) for prompt in prompts], 50, temperature=0.6, rngs=nnx.Rngs(0)
)
for prompt, tokens in zip(prompts, written, strict=True):
    print(prompt + bytes(tokens.tolist()).decode(errors="replace"), end="\n----\n")

# %% [markdown]
# ## Change something
#
# Replace `"rezero"` by `"pre_norm"` or `"post_norm"` where the language model is made, train again,
# and compare the diagnosis: which signals grow, which layers idle?
