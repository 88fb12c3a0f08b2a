"""The four families in their smallest form, and helpers that tests of every area share.

`FAMILIES[name]` makes a tiny model, an input for it and the config of a tiny run. The fixture
`trained` of conftest.py gives the folder of such a run, which is trained once for all tests.
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from rezero_jax import MLP, Alpha, ResNet, Stack, Transformer, ViT
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.training import loop
from rezero_jax.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
STEPS = 8  # of a tiny run, which saves after each second step
TINY = {
    "train.epochs": None,
    "train.steps": STEPS,
    "train.batch_size": 16,
    "train.steps_per_dispatch": 3,  # divides neither the steps nor the intervals
    "eval.every_epochs": None,
    "eval.every_steps": 4,
    "eval.batch_size": 64,
    "eval.examples": 128,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": STEPS // 2,
    "log.every_steps": 1,
    "mesh.data": 1,
}
# Rounding may flip the sign of a gradient, and with it a first step of Adam or Adagrad: runs whose
# sums differ in order are compared under SGD.
SGD = {
    "optim.name": "sgd",
    "optim.schedule": "constant",
    "optim.learning_rate": 0.05,
}
# XLA's own defaults, which conftest.py replaces so that tests compile quickly.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True


@dataclasses.dataclass(frozen=True)
class Family:
    """How to make a family's tiny model, input and config.

    Attributes:
      config: the file in configs/ and its argument.
      make: the model, given `rngs` and options that replace the ones used here.
      example: a batch for the model, given its size.
      fields: overrides of the tiny run's config.
    """

    config: str
    make: Callable[..., nnx.Module]
    example: Callable[[int], Array]
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)

    def load_config(self, **fields: Any) -> ConfigDict:
        """The config of a tiny run; `fields` override it."""
        return config(self.config, **(TINY | self.fields | fields))

    def trainer(self, **fields: Any) -> Trainer:
        """The trainer of this config on its data set."""
        return Trainer(self.load_config(**fields))


def _mlp(residual: str = "rezero", depth: int = 5, *, rngs: nnx.Rngs, **options: Any) -> MLP:
    return MLP(12, 6, depth, 4, residual, rngs=rngs, **options)


def _resnet(residual: str = "rezero", depth: int = 14, *, rngs: nnx.Rngs, **options: Any) -> ResNet:
    return ResNet.cifar(depth, residual, 4, rngs=rngs, **({"width": 4, "in_channels": 2} | options))


def _transformer(
    residual: str = "rezero", depth: int = 3, *, rngs: nnx.Rngs, **options: Any
) -> Transformer:
    return Transformer(11, 8, depth, 2, 6, residual, rngs=rngs, **options)


def _vit(residual: str = "rezero", depth: int = 3, *, rngs: nnx.Rngs, **options: Any) -> ViT:
    return ViT(8, 4, 8, depth, 2, 4, residual, rngs=rngs, **({"in_channels": 2} | options))


def normal(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(shape: tuple[int, ...], vocab_size: int = 11, seed: int = 0) -> Array:
    """Uniform tokens."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab_size, shape), jnp.int32)


FAMILIES = {
    "mlp": Family("mlp.py:smoke", _mlp, lambda size: normal((size, 12))),
    "resnet": Family("resnet.py:smoke", _resnet, lambda size: normal((size, 8, 8, 2))),
    "transformer": Family(
        "transformer_small.py:smoke",
        _transformer,
        lambda size: tokens((size, 6)),
        {"model.scan": True, "model.dropout": 0.1, "train.accumulate": 2},
    ),
    "vit": Family("vit.py:smoke", _vit, lambda size: normal((size, 8, 8, 2))),
}


# Instead of updating the parameters, keeps the gradients as its state, exactly.
REMEMBER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)


# ---- Configs and trees


def config(file: str, **fields: Any) -> ConfigDict:
    """A config of configs/, such as "mlp.py:smoke", with these fields overridden."""
    return load_config(f"{ROOT / 'configs' / file}", [f"{k}={v}" for k, v in fields.items()])


def flat(tree: Any) -> dict[str, np.ndarray]:
    """{"a/b/c": array} of a tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def assert_trees_close(ours: Any, theirs: Any, rtol: float, atol: float = 0.0) -> None:
    """Compares two trees leaf by leaf; their paths are the same."""
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        np.testing.assert_allclose(ours[path], expected, rtol=rtol, atol=atol, err_msg=path)


def drawn(make: Callable[..., Any], seed: int = 0, alpha: float | None = None) -> Any:
    """A module whose parameters NumPy draws and whose other arrays are 1: nothing to compile.

    Parameters are uniform in -0.4 .. 0.4; every gate is `alpha` if that is given.
    """
    module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    generator = np.random.default_rng(seed)
    for _, leaf in nnx.to_flat_state(nnx.state(module)):
        values = generator.uniform(-0.4, 0.4, leaf.shape) if isinstance(leaf, nnx.Param) else 1.0
        if alpha is not None and isinstance(leaf, Alpha):
            values = alpha
        leaf.set_value(jnp.broadcast_to(jnp.asarray(values, leaf.dtype), leaf.shape))
    return module


@functools.cache
def stored(name: str) -> dict[str, np.ndarray]:
    """The arrays that PyTorch computed once; tests/reference/make_NAME.py makes them."""
    with np.load(ROOT / "tests/reference" / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    if "layout" not in arrays:
        return arrays
    values = np.ascontiguousarray(arrays["values"].T).view("<f4").ravel()  # see make_resnet.py
    found, start = {}, 0
    for key, dtype, shape in json.loads(arrays["layout"].item()):
        end = start + math.prod(shape)
        found[key] = values[start:end].reshape(shape).astype(dtype)
        start = end
    return found


def unrolled(stack: Stack) -> Stack:
    """A copy of a stack whose blocks are a list."""
    twin = nnx.clone(stack)
    twin.blocks = nnx.List(twin.layers())
    return twin


def under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names begin with `prefix`, under the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


# ---- Training in this process


def train(trainer: Trainer, steps: int | None = None, state: Any = None) -> tuple[np.ndarray, Any]:
    """The losses of the first `steps` updates (default: all of them) and the state after them.

    The training starts at `state`, whose memory it uses, by default the initial one.
    """
    state, batches, losses = state or trainer.init(), trainer.batches(0), []
    batches = islice(batches, steps)
    while group := list(islice(batches, trainer.config.train.steps_per_dispatch)):
        state, report = trainer.dispatch(state, group)
        losses.extend(np.asarray(report["loss"])[: len(group)].tolist())
    return np.asarray(losses), state


def train_once(name: str, parent: Path) -> Path:
    """The folder of the tiny run of a family, trained by the first process that asks for it."""
    folder = parent / f"trained_{name}"
    with lock(parent / f"trained_{name}.lock"):
        if not (folder / "final.json").exists():
            loop.train(FAMILIES[name].load_config(), folder)
    return folder


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Waits until no other process of this machine holds the lock."""
    with path.open("w") as file:
        flock(file, LOCK_EX)
        yield


# ---- The command as a process


def command(file: str, workdir: Any, *flags: str, **fields: Any) -> list[str]:
    """The command that trains a config of configs/ with these fields overridden."""
    overrides = [f"--config.{key}={value}" for key, value in fields.items()]
    spec = f"--config={ROOT / 'configs' / file}"
    return [
        sys.executable,
        str(ROOT / "train.py"),
        spec,
        f"--workdir={workdir}",
        *overrides,
        *flags,
    ]


def run(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """The result of a process, whatever its status."""
    return subprocess.run(
        [str(word) for word in argv], capture_output=True, text=True, check=False, **options
    )


def stop(
    argv: list[str], workdir: Path, signum: int, after: int
) -> subprocess.CompletedProcess[str]:
    """The result of a process that is sent a signal once it has recorded step `after`."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and any(line["step"] >= after for line in read_metrics(workdir)):
            process.send_signal(signum)
            break
        time.sleep(0.002)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def refused(work: Callable[[], Any], *words: str) -> None:
    """Checks that `work` raises a UserError, a single line that contains the words."""
    with pytest.raises(UserError) as error:
        work()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
