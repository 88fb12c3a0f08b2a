"""Initial alphas from 0 to 1: which of them behave like 0 (protocol.md's A1)."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import drawing
from experiments.claims import WORDS, Claim, fact, together
from experiments.jobs import Job
from experiments.ratios import Decision, Ratio, between, decide, quotients
from experiments.results import Curve, Results, Row
from rezero_jax.analysis.plots.theme import COLOURS
from rezero_jax.runs.reader import Run

TITLE = "ReZero networks by their initial alpha"
SOURCE = "UAI section 5"
SEEDS = 1
SETTING = {
    "paper": "Transformers of 12 layers on enwik8 as in Figure 7, to 1.2 bits per byte.",
    "cpu": "Reduced, another network: 32 fully connected layers on CIFAR-10 as in Figure 5, to a "
    "training loss of 1.2, at most 8 epochs.",
    "smoke": "Reduced: 4 layers of width 8 on scikit-learn's digits, 2 epochs.",
}

ALPHAS = {"paper": (0, 0.001, 0.01, 0.03, 0.1, 0.3, 1), "smoke": (0, 0.01, 1)}
ALPHAS["cpu"] = ALPHAS["paper"]
RANGE = (0.001, 0.01)  # what "a range of small initial alphas" is taken to be
ALIKE = 1.1  # times as many epochs, or as few, still behave alike
TARGET = 1.2  # nats, of the training loss; at the paper's scale bits per byte
QUANTITY = {
    "paper": "iterations to the target",
    "cpu": f"epochs to {TARGET}",
    "smoke": f"epochs to {TARGET}",
}
TOP = 2.5  # of the plot of curves
RATIO = "times those of alpha = 0"
SHORT = (
    f"train.until_loss={TARGET}",
    "eval.every_epochs=None",
    "checkpoint.every_steps=2500",
    "checkpoint.keep=1",
    "log.every_steps=100",
)
VERDICTS = {True: "behaves like 0", False: "behaves otherwise", None: "is undecided"}
NOTES = (
    "The paper names no values. What behaves alike is decided by part A1 of "
    "experiments/protocol.md, which is older than the first run. Bars are 95 % intervals of each "
    "ratio alone; the verdicts are Holm-corrected.",
)


def name(alpha: float) -> str:
    """What the report calls an initial alpha."""
    return f"alpha = {alpha:g}"


def runs(scale: str) -> list[Job]:
    """One of each initial alpha."""
    jobs = []
    for alpha in ALPHAS[scale]:
        if scale == "paper":  # those of transformer12
            start, suffix = (
                (f",alpha_init={alpha:g}", f"-alpha_init{alpha:g}") if alpha else ("",) * 2
            )
            config = f"transformer_enwik8.py:layers=12,residual=rezero{start}"
            jobs.append(Job(name(alpha), f"transformer12-rezero{suffix}", config, test=True))
            continue
        size = "depth=32,dataset=cifar10,epochs=8" if scale == "cpu" else "smoke,epochs=2"
        overrides = (f"model.alpha_init={alpha:g}", *(SHORT if scale == "cpu" else ()))
        jobs.append(Job(name(alpha), f"fc-alpha{alpha:g}", f"mlp.py:{size}", overrides))
    return jobs


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """The time to the target, also as multiples of that of alpha = 0, and where the gates end."""
    metric, key = ("bits_per_byte", "eval/bits_per_byte") if scale == "paper" else ("loss", "")
    make = partial(Row, reduced=scale != "paper")
    rows, curves, ratios = [], {}, []
    times = {s: tuple(run.time_to(metric, TARGET) for run in seeds) for s, seeds in runs.items()}
    for setting, seeds in runs.items():
        lost = all(run.diverged for run in seeds)
        word = "diverged" if lost else "not reached"
        shown = setting in map(name, (0, *RANGE))
        rows.append(make(setting, QUANTITY[scale], times[setting], shown, missing=word))
        if setting != name(0):
            caps = [_cap(run, scale) for run in seeds]
            ratios.append(Ratio.of_pairs(times[setting], times[name(0)], caps))
            multiples = quotients(times[setting], times[name(0)])
            rows.append(make(setting, RATIO, multiples, missing=word, is_geometric=True))
        if all(len(run.epoch_losses()) for run in seeds):
            first = tuple(float(run.epoch_losses()[0]) for run in seeds)
            rows.append(make(setting, "training loss of epoch 1", first))
        if all(run.lines for run in seeds):  # else one diverged before it logged anything
            ends = tuple(float(np.abs(run.alphas()[1][-1]).mean()) for run in seeds)
            rows.append(make(setting, "mean |alpha| at the end", ends))
        if key:
            curves[setting] = Curve.of_runs([run.series(key) for run in seeds])
        else:
            curves[setting] = Curve.by_epoch([run.epoch_losses() for run in seeds])
    others = [alpha for alpha in ALPHAS[scale] if alpha]
    decisions = dict(zip(others, decide(ratios, 1 / ALIKE, ALIKE), strict=True))
    claim = _claim(decisions, len(runs[name(0)]), scale != "paper")
    remarks = [_remark(*one) for one in zip(others, ratios, decisions.values(), strict=True)]
    return Results("alpha_init", scale, rows, [claim], curves, remarks)


def _cap(run: Run, scale: str) -> float:
    """The longest time that a run had, in the unit of its time to the target."""
    return run.final()["steps"] if scale == "paper" else run.config["train.epochs"]


def _claim(decisions: Mapping[float, Decision], n: int, reduced: bool) -> Claim:
    """The primary outcome: whether both ends of RANGE behave like 0."""
    ends = [decisions[alpha] for alpha in RANGE if alpha in decisions]
    holds = together([decision.holds for decision in ends])
    found = fact(
        "A range of small initial alphas behaves like 0",
        "UAI 7",
        holds,
        f"in this setting {WORDS[holds]}; the interval holds those of the ratios of "
        f"{' and '.join(map(str, RANGE))}, Holm-corrected",
        n=n,
        reduced=reduced,
    )
    intervals = [decision.corrected for decision in ends if decision.corrected]
    if len(intervals) < len(RANGE):
        return found
    low, high = zip(*intervals, strict=True)
    return found._replace(interval=(min(low), max(high)))


def _remark(alpha: float, ratio: Ratio | None, decision: Decision) -> str:
    shown = "no ratio, as alpha = 0 did not arrive" if ratio is None else f"{ratio.shown} times"
    corrected = f"; corrected {between(decision.corrected)}" if decision.corrected else ""
    return f"{name(alpha)} {VERDICTS[decision.holds]}: {shown}{corrected}."


def plot(results: Results) -> Figure:
    """The curves of each initial alpha, and the ratios of their times to that of 0."""
    setting = SETTING[results.scale]
    figure, (left, right) = drawing.sheet(TITLE, results.scale, setting, panels=2)
    for label, colour in drawing.colours(results.curves).items():
        drawn = results.curves[label]
        if min(drawn.y, default=np.inf) > TOP:  # its band alone would fill the panel
            label, drawn = f"{label} (above {TOP})", Curve([], [])
        drawing.line(left, drawn, label, colour)
    paper = results.scale == "paper"
    left.axhline(TARGET, color="#888888", lw=0.8, ls=":")
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
    axis.axhspan(1 / ALIKE, ALIKE, color="#888888", alpha=0.2, lw=0, label="behaves like 0")
    for row in (row for row in results.rows if row.quantity == RATIO):
        alpha = float(row.setting.split()[-1])
        if row.mean is not None:
            axis.plot(alpha, row.mean, "o", color=COLOURS[0])
        if row.interval is not None:
            axis.plot([alpha] * 2, row.interval, color=COLOURS[0], lw=1.5)
    axis.set(xscale="log", xlabel="initial alpha", ylabel=f"{QUANTITY[results.scale]}, {RATIO}")
    axis.legend(fontsize=7)
