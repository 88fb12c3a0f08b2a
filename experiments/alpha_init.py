"""Initial alphas from 0 to 1: which of them behave like 0 (protocol.md's A1)."""

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing
from experiments.published import WORDS
from experiments.results import ALPHA_AT_END, Curve, Results, Runs, gates_at_end, times_to
from experiments.statistics import between, decide, holds, quotients, together
from rezero_jax.analysis.theme import COLOURS

ZERO, RANGE = "alpha = 0", ("alpha = 0.001", "alpha = 0.01")  # "a range of small initial alphas"
ALIKE = 1.1  # up to this factor in the epochs, networks behave alike
TARGET = 1.2  # nats, of the training loss; at the paper's scale bits per byte
TOP = 2.5  # of the plot of curves
RATIO = "times those of alpha = 0"


def _time(scale: str) -> str:
    return "iterations to the target" if scale == "paper" else f"epochs to {TARGET}"


def measure(results: Results, runs: Runs) -> None:
    """The time to the target, also as multiples of that of alpha = 0, and where the gates end."""
    paper = results.scale == "paper"
    for setting, seeds in runs.items():
        times = times_to(seeds, "bits_per_byte" if paper else "loss", TARGET)
        results.add(setting, _time(results.scale), times)
        losses = [run.epoch_losses() for run in seeds]
        if setting != ZERO:
            zero = results.row(ZERO, _time(results.scale)).draws
            results.add(setting, RATIO, quotients(times, zero), log=True)
        if all(map(len, losses)):
            results.add(setting, "training loss of epoch 1", (float(loss[0]) for loss in losses))
        if all(run.lines for run in seeds):  # else a run diverged before it logged anything
            results.add(setting, ALPHA_AT_END, gates_at_end(seeds))
        bits = Curve.logged(seeds, "eval/bits_per_byte")
        results.curves[setting] = bits if paper else Curve.by_epoch(losses)
    conclude(results)


def conclude(results: Results) -> None:
    """The primary outcome, whether both ends of RANGE behave like 0, and a sentence for each."""
    ratios = [row for row in results.rows if row.metric == RATIO]
    ends = []
    for row, decision in zip(ratios, decide(ratios, 1 / ALIKE, ALIKE), strict=True):
        if row.setting in RANGE:
            ends.append(decision)
        word = "behaves like 0" if decision.verdict == "within" else decision.verdict
        corrected = f"; Holm-corrected {between(decision.interval)}" if decision.interval else ""
        results.remarks.append(f"{row.setting}: {word}; {row.shown} times{corrected}.")
    found = together([holds(end.verdict) for end in ends])
    intervals = [end.interval for end in ends if end.interval]
    hull = None
    if len(intervals) == len(RANGE):
        hull = (min(low for low, _ in intervals), max(high for _, high in intervals))
    numbers = " and ".join(setting.split()[-1] for setting in RANGE)
    results.claim(
        "A range of small initial alphas behaves like 0",
        "UAI 7",
        found,
        f"{WORDS[found]} in this setting; the interval spans the Holm-corrected ones of {numbers}",
        len(results.row(ZERO, _time(results.scale)).draws),
        interval=hull,
    )


def plot(results: Results) -> Figure:
    """The curves of each initial alpha, and the ratios of their times to that of 0."""
    figure, (left, right) = drawing.sheet_of(results, panels=2)
    for label, colour in drawing.colours(results.curves).items():
        drawn = results.curves[label]
        if min(drawn.y, default=np.inf) > TOP:  # its band alone would fill the panel
            label, drawn = f"{label} (above {TOP})", Curve([], [])
        drawing.line(left, drawn, label, colour)
    paper = results.scale == "paper"
    drawing.target(left, TARGET)
    loss = "bits per byte, validation" if paper else "training cross entropy (nats)"
    left.set(xlabel="iteration" if paper else "epoch", ylabel=loss)
    lowest = min(min(drawn.y, default=TARGET) for drawn in results.curves.values())
    left.set_ylim(min(lowest, TARGET) - 0.1, TOP)  # what exploded at first comes in from above
    drawing.legend(left)
    right.axhspan(1 / ALIKE, ALIKE, color=drawing.GREY, alpha=0.2, lw=0, label="behaves like 0")
    for row in (row for row in results.rows if row.metric == RATIO):
        alpha = float(row.setting.split()[-1])
        if row.mean is not None:
            right.plot(alpha, row.mean, "o", color=COLOURS[0])
        if interval := row.interval():
            right.plot([alpha] * 2, interval, color=COLOURS[0], lw=1.5)
    right.set(xscale="log", xlabel="initial alpha", ylabel=f"{_time(results.scale)}, {RATIO}")
    drawing.legend(right)
    return figure
