"""Random numbers of a key: those of SplitMix64 in plain Python, spread evenly, and never others."""

import re
import time

import numpy as np
import pytest

from rezero_jax.data.generator import SplitMix64, generator
from rezero_jax.errors import UserError

KEYS = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (5, 7, 0x7E87), (2**64 - 1, 2**40)]


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


def test_published_outputs() -> None:
    # Of seed 0, as in the tests of Java's SplittableRandom and of many others.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert SplitMix64().bits(4).tolist() == expected


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_bits_are_those_of_the_reference_however_they_are_asked_for(key: tuple[int, ...]) -> None:
    expected = reference(key, 20)
    assert SplitMix64(*key).bits(20).tolist() == expected
    draws = SplitMix64(*key)
    assert [int(x) for count in (1, 2, 7, 10) for x in draws.bits(count)] == expected
    draws = SplitMix64(*key)
    assert draws.integers(1000, size=1).tolist() == [expected[0] % 1000]
    assert draws.integers(3, size=4).tolist() == [x % 3 for x in expected[1:5]]
    assert draws.uniform(0, 1) == (expected[5] >> 11) / 2**53
    assert draws.uniform(-2, 3) == -2 + 5 * ((expected[6] >> 11) / 2**53)


def test_permutations_are_the_ranks_of_the_bits() -> None:
    bits = reference((3, 4), 50)
    assert SplitMix64(3, 4).permutation(50).tolist() == sorted(range(50), key=bits.__getitem__)


def test_every_number_of_a_key_and_its_place_count() -> None:
    firsts = [tuple(SplitMix64(*key).bits(4).tolist()) for key in KEYS]
    assert len(set(firsts)) == len(KEYS)


def test_uniform_numbers_are_spread_evenly_and_stay_within_their_bounds() -> None:
    draws = SplitMix64(1, 2)
    values = np.array([draws.uniform(0.08, 1) for _ in range(4000)])
    assert values.min() >= 0.08
    assert values.max() < 1
    rank = (np.sort(values) - 0.08) / 0.92
    # Kolmogorov-Smirnov; 2.3 / sqrt(N) is exceeded by chance once in 20,000.
    assert np.abs(rank - (np.arange(4000) + 0.5) / 4000).max() < 2.3 / np.sqrt(4000)


@pytest.mark.parametrize("high", [2, 7, 81])
def test_integers_are_equally_likely_within_a_key_and_from_key_to_key(high: int) -> None:
    n = 40_000
    within = SplitMix64(9).integers(high, size=n)
    across = np.concatenate([SplitMix64(9, i).integers(high, size=1) for i in range(n // 10)])
    for values in (within, across):
        expected = len(values) / high
        counts = np.bincount(values, minlength=high)
        assert len(counts) == high
        # Chi-squared: five standard deviations above its mean.
        limit = high - 1 + 5 * np.sqrt(2 * (high - 1))
        assert ((counts - expected) ** 2 / expected).sum() < limit


def test_imagenet_is_shuffled_in_well_under_a_second() -> None:
    SplitMix64(0).permutation(1_281_167)
    started = time.process_time()
    SplitMix64(1).permutation(1_281_167)
    assert time.process_time() - started < 1


def test_an_unknown_method_is_refused() -> None:
    assert isinstance(generator("hash", 1), SplitMix64)
    assert isinstance(generator("numpy", 1), np.random.Generator)
    words = 'unknown data.order "nunpy"; did you mean "numpy"? The valid ones are hash, numpy'
    with pytest.raises(UserError, match=re.escape(words)):
        generator("nunpy", 1)
