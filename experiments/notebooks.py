"""Whether the one run that a notebook printed could be one more run of ours (protocol.md, N1)."""

from collections.abc import Sequence

from experiments.claims import LEVEL, Claim, fact, together
from experiments.published import Published, published
from experiments.ratios import between
from experiments.results import Row


def one_more_run(
    text: str, experiment: str, rows: Sequence[Row], judged: int, reduced: bool
) -> Claim:
    """The claim that the notebook's number of every row lies where we expect one more run of ours.

    It holds if each lies in the row's prediction interval of 95 %, and does not if one lies outside
    of that of confidence 1 - 0.05 / judged.

    Args:
      rows: not empty, each with a number in published.csv.
      judged: how many numbers all such claims of the experiment judge.
    """
    found = published(experiment)
    verdicts, outside = list[bool | None](), list[str]()
    widths = list[tuple[float, tuple[float, float]]]()
    for row in rows:
        paper = found[row.setting, row.quantity]
        interval, wider = row.prediction(), row.prediction(LEVEL / judged)
        if interval is None or wider is None:
            verdicts.append(None)
            continue
        low, high = interval
        widths.append((high / low if row.is_geometric else high - low, interval))
        held = lies_in(interval, paper)
        verdicts.append(held or (None if lies_in(wider, paper) else False))
        if not held:
            outside.append(row.quantity)
    evidence = "there are not two runs with every number"
    if widths:
        evidence = (
            f"outside of the interval for one more run of ours: {', '.join(outside) or 'none'}; "
            f"the widest of them is {between(max(widths)[1])}"
        )
    source, n = found[rows[0].setting, rows[0].quantity].source, len(rows[0].ours)
    return fact(text, source, together(verdicts), evidence, n=n, reduced=reduced)


def lies_in(interval: tuple[float, float], paper: Published) -> bool:
    """Whether a number that rounds to a printed one lies in an interval."""
    if paper.value is None:
        return False
    half = 0.5 * 10 ** -len(paper.text.partition(".")[2])
    return interval[0] <= paper.value + half and paper.value - half <= interval[1]
