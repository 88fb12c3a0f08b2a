"""Initial alphas from 0 to 1: which of them behave like 0 (protocol.md's A1)."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import drawing
from experiments.claims import WORDS, Claim
from experiments.jobs import Job
from experiments.results import (
    Curve,
    Results,
    Row,
    find,
    gates_at_end,
    times_to,
    training_curve,
)
from experiments.statistics import between, decide, holds, quotients, together
from rezero_jax.analysis.theme import COLOURS
from rezero_jax.runs.reader import Run

ALPHAS = {
    "paper": (0, 0.001, 0.01, 0.03, 0.1, 0.3, 1),
    "cpu": (0, 0.001, 0.01, 0.03, 0.1, 0.3, 1),
    "smoke": (0, 0.01, 1),
}
RANGE = (0.001, 0.01)  # what "a range of small initial alphas" is taken to be
ALIKE = 1.1  # up to this factor in the epochs, networks behave alike
TARGET = 1.2  # nats, of the training loss; at the paper's scale bits per byte
TIME = {"paper": "iterations to the target"} | dict.fromkeys(
    ("cpu", "smoke"), f"epochs to {TARGET}"
)
TOP = 2.5  # of the plot of curves
RATIO = "times those of alpha = 0"
SHORT = (
    f"train.until_loss={TARGET}",
    "eval.every_epochs=None",
    "checkpoint.every_steps=2500",
    "checkpoint.keep=1",
    "log.every_steps=100",
)


def name(alpha: float) -> str:
    """The setting of an initial alpha."""
    return f"alpha = {alpha:g}"


def runs(scale: str) -> list[Job]:
    """One of each initial alpha; at the paper's scale the runs of transformer12."""
    jobs = []
    for alpha in ALPHAS[scale]:
        if scale == "paper":
            start = f",alpha_init={alpha:g}" if alpha else ""
            config = f"transformer_enwik8.py:layers=12,residual=rezero{start}"
            run = f"transformer12-rezero{start.replace(',', '-').replace('=', '')}"
            jobs.append(Job(name(alpha), run, config, test=True))
            continue
        size = "depth=32,dataset=cifar10,epochs=8" if scale == "cpu" else "smoke,epochs=2"
        overrides = (f"model.alpha_init={alpha:g}", *(SHORT if scale == "cpu" else ()))
        jobs.append(Job(name(alpha), f"fc-alpha{alpha:g}", f"mlp.py:{size}", overrides))
    return jobs


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """The time to the target, also as multiples of that of alpha = 0, and where the gates end."""
    metric = "bits_per_byte" if scale == "paper" else "loss"
    make = partial(Row, reduced=scale != "paper")
    rows, curves = [], {}
    times = {setting: times_to(seeds, metric, TARGET) for setting, seeds in runs.items()}
    for setting, seeds in runs.items():
        rows.append(make(setting, TIME[scale], times[setting], setting in map(name, (0, *RANGE))))
        if setting != name(0):
            rows.append(make(setting, RATIO, quotients(times[setting], times[name(0)]), log=True))
        if all(len(run.epoch_losses()) for run in seeds):
            first = tuple(float(run.epoch_losses()[0]) for run in seeds)
            rows.append(make(setting, "training loss of epoch 1", first))
        if all(run.lines for run in seeds):  # else a run diverged before it logged anything
            rows.append(make(setting, "mean |alpha| at the end", gates_at_end(seeds)))
        curves[setting] = (
            training_curve(seeds, "eval/bits_per_byte")
            if scale == "paper"
            else Curve.by_epoch([run.epoch_losses() for run in seeds])
        )
    claim, remarks = conclude(rows, reduced=scale != "paper")
    return Results("alpha_init", scale, rows, [claim], curves, remarks)


def conclude(rows: Sequence[Row], *, reduced: bool) -> tuple[Claim, list[str]]:
    """The primary outcome, whether both ends of RANGE behave like 0, and a sentence for each."""
    ratios = [row for row in rows if row.metric == RATIO]
    decisions = decide(ratios, 1 / ALIKE, ALIKE)
    ends, remarks = [], []
    for row, decision in zip(ratios, decisions, strict=True):
        if row.setting in map(name, RANGE):
            ends.append(decision)
        word = "behaves like 0" if decision.verdict == "within" else decision.verdict
        corrected = f"; Holm-corrected {between(decision.interval)}" if decision.interval else ""
        remarks.append(f"{row.setting}: {word}; {row.shown} times{corrected}.")
    holding = together([holds(end.verdict) for end in ends])
    intervals = [end.interval for end in ends if end.interval]
    hull = None
    if len(intervals) == len(RANGE):
        hull = (min(low for low, _ in intervals), max(high for _, high in intervals))
    claim = Claim(
        "A range of small initial alphas behaves like 0",
        "UAI 7",
        holding,
        f"{WORDS[holding]} in this setting; the interval spans the Holm-corrected ones of "
        f"{' and '.join(map(str, RANGE))}",
        len(find(rows, name(0), rows[0].metric).draws),
        hull,
        reduced,
    )
    return claim, remarks


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
    left.set(
        xlabel="iteration" if paper else "epoch",
        ylabel="bits per byte, validation" if paper else "training cross entropy (nats)",
    )
    lowest = min(min(drawn.y, default=TARGET) for drawn in results.curves.values())
    left.set_ylim(min(lowest, TARGET) - 0.1, TOP)  # what exploded at first comes in from above
    left.legend(fontsize=7)
    _plot_ratios(right, results)
    return figure


def _plot_ratios(axis: Axes, results: Results) -> None:
    axis.axhspan(1 / ALIKE, ALIKE, color=drawing.GREY, alpha=0.2, lw=0, label="behaves like 0")
    for row in (row for row in results.rows if row.metric == RATIO):
        alpha = float(row.setting.split()[-1])
        if row.mean is not None:
            axis.plot(alpha, row.mean, "o", color=COLOURS[0])
        if interval := row.interval():
            axis.plot([alpha] * 2, interval, color=COLOURS[0], lw=1.5)
    axis.set(xscale="log", xlabel="initial alpha", ylabel=f"{TIME[results.scale]}, {RATIO}")
    axis.legend(fontsize=7)
