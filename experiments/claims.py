"""Claims of the paper and what our runs say about them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from experiments.published import Published, published
from experiments.statistics import (
    LEVEL,
    NOT_SIGNIFICANT,
    Draw,
    Draws,
    Interval,
    Sample,
    between,
    holds,
    together,
    verdict,
)
from rezero_jax.formatting import number

STATUSES = ("replicated", "compatible", "contradicted", NOT_SIGNIFICANT, "not tested")
WORDS = {True: "supported", False: "contradicted", None: NOT_SIGNIFICANT}
# An interval for one more run whose ends are further apart than this factor hardly tests a claim.
INFORMATIVE = 2.5


class Claim(NamedTuple):
    """A sentence of the paper and the evidence for it.

    Attributes:
      holds: what our runs say; None if that is not significant.
      n: the runs, pairs of runs or networks behind the claim.
      interval: of the quantity in `evidence`; None for a single run or an exact result.
      reduced: whether our setting is smaller than the paper's and so tests nothing about it.
      weak: whether the claim could hardly have failed.
    """

    text: str
    source: str
    holds: bool | None
    evidence: str
    n: int = 1
    interval: Interval | None = None
    reduced: bool = False
    weak: bool = False

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> "Claim":
        """The claim whose fields a result file holds."""
        ends = fields["interval"]
        return cls(**fields | {"interval": (ends[0], ends[1]) if ends else None})

    @property
    def status(self) -> str:
        """One of STATUSES."""
        if self.reduced:
            return "not tested"
        if not self.holds:
            return NOT_SIGNIFICANT if self.holds is None else "contradicted"
        return "compatible" if self.weak else "replicated"


def bounded(
    text: str,
    source: str,
    quantity: str,
    draws: Sequence[Draw],
    low: float = -math.inf,
    high: float = math.inf,
    *,
    reduced: bool = False,
) -> Claim:
    """The claim that the mean of a quantity lies between `low` and `high`, by its 95 % interval."""
    sample, n = Sample(draws), len(draws)
    interval = sample.interval()
    evidence = f"{quantity}: {number(sample.mean) if sample.mean is not None else sample.shown}"
    if n == 1 and sample.mean is not None:
        evidence += " in a single run"
    word = verdict(interval, low, high)
    return Claim(text, source, holds(word), evidence, n, interval, reduced)


def one_more_run(
    text: str, experiment: str, rows: Sequence[Any], tests: int, *, reduced: bool
) -> Claim:
    """The claim that the one run of a notebook could be one more run of ours.

    The claim holds if each printed number lies in the 95 % prediction interval of its row, and is
    contradicted if one lies outside the interval of confidence 1 - LEVEL / tests.

    Args:
      rows: results.Row, not empty, each with a number in published.csv.
      tests: how many numbers all such claims of the experiment test.
    """
    theirs = published(experiment)
    parts, outside = list[bool | None](), list[str]()
    widths = list[tuple[float, Interval]]()
    for row in rows:
        paper, interval = theirs[row.setting, row.metric], row.prediction()
        if interval is None:
            parts.append(None)
            continue
        widths.append((interval[1] / interval[0] if interval[0] > 0 else math.inf, interval))
        inside = lies_in(interval, paper)
        parts.append(inside or (None if lies_in(row.prediction(LEVEL / tests), paper) else False))
        if not inside:
            outside.append(row.metric)
    evidence = "fewer than two runs have every number"
    if widths:
        evidence = (
            f"{', '.join(outside)} outside" if outside else "all numbers inside"
        ) + f" our 95 % prediction intervals (widest: {between(max(widths)[1])})"
    source, n = theirs[rows[0].setting, rows[0].metric].source, len(rows[0].draws)
    weak = bool(widths) and max(widths)[0] > INFORMATIVE
    return Claim(text, source, together(parts), evidence, n, reduced=reduced, weak=weak)


def lies_in(interval: Interval, paper: Published) -> bool:
    """Whether an interval holds a number that rounds to the printed one."""
    if paper.value is None:
        return False
    half = 0.5 * 10 ** -len(paper.text.partition(".")[2])
    return interval[0] <= paper.value + half and paper.value - half <= interval[1]


def all_or_none(count: int, n: int) -> bool | None:
    """Whether something happened in all n runs; None if it did in some of them."""
    return None if 0 < count < n else count == n


def quoted(values: Iterable[Draw]) -> str:
    """The numbers, separated by commas."""
    return ", ".join("none" if value is None else number(value) for value in values)


def shown(samples: Iterable[tuple[str, Draws]]) -> str:
    """Named samples as "FC 8.5 (7.4 to 10), FC + Norm 6.6 (5.5 to 7.9)"."""
    return ", ".join(f"{name} {sample.shown}" for name, sample in samples)
