"""Claims of the paper, and their statuses, which confidence intervals decide."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rezero_jax.analysis.statistics import Estimate
from rezero_jax.formatting import number

STATUSES = ("replicated", "consistent", "undecided", "contradicted")
WORDS = {True: "supported", False: "contradicted", None: "undecided"}  # of a reduced setting
LEVEL = 0.05  # 1 - the confidence of an interval


class Claim(NamedTuple):
    """A sentence of the paper and what our runs say of it.

    Attributes:
      status: one of STATUSES, see `status`.
      n: the runs, pairs of runs or networks behind it.
      interval: of the quantity in `evidence`; None where n is 1 or the result is exact.
    """

    text: str
    source: str
    status: str
    evidence: str
    n: int
    interval: tuple[float, float] | None = None


def status(holds: bool | None, *, reduced: bool, whole: bool) -> str:
    """The word for a claim that holds, does not, or is left open (None).

    Args:
      reduced: our setting is smaller than the paper's, so that it decides nothing about the paper.
      whole: there are as many runs as in the paper, and none was cut short.
    """
    if reduced or holds is None:
        return "undecided"
    if not holds:
        return "contradicted"
    return "replicated" if whole else "consistent"


def fact(
    text: str,
    source: str,
    holds: bool | None,
    evidence: str,
    *,
    n: int = 1,
    reduced: bool = False,
    whole: bool = True,
) -> Claim:
    """A claim that is decided without an interval: an exact result, or whether runs diverge."""
    return Claim(text, source, status(holds, reduced=reduced, whole=whole), evidence, n)


def bounded(
    text: str,
    source: str,
    quantity: str,
    draws: Sequence[float | None],
    low: float = -np.inf,
    high: float = np.inf,
    *,
    reduced: bool = False,
    seeds: int = 1,
) -> Claim:
    """The claim that the mean of a quantity lies between `low` and `high`.

    It holds if the whole 95 % interval lies between them, does not if the whole interval lies
    outside, and is undecided else, with a single draw or a missing one.

    Args:
      draws: of each run or pair; None where it has no number.
      seeds: the paper's runs, of which fewer are "consistent" at best.
    """
    estimate = Estimate.of_all(draws)
    n = len(draws)
    if estimate is None:
        return Claim(text, source, "undecided", f"{quantity}: missing in some runs", n)
    evidence = f"{quantity}: {number(estimate.mean)}"
    if n < 2:
        return Claim(text, source, "undecided", f"{evidence}, in a single run", n)
    interval = estimate.interval(1 - LEVEL)
    decided = status(inside(interval, low, high), reduced=reduced, whole=n >= seeds)
    return Claim(text, source, decided, evidence, n, interval)


def inside(interval: tuple[float, float], low: float, high: float) -> bool | None:
    """Whether a whole interval lies in [low, high]; None if it does only in part."""
    if low <= interval[0] and interval[1] <= high:
        return True
    return False if interval[1] < low or high < interval[0] else None


def paired(one: Sequence[float | None], other: Sequence[float | None]) -> tuple[float | None, ...]:
    """one - other of each pair of runs; None where one has no number."""
    return tuple(None if a is None or b is None else a - b for a, b in zip(one, other, strict=True))


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[tuple[float, bool]]:
    """Holm's step-down procedure (1979) over m tests.

    Returns:
      Of each, the level it is compared with, which is level / (m + 1 - k) for the k-th smallest
      p-value, and whether it is decided: all up to it are at or below their levels.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, decided = {}, True
    for rank, test in enumerate(order):
        compared = level / (len(order) - rank)
        decided = decided and p_values[test] <= compared
        found[test] = (compared, decided)
    return [found[test] for test in range(len(order))]


def together(verdicts: Sequence[bool | None]) -> bool | None:
    """Of a claim of several parts: False if one part is, True if all are, else None."""
    if False in verdicts:
        return False
    return True if verdicts and None not in verdicts else None
