"""The paper's own numbers in published.csv, and their sources."""

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rezero_jax.formatting import number

# The marks of published.csv; a number after UAI or SUP is a page of the PDF.
SOURCES = {
    "UAI": "Bachlechner et al., ReZero is All You Need, UAI 2021 (PMLR 161:1352-1361)",
    "SUP": "its supplement",
    "ARX": "its version 2 on arXiv (2003.04887), where that differs",
    "DIG": "read off the figure in that PDF, to about 1 % of the axis; not printed",
    "derived": "arithmetic from its printed or digitised numbers, or from its sizes",
    "NB-FC": "the authors' fully connected notebook (github.com/tbachlechner/ReZero-examples)",
    "NB-RN": "the authors' ResNet notebook (the same)",
    "NB-TX": "the authors' Transformer notebook (the same)",
    "NB-SC": "the authors' log (github.com/tbachlechner/ReZero-Superconvergence)",
    "FIX": "the authors' log of the baseline (github.com/tbachlechner/Fixup)",
}
MARKS = {  # of what the paper does not print; "DIG" may follow "derived"
    "DIG": "digitised",
    "derived": "derived",
    "NB-FC": "notebook",
    "NB-RN": "notebook",
    "NB-TX": "notebook",
    "NB-SC": "log",
    "FIX": "log",
}
# Settings that no experiment of ours has: results that the paper copies from others, and two curves
# whose labels do not fit its own table.
ONLY_THEIRS = ("Char-TX", "the curve labelled")


class Published(NamedTuple):
    """A number of the paper.

    Attributes:
      value: None where the paper has a word, such as "diverged".
      text: as written in published.csv.
      error: the standard error, if given; half of a bin for a number read off a histogram.
      source: a key of SOURCES and a place, after "derived" perhaps a second one.
    """

    value: float | None
    text: str
    error: float | None
    source: str

    @property
    def shown(self) -> str:
        """The number as "31 ± 1 (notebook)", or the word; unmarked if the paper prints it."""
        error = f" ± {number(self.error, 2)}" if self.error is not None else ""
        text = self.text if self.value is None else number(self.value) + error
        marks = ", ".join(MARKS[word] for word in self.source.split() if word in MARKS)
        return f"{text} ({marks})" if marks else text


@cache
def published(experiment: str) -> dict[tuple[str, str], Published]:
    """(setting, metric) -> number, of one experiment, in the paper's order."""
    text = Path(__file__).with_name("published.csv").read_text()
    return {
        (row["setting"], row["quantity"]): Published(
            _float(row["value"]), row["value"], _float(row["error"]), row["source"]
        )
        for row in csv.DictReader(text.splitlines())
        if row["experiment"] == experiment
    }


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def curve(experiment: str, setting: str, prefix: str) -> list[tuple[float, float]]:
    """The values of a setting whose metric is `prefix` followed by a number x, as (x, value).

    For example, curve("fc", "FC", "loss of epoch") is [(50, 0.76), (100, 0.25), (150, 0.096)].
    """
    points = []
    for (of, metric), paper in published(experiment).items():
        if of == setting and metric.startswith(prefix) and paper.value is not None:
            points.append((float(metric.removeprefix(prefix).split()[0]), paper.value))
    return sorted(points)
