"""The order of examples: a pure function of (seed, step) that visits each example once an epoch."""

import re

import numpy as np
import pytest

from rezero_jax.config import load_config
from rezero_jax.data import Order, eval_batches
from rezero_jax.errors import UserError
from rezero_jax.training.trainer import Trainer
from tests.data import load

SIZES = [(12, 4), (12, 5), (10, 10), (7, 3), (1, 1), (1000, 999), (13, 1)]

# The first ten examples of an epoch, by method and (seed, size, epoch). A run resumes with another
# version of NumPy, or after years, only if these never change.
FIRST = {
    "hash": {
        (0, 10, 0): [0, 7, 8, 2, 5, 9, 4, 6, 3, 1],
        (0, 1000, 0): [557, 424, 325, 817, 208, 477, 634, 682, 156, 799],
        (3, 1000, 5): [793, 569, 540, 619, 891, 131, 608, 931, 35, 614],
        (2**40, 50000, 1): [3517, 3694, 44103, 41759, 40738, 28170, 16219, 15553, 13511, 22769],
    },
    "numpy": {
        (0, 10, 0): [4, 6, 2, 7, 3, 5, 9, 0, 8, 1],
        (0, 1000, 0): [459, 206, 222, 162, 711, 814, 350, 890, 518, 264],
        (3, 1000, 5): [695, 154, 772, 864, 276, 848, 946, 375, 721, 736],
        (2**40, 50000, 1): [33902, 20907, 7720, 35514, 36356, 6862, 40086, 20096, 1188, 8643],
    },
}


@pytest.mark.parametrize("method", FIRST)
def test_the_order_never_changes(method: str) -> None:
    for (seed, size, epoch), expected in FIRST[method].items():
        assert Order(seed, size, size, method).indices(epoch)[:10].tolist() == expected
        batches = Order(seed, size, 10, method)
        assert batches.indices(epoch * size // 10).tolist() == expected


def test_hash_is_the_default() -> None:
    assert Order(0, 10, 10).indices(0).tolist() == FIRST["hash"][0, 10, 0]


@pytest.mark.parametrize("method", FIRST)
@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_each_epoch_visits_each_example_exactly_once(
    size: int, batch_size: int, method: str
) -> None:
    order = Order(seed=3, size=size, batch_size=batch_size, method=method)
    epochs = 4
    steps = -(-epochs * size // batch_size)
    stream = np.concatenate([order.indices(step) for step in range(steps)])[: epochs * size]
    for epoch in stream.reshape(epochs, size):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    order = Order(seed=5, size=17, batch_size=6)
    forward = [order.indices(step) for step in range(40)]
    for step in np.random.default_rng(0).permutation(40).tolist():
        np.testing.assert_array_equal(order.indices(step), forward[step])
        np.testing.assert_array_equal(Order(5, 17, 6).indices(step), forward[step])


def test_a_step_far_ahead_needs_no_replay() -> None:
    order = Order(seed=0, size=50_000, batch_size=128)
    assert order.indices(10**12).shape == (128,)


def test_batches_are_int32_of_one_shape() -> None:
    order = Order(seed=1, size=7, batch_size=3)
    for step in range(10):
        batch = order.indices(step)
        assert batch.dtype == np.int32
        assert batch.shape == (3,)


def test_writing_to_a_batch_does_not_change_the_order() -> None:
    order = Order(seed=1, size=8, batch_size=4)
    expected = order.indices(0).copy()
    order.indices(0)[:] = 0
    np.testing.assert_array_equal(order.indices(0), expected)


def test_seeds_and_epochs_differ() -> None:
    orders = [Order(seed, 100, 100) for seed in (0, 1, 2)]
    batches = [order.indices(epoch) for order in orders for epoch in (0, 1)]
    for i, one in enumerate(batches):
        for other in batches[:i]:
            assert not np.array_equal(one, other)


def test_every_example_can_come_first() -> None:
    firsts = [Order(seed, 4, 1).indices(0)[0] for seed in range(200)]
    assert set(firsts) == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["seeds", "epochs"])
def test_every_example_is_at_every_place_equally_often(kind: str) -> None:
    size, count = 12, 3000
    if kind == "seeds":
        orders = [Order(seed, size, size).indices(0) for seed in range(count)]
    else:
        orders = [Order(0, size, size).indices(epoch) for epoch in range(count)]
    permutations = np.array(orders)
    expected = count / size
    for place in range(size):
        counts = np.bincount(permutations[:, place], minlength=size)
        # Chi-squared with 11 degrees of freedom: above 45 in 1 of 200,000 cases.
        assert ((counts - expected) ** 2 / expected).sum() < 45
    # Pairs of neighbours: 132 ordered ones; chi-squared five standard deviations above its mean.
    pairs = np.bincount(permutations[:, 0] * size + permutations[:, 1], minlength=size * size)
    pairs = pairs[pairs > 0]
    assert len(pairs) == size * (size - 1)
    assert ((pairs - count / 132) ** 2 / (count / 132)).sum() < 131 + 5 * np.sqrt(2 * 131)


def test_epochs_and_seeds_are_independent() -> None:
    size = 2000
    orders = [Order(seed, size, size).indices(epoch) for seed in range(5) for epoch in range(5)]
    correlations = np.corrcoef(orders) - np.eye(25)
    assert np.abs(correlations).max() < 5 / np.sqrt(size)
    same = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert np.mean(same) == pytest.approx(1, abs=5 / np.sqrt(len(same)))  # as of any two


@pytest.mark.parametrize(
    ("seed", "batch_size", "words"),
    [
        (0, 101, "train.batch_size=101 is larger than the 100 training examples; lower it to"),
        (0, 0, "train.batch_size=0 is empty; set it to at least 1"),
        (-1, 10, "seed=-1 is negative"),
    ],
)
def test_impossible_orders_are_refused(seed: int, batch_size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Order(seed, 100, batch_size)


def test_an_unknown_order_is_refused_before_any_batch() -> None:
    words = 'unknown data.order "has"; did you mean "hash"? The valid ones are hash, numpy'
    with pytest.raises(UserError, match=re.escape(words)):
        Order(0, 100, 10, "has")


@pytest.mark.parametrize(("size", "batch_size"), [*SIZES, (3, 8), (0, 4)])
def test_eval_covers_every_example_exactly_once(size: int, batch_size: int) -> None:
    indices, mask = eval_batches(size, batch_size)
    assert indices.dtype == np.int32
    assert mask.dtype == bool
    assert indices.shape == mask.shape == (-(-size // batch_size), batch_size)
    np.testing.assert_array_equal(indices[mask], np.arange(size))
    assert not indices[~mask].any()


@pytest.mark.parametrize(("examples", "count"), [(1, 1), (7, 7), (10, 10), (11, 10)])
def test_eval_covers_the_first_examples(examples: int, count: int) -> None:
    indices, mask = eval_batches(10, 4, examples)
    assert len(indices) == -(-count // 4)
    np.testing.assert_array_equal(indices[mask], np.arange(count))


@pytest.mark.parametrize(("batch_size", "examples"), [(0, None), (4, 0)])
def test_eval_refuses_to_evaluate_nothing(batch_size: int, examples: int | None) -> None:
    with pytest.raises(UserError, match="at least 1"):
        eval_batches(10, batch_size, examples)


@pytest.mark.parametrize("method", FIRST)
def test_the_config_chooses_the_order_of_a_run(method: str) -> None:
    config = load_config("configs/mlp.py:smoke", ["mesh.data=1", f"data.order={method}"])
    trainer = Trainer.from_config(config)
    size = trainer.intervals.batch_size
    batch = next(trainer.batches(3))["index"]
    dataset = load("digits")
    expected = Order(config.seed, dataset.train.size, size, method).indices(3)
    np.testing.assert_array_equal(batch, expected)
