"""The control of deep nets: with every alpha frozen at 0 their depth makes no difference."""

import numpy as np
import pytest

from experiments.jobs import FROZEN
from rezero_jax.config import load_config
from rezero_jax.training.trainer import Trainer


def losses(depth, overrides=()):
    fields = (f"model.depth={depth}", "mesh.data=1", "train.epochs=None", "train.steps=4")
    config = load_config("configs/mlp.py:smoke", (*fields, *overrides))
    trainer = Trainer.from_config(config)
    state, batches = trainer.init(), trainer.batches(0)
    found = []
    for _ in range(4):
        state, metrics = trainer.dispatch(state, [next(batches)])
        found.append(metrics["loss"][0])  # of the one update in the dispatch
    return np.array(found)


@pytest.mark.slow
def test_a_held_net_is_the_same_at_any_depth():
    """So the control of 10,000 layers may have one: same start, same batches, same losses."""
    held = losses(1, FROZEN)
    np.testing.assert_array_equal(losses(3, FROZEN), held)
    assert (losses(3)[2:] != held[2:]).all()
    assert held[-1] < held[0]
