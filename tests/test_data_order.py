"""The order of examples: SplitMix64 as published, and every example exactly once an epoch."""

import numpy as np
import pytest

from rezero_jax.data import Order, eval_batches
from rezero_jax.data.order import SplitMix64
from rezero_jax.training.trainer import Trainer
from tests.families import config

KEYS = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (5, 7, 0x7E87), (2**64 - 1, 2**40)]
SIZES = [(12, 4), (12, 5), (10, 10), (7, 3), (1, 1), (1000, 999), (13, 1)]

# The first ten examples of an epoch, by (seed, size, epoch). A run resumes with another version of
# NumPy, or after years, only if these never change.
FIRST = {
    (0, 10, 0): [0, 7, 8, 2, 5, 9, 4, 6, 3, 1],
    (0, 1000, 0): [557, 424, 325, 817, 208, 477, 634, 682, 156, 799],
    (3, 1000, 5): [793, 569, 540, 619, 891, 131, 608, 931, 35, 614],
    (2**32 - 1, 50000, 1): [34839, 894, 20035, 7543, 25460, 47140, 18798, 23886, 21029, 30864],
}


def reference(key: tuple[int, ...], count: int) -> list[int]:
    """SplitMix64 as published, in Python's integers; its state is the last output of the key."""
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    state = 0
    for number in key:
        state = mix(state + gamma + number & mask)
    return [mix(state + i * gamma & mask) for i in range(1, count + 1)]


def test_bits_are_those_of_the_reference_however_they_are_asked_for():
    # The outputs of seed 0 in the tests of Java's SplittableRandom and of many others.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert SplitMix64().bits(4).tolist() == published
    for key in KEYS:
        expected = reference(key, 20)
        draws = SplitMix64(*key)
        assert [int(x) for count in (1, 2, 7, 10) for x in draws.bits(count)] == expected
        draws = SplitMix64(*key)
        assert draws.integers(1000, size=1).tolist() == [expected[0] % 1000]
        assert draws.integers(3, size=4).tolist() == [x % 3 for x in expected[1:5]]
        assert draws.uniform(0, 1) == (expected[5] >> 11) / 2**53
        assert draws.uniform(-2, 3) == -2 + 5 * ((expected[6] >> 11) / 2**53)
    assert len({tuple(SplitMix64(*key).bits(4).tolist()) for key in KEYS}) == len(KEYS)


def test_the_order_never_changes():
    for (seed, size, epoch), expected in FIRST.items():
        assert Order(seed, size, size).indices(epoch)[:10].tolist() == expected
        assert Order(seed, size, 10).indices(epoch * size // 10).tolist() == expected
    bits = reference((3, 4), 50)
    assert Order(3, 50, 50).indices(4).tolist() == sorted(range(50), key=bits.__getitem__)


@pytest.mark.guarantee("data order")
@pytest.mark.parametrize(("size", "batch_size"), SIZES)
def test_each_epoch_visits_each_example_exactly_once(size, batch_size):
    order = Order(seed=3, size=size, batch_size=batch_size)
    epochs = 4
    batches = [order.indices(step) for step in range(-(-epochs * size // batch_size))]
    assert {(str(batch.dtype), batch.shape) for batch in batches} == {("int32", (batch_size,))}
    stream = np.concatenate(batches)[: epochs * size].reshape(epochs, size)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(size), (epochs, 1)))


@pytest.mark.guarantee("data order")
def test_a_batch_is_a_function_of_seed_and_step_alone():
    order = Order(seed=5, size=17, batch_size=6)
    forward = [order.indices(step).copy() for step in range(40)]
    for step in np.random.default_rng(0).permutation(40).tolist():
        np.testing.assert_array_equal(order.indices(step), forward[step])
        np.testing.assert_array_equal(Order(5, 17, 6).indices(step), forward[step])
        order.indices(step)[:] = 0  # a batch may be overwritten
    assert Order(seed=0, size=50_000, batch_size=128).indices(10**12).shape == (128,)
    trainer = Trainer(config("mlp.py:smoke", **{"mesh.data": 1, "seed": 3}))
    np.testing.assert_array_equal(next(trainer.batches(5))["index"], Order(3, 1437, 50).indices(5))


def test_every_example_is_at_every_place_equally_often_over_seeds_and_over_epochs():
    size, count = 12, 3000

    def chi_squared(counts: np.ndarray) -> None:
        """Fails if the counts are five standard deviations less even than by chance."""
        free, expected = len(counts) - 1, count / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < free + 5 * np.sqrt(2 * free)

    for permutations in (
        np.array([Order(seed, size, size).indices(0) for seed in range(count)]),
        np.array([Order(0, size, size).indices(epoch) for epoch in range(count)]),
    ):
        for place in range(size):
            chi_squared(np.bincount(permutations[:, place], minlength=size))
        pairs = np.bincount(permutations[:, 0] * size + permutations[:, 1])
        assert len(pairs[pairs > 0]) == size * (size - 1)  # of different neighbours
        chi_squared(pairs[pairs > 0])


@pytest.mark.parametrize(("size", "batch_size"), [*SIZES, (3, 8), (0, 4)])
def test_eval_covers_every_example_exactly_once(size, batch_size):
    indices, mask = eval_batches(size, batch_size)
    assert (indices.dtype, mask.dtype) == (np.int32, bool)
    assert indices.shape == mask.shape == (-(-size // batch_size), batch_size)
    np.testing.assert_array_equal(indices[mask], np.arange(size))
    assert not indices[~mask].any()
    for examples in {1, max(size, 1), size + 1}:  # the first ones alone
        indices, mask = eval_batches(size, batch_size, examples)
        np.testing.assert_array_equal(indices[mask], np.arange(min(examples, size)))
        assert len(indices) == -(-min(examples, size) // batch_size)
