# %% [markdown]
# # ReZero in ten minutes
#
# A deep network is a chain of layers. If every layer shrinks or stretches its signal a little, a
# hundred of them destroy it, and the gradient with it. ReZero
# ([Bachlechner et al., 2021](https://arxiv.org/abs/2003.04887)) puts one learned number in front of
# each residual branch and starts it at zero:
#
# $$x' = x + \alpha F(x), \qquad \alpha = 0 \text{ at the start}$$
#
# So the network begins as the identity at any depth, and learns how much of each layer it wants.
# Here you wrap a module of your own, see which parameters learn first, compare three ways to join a
# branch to its trunk, and train 1,000 layers.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/rezero_jax/blob/main/notebooks/rezero_in_ten_minutes.ipynb)

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
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from rezero_jax import Alpha, ReZero, Stack
from rezero_jax.analysis.figures import plot_gates
from rezero_jax.analysis.gates import Gates
from rezero_jax.analysis.theme import line_styles, plot_line, themed

print(f"jax {jax.__version__} on {jax.devices()[0].platform}")

# %% [markdown]
# ## Wrap your own module
#
# Any module or function whose output has the shape of its first argument will do.


# %%
class Branch(nnx.Module):
    """Two linear layers with a GELU between them, width -> width."""

    def __init__(self, width, *, rngs):
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


block = ReZero(Branch(8, rngs=nnx.Rngs(0)))
x = jax.random.normal(jax.random.key(1), (4, 8))

print("alpha:", block.alpha[...])
print("the branch's output is not zero:", jnp.abs(block.f(x)).max())
print("the block is the identity, bit for bit:", (block(x) == x).all())

# %% [markdown]
# ## The gates learn first
#
# With $\alpha = 0$ nothing that happens inside of $F$ reaches the output, so the parameters of $F$
# have a gradient of exactly zero. The gate has one: how well the branch, as it is, points to where
# the loss wants the output,
#
# $$\frac{\partial L}{\partial \alpha} =
# \left\langle \frac{\partial L}{\partial x'}, F(x) \right\rangle .$$
#
# The first update opens the gate, and from the second on the branch learns too. (For the same
# reason do not start the last layer of $F$ at zero as well: then nothing would ever move.)

# %%
target = jax.random.normal(jax.random.key(2), (4, 8))


def distance(block):
    """Half the squared distance to the target, whose gradient is block(x) - target."""
    return ((block(x) - target) ** 2).sum() / 2


print("<dL/dx', F(x)> =", ((x - target) * block.f(x)).sum())

optimizer = nnx.Optimizer(block, optax.sgd(0.01), wrt=nnx.Param)
for update in range(3):
    gradient = nnx.grad(distance)(block)
    inside = optax.global_norm(gradient["f"])
    print(f"update {update + 1}: dL/dalpha = {gradient['alpha'][...]:.6f}, |dL/dF| = {inside:.6f}")
    optimizer.update(block, gradient)

# %% [markdown]
# ## A deep network of your blocks
#
# `Stack` holds equal blocks with their parameters stacked on a leading axis and runs them in one
# scan, so that the time to compile does not depend on the depth. The data are scikit-learn's
# handwritten digits, 8 x 8 pixels.

# %%
pixels, labels = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = map(
    jnp.asarray,
    train_test_split((pixels / 8 - 1).astype(np.float32), labels, test_size=357, random_state=0),
)
BATCH = 48  # of 1,440 digits


class Net(nnx.Module):
    """A linear stem, `depth` blocks `join(Branch)`, a linear head."""

    def __init__(self, join, depth, width, *, rngs):
        self.stem = nnx.Linear(64, width, rngs=rngs)
        self.trunk = Stack(lambda rngs: join(Branch(width, rngs=rngs)), depth, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.trunk(self.stem(x)))


def train(model, epochs, learning_rate=0.01):
    """Trains with Adagrad; returns the loss of each epoch and every alpha at its end."""
    graph, params = nnx.split(model)
    optimizer = optax.adagrad(learning_rate)

    def loss(params, rows):
        logits = nnx.merge(graph, params)(train_x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, train_y[rows]).mean()

    def step(carry, rows):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params, rows)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), value

    run_epoch = jax.jit(lambda carry, order: jax.lax.scan(step, carry, order))
    carry, losses, alphas = (params, optimizer.init(params)), [], []
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(train_x)).reshape(-1, BATCH)
        carry, values = run_epoch(carry, order)
        losses.append(float(values.mean()))
        alphas.append(np.concatenate(jax.tree.leaves(nnx.filter_state(carry[0], Alpha)) or [[]]))
    nnx.update(model, carry[0])
    return np.array(losses), np.array(alphas)


def accuracy(model):
    """The fraction of the test digits that the model gets right."""
    return float((model(test_x).argmax(axis=1) == test_y).mean())


# %% [markdown]
# ## Plain, residual, ReZero
#
# The same branch, 64 times, joined in three ways. Plain layers pass on only $F(x)$; residual ones
# pass on $x + F(x)$, whose signal grows from layer to layer; ReZero starts as the identity. All
# else is equal: weights, data, order, learning rate.


# %%
class Residual(nnx.Module):
    """x' = x + F(x)."""

    def __init__(self, f):
        self.f = f

    def __call__(self, x):
        return x + self.f(x)


JOINS = {"plain": lambda f: f, "residual": Residual, "ReZero": ReZero}
curves = {}
for name, join in JOINS.items():
    model = Net(join, depth=64, width=32, rngs=nnx.Rngs(0))
    trunk_input = model.stem(test_x)
    growth = jnp.linalg.norm(model.trunk(trunk_input)) / jnp.linalg.norm(trunk_input)
    curves[name], alphas = train(model, epochs=20)
    print(
        f"{name:<9}signal x {growth:.2g} through 64 layers at the start, loss "
        f"{curves[name][0]:.4g} -> {curves[name][-1]:.4g}, test accuracy {accuracy(model):.1%}"
    )


# %% tags=["gallery"]
@themed
def plot_losses(curves):
    """Training loss by epoch on a log axis."""
    figure = Figure(figsize=(5.5, 3.2))
    axis = figure.subplots()
    for style, (name, losses) in zip(line_styles(len(curves)), curves.items(), strict=True):
        plot_line(axis, np.arange(1, len(losses) + 1), losses, **style, label=name)
    axis.set(xlabel="epoch", ylabel="training loss (nats)", yscale="log", xticks=range(0, 21, 5))
    axis.legend()
    return figure


plot_losses(curves)

# %% [markdown]
# A residual net can be saved by smaller initial weights, by normalisation or by warm-up; the paper
# gives its own residual nets smaller weights, and so does `rezero_jax.MLP`. ReZero needs none of
# them. Its gates open with either sign. In the paper's language models their mean size ends near
# 1 / layers, the dashed line; these open further.

# %% tags=["gallery"]
steps_per_epoch = len(train_x) // BATCH
steps = steps_per_epoch * np.arange(1, len(alphas) + 1)
plot_gates(Gates(steps, alphas))

# %% [markdown]
# ## 1,000 layers
#
# Nothing changes but the number, here with a width of 16.

# %%
started = time.perf_counter()
deep = Net(ReZero, depth=1000, width=16, rngs=nnx.Rngs(0))
print("1,000 layers are the identity:", (deep.trunk(x16 := deep.stem(test_x)) == x16).all())
losses, _ = train(deep, epochs=8)
print("loss of each epoch:", np.round(losses, 3))
print(f"test accuracy {accuracy(deep):.1%} after {time.perf_counter() - started:.0f} s")

# %% [markdown]
# ## Change something
#
# - Replace `ReZero` by a rule of your own in `Net`, such as x + tanh(alpha) F(x), and compare.
# - In your own model: wrap each residual branch, `ReZero(branch)`, leave out its normalisation, and
#   keep weight decay away from the gates (their type is `rezero_jax.Alpha`).
# - `rezero_jax.MLP`, `ResNet` and `Transformer` are the paper's networks, made in one line.
# - The notebook `from_a_config_to_a_result` trains them by a config, with a record and checkpoints.
# - The notebook `inside_a_deep_transformer` measures what depth does to a network.
