"""Figure 5: the training loss of 32 fully connected layers in four architectures."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing
from experiments.claims import Claim, bounded, shown
from experiments.jobs import CONTROL, FROZEN, Job
from experiments.published import curve, published
from experiments.results import Curve, Results, Row, find, times_to
from experiments.statistics import (
    between,
    decide,
    holds,
    mapped,
    quotients,
    together,
    verdict,
)
from rezero_jax.analysis.theme import plain_ticks
from rezero_jax.runs.reader import Run

RULES = {"FC": "plain", "FC + Norm": "norm", "FC + Res": "residual", "FC + ReZero": "rezero"}
OURS, PLAIN, RES = "FC + ReZero", "FC", "FC + Res"
BASELINES = tuple(setting for setting in RULES if setting != OURS)
CONTROL_EPOCHS = 50  # at most; ReZero needs about 21
PRIMARY = "0.1"  # the loss of the primary outcome, see protocol.md
FASTER = (7.0, 15.0)  # times, says the paper
TARGETS = ("1.2", "0.8", "0.4", "0.2", "0.1", "0.06")  # nats, as published.csv writes them
EPOCHS = (1, 2, 5, 10, 15, 20, 50, 100, 150, 200)
# The figure shows the loss of each epoch, so all else is logged and saved rarely.
WHOLE = (
    f"train.until_loss={TARGETS[-1]}",
    "eval.every_epochs=10",
    "checkpoint.every_steps=2500",
    "checkpoint.keep=1",
    "log.every_steps=100",
)


def runs(scale: str) -> list[Job]:
    """One of each architecture, and the control, whose depth of 1 makes no difference."""
    jobs = []
    for setting, rule in RULES.items():
        epochs = 300 if scale == "paper" else 21 if rule == "rezero" else 50
        size = f"depth=32,dataset=cifar10,epochs={epochs}"
        if scale == "smoke":
            size = "smoke,epochs=2"
        overrides = WHOLE if scale == "paper" else ()
        jobs.append(Job(setting, f"fc32-{rule}", f"mlp.py:residual={rule},{size}", overrides))
    ours = next(job for job in jobs if job.setting == OURS)
    short = (f"train.epochs={CONTROL_EPOCHS}",) if scale == "paper" else ()
    held = (*ours.overrides, *FROZEN, "model.depth=1", *short)
    return [*jobs, Job(CONTROL, "fc32-frozen", ours.config, held)]


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """Epochs to each loss, also as multiples of ReZero's, and the losses of some epochs."""
    make = partial(Row, reduced=scale == "smoke")
    summarised = PRIMARY if scale == "paper" else "1.2"
    losses = {setting: [run.epoch_losses() for run in seeds] for setting, seeds in runs.items()}
    rows = []
    for target in TARGETS:
        reached = {name: times_to(seeds, "loss", float(target)) for name, seeds in runs.items()}
        for setting, epochs in reached.items():
            rows.append(make(setting, f"epochs to {target}", epochs, target == summarised))
        for setting in (*BASELINES, CONTROL):
            times = quotients(reached[setting], reached[OURS])
            rows.append(make(setting, f"times ReZero's epochs to {target}", times, log=True))
    for setting, seeds in losses.items():
        for epoch in EPOCHS:
            if all(len(loss) >= epoch for loss in seeds):
                values = tuple(float(loss[epoch - 1]) for loss in seeds)
                rows.append(make(setting, f"loss of epoch {epoch}", values, log=True))
    control = bounded(
        "The ReZero net could not fit the data so fast without its layers (control)",
        "UAI 6",
        f"ln of the ratio of losses in ReZero's last epoch, {CONTROL} over ReZero",
        tuple(map(_log_ratio_at_end, losses[OURS], losses[CONTROL])),
        low=0,
        reduced=scale == "smoke",
    )
    claims = [*times_faster(rows, scale == "smoke"), control]
    curves = {setting: Curve.by_epoch(seeds) for setting, seeds in losses.items()}
    return Results("fc", scale, rows, claims, curves, secondary(rows))


def _log_ratio_at_end(ours: np.ndarray, control: np.ndarray) -> float:
    """ln(control / ours) in the last epoch of ours; NaN if the control ended before it."""
    end = len(ours) - 1
    return math.log(control[end] / ours[end]) if end < len(control) else math.nan


def _ratio(rows: Sequence[Row], setting: str, target: str) -> Row:
    return find(rows, setting, f"times ReZero's epochs to {target}")


def times_faster(rows: Sequence[Row], reduced: bool) -> list[Claim]:
    """The primary outcome of protocol.md's E1, Holm-corrected, its parts, and a secondary one."""
    ratios = {setting: _ratio(rows, setting, PRIMARY) for setting in BASELINES}
    decisions = decide(list(ratios.values()), *FASTER)
    n = len(find(rows, OURS, f"epochs to {PRIMARY}").draws)
    claims = [
        Claim(
            "ReZero fits the training data 7 to 15 times faster than its baselines",
            "UAI 6",
            together([holds(decision.verdict) for decision in decisions]),
            f"ratios of epochs to a loss of {PRIMARY}: {shown(ratios.items())}",
            n,
            reduced=reduced,
        )
    ]
    for (setting, ratio), decision in zip(ratios.items(), decisions, strict=True):
        corrected = decision.interval and f"; Holm-corrected {between(decision.interval)}"
        evidence = f"the ratio of epochs is {ratio.shown}{corrected or ''}"
        text = f"7 to 15 times faster than {setting}"
        word = holds(decision.verdict)
        claims.append(Claim(text, "UAI 6", word, evidence, n, ratio.interval(), reduced))
    res, plain = (find(rows, setting, f"epochs to {PRIMARY}").draws for setting in (RES, PLAIN))
    logs = mapped(math.log, quotients(res, plain))
    text = "A residual connection alone makes the net slower than the plain one (secondary)"
    quantity = f"ln of the ratio of epochs to {PRIMARY}, {RES} over {PLAIN}"
    return [*claims, bounded(text, "UAI 6", quantity, logs, low=0, reduced=reduced)]


def secondary(rows: Sequence[Row]) -> list[str]:
    """A sentence for each loss: uncorrected verdicts against 7 to 15, and the control's ratio."""
    sentences = []
    for target in TARGETS:
        parts, theirs_inside = [], []
        for setting in BASELINES:
            ratio = _ratio(rows, setting, target)
            interval = ratio.interval()
            word = verdict(interval, *FASTER) if interval else ratio.shown
            parts.append(f"{setting} {word}")
            theirs = published("fc")[setting, ratio.metric].value or 0
            if interval and interval[0] <= theirs <= interval[1]:
                theirs_inside.append(setting)
        sentences.append(
            f"Ratios to {target} against 7 to 15: {', '.join(parts)}. {CONTROL.capitalize()}: "
            f"{_ratio(rows, CONTROL, target).shown}. Our interval holds the figure's ratio for "
            f"{', '.join(theirs_inside) or 'none'}."
        )
    return sentences


def plot(results: Results) -> Figure:
    """The losses by epoch, and the epochs to each loss with their intervals.

    Except in the smoke test, crosses show the paper's numbers.
    """
    figure, (axis,) = drawing.sheet_of(results)
    reached = [row for row in results.rows if row.metric.startswith("epochs to") and row.mean]
    ends = [x for drawn in results.curves.values() for x in drawn.x]
    ends += [interval[1] for row in reached if (interval := row.interval())]
    crossed = False
    for setting, colour in drawing.colours(results.curves).items():
        drawing.line(axis, results.curves[setting]._replace(half=None), setting, colour)
        for row in reached:
            if row.setting == setting and row.mean and (interval := row.interval()):
                target = float(row.metric.removeprefix("epochs to "))
                axis.plot(interval, [target] * 2, color=colour, lw=1)
                axis.plot(row.mean, target, "o", color=colour, markersize=3)
        if results.scale != "smoke":
            read_off = curve("fc", setting, "loss of epoch")
            read_off += [(x, y) for y, x in curve("fc", setting, "epochs to")]
            crossed |= drawing.crosses(axis, read_off, colour, until=max(ends))
    axis.set(xlabel="epoch", ylabel="training cross entropy (nats)", yscale="log")
    lowest = min(y for drawn in results.curves.values() for y in drawn.y)
    axis.set_ylim(min(lowest, float(TARGETS[-1])) / 1.2, 4)  # what exploded comes in from above
    plain_ticks(axis)
    axis.legend(title="lines ours, crosses digitised from the paper" if crossed else None)
    return figure
